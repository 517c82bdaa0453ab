"""`torchrun … src/train.py --hidden_width=…`: the same as `hypershard train`, for launchers that want a file."""

import sys

from hypershard.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
