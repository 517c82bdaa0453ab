"""`hypershard VERB`: finds the verb's file and nothing else, so that --help answers at once."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__

# verb -> one line for --help; each verb is cli/<verb>.py with `run(argv) -> exit code`
VERBS = {
    "train": "train a model; see `hypershard train --help`",
    "plan": "whether a training fits, how long it takes, what it costs",
    "launch": "start a training on Slurm, SageMaker, Kubernetes or here",
    "prepare": "turn text into token bins",
    "checkpoint": "list, verify, copy, prune, compare and export checkpoints",
    "generate": "let a trained model continue a text",
    "chat": "talk to a model that was trained on conversations",
    "data": "analyze a data set; read back which samples a run trained on",
    "doctor": "what this machine or cluster is, what is missing, how to mend it",
    "report": "show a run: its curve, speed and whereabouts",
}

_HELP = f"""hypershard {__version__}: train language models with FSDP2

usage: hypershard VERB [flags]

{chr(10).join(f"  {verb:<12} {text}" for verb, text in VERBS.items())}

`hypershard VERB --help` teaches a verb. To begin: hypershard train --model tiny_llama --max_steps 60"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the process's exit code."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        print(f"hypershard: unknown verb {verb!r}{f'; did you mean {near[0]}?' if near else ''}", file=sys.stderr)
        return 2
    from ..errors import HypershardError

    module = importlib.import_module(f".{verb}", __package__)
    try:
        code: int = module.run(rest)
    except HypershardError as error:
        print(f"hypershard {verb}: {error}", file=sys.stderr)
        return error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
