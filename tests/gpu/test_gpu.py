"""The numerics on one GPU: NCCL, bf16, compile, offload, adapters, checkpoints. Run by `make test-gpu`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf_folders import write_hf_folder
from tests.integration.processes import command, history
from tests.jobs import a_job, tiny, train_losses
from tests.rank_pool import RankPool
from tests.train.test_dpo import write_pairs
from tests.train.test_lora import bits

from hypershard.distributed.process_group import World
from hypershard.models.attention_modules import varlen_attention
from hypershard.train.attention import segments
from hypershard.train.state import Progress, advance
from hypershard.train.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
STEPS = 4
FAMILIES = ("tiny_llama", "tiny_mistral", "tiny_mixtral", "tiny_qwen2", "tiny_gpt2", "tiny_llama4")


@pytest.fixture(scope="module")
def gpu() -> Iterator[RankPool]:
    """One rank on the GPU, in an NCCL group."""
    pool = RankPool(1, gpu=True)
    yield pool
    pool.close()


def flags_of(model: str, **settings: Any) -> str:
    words = {"num_layers": 2, "max_context_width": 128, "train_batch_size": 4, "max_steps": 9, "lr": 0.001, "warmup": 0}
    return " ".join([f"--model {model}", *(f"--{name}={value}" for name, value in {**words, **settings}.items())])


def named(settings: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in settings.items())


@pytest.mark.parametrize("model", FAMILIES)
def test_float32_equals_the_cpu(
    pools: Callable[[int], RankPool], gpu: RankPool, cache_dir: Path, tmp_path: Path, model: str
) -> None:
    """The same weights, other kernels: 1e-5 at the first step, 1e-3 after AdamW has amplified it."""
    flags = flags_of(model, bf16=0)
    write_hf_folder(tmp_path / "hf", flags, cache_dir=cache_dir)
    on_cpu, on_gpu = (
        pool.run(train_losses, f"{flags} --init_from {tmp_path / 'hf'}", cache_dir, STEPS)[0]
        for pool in (pools(1), gpu)
    )
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-5)
    assert [loss for loss, _ in on_gpu] == pytest.approx([loss for loss, _ in on_cpu], rel=1e-3)


@pytest.mark.parametrize("model", FAMILIES)
def test_bf16_stays_close_to_float32(gpu: RankPool, cache_dir: Path, model: str) -> None:
    """8 bits of mantissa: losses within 1%. Routers may send a token elsewhere, so experts get 2%."""
    exact = gpu.run(train_losses, flags_of(model, bf16=0), cache_dir, STEPS)[0]
    found = gpu.run(train_losses, flags_of(model, bf16=1), cache_dir, STEPS)[0]
    allowed = 0.02 if model in ("tiny_mixtral", "tiny_llama4") else 0.01
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in exact], rel=allowed)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"offload_activations": 1},
        {"cpu_offload": 1},
        {"activation_checkpointing": "full", "offload_activations": 1, "cpu_offload": 1},
        {"compile": 1},
        {"compile": 1, "activation_checkpointing": "selective"},
        {"sharding_strategy": "zero1", "train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"sharding_strategy": "none"},
    ],
    ids=named,
)
def test_what_trades_memory_or_time_changes_only_rounding(gpu: RankPool, cache_dir: Path, settings: dict) -> None:
    """float32, one layout: 1e-5 at step 1 (fused kernels round otherwise), 1e-3 after AdamW has amplified it."""
    plain = gpu.run(train_losses, tiny(), cache_dir, STEPS)[0]
    found = gpu.run(train_losses, tiny(**settings), cache_dir, STEPS)[0]
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in plain], rel=1e-3)


# --- adapters beside frozen weights, and preferences


LORA = {"lora_r": 8, "lr": 0.01}
NF4 = {**LORA, "bnb_quant_type": "nf4"}
# So slow that the loss stays far from zero, where it has no digits to compare.
DPO = {"objective": "dpo", "dataset": "{pairs}", "lr": 0.001, "num_layers": 1}


def adapter_losses(world: World, flags: str, cache_dir: Path) -> tuple[list[float], bool]:
    """Losses of STEPS steps, and whether every bit of the frozen weights is what it was.

    Adapters' numbers are drawn on the host, since a GPU's generators give others, and none is zero.
    """
    with a_job(world, flags, cache_dir) as job:
        for number, name in enumerate(sorted(job.parameters)):
            local = job.parameters[name].detach().to_local()  # type: ignore[attr-defined]
            local.copy_(torch.randn(local.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
        assert all("lora_" in name for name in job.parameters)
        before = [bits(one).clone() for one in job.module.hf_model.parameters() if not one.requires_grad]
        progress, losses = Progress(), []
        for _ in range(STEPS):
            report = train_step(job, progress, flags=tuple)
            progress = advance(progress, report, seconds=report.seconds)
            losses.append(report.loss)
        after = [bits(one) for one in job.module.hf_model.parameters() if not one.requires_grad]
        assert before
        return losses, all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def adapter_flags(folder: Path, cache_dir: Path, **settings: Any) -> str:
    """Beside weights of transformers' own, which are the same on every device."""
    shape = {name: settings[name] for name in ("model", "num_layers") if name in settings}
    write_hf_folder(folder / "hf", flags_of(**shape), cache_dir=cache_dir)
    flags = f"{flags_of(**settings)} --init_from {folder / 'hf'}"
    return flags.format(pairs=write_pairs(folder / "pairs.jsonl"))


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "tiny_llama", **LORA},
        {"model": "tiny_mixtral", **LORA},
        {"model": "tiny_llama", **NF4},
        {"model": "tiny_mixtral", **NF4},
        {"model": "tiny_llama4", **NF4},
        {"model": "tiny_llama", **LORA, **DPO},
        {"model": "tiny_llama", **NF4, **DPO},
    ],
    ids=named,
)
def test_adapters_in_float32_train_as_on_the_cpu(
    pools: Callable[[int], RankPool], gpu: RankPool, cache_dir: Path, tmp_path: Path, settings: dict
) -> None:
    """Experts multiply packed weights group by group; tolerances as of whole models."""
    flags = adapter_flags(tmp_path, cache_dir, bf16=0, **settings)
    (on_cpu, _), (on_gpu, is_unchanged) = (pool.run(adapter_losses, flags, cache_dir)[0] for pool in (pools(1), gpu))
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-5)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert is_unchanged and on_gpu[-1] < on_gpu[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "tiny_llama", **LORA},
        {"model": "tiny_llama", **NF4},
        {"model": "tiny_llama", **NF4, "compile": 1},
        {"model": "tiny_llama", **NF4, "compile": 1, "activation_checkpointing": "selective"},
        {"model": "tiny_mixtral", **NF4},
        {"model": "tiny_mixtral", **NF4, "compile": 1},
        {"model": "tiny_llama4", **NF4},
        {"model": "tiny_llama", **NF4, **DPO},
    ],
    ids=named,
)
def test_adapters_in_bf16_stay_close_to_float32(gpu: RankPool, cache_dir: Path, tmp_path: Path, settings: dict) -> None:
    """Within 1%, with experts 2%, as whole models are."""
    flags = adapter_flags(tmp_path, cache_dir, **settings)
    exact = gpu.run(adapter_losses, f"{flags} --bf16 0 --compile 0 --activation_checkpointing none", cache_dir)[0][0]
    found, is_unchanged = gpu.run(adapter_losses, f"{flags} --bf16 1", cache_dir)[0]
    assert found == pytest.approx(exact, rel=0.01 if settings["model"] == "tiny_llama" else 0.02)
    assert is_unchanged and found[-1] < found[0]


