"""Start a training on Kubernetes: `python launchers/kubernetes.py --model llama3_8b --instance p5 --nodes 4 …`.

That is `hypershard launch kubernetes`; add --dry_run to see the manifests.
"""

from __future__ import annotations

import sys

from hypershard.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["launch", "kubernetes", *sys.argv[1:]]))
