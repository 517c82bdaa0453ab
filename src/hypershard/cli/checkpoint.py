"""`hypershard checkpoint VERB PLACE`: what was saved, whether it is whole, and what becomes of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TypeAlias

from ..checkpoint.survey import Superfluous, superfluous
from ..errors import CheckpointError
from ..units import format_bytes
from .checkpoint_adapters import add_adapters
from .checkpoint_diff import diff_checkpoints
from .checkpoint_export import default_workers, export
from .checkpoint_list import list_checkpoints
from .checkpoint_memory import prune_memory
from .checkpoint_places import PLACE, add_step, stored_at
from .checkpoint_transfer import copy, verify

Actions: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_DESCRIPTION = """\
Look after the checkpoints of a run. PLACE is a run directory, its checkpoints/, one step-XXXXXXXX in it, or an
s3://bucket/prefix of the same. Of a run, list and verify also show what lies in this node's memory, on its own disk
and in the run's bucket, as its config.yaml names them.

  list     one line per checkpoint; compares names and sizes, so it is quick. Of adapters also what they are, and
           whether the model that they were trained beside is where it was
  verify   read every byte and compare it with the manifest; exit code 2 if anything differs
  copy     take one checkpoint to another disk or bucket, verified on the way
  prune    delete all but the newest; with --memory, what earlier runs left in this node's memory
  diff     what differs between two checkpoints, down to the values; exit code 0 equal, 1 different
  export   write the weights as a Hugging Face model directory, for serving or further training elsewhere
"""
_EPILOG = """\
examples:
  hypershard checkpoint list runs/demo
  hypershard checkpoint verify s3://bucket/demo --step 60
  hypershard checkpoint copy runs/demo s3://bucket/demo
  hypershard checkpoint copy runs/demo /mnt/shared/demo --from memory
  hypershard checkpoint prune runs/demo --keep 2 --keep_every 1000 --dry_run
  hypershard checkpoint prune --memory
  hypershard checkpoint diff runs/demo@40 runs/demo@60 --tensors 'model/*'
  hypershard checkpoint export runs/demo --output models/demo --step best --dtype bfloat16
  hypershard checkpoint export s3://bucket/demo --step 60 --output s3://bucket/models/demo --num_workers 4
  hypershard checkpoint export models/base --adapter adapters/law --adapter s3://bucket/tone:0.5 --output models/both
