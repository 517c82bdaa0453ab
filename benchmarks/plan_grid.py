"""Closed-form memory against the traced one on 40 configurations: `python benchmarks/plan_grid.py`.

Needs no GPU. Answers are kept (in ~/.cache/hypershard/traced, by configuration and code), so a second run is quick.
Writes benchmarks/results/plan_grid.json and the table src/hypershard/plan/GRID.md.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_file import save

from hypershard.catalog.instances import instance
from hypershard.config.schema import Config
from hypershard.config.sources import Layer, read_yaml, resolve
from hypershard.models.family import family_of
from hypershard.models.files import model_file
from hypershard.plan import bytes as memory
from hypershard.plan.job import Job
from hypershard.plan.traced import traced_memory

PAGE = Path(__file__).parents[1] / "src" / "hypershard" / "plan" / "GRID.md"
CACHE = Path("~/.cache/hypershard/traced").expanduser()
TARGET = 0.12

SELECTIVE, FULL = {"activation_checkpointing": "selective"}, {"activation_checkpointing": "full"}
ACCUMULATES = {"gradient_accumulation_steps": 4}


def tokens(context: int, batch: int = 1) -> dict[str, int]:
    return {"max_context_width": context, "train_batch_size": batch}


# model, instance, nodes, flags
GRID: tuple[tuple[str, str, int, Mapping[str, Any]], ...] = (
    ("llama3_2_1b", "p5", 1, tokens(2048)),
    ("llama3_2_1b", "p5", 1, tokens(2048) | FULL),
    ("llama3_2_1b", "p5", 1, tokens(8192, 2) | SELECTIVE),
    ("llama3_2_1b", "p5", 1, tokens(4096, 4) | {"sharding_strategy": "none"}),
    ("llama3_2_1b", "g5.12xlarge", 1, tokens(2048) | FULL | {"sharding_strategy": "zero2"} | ACCUMULATES),
    ("llama3_2_1b", "p5", 8, tokens(4096, 2) | {"sharding_strategy": "hybrid"}),
    ("llama3_2_1b", "p5", 1, tokens(2048, 2) | {"bf16": False}),
    ("llama3_2_1b", "p5", 1, tokens(2048, 2) | {"attention": "dense"}),
    ("llama3_2_3b", "p5", 1, tokens(4096, 2)),
    ("llama3_2_3b", "p5", 1, tokens(8192) | FULL | {"sharding_strategy": "zero2"}),
    ("llama3_2_3b", "p5", 2, tokens(8192) | SELECTIVE | {"sharding_strategy": "hybrid"} | ACCUMULATES),
    ("llama3_2_3b", "g6e.12xlarge", 1, tokens(4096) | SELECTIVE | {"sharding_strategy": "zero1"} | ACCUMULATES),
    ("llama3_2_3b", "g5.12xlarge", 1, tokens(4096) | FULL | {"offload_activations": True}),
    ("llama3_1_8b", "p5", 1, tokens(8192)),
    ("llama3_1_8b", "p5", 1, tokens(8192, 2) | SELECTIVE),
    ("llama3_1_8b", "p5", 16, tokens(8192, 2) | SELECTIVE),
    ("llama3_1_8b", "p5", 1, tokens(8192, 4) | FULL),
    ("llama3_1_8b", "p5", 1, tokens(2048) | FULL),
    ("llama3_1_8b", "p5", 4, tokens(4096, 2) | {"sharding_strategy": "zero2"} | ACCUMULATES),
    ("llama3_1_8b", "p5", 4, tokens(4096, 2) | SELECTIVE | {"sharding_strategy": "hybrid"} | ACCUMULATES),
    ("llama3_1_8b", "g5.48xlarge", 1, tokens(4096) | FULL | {"cpu_offload": True}),
    ("llama3_1_8b", "g5.48xlarge", 1, tokens(4096) | FULL | {"offload_activations": True}),
    ("llama3_1_8b", "p5", 1, tokens(4096) | FULL | {"sharding_strategy": "none"}),
    ("llama3_1_8b", "p5", 1, tokens(4096) | SELECTIVE | {"attention": "dense"}),
    ("llama2_13b", "p4de", 1, tokens(4096) | SELECTIVE),
    ("llama2_13b", "p4de", 1, tokens(4096, 2) | FULL),
    ("llama2_13b", "p4de", 2, tokens(4096)),
    ("llama2_13b", "p4de", 2, tokens(4096) | FULL | {"sharding_strategy": "hybrid"} | ACCUMULATES),
    ("llama3_1_70b", "p5", 8, tokens(8192) | FULL),
    ("llama3_1_70b", "p5", 16, tokens(4096) | SELECTIVE),
    ("llama3_1_70b", "p5", 4, tokens(8192) | FULL | {"offload_activations": True}),
    ("mixtral_8x7b", "p5", 4, tokens(4096) | FULL),
    ("mixtral_8x7b", "p5", 8, tokens(4096) | SELECTIVE),
    ("mixtral_8x7b", "p5", 8, tokens(4096)),
    ("deepseek_r1_distill_qwen_32b", "p5", 4, tokens(8192) | FULL),
    ("deepseek_r1_distill_qwen_32b", "p5", 4, tokens(4096) | SELECTIVE),
    ("gpt2_1_36b", "g5.12xlarge", 1, tokens(1024, 2)),
    ("gpt2_1_36b", "g5.12xlarge", 1, tokens(1024, 8) | FULL),
    ("llama4_scout_17b_16e", "p5", 8, tokens(8192) | FULL),
    ("llama4_scout_17b_16e", "p5", 8, tokens(8192) | SELECTIVE),
)


@dataclass(frozen=True)
class Row:
    """One configuration: bytes needed and most in use at once, by the closed form and traced."""

    name: str
    closed_needed: float
    closed_active: float
    traced_needed: float
    traced_active: float
    traced_peak: str
    dominant: str

    @property
    def error(self) -> float:
        return self.closed_needed / self.traced_needed - 1

    @property
    def active_error(self) -> float:
        return self.closed_active / self.traced_active - 1


def job_of(model: str, where: str, num_nodes: int, flags: Mapping[str, Any]) -> Job:
    config: Config = resolve(
        Layer("model file", read_yaml(model_file(model))[0]), Layer("flag", dict(flags), is_flags=True)
    ).config
    return Job(
        model=family_of(config.model.model_type).complete(config.model),
        data=config.data,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
        train=config.train,
        instance=instance(where),
        num_nodes=num_nodes,
    )


def name_of(model: str, where: str, num_nodes: int, flags: Mapping[str, Any]) -> str:
    short = {"max_context_width": "", "train_batch_size": "x", "activation_checkpointing": "AC "}
    said = [f"{short.get(name, name + '=')}{value}" for name, value in flags.items()]
    return f"{model}, {num_nodes} x {where}: {' '.join(said)}"


def row_of(model: str, where: str, num_nodes: int, flags: Mapping[str, Any]) -> Row:
    job = job_of(model, where, num_nodes, flags)
    moments = memory.gpu_moments(job)
    traced = traced_memory(job, cache_dir=CACHE, timeout_seconds=600)
    return Row(
        name=name_of(model, where, num_nodes, flags),
        closed_needed=memory.gpu_fit(job, moments).needed_bytes,
        closed_active=memory.peak(moments).num_bytes,
        traced_needed=traced.needed_bytes,
        traced_active=traced.active_bytes,
        traced_peak=traced.peak.name,
        dominant=traced.dominant,
    )


def cells(row: Row) -> list[str]:
    gib = [f"{value / memory.GIB:.1f}" for value in (row.closed_needed, row.traced_needed)]
    active = [f"{value / memory.GIB:.1f}" for value in (row.closed_active, row.traced_active)]
    where = f"{row.traced_peak}, {row.dominant}"
    return [row.name, *gib, f"{row.error:+.1%}", *active, f"{row.active_error:+.1%}", where]


def page(rows: list[Row], summary: str) -> str:
    """The table as Markdown."""
    head = ["configuration", "needed: closed", "traced", "error", "in use: closed", "traced", "error", "peak"]
    lines = [head, ["---", *["---:"] * 6, "---"], *(cells(row) for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        "# Closed form against trace\n\n"
        "Made by `python benchmarks/plan_grid.py`; GiB of the fullest GPU. Needed is what the allocator reserves, with "
        "1.5 GiB\noutside torch; in use is the most at once.\n\n"
        f"{summary}\n\n{table}\n"
    )


def main() -> None:
    rows = []
    for entry in GRID:
        row = row_of(*entry)
        rows.append(row)
        print("  ".join(cells(row)), file=sys.stderr, flush=True)
    errors = [abs(row.error) for row in rows]
    within = sum(error <= TARGET for error in errors)
    summary = (
        f"{within} of {len(rows)} within {TARGET:.0%}; mean absolute error {statistics.mean(errors):.1%}, "
        f"worst {max(errors):.1%}."
    )
    print(summary)
    PAGE.write_text(page(rows, summary))
    print(save("plan_grid", {"summary": summary, "rows": [vars(row) | {"error": row.error} for row in rows]}))


if __name__ == "__main__":
    main()
