"""One way of turning JSONL into tokens that training can read, in a process of its own; prints seconds and tokens.

Times leave out the start of the interpreter and imports, and hold everything else: reading and parsing the JSON,
starting processes, tokenising, the end token of each document, writing.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.encode.encoder import encoder_spec
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.data.read.files import find_files


def hypershard(text: Path, output: Path, num_processes: int) -> dict[str, float]:
    """Token bins with a validation split, checksums and document starts."""
    from hypershard.data.bins.prepare import SPLIT_SEED, VAL_SHARE, prepare

    started_at = time.perf_counter()
    spec = encoder_spec(
        kind="text",
        tokenizer=load_tokenizer(TOKENIZER_PATH),
        text_field="text",
        messages_field="messages",
        chat_template=None,
    )
    files = find_files(str(text), dataset_config_name=None, cache_dir=output.parent)
    meta = prepare(
        files,
        output,
        spec,
        val_share=VAL_SHARE,
        seed=SPLIT_SEED,
        malformed_rows="refuse",
        num_processes=num_processes,
    )
    seconds = time.perf_counter() - started_at
    return {"seconds": seconds, "tokens": meta.train.num_tokens + meta.val.num_tokens}


def by_map(
    text: Path, output: Path, num_processes: int, encode: Callable[[list[str]], list[list[int]]]
) -> dict[str, float]:
    """`datasets.map`, which writes an Arrow file. `map_seconds` leaves out load_dataset, which parses the JSON."""
    import datasets

    datasets.disable_progress_bars()
    started_at = time.perf_counter()
    files = [str(path) for path in sorted(text.glob("*.jsonl"))]
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(output))
    map_at = time.perf_counter()
    mapped = loaded.map(
        lambda batch: {"input_ids": encode(batch["text"])},
        batched=True,
        num_proc=num_processes,
        remove_columns=loaded.column_names,
    )
    ended_at = time.perf_counter()
    tokens = sum(len(chunk.values) for chunk in _chunks(mapped))
    return {"seconds": ended_at - started_at, "map_seconds": ended_at - map_at, "tokens": tokens}


def _chunks(mapped: Any) -> list[Any]:
    return mapped.data.column("input_ids").chunks


def datasets_transformers(text: Path, output: Path, num_processes: int) -> dict[str, float]:
    """With the tokenizer as most scripts load it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER_PATH))
    end = load_tokenizer(TOKENIZER_PATH).eos_token_id

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
        return [[*ids, end] for ids in encoded["input_ids"]]

    return by_map(text, output, num_processes, encode)


def datasets_tokenizers(text: Path, output: Path, num_processes: int) -> dict[str, float]:
    """With the tokenizers library itself."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER_PATH))
    end = load_tokenizer(TOKENIZER_PATH).eos_token_id

    def encode(texts: list[str]) -> list[list[int]]:
        return [[*one.ids, end] for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return by_map(text, output, num_processes, encode)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended. On a machine that others use, they say more than a clock."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


METHODS = {one.__name__: one for one in (hypershard, datasets_transformers, datasets_tokenizers)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--num_processes", type=int, required=True)
    args = parser.parse_args()
    import datasets  # noqa: F401 (imports are not part of the work)
    import transformers  # noqa: F401

    before = cpu_seconds()
    found = METHODS[args.method](args.text, args.output, args.num_processes)
    print(json.dumps({**found, "cpu_seconds": cpu_seconds() - before}))
