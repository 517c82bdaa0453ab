"""What torchrun or srun is on a node: starts this node's ranks, notes how each one ended, and outlives them.

Standard library only. Every line of standard input starts ranks once more, as a launcher that restarts them does:
    {"argv": [...], "ranks": [{"env": {...}, "log": path, "exit": path}, ...]}
A rank's exit code goes to its `exit` file. The launcher ends when its input and its ranks have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def start_ranks(argv: list[str], ranks: list[dict[str, object]]) -> dict[Path, subprocess.Popen[bytes]]:
    running = {}
    for rank in ranks:
        env = {**os.environ, **rank["env"]}  # type: ignore[dict-item]
        with open(str(rank["log"]), "ab") as log:
            process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        running[Path(str(rank["exit"]))] = process
    return running


def note_ends(running: dict[Path, subprocess.Popen[bytes]]) -> None:
    for path, process in list(running.items()):
        if (code := process.poll()) is not None:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(str(code))
            temporary.replace(path)
            del running[path]


def main() -> None:
    for line in sys.stdin:
        start = json.loads(line)
        running = start_ranks(start["argv"], start["ranks"])
        while running:
            note_ends(running)
            time.sleep(0.02)


if __name__ == "__main__":
    main()
