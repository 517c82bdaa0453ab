"""`hypershard prepare`: documents -> a folder of token bins; or a look at their tokens, or a check of the folder."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.flags import coerce
from ..config.schema import SETTINGS, DataConfig
from ..data.bins.recipes import RECIPES
from ..data.kinds import PREFERENCE
from ..errors import ConfigError
from ..units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from ..data.bins.meta import BinsMeta
    from ..data.bins.prepare import Progress
    from ..data.open import Text

_DESCRIPTION = """\
Turn documents into token ids once, so that training starts at once. Reads .txt, JSON lines, Parquet and Arrow (text
also packed as .gz, .xz, .zst, .bz2), plain text, conversations or preferences, from a path, s3://bucket/prefix, or a
hub name. Writes a folder with the tokens (train.bin, val.bin), where documents begin (.starts), which tokens of
answers the loss counts (.targets), meta.json and the tokenizer.

A JSON line or a table's row is a document; so is a .txt file, or each part of it between lines that hold just
<|endoftext|>. A row of preferences holds two answers under chosen and rejected: texts or lists of messages, which go
on from prompt (text or messages), or, without it, begin with the same text or messages themselves; the loss counts
what comes after that. Files or folders named train… and val… keep their split; else about --val_share of the documents,
picked by a hash of their index, go to val.

The folder appears when it is complete. A run that is stopped, however, is gone on with by the same command, and the
folder is the same, byte for byte, whatever --num_processes and however often it was stopped.
"""

_EXAMPLES = f"""\
known by name:
{chr(10).join(f"  {name:<24}{recipe.about}" for name, recipe in RECIPES.items())}

examples:
  hypershard prepare embedded --output data/embedded
  hypershard prepare books/ --output data/books --tokenizer models/llama3_8b
  hypershard prepare s3://bucket/crawl/ --output data/crawl --text_field content --malformed_rows skip
  hypershard prepare chats.jsonl --tokenizer models/llama3_8b --inspect 3
  hypershard prepare pairs.jsonl --output data/pairs --tokenizer models/llama3_8b --data_kind preference
  hypershard prepare slimpajama_6b_llama --output data/slimpajama
  hypershard prepare --verify data/slimpajama

then:
  hypershard train --dataset data/books
"""

# Settings of training that mean the same here.
_SETTINGS = (
    "tokenizer",
    "data_kind",
    "text_field",
    "messages_field",
    "chat_template",
    "malformed_rows",
    "dataset_config_name",
    "cache_dir",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard prepare",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "input", nargs="?", metavar="INPUT", help="file, folder, s3:// URI, hub name, 'embedded', or a name from below"
    )
    parser.add_argument("--output", metavar="DIR", help="the new folder; must not exist or be empty")
    for name in _SETTINGS:
        field = SETTINGS[name][1]
        default = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            metavar="|".join(field.metadata["choices"]) or "TEXT",
            help=(field.metadata["help"] + default).replace("%", "%%"),
        )
    parser.add_argument(
        "--dataset_location", metavar="PATH", help="a copy of a data set known by name: a folder or s3:// prefix"
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
    parser.add_argument(
        "--num_processes",
        type=int,
        metavar="N",
        help="processes that tokenise (default: one per core this process may use, fewer for little input)",
    )
    parser.add_argument(
        "--inspect",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="print the first N (1) documents as tokens, those that the loss counts in colour, and write nothing",
    )
    parser.add_argument(
        "--verify", metavar="DIR", help="compare a folder's files with its checksums, and write nothing"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Prepare, inspect or verify; 0 when done, 1 when a folder is not as it was written.

    ConfigError, DataError and StorageError are for the caller to show.
    """
    args = build_parser().parse_args(argv)
    if args.verify is not None:
        return _verify(args)
    if args.input is None:
        raise ConfigError("found no INPUT; expected a file, a folder, a name (see --help), or --verify DIR")
    if args.inspect is not None:
        return _inspect(args)
    if args.output is None:
        raise ConfigError("found no --output; expected the folder to write into, or --inspect")
    return _prepare(args)


