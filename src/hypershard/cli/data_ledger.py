"""`hypershard data ledger RUN`: which samples a step trained on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import Config
from ..config.sources import Layer, read_yaml, resolve
from ..errors import ConfigError, DataError
from ..metrics.sinks import read_json_lines

if TYPE_CHECKING:
    from ..data.ledger import Sample

_DESCRIPTION = """\
Print which samples a step trained on: where they lie in the data, and a digest of their token ids. It is worked out
from the run's configuration and events, and read from the data once more, so the data must still be there and
unchanged. Use it to see what made a loss jump, or to prove that two runs read the same.
"""
_EXAMPLES = """\
examples:
  hypershard data ledger runs/demo --step 12
  hypershard data ledger runs/demo --step 10 --last 20 --json > samples.jsonl
  hypershard data ledger runs/demo --step 12 --text
"""
_SHOWN_CHARACTERS = 300


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "ledger",
        help="which samples a step of a run trained on",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run directory")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step, from 1")
    parser.add_argument("--last", type=int, metavar="N", help="the last of several steps; default: just --step")
    parser.add_argument("--text", action="store_true", help="also the beginning of each sample's text")
    parser.add_argument("--json", action="store_true", help="one JSON object a sample, token ids included")
    parser.set_defaults(do=ledger)


def ledger(args: argparse.Namespace) -> int:
    """Print the samples. Raises DataError for steps that were not done, ConfigError for a folder that is no run."""
    last = args.step if args.last is None else args.last
    if not 1 <= args.step <= last:
        raise DataError(f"--step={args.step}, --last={last}: expected 1 or more, and no last step before the first")
    from ..data.encode.tokenizer import kept_tokenizer, load_tokenizer

    tokenizer = None
    if args.text:
        kept = kept_tokenizer(args.run_dir)
        if kept is None:
            raise DataError(f"--text: {args.run_dir} holds no tokenizer/")
        tokenizer = load_tokenizer(kept)
    for sample in _samples(args.run_dir, args.step, last):
        if args.json:
            values = {**vars(sample), "tokens": sample.tokens.tolist()}
            print(json.dumps(values))
            continue
        print(f"step {sample.step}  position {sample.position}  {sample.digest}  {sample.source}")
        for document in sample.documents:
            print(f"    {document}")
        if tokenizer is not None:
            text = tokenizer.backend.decode(sample.tokens.tolist(), skip_special_tokens=False)
            print(f"    {text[:_SHOWN_CHARACTERS]!r}")
    return 0


def _samples(run_dir: Path, first: int, last: int) -> Iterator[Sample]:
    from ..data.feed import Feed
    from ..data.ledger import read_ledger
    from ..data.open import open_dataset
    from ..data.sequences import training_sources

    config = _config(run_dir)
    found = read_ledger(read_json_lines(run_dir / "events.jsonl"))
    sources = training_sources(
        open_dataset(config.data_read), config.data, context_tokens=config.model.max_context_width
    )
    feed = Feed(sources, seed=config.data.seed, num_lanes=1, num_workers=0, rank=0)
    for step in range(first, last + 1):
        yield from found.samples(feed, step)


def _config(run_dir: Path) -> Config:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{run_dir}: found no config.yaml; expected a run directory, as printed by `hypershard train`"
        )
    return resolve(Layer(str(path), read_yaml(path)[0])).config
