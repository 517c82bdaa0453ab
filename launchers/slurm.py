"""Submit, print or write a Slurm job: `python launchers/slurm.py --model llama3_8b --instance p5 …`.

That is `hypershard launch slurm`; slurm/ holds the files it writes.
"""

import sys

from hypershard.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["launch", "slurm", *sys.argv[1:]]))
