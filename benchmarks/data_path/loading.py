"""One way of getting batches for training, in a process of its own; prints tokens per second of several windows.

Every way gives batches of BATCH_SIZE x CONTEXT tokens in a shuffled order, and the loop reads every tensor it gets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from hypershard.config.schema import DataConfig
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.data.feed import Feed
from hypershard.data.loader import Loader, Share
from hypershard.data.open import open_dataset
from hypershard.data.sequences import training_sources

CONTEXT, BATCH_SIZE = 2048, 8
WARMUP_STEPS = 8


def hypershard(data: Path, cache: Path, num_workers: int) -> Iterator[list[torch.Tensor]]:
    """Inputs, labels and positions, documents masked from each other; made ahead by a thread (and workers)."""
    settings = DataConfig(dataset=str(data), cache_dir=str(cache), streaming=_is_text(data))
    sources = training_sources(open_dataset(settings), settings, context_tokens=CONTEXT)
    feed = Feed(sources, seed=settings.seed, num_lanes=BATCH_SIZE, num_workers=num_workers, rank=0)
    share = Share(rank=0, world_size=1, batch_size=BATCH_SIZE)
    loader = Loader(feed, share, context_tokens=CONTEXT, prefetch_steps=settings.prefetch_steps, pin=False)
    try:
        for position in itertools.count(0, BATCH_SIZE):
            (batch,) = loader.step(position, accumulation=1)
            yield [batch.input_ids, batch.labels, batch.position_ids]
    finally:
        loader.close()


def _is_text(data: Path) -> bool | None:
    return True if any(data.glob("*.jsonl")) else None


def write_arrow(bins: Path, output: Path, *, columns: int) -> None:
    """The same sequences, packed once, as an Arrow data set: the first `columns` of inputs, labels and positions."""
    import datasets
    import numpy as np

    settings = DataConfig(dataset=str(bins))
    (source,) = training_sources(open_dataset(settings), settings, context_tokens=CONTEXT)
    rows = source.rows

    def sequences() -> Iterator[dict[str, Any]]:
        for index in range(rows.num_samples):
            row = rows.row(index)
            labels = np.where(row.targets[1:], row.tokens[1:], -100)
            arrays = {"input_ids": row.tokens[:-1], "labels": labels, "position_ids": row.positions[:-1]}
            yield {name: arrays[name].astype(np.int64) for name in list(arrays)[:columns]}

    datasets.disable_progress_bars()
    datasets.Dataset.from_generator(sequences, cache_dir=str(output / "building")).save_to_disk(str(output / "arrow"))


def arrow(data: Path, cache: Path, num_workers: int) -> Iterator[list[torch.Tensor]]:
    """torch's DataLoader over an Arrow data set of packed sequences, int64 as the model wants them."""
    import datasets

    dataset = datasets.load_from_disk(str(data / "arrow")).with_format("torch")
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "shuffle": True, "num_workers": num_workers}
    while True:
        for batch in torch.utils.data.DataLoader(dataset, drop_last=True, **options):
            yield list(batch.values())


class _Packed(torch.utils.data.IterableDataset):
    """Documents tokenised and put one after another, cut every CONTEXT tokens; no document mask."""

    def __init__(self, documents: Iterable[dict[str, list[int]]]):
        self._documents = documents

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        held: list[int] = []
        for document in self._documents:
            held += document["input_ids"]
            while len(held) > CONTEXT:
                row = torch.tensor(held[: CONTEXT + 1])
                held = held[CONTEXT:]
                yield {"input_ids": row[:-1], "labels": row[1:]}


def datasets_streaming(data: Path, cache: Path, num_workers: int) -> Iterator[list[torch.Tensor]]:
    """`datasets` reading as a stream, tokenised by map in batches, and torch's DataLoader."""
    import datasets
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER_PATH))
    end = load_tokenizer(TOKENIZER_PATH).eos_token_id

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*one.ids, end] for one in encoded]}

    files = [str(path) for path in sorted(data.glob("*.jsonl"))]
    while True:
        read = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(cache))
        shuffled = read.shuffle(seed=42, buffer_size=DataConfig().shuffle_window * BATCH_SIZE)
        tokens = shuffled.map(encode, batched=True, batch_size=256, remove_columns=["text"])
        loader = torch.utils.data.DataLoader(_Packed(tokens), batch_size=BATCH_SIZE, num_workers=num_workers)
        for batch in loader:
            if len(batch["input_ids"]) == BATCH_SIZE:
                yield list(batch.values())


METHODS = {one.__name__: one for one in (hypershard, arrow, datasets_streaming)}


def measure(batches: Iterator[list[torch.Tensor]], *, num_windows: int, seconds: float) -> dict[str, list[float]]:
    """Tokens per second in each window. What was made ahead before a window began is small beside it.

    `tokens_per_cpu_second` of this process alone says more than a clock where others use the machine too.
    """
    total = torch.zeros((), dtype=torch.int64)
    for batch in itertools.islice(batches, WARMUP_STEPS):
        total += sum(int(tensor.sum()) for tensor in batch)
    found: dict[str, list[float]] = {"tokens_per_second": [], "tokens_per_cpu_second": []}
    for _ in range(num_windows):
        num_tokens, started_at, cpu_at = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - started_at < seconds:
            batch = next(batches)
            assert batch[0].shape == (BATCH_SIZE, CONTEXT), batch[0].shape
            total += sum(int(tensor.sum()) for tensor in batch)
            num_tokens += BATCH_SIZE * CONTEXT
        found["tokens_per_second"].append(num_tokens / (time.perf_counter() - started_at))
        found["tokens_per_cpu_second"].append(num_tokens / (time.process_time() - cpu_at))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("data", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--num_workers", type=int, required=True)
    parser.add_argument("--num_windows", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    args = parser.parse_args()
    batches = METHODS[args.method](args.data, args.cache, args.num_workers)
    found = measure(batches, num_windows=args.num_windows, seconds=args.seconds)
    batches.close()  # type: ignore[attr-defined]
    print(json.dumps(found))


if __name__ == "__main__":  # workers import this file again
    main()
