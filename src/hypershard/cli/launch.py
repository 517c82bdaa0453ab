"""`hypershard launch WHERE`: start a training on a cluster. Finds the launcher's file and imports no other.

A launcher is cli/launch_<name>.py with `add_parser(verbs)`, which sets `do`, the function to call. One that starts a
training also sets `takes_train_flags`: flags it does not know are flags of `hypershard train`, and its `train_flags`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from ..errors import ConfigError

VERBS = {
    "slurm": "submit or write an sbatch file (Slurm, HyperPod)",
    "sagemaker": "start, watch, stop and resume a SageMaker training job",
    "kubernetes": "write the YAML of an indexed Job, or of a HyperPodPyTorchJob",
    "local": "run the same job on this machine",
    "verdict": "what a job script does next, from the run's record",
}

_HELP = f"""\
usage: hypershard launch WHERE [--model NAME | --config FILE] [flags] [flags of `hypershard train`]

{chr(10).join(f"  {verb:<12} {text}" for verb, text in VERBS.items())}

`hypershard launch WHERE --help` teaches one of them; --dry_run prints what would be submitted and submits nothing.

examples:
  hypershard launch slurm --model llama3_8b --instance p5 --nodes 4 --train_batch_size=2
  hypershard launch sagemaker --model llama3_8b --instance p5 --nodes 4 --dry_run …
"""


def run(argv: Sequence[str]) -> int:
    """Do what the launcher named by the first word does; its exit code. Raises ConfigError for an unknown one."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if words else 2
    if words[0] not in VERBS:
        raise ConfigError(f"launch {words[0]}: found no such launcher; expected one of {', '.join(VERBS)}")
    parser = argparse.ArgumentParser(prog="hypershard launch", allow_abbrev=False)
    importlib.import_module(f".launch_{words[0]}", __package__).add_parser(parser.add_subparsers(required=True))
    args, unknown = parser.parse_known_args(words)
    if getattr(args, "takes_train_flags", False):
        args.train_flags = unknown
    elif unknown:
        raise ConfigError(f"launch {words[0]}: unknown {' '.join(unknown)}; see hypershard launch {words[0]} --help")
    code: int = args.do(args)
    return code
