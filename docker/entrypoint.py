"""Process 1 of the container: `python entrypoint.py train …`. All it does is in hypershard.launch.start."""

import sys

from hypershard.launch.start import main

if __name__ == "__main__":
    sys.exit(main())