def _verify(args: argparse.Namespace) -> int:
    if args.input is not None or args.output is not None or args.inspect is not None:
        raise ConfigError(f"--verify={args.verify} takes no INPUT, --output or --inspect; leave them out")
    from ..data.bins.token_bins import verify
    from ..storage import local_path

    folder = local_path(args.verify, flag="--verify")
    problems = verify(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{folder}: every file is as it was written")
    return 1 if problems else 0


def _inspect(args: argparse.Namespace) -> int:
    if args.output is not None or args.inspect < 1:
        raise ConfigError("--inspect takes a number of documents, 1 at least, and no --output")
    from ..data.encode.inspect import show
    from ..data.read.documents import read_documents
    from ..data.records import WHOLE

    text = _text(args)
    documents = itertools.chain.from_iterable(
        read_documents(file, columns=text.encoder.columns, part=WHOLE, skip=0) for file in text.files
    )
    show(documents, text.encoder, limit=args.inspect)
    return 0


def _prepare(args: argparse.Namespace) -> int:
    if args.num_processes is not None and args.num_processes < 1:
        raise ConfigError(f"--num_processes={args.num_processes}: expected at least 1")
    from ..data.bins.encoding_pool import num_cores
    from ..data.bins.prepare import prepare
    from ..storage import local_path

    output = local_path(args.output, flag="--output")
    text = _text(args)
    if args.val_share is not None and any(file.split == "val" for file in text.files):
        raise ConfigError(
            f"--val_share={args.val_share}: {args.input} has files named val, which validate; drop the flag"
        )
    started_at = time.monotonic()
    with shown_progress() as progress:
        meta = prepare(
            text.files,
            output,
            text.encoder,
            val_share=text.val_share if args.val_share is None else args.val_share,
            seed=args.split_seed,
            malformed_rows=_data(args).malformed_rows,
            num_processes=args.num_processes or num_cores(),
            progress=progress,
        )
    print(_summary(output, meta, time.monotonic() - started_at))
    return 0


def _data(args: argparse.Namespace) -> DataConfig:
    """The settings given, a recipe's where one is named."""
    given = {name: coerce(name, getattr(args, name), where=f"--{name}") for name in _SETTINGS if hasattr(args, name)}
    recipe = RECIPES.get(args.input)
    if recipe is None:
        if args.dataset_location is not None:
            raise ConfigError(
                f"--dataset_location={args.dataset_location}: goes with {' or '.join(RECIPES)}; found {args.input}"
            )
        return DataConfig(dataset=args.input, **given)
    fixed = {"data_kind": "text", "text_field": recipe.text_field}
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ConfigError(f"--{name}={given[name]}: {args.input} has {value}; drop the flag")
    return DataConfig(
        dataset=args.dataset_location or recipe.dataset, **{"tokenizer": recipe.tokenizer} | given | fixed
    )


def _text(args: argparse.Namespace) -> Text:
    from ..data.open import resolve_text

    data = _data(args)
    return resolve_text(data.dataset, data)


def _summary(output: Path, meta: BinsMeta, seconds: float) -> str:
    num_tokens = meta.train.num_tokens + meta.val.num_tokens
    rows = [f"{output}: {format_count(num_tokens)} tokens in {format_seconds(seconds)}"]
    unit = "pair" if meta.kind == PREFERENCE else "document"
    for name, split in (("train", meta.train), ("val", meta.val)):
        counts = f"{split.num_tokens:>15,} tokens {split.num_documents:>12,} {unit}s"
        rows.append(f"  {name:5} {counts}  {format_bytes(sum(file.size_bytes for file in split.files))}")
    rows.append(f"  longest {unit} {meta.longest_document_tokens:,} tokens")
    if meta.num_malformed_rows:
        rows.append(f"  left out {meta.num_malformed_rows:,} malformed rows")
    rows.append(f"  vocabulary {meta.vocab_size}, stored as {meta.dtype}, end of document: id {meta.eos_token_id}")
    objective = " --objective dpo" if meta.kind == PREFERENCE else ""
    rows.append(f"train on it: hypershard train --dataset {output}{objective}")
    return "\n".join(rows)


@contextmanager
def shown_progress() -> Iterator[Callable[[Progress], None]]:
    """A moving bar on a terminal; elsewhere a log line every few seconds."""
    if not sys.stderr.isatty():
        from ..data.bins.prepare import log_progress

        yield log_progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
    )
    first: list[tuple[float, int]] = []  # a run that goes on with another one's work begins with its tokens
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, tokens="")

        def show(done: Progress) -> None:
            now = time.monotonic()
            if not first:
                first.append((now, done.num_tokens))
            speed = (done.num_tokens - first[0][1]) / max(now - first[0][0], 1e-9)
            tokens = f"{format_count(done.num_tokens)} tokens, {format_count(speed)}/s"
            bar.update(task, completed=done.read_bytes, total=done.total_bytes, tokens=tokens)

        yield show
