"""Traces for tests/dry_run, in a process of their own, since it takes itself for one rank of many.

`python -m tests.dry_run_cases` prints one JSON object: what each case found, by its name.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hypershard.dry_run.allocator import Event, replay
from hypershard.dry_run.trace import Question, events_of, trace
from hypershard.models.family import family_of
from hypershard.parallel.apply import apply
from hypershard.parallel.fsdp import ShardedModule
from hypershard.plan.job import Job
from hypershard.train import setup
from hypershard.train.loss import LanguageModel
from tests.plan_jobs import job_of

ONE_B = {"max_context_width": 2048, "activation_checkpointing": "full", "document_mask": False}
EIGHT_B = {**ONE_B, "max_context_width": 8192, "train_batch_size": 2, "activation_checkpointing": "selective"}
SHALLOW = {**ONE_B, "num_layers": 2}
STRATEGIES = ("full", "hybrid", "zero1", "zero2", "none")
TINY = {"vocab_size": 512, "max_context_width": 64, "max_position_embeddings": 64}
# Layers so many that some are repeated; what they are trained with differs from family to family.
REPEATED: dict[str, dict[str, Any]] = {
    "tiny_llama2": {"num_layers": 9, "activation_checkpointing": "full"},
    "tiny_qwen2": {"num_layers": 8, "sharding_strategy": "zero2", "gradient_accumulation_steps": 3},
    "tiny_mixtral": {"num_layers": 7, "activation_checkpointing": "selective", "cpu_offload": True},
    "tiny_gpt2": {"num_layers": 7, "sharding_strategy": "hybrid", "offload_activations": True},
    "tiny_llama4": {"num_layers": 25, "attention_chunk_size": 16, "sharding_strategy": "zero1"},
}
# The same with adapters beside frozen weights, the embedding among them; few, since each costs a trace much time.
LORA = {"lora_r": 16}
REPEATED_LORA: dict[str, dict[str, Any]] = {
    "tiny_llama2": {
        **LORA,
        "lora_targets": "q_proj,down_proj",
        "num_layers": 7,
        "activation_checkpointing": "full",
        "gradient_accumulation_steps": 3,
    },
    "tiny_mixtral": {
        **LORA,
        "lora_targets": "q_proj,experts.down_proj",
        "num_layers": 7,
        "activation_checkpointing": "selective",
        "sharding_strategy": "zero2",
    },
}
# A published model with adapters, on eight H100s.
LARGE_LORA: dict[str, dict[str, Any]] = {
    "llama3_1_8b": {**LORA, "max_context_width": 8192, "activation_checkpointing": "full"},
}


class WholeLogits(nn.Module):
    """The model under transformers' own loss, which holds the logits of all tokens."""

    statistics = ()
    num_terms = staticmethod(LanguageModel.num_terms)

    def __init__(self, hf_model: nn.Module) -> None:
        super().__init__()
        self.hf_model = hf_model

    def forward(self, input_ids: Any, labels: Any, position_ids: Any, segments: Any) -> Any:
        inputs = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, **segments}
        return torch.stack([self.hf_model(**inputs, use_cache=False).loss])


def with_whole_logits(
    config: Any, model: Any, attention: Any, world: Any, *, samples_per_step: int
) -> tuple[nn.Module, ShardedModule]:
    family = family_of(model.model_type)
    hf_model = family.build(model, path=attention.path)
    mesh = setup.build_mesh("full", world_size=world.size, hybrid_shard_degree=8, device_type="cpu")
    root = WholeLogits(hf_model)
    blocks = family.blocks(hf_model)
    return root, apply(root, blocks, mesh=mesh, parallel=config.parallel, device=world.device)


def question_of(job: Job) -> Question:
    if dist.is_initialized():
        dist.destroy_process_group()  # each case has a world of its own
    return Question(
        config=setup.Config(model=job.model, data=job.data, parallel=job.parallel, adapters=job.adapters),
        num_gpus=job.num_gpus,
        gpus_per_node=job.instance.num_gpus,
        accumulation=job.accumulation,
        attention_path=job.attention_path,
    )


def numbers(events: list[Event]) -> dict[str, Any]:
    expandable, classic = replay(events, expandable=True), replay(events, expandable=False)
    top = max(expandable.windows, key=lambda window: window.in_use_bytes)
    return {
        "active": top.in_use_bytes,
        "peak": top.name,
        "categories": top.categories,
        "reserved": expandable.reserved_bytes,
        "classic": classic.reserved_bytes,
    }


def whole_logits(model: str, num_nodes: int, **flags: Any) -> dict[str, Any]:
    return numbers(events_of(question_of(job_of(model, "p5", num_nodes, **flags)), build=with_whole_logits))


def at_start(**flags: Any) -> dict[str, int]:
    """Bytes of weights and of moments before the first step, without what the allocator rounds up."""
    found = {"weights": 0, "optimizer": 0}
    for event in events_of(question_of(job_of("llama3_2_1b", "p5", 2, **SHALLOW, **flags))):
        if event.window == "start" and event.category in found:
            found[event.category] += event.num_bytes if event.is_new else -event.num_bytes
    return found


def both_ways(model: str, **flags: Any) -> list[Any]:
    """Layers repeated, and all traced; without the optimizer's step, where numbers of 8 bytes are not repeated."""
    question = question_of(job_of(model, "p5", 1, **TINY, **flags))
    found = []
    for events in (events_of(question), trace(question, build=setup.build_module, period=1)[0]):
        played = replay(events, expandable=True)
        windows = [dataclasses.asdict(one) for one in played.windows if one.name != "optimizer's step"]
        found.append({"reserved": played.reserved_bytes, "windows": windows})
    return found


def cases() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for depth in (2, 4, 8, 16):
        found[f"1b/{depth}"] = lambda depth=depth: whole_logits("llama3_2_1b", 1, **ONE_B, num_layers=depth)
    for num_nodes in (1, 16):
        found[f"8b/{8 * num_nodes}"] = lambda nodes=num_nodes: whole_logits("llama3_1_8b", nodes, **EIGHT_B)
    found["1b/ours"] = lambda: numbers(events_of(question_of(job_of("llama3_2_1b", **ONE_B))))
    for strategy in STRATEGIES:
        found[f"start/{strategy}"] = lambda strategy=strategy: at_start(sharding_strategy=strategy)
    for model, flags in REPEATED.items():
        found[model] = lambda model=model, flags=flags: both_ways(model, **flags)
    for model, flags in REPEATED_LORA.items():
        found[f"lora/{model}"] = lambda model=model, flags=flags: both_ways(model, **flags)
    for model, flags in LARGE_LORA.items():
        found[f"lora/{model}"] = lambda model=model, flags=flags: numbers(
            events_of(question_of(job_of(model, **flags)))
        )
    return found


if __name__ == "__main__":
    json.dump({name: case() for name, case in cases().items()}, sys.stdout)
