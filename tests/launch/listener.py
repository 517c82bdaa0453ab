"""A supervisor's links as a program: connects as the place in its argument (JSON), then prints what it hears."""

from __future__ import annotations

import json
import select
import signal
import sys

from hypershard.launch.hosts import Wait
from hypershard.launch.links import open_links
from hypershard.launch.surroundings import NodePlace

SILENT_SECONDS = 4


def main() -> None:
    signal.alarm(60)
    place = NodePlace(**json.loads(sys.argv[1]))
    links = open_links(place, wait=Wait(30.0, is_stopped=lambda: False), silent_seconds=SILENT_SECONDS)
    print("connected", flush=True)
    ready, _, _ = select.select(links.sockets(), [], [])
    for note in (note for one in ready for note in links.read(one)):
        print(f"{note.kind} {note.host}: {note.text}")


if __name__ == "__main__":
    main()