"""
_NEWEST = "only the checkpoint of this step; default: the one that a resume would take"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard checkpoint",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|verify|copy|prune|diff|export")
    action = _action(actions, "list", "show everything that was saved, in the order in which a resume would take it")
    action.add_argument("place", metavar="PLACE", help=f"{PLACE}; or a folder of adapters in PEFT's format")
    action.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    action = _action(actions, "verify", "check every byte; exit code 2 if anything is damaged")
    action.add_argument("place", metavar="PLACE", help=PLACE)
    action.add_argument("--step", type=int, metavar="N", help="only the checkpoints of this step; default: all")
    _add_copy(actions)
    _add_prune(actions)
    _add_diff(actions)
    _add_export(actions)
    return parser


def _action(actions: Actions, name: str, text: str) -> argparse.ArgumentParser:
    return actions.add_parser(name, help=text.partition(";")[0], description=text, allow_abbrev=False)


def _add_copy(actions: Actions) -> None:
    text = (
        "take one checkpoint to another disk or bucket; every block is verified on the way, the manifest goes last and "
        "unchanged, and nothing finished is ever overwritten. The run's id, config.yaml and tokenizer go along"
    )
    action = _action(actions, "copy", text)
    action.add_argument("place", metavar="PLACE", help=PLACE)
    action.add_argument(
        "destination", metavar="DESTINATION", help="folder, run directory or s3://bucket/prefix that is to hold it"
    )
    action.add_argument("--step", type=int, metavar="N", help=_NEWEST)
    _add_from(action)


def _add_from(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--from",
        dest="tier",
        choices=("memory", "local"),
        help="put it together from the blobs in this node's memory, or on its own disk; all parts must be on this node",
    )


def _add_prune(actions: Actions) -> None:
    text = (
        "delete all but the newest checkpoints; with --memory, show what runs hold in this node's memory and, with "
        "--yes, delete what nobody needs: no living process (that is seen from here; one in another container may not "
        "be) has it mapped, no agent serves it, and it was not touched for an hour"
    )
    action = _action(actions, "prune", text)
    action.add_argument("place", metavar="PLACE", nargs="?", help=PLACE)
    action.add_argument("--keep", type=_positive, metavar="K", help="newest complete checkpoints that stay")
    action.add_argument("--keep_every", type=_positive, metavar="N", help="multiples of N steps stay too")
    action.add_argument("--dry_run", action="store_true", help="only say what would be deleted")
    action.add_argument(
        "--unfinished",
        action="store_true",
        help="delete unfinished and damaged ones too; not while a job runs, which may be writing one",
    )
    action.add_argument("--memory", action="store_true", help="this node's memory instead of a PLACE")
    action.add_argument("--memory_tier_dir", metavar="DIR", help="with --memory: default as in training")
    action.add_argument("--run", action="append", metavar="ID", help="with --memory: only this run, however recent")
    action.add_argument("--yes", action="store_true", help="with --memory: delete, not just show")


def _add_diff(actions: Actions) -> None:
    text = (
        "show what differs between two checkpoints; exit code 0 equal, 1 different, 2 if one cannot be read. Of each "
        "tensor whose values differ: the length of the difference relative to the tensor's, by which they are sorted, "
        "then the largest relative and absolute difference of an element, and how many differ"
    )
    action = _action(actions, "diff", text)
    for name in ("A", "B"):
        action.add_argument(name.lower(), metavar=name, help="PLACE (its newest checkpoint), PLACE@STEP or PLACE@best")
    action.add_argument("--tensors", metavar="PATTERN", help="only tensors of such names ('model/*'), and no facts")
    action.add_argument("--no_values", action="store_true", help="compare names, shapes and dtypes only")


def _add_export(actions: Actions) -> None:
    text = (
        "write a Hugging Face model directory; config.json goes last, so that an unfinished directory looks like none. "
        "Cut off, the same command goes on and the result is the same to the byte. Every byte read is verified"
    )
    action = _action(actions, "export", text)
    action.add_argument("place", metavar="PLACE", help=PLACE)
    add_step(action)
    action.add_argument(
        "--output", required=True, metavar="DIR", help="new directory of the model, or s3://bucket/prefix"
    )
    action.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights; default: %(default)s"
    )
    action.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json or its folder, to put beside the weights; default: the run's own",
    )
    add_adapters(
        action,
        bare="without a folder, of --lora_r: the run's adapters alone, in PEFT's format. With one, PLACE may be a "
        "model directory too",
    )
    action.add_argument(
        "--max_shard_gb", type=_gigabytes, default=5.0, metavar="X", help="size of a file; default: %(default)g GB"
    )
    action.add_argument(
        "--num_workers",
        type=_positive,
        default=default_workers(),
        metavar="N",
        help="processes that write, a file at a time, each with a file in memory; default here: %(default)s",
    )
    _add_from(action)


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of gigabytes above 0")
    return value


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1 on")
    return int(text)


def run(argv: Sequence[str]) -> int:
    """Do what the arguments say; 0 when done, 1 if `diff` found a difference. Raises CheckpointError, StorageError."""
    args = build_parser().parse_args(argv)
    if args.action == "list":
        return list_checkpoints(args.place, as_json=args.json)
    if args.action == "verify":
        return verify(args.place, step=args.step)
    if args.action == "copy":
        return copy(args.place, args.destination, step=args.step, tier=args.tier)
    if args.action == "diff":
        return diff_checkpoints((args.a, args.b), pattern=args.tensors, with_values=not args.no_values)
    return _prune(args) if args.action == "prune" else export(args)


def _prune(args: argparse.Namespace) -> int:
    if args.memory:
        if args.place is not None or args.keep is not None or args.keep_every is not None or args.unfinished:
            raise CheckpointError("prune --memory takes no PLACE, --keep, --keep_every or --unfinished")
        if args.dry_run and args.yes:
            raise CheckpointError("prune --memory: found both --dry_run and --yes, expected one of them")
        return prune_memory(args.memory_tier_dir, runs=args.run, delete=args.yes)
    if args.memory_tier_dir is not None or args.run is not None or args.yes:
        raise CheckpointError("--memory_tier_dir, --run and --yes belong to prune --memory")
    if args.place is None or args.keep is None:
        raise CheckpointError("prune takes a PLACE and --keep K, or --memory")
    stored = stored_at(args.place)
    place, found = stored.place, stored.found
    if place.folder is not None:
        raise CheckpointError(f"{args.place} is one checkpoint; expected the folder that holds all of a run")
    if not found:
        raise CheckpointError(f"{stored.location}: found no checkpoint (a folder named step-XXXXXXXX)")
    gone = superfluous(found, keep=args.keep, keep_every=args.keep_every, with_broken=args.unfinished)
    for one in gone:
        if not args.dry_run:
            place.store.remove(one.found.stored.folder)
        print(_removed(one, dry_run=args.dry_run))
    for broken in (one for one in found if not one.is_complete and not args.unfinished):
        print(f"left alone {broken.stored.location}: {broken.condition}; --unfinished deletes it")
    freed = format_bytes(sum(one.found.size_bytes for one in gone))
    num_kept = len(found) - len(gone)
    print(f"{'would free' if args.dry_run else 'freed'} {freed} of {len(gone)} checkpoints; {num_kept} stay")
    return 0


def _removed(one: Superfluous, *, dry_run: bool) -> str:
    size = format_bytes(one.found.size_bytes)
    return f"{'would delete' if dry_run else 'deleted'} {one.found.stored.location} ({size}): {one.reason}"
