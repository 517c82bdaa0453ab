"""`hypershard checkpoint list|verify|export`: what was saved, whether it is whole, and out of it as a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.manifest import (
    checkpoint_directory,
    complete_checkpoints,
    damage_of,
    is_finished,
    read_facts,
    read_manifest,
    step_directories,
)
from ..checkpoint.tier import CheckpointRecord
from ..errors import CheckpointError
from ..log import logger
from ..storage import local_path
from ..units import format_bytes

_DESCRIPTION = """\
Look after the checkpoints of a run. PLACE is a run directory, its checkpoints/, or one step-XXXXXXXX in it.

  list     one line per checkpoint; compares file sizes, so it is quick
  verify   read every byte and compare it with the manifest; exit code 2 if anything differs
  export   write the weights as a Hugging Face model directory, for serving or further training elsewhere
"""
_EPILOG = """\
examples:
  hypershard checkpoint list runs/demo
  hypershard checkpoint verify runs/demo --step 60
  hypershard checkpoint export runs/demo --output models/demo --dtype bfloat16
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard checkpoint",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|verify|export")
    for name, text in (
        ("list", "show all checkpoints, newest first"),
        ("verify", "check every byte"),
        ("export", "write a Hugging Face model directory"),
    ):
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.add_argument(
            "place", metavar="PLACE", help="run directory, checkpoint directory, or one step's directory"
        )
        if name != "list":
            default = "all" if name == "verify" else "the newest"
            action.add_argument(
                "--step", type=int, metavar="N", help=f"only the checkpoint of this step; default: {default}"
            )
        if name == "export":
            action.add_argument("--output", required=True, metavar="DIR", help="new directory of the model")
            action.add_argument(
                "--dtype",
                choices=("bfloat16", "float32"),
                default="bfloat16",
                help="of the weights; default: %(default)s",
            )
            action.add_argument(
                "--tokenizer",
                metavar="PATH",
                help="tokenizer.json or its folder, to put beside the weights; default: the run's own",
            )
    return parser


def run(argv: Sequence[str]) -> int:
    """Do what the arguments say; 0 when done. Raises CheckpointError and StorageError."""
    args = build_parser().parse_args(argv)
    actions = {"list": _list, "verify": _verify, "export": _export}
    return actions[args.action](args)


def _list(args: argparse.Namespace) -> int:
    directory = _directory(args)
    records = step_directories(directory) or complete_checkpoints(directory)
    if not records:
        raise CheckpointError(f"{directory}: found no checkpoint (a directory named step-XXXXXXXX)")
    print(_row("step", "saved", "size", "ranks", "torch", "state"))
    for record in records:
        print(_describe(record))
    return 0


def _describe(record: CheckpointRecord) -> str:
    step, directory = f"{record.step}" + (f".{record.attempt}" if record.attempt > 1 else ""), Path(record.location)
    if not is_finished(record):
        return _row(step, "-", "-", "-", "-", "unfinished: never used, removed by the next save")
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return _row(step, "-", "-", "-", "-", f"damaged: {error}")
    damage = [
        text
        for name, expected in manifest.files.items()
        if (text := damage_of(directory / name, expected, checksum=False))
    ]
    state = f"damaged: {damage[0]}" if damage else "complete"
    saved = manifest.saved_at.replace("T", " ").removesuffix("+00:00") + " UTC"
    return _row(step, saved, format_bytes(manifest.size_bytes), manifest.world_size, manifest.torch_version, state)


def _row(*cells: object) -> str:
    step, saved, size, ranks, torch_version, state = map(str, cells)
    return f"{step:>10}  {saved:<23}  {size:>10}  {ranks:>5}  {torch_version:<12}  {state}"


def _verify(args: argparse.Namespace) -> int:
    records = _chosen(args)
    num_damaged = 0
    for record in records:
        damage = _damage(Path(record.location))
        num_damaged += bool(damage)
        print(f"{record.location}: {'; '.join(damage) if damage else 'valid'}")
    if num_damaged:
        raise CheckpointError(f"{num_damaged} of {len(records)} checkpoints are damaged")
    return 0


def _damage(directory: Path) -> list[str]:
    """Every byte against the manifest, and the layout that torch needs; empty when all is as saved."""
    try:
        manifest = read_manifest(directory)
        damage = [text for name, file in manifest.files.items() if (text := damage_of(directory / name, file))]
        if not damage:
            from ..checkpoint.metadata import read_metadata

            read_metadata(directory, files=manifest.files)
            read_facts(directory)
    except CheckpointError as error:
        return [str(error)]
    return damage


def _export(args: argparse.Namespace) -> int:
    import torch

    from ..checkpoint.hf import Export, export_hf
    from ..config.schema import ModelConfig
    from ..models.family import family_of

    checkpoint = Path(_chosen(args)[0].location)
    model = ModelConfig(**read_facts(checkpoint)["model"])
    tokenizer_path, eos_token_id = _tokenizer(args, model.vocab_size)
    output = local_path(args.output, flag="--output")
    export_hf(
        checkpoint,
        output,
        family_of(model.model_type).hf_config(model),
        export=Export(getattr(torch, args.dtype), tokenizer_path=tokenizer_path, eos_token_id=eos_token_id),
    )
    print(f"{output}: {model.model_type} in {args.dtype}, from {checkpoint}")
    return 0


def _tokenizer(args: argparse.Namespace, vocab_size: int | None) -> tuple[Path | None, int | None]:
    from ..data.tokenizer import kept_tokenizer, load_tokenizer

    given = local_path(args.tokenizer, flag="--tokenizer") if args.tokenizer else kept_tokenizer(_directory(args))
    if given is None:
        logger.warning("the run keeps no tokenizer and no --tokenizer is given: the model directory will have none")
        return None, None
    tokenizer = load_tokenizer(given)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"--tokenizer={given} has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
            f"give the tokenizer it was trained with"
        )
    return tokenizer.path, tokenizer.eos_token_id


def _directory(args: argparse.Namespace) -> Path:
    path = local_path(args.place, flag="PLACE")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; expected a run or checkpoint directory")
    return checkpoint_directory(path)


def _chosen(args: argparse.Namespace) -> list[CheckpointRecord]:
    directory = _directory(args)
    records = complete_checkpoints(directory)
    if not records:
        raise CheckpointError(f"{directory}: found no finished checkpoint")
    if args.step is None:
        return records
    chosen = [record for record in records if record.step == args.step]
    if not chosen:
        steps = ", ".join(str(record.step) for record in records)
        raise CheckpointError(f"--step={args.step}: {directory} has steps {steps}")
    return chosen
