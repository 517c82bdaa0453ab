"""The peer: Hugging Face Trainer with accelerate's FSDP2 on the same model, batches and optimizer. Run by torchrun."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Windows(Dataset):
    """Consecutive windows of one token file, as both sides read them."""

    def __init__(self, path: Path, context: int, count: int) -> None:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self._rows = torch.from_numpy(tokens[: count * context].astype(np.int64)).view(count, context)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


class Clock(TrainerCallback):
    """Seconds between the ends of optimizer steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def allow_fsdp_on_cpu() -> None:
    """accelerate shards with FSDP2 only where its table of devices says "multi GPU"; its code runs on gloo as well.

    Without this the Trainer silently trains with DDP on a CPU, which is other work.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    assert PartialState().distributed_type == DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=json.loads, required=True, help="LlamaConfig arguments as JSON")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--bf16", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = LlamaForCausalLM(LlamaConfig(**arguments.shape, attn_implementation="sdpa", use_cache=False))
    clock = Clock()
    settings = TrainingArguments(
        output_dir=str(arguments.output.parent / "hf"),
        per_device_train_batch_size=arguments.batch_size,
        max_steps=arguments.steps,
        learning_rate=1e-4,
        weight_decay=0.2,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=bool(arguments.bf16),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        fsdp=True,
        fsdp_config={
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        },
    )
    if settings.device.type == "cpu":  # reading the device is what starts the process group
        allow_fsdp_on_cpu()
    data = Windows(
        arguments.tokens, arguments.context, arguments.steps * arguments.batch_size * int(os.environ["WORLD_SIZE"])
    )
    trainer = Trainer(model=model, args=settings, train_dataset=data, callbacks=[clock])
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        sharded = any(type(p).__name__ == "DTensor" for p in trainer.model_wrapped.parameters())
        # The first entry counts from the clock's zero: it is no step's time.
        arguments.output.write_text(json.dumps({"seconds": clock.seconds[1:], "losses": losses, "fsdp2": sharded}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
