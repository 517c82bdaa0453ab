"""Run a job on this machine: `python launchers/local.py --model tiny_llama --run_dir runs/first --max_steps=60`.

That is `hypershard launch local`; add --dry_run to see the command.
"""

from __future__ import annotations

import sys

from hypershard.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["launch", "local", *sys.argv[1:]]))
