"""One question as JSON on stdin, its answer as the last line on stdout: `python -m hypershard.dry_run`.

A process of its own, because it takes itself for one of many ranks, and because torch ends a process that asks a device
it does not have. Who asks is plan/traced.py, which knows no torch.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ..config.schema import AdapterConfig, Config, DataConfig, ModelConfig, ParallelConfig


def main() -> None:
    asked = json.loads(sys.stdin.read())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing is computed
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print(json.dumps(answer(asked)))


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a GPU: reserved after all, in use at most, and each part's most in use by what it is for."""
    from .allocator import replay
    from .trace import Question, events_of

    question = Question(
        config=Config(
            model=ModelConfig(**asked["model"]),
            data=DataConfig(**asked["data"]),
            parallel=ParallelConfig(**asked["parallel"]),
            adapters=AdapterConfig(**asked["adapters"]),
        ),
        num_gpus=asked["num_gpus"],
        gpus_per_node=asked["gpus_per_node"],
        accumulation=asked["accumulation"],
        attention_path=asked["attention_path"],
    )
    replayed = replay(events_of(question), expandable=True)  # as launch/environment.py sets it
    windows = replayed.windows
    return {
        "reserved_bytes": replayed.reserved_bytes,
        "active_bytes": max(window.in_use_bytes for window in windows),
        "moments": {window.name: window.categories for window in windows},
        "stream_bytes": {
            stream: max(window.stream_bytes.get(stream, 0) for window in windows)
            for stream in sorted({name for window in windows for name in window.stream_bytes})
        },
    }


if __name__ == "__main__":
    main()