# --- attention without a mask


LENGTHS = ([200, 1, 311], [512])


def packed(*, num_key_value_heads: int, width: int) -> list[torch.Tensor]:
    """query (8 heads), key, value [2, heads, 512, width] in bf16 on the GPU, in memory as projections leave them."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 512, heads, width, generator=generator).to("cuda", torch.bfloat16).transpose(1, 2)
        for heads in (8, num_key_value_heads, num_key_value_heads)
    ]


def attended(states: list[torch.Tensor], window: int | None) -> torch.Tensor:
    """Attention inside the documents of LENGTHS, [2, 512, 8, width]."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    documents = segments(positions, chunk_tokens=None, device=states[0].device)
    options = {"documents": documents, "scaling": 0.125, "sliding_window": window}
    return varlen_attention(torch.nn.Module(), *states, None, **options)[0]


def attended_and_gradients(states: list[torch.Tensor], window: int | None) -> list[torch.Tensor]:
    """The result and the gradients of query, key and value under fixed weights, float32 on the CPU."""
    leaves = [tensor.detach().requires_grad_() for tensor in states]
    mixed = attended(leaves, window)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(mixed)
    found = torch.autograd.grad(mixed, leaves, weights)
    return [tensor.detach().float().cpu() for tensor in (mixed, *found)]


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(("num_key_value_heads", "width"), [(8, 64), (2, 128)])
def test_the_kernel_equals_the_loop_over_documents(num_key_value_heads: int, width: int, window: int | None) -> None:
    """bf16 against float32 from the same bf16 inputs. Results and probabilities are rounded to 8 bits (2^-9 each):
    1% of the whole, and for single results 4 times that of the largest. Forward and backward, grouped heads too."""
    on_gpu = packed(num_key_value_heads=num_key_value_heads, width=width)
    on_cpu = [states.float().cpu() for states in on_gpu]
    pairs = zip(attended_and_gradients(on_gpu, window), attended_and_gradients(on_cpu, window), strict=True)
    for found, expected in pairs:
        assert (found - expected).norm() < 0.01 * expected.norm()
        assert (found - expected).abs().max() < 0.04 * expected.abs().max()


