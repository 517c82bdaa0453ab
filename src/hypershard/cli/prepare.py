"""`hypershard prepare`: text files -> a folder of token bins."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from ..data.prepare import Progress
    from ..data.token_bins import BinsMeta

_DESCRIPTION = """\
Turn text into token ids once, so that training starts at once: reads .txt and .jsonl files (also packed as .gz
or .xz), writes a folder with train.bin, val.bin, meta.json and the tokenizer.

A line of a .jsonl file is a document; so is a .txt file, or each part of it between lines that hold just
<|endoftext|>. Files or folders named train… and val… keep their split; else about --val_share of the documents,
picked by a hash of their index, go to val.

The folder appears when it is complete. A run that is stopped leaves nothing that could be mistaken for it.
"""

_EXAMPLES = """\
examples:
  hypershard prepare embedded --output data/embedded
  hypershard prepare books/ --output data/books --tokenizer models/llama3_8b
  hypershard prepare crawl.jsonl.gz --output data/crawl --text_field content --val_share 0.001

then:
  hypershard train --dataset data/books
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard prepare",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="INPUT", help="a .txt or .jsonl file, a folder of them, or 'embedded'")
    parser.add_argument("--output", required=True, metavar="DIR", help="the new folder; must not exist or be empty")
    parser.add_argument(
        "--tokenizer",
        metavar="T",
        help="folder or tokenizer.json; default: the tokenizer.json in INPUT, else the embedded one",
    )
    parser.add_argument(
        "--text_field", default="text", metavar="KEY", help="JSONL: key that holds the text (default: %(default)s)"
    )
    parser.add_argument(
        "--val_share",
        type=float,
        metavar="SHARE",
        help="share of the documents that validate (default: 0.01; embedded: 0.05)",
    )
    parser.add_argument(
        "--split_seed",
        type=int,
        default=0,
        metavar="N",
        help="another number picks other documents for val (default: %(default)s)",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Prepare and print what was made; 0 when done. DataError and StorageError are for the caller to show."""
    args = build_parser().parse_args(argv)
    from ..data.open import resolve_text
    from ..data.prepare import prepare
    from ..storage import local_path

    output = local_path(args.output, flag="--output")
    text = resolve_text(args.input, tokenizer=args.tokenizer, text_field=args.text_field)
    started_at = time.monotonic()
    with _shown_progress() as progress:
        meta = prepare(
            text.inputs,
            output,
            text.tokenizer,
            text_field=text.text_field,
            val_share=text.val_share if args.val_share is None else args.val_share,
            seed=args.split_seed,
            progress=progress,
        )
    print(_summary(output, meta, time.monotonic() - started_at))
    return 0


def _summary(output: Path, meta: BinsMeta, seconds: float) -> str:
    num_tokens = meta.train.num_tokens + meta.val.num_tokens
    speed = f"{format_count(num_tokens / max(seconds, 1e-9))} tokens/s"
    rows = [f"{output}: {format_count(num_tokens)} tokens in {format_seconds(seconds)} ({speed})"]
    for name, split in (("train", meta.train), ("val", meta.val)):
        counts = f"{split.num_tokens:>15,} tokens {split.num_documents:>12,} documents"
        rows.append(f"  {name:5} {counts}  {format_bytes(split.size_bytes)}")
    rows.append(f"  vocabulary {meta.vocab_size}, stored as {meta.dtype}, documents end with id {meta.eos_token_id}")
    rows.append(f"train on it: hypershard train --dataset {output}")
    return "\n".join(rows)


@contextmanager
def _shown_progress() -> Iterator[Callable[[Progress], None]]:
    """A moving bar on a terminal; elsewhere a log line every few seconds."""
    if not sys.stderr.isatty():
        from ..data.prepare import log_progress

        yield log_progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, tokens="0")
        yield lambda done: bar.update(
            task, completed=done.read_bytes, total=done.total_bytes, tokens=format_count(done.num_tokens)
        )
