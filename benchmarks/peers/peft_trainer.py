"""The peer: Hugging Face Trainer with PEFT's LoRA beside dense weights or bitsandbytes' NF4, on one device."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from hf_trainer import Clock, Windows
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=json.loads, required=True, help="what to train, as fine_tune.py writes it")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    job: dict[str, Any] = arguments.job
    model = adapted(job)
    clock = Clock()
    settings = TrainingArguments(
        output_dir=str(arguments.output.parent / "hf"),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"],
        learning_rate=1e-4,
        weight_decay=0.2,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=job["bf16"],
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=job["recompute"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if job["recompute"] else None,
        torch_compile=job["compile"],
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
    )
    data = Windows(arguments.tokens, job["context"], job["steps"] * job["batch_size"])
    trainer = Trainer(model=model, args=settings, train_dataset=data, callbacks=[clock])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    memory = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    result = {"seconds": clock.seconds[1:], "losses": losses, "memory_bytes": memory, "trained": trained}
    arguments.output.write_text(json.dumps(result))


def adapted(job: dict[str, Any]) -> nn.Module:
    """A model of random weights with adapters on every matrix of its blocks."""
    from peft import LoraConfig, get_peft_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if job["bf16"] else torch.float32
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(LlamaConfig(**job["shape"], attn_implementation="sdpa", use_cache=False))
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if job["nf4"]:
        hold_in_nf4(model.model, dtype, device)
    if job["recompute"]:
        model.enable_input_require_grads()
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def hold_in_nf4(model: nn.Module, dtype: torch.dtype, device: str) -> None:
    """As transformers does while it loads a model with BitsAndBytesConfig, for one that is already there."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is not nn.Linear:
                continue
            assert child.bias is None
            packed = Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            packed.weight = Params4bit(
                child.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            setattr(owner, name, packed.to(device))


if __name__ == "__main__":
    main()