def test_no_document_sees_another_through_the_kernel() -> None:
    """Results of untouched documents keep every bit, and what backward sends into other documents is exactly zero."""
    states = packed(num_key_value_heads=2, width=64)
    before = attended(states, None)
    changed = [tensor.clone() for tensor in states]
    for tensor in changed:
        tensor[0, :, :200] += 1
    after = attended(changed, None)
    assert not torch.equal(after[0, :200], before[0, :200])
    assert torch.equal(after[0, 200:], before[0, 200:])
    assert torch.equal(after[1], before[1])
    leaves = [tensor.detach().requires_grad_() for tensor in states]
    for gradient in torch.autograd.grad(attended(leaves, None)[0, 201:].float().sum(), leaves):
        assert gradient[0, :, 201:].any()
        assert not gradient[0, :, :201].any()
        assert not gradient[1].any()


def test_no_mask_is_allocated() -> None:
    """16,384 tokens in one row: forward and backward of one layer stay below a mask's T^2 bytes (256 MiB)."""
    context, heads, width = 16_384, 4, 64
    positions = (torch.arange(context) % 256)[None]
    states = [torch.randn(1, heads, context, width, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for tensor in states:
        tensor.requires_grad_()
    borders = segments(positions, chunk_tokens=None, device=torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mixed, _ = varlen_attention(torch.nn.Module(), *states, None, documents=borders, scaling=0.125)
    mixed.backward(torch.randn_like(mixed))
    assert torch.cuda.max_memory_allocated() - before < context**2


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": "selective"}, {"compile": 1}], ids=str)
@pytest.mark.parametrize("model", FAMILIES)
def test_trains_as_with_a_mask(gpu: RankPool, cache_dir: Path, model: str, settings: dict) -> None:
    """bf16, other kernels: within 1% (experts 2%), as bf16 is to float32."""
    dense = gpu.run(train_losses, flags_of(model, bf16=1, attention="dense"), cache_dir, STEPS)[0]
    found = gpu.run(train_losses, flags_of(model, bf16=1, attention="varlen", **settings), cache_dir, STEPS)[0]
    allowed = 0.02 if model in ("tiny_mixtral", "tiny_llama4") else 0.01
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in dense], rel=allowed)


def train_on_gpu(**flags: Any) -> subprocess.CompletedProcess[str]:
    words = command(nproc_per_node=1, **flags)
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=dict(os.environ), check=False)


def test_resumes_bit_for_bit_and_exports(tmp_path: Path) -> None:
    flags = {"bf16": 1, "max_context_width": 256, "deterministic": 1}
    whole = train_on_gpu(run_dir=tmp_path / "whole", **flags)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "whole" / "checkpoints" / "step-00000008"
    resumed = train_on_gpu(run_dir=tmp_path / "resumed", resume_from_checkpoint=folder, **flags)
    assert resumed.returncode == 0, resumed.stderr
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")[8:]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["mfu"] < 1 for line in lines if line.get("mfu") is not None)
    output = tmp_path / "model"
    words = [sys.executable, "-m", "hypershard.cli.main", "checkpoint", "export", str(tmp_path / "whole")]
    subprocess.run([*words, "--output", str(output)], check=True, timeout=120)
    assert (output / "model.safetensors").exists()


def test_out_of_memory_comes_before_the_first_step_and_names_the_flags(tmp_path: Path) -> None:
    done = train_on_gpu(run_dir=tmp_path / "run", train_batch_size=400_000, max_context_width=256)
    assert done.returncode == 1
    assert "out of GPU memory" in done.stderr and "--train_batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not history(tmp_path / "run")
