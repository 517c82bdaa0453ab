"""Closed-form memory against torch's own saved tensors, published readings, and cases worked out by hand."""

import dataclasses
from typing import Any

import pytest
import torch
from tests.plan_jobs import job_of as job
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hypershard.checkpoint import memory as checkpoint_memory
from hypershard.models.family import family_of
from hypershard.parallel.activation import _ALWAYS_KEPT, _MATRIX_PRODUCTS
from hypershard.parallel.init import materialise
from hypershard.plan import bytes as memory
from hypershard.plan.job import Job, sizes_of
from hypershard.train import loss

TOKENS = 64
FAMILIES = ("tiny_llama2", "tiny_mistral", "tiny_qwen2", "tiny_mixtral", "tiny_llama4", "tiny_gpt2")


def small(name: str, **flags: Any) -> Job:
    """A tiny model with as many key heads as heads: a CPU's attention would copy them, which a GPU's does not."""
    heads = {"num_key_value_heads": 4} if name != "tiny_gpt2" else {}
    sizes = {"vocab_size": 512, "max_context_width": TOKENS, "max_position_embeddings": TOKENS, "num_layers": 2}
    return job(name, **sizes, **heads, **flags)


def run_first_block(planned: Job, around: Any) -> None:
    """Forward of the real model in bfloat16, its first block inside `around()`."""
    family = family_of(planned.model.model_type)
    module = family.build(planned.model)
    materialise(module, parameter_device=torch.device("cpu"), buffer_device=torch.device("cpu"))
    module.to(torch.bfloat16 if planned.parallel.bf16 else torch.float32)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    block: Any = family.blocks(module)[0]
    forward = block.forward

    def watched(*args: Any, **options: Any) -> Any:
        with around():
            return forward(*args, **options)

    block.forward = watched
    positions = torch.arange(TOKENS).unsqueeze(0)
    module(input_ids=torch.randint(512, (1, TOKENS)), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_block_saves_is_what_autograd_saves(name: str, bf16: bool) -> None:
    planned = small(name, bf16=bf16, document_mask=False)  # of one document, which takes no mask
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Weights stay anyway; positions' sines and a chunk's mask are made once for all blocks.
        is_weight = isinstance(tensor._base if tensor._base is not None else tensor, nn.Parameter)
        is_shared = tensor.is_complex() or (tensor.shape[:2] == (1, 1) and tensor.shape[2:3] == (TOKENS,))
        if not is_weight and not is_shared:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    run_first_block(planned, lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
    expected = sum(saved.values()) / TOKENS
    # Experts' indices and GPT-2's means differ by some bytes.
    assert memory.saved_by_token(planned).whole == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_selective_keeps_the_products_that_the_policy_keeps(name: str) -> None:
    """The operations of a real forward, through parallel/activation.py's own lists and its every-second rule."""
    planned = small(name, activation_checkpointing="selective")
    kept_bytes, num_products = 0, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal kept_bytes, num_products
            result = func(*args, **(kwargs or {}))
            num_products += func in _MATRIX_PRODUCTS
            if func in _ALWAYS_KEPT or (func in _MATRIX_PRODUCTS and num_products % 2 == 1):
                results = result if isinstance(result, tuple) else (result,)
                kept_bytes += sum(one.nbytes for one in results if isinstance(one, torch.Tensor))
            return result

    run_first_block(planned, Watch)
    block_input = 2 * planned.model.hidden_width
    assert memory.saved_by_token(planned).kept == pytest.approx(kept_bytes / TOKENS + block_input, rel=0.001)


def test_saved_bytes_of_llama_3_2_1b_are_the_published_trace() -> None:
    """torch's tracker: 108,680 bytes a token and block without checkpointing; 4,096 with (facts of the 1B proof)."""
    assert memory.saved_by_token(job("llama3_2_1b")).whole == 108_680
    full = memory.saved_by_token(job("llama3_2_1b", activation_checkpointing="full"))
    assert (full.kept, full.on_host) == (4096, 0)


def with_whole_logits(planned: Job) -> tuple[memory.Moment, ...]:
    """The job's moments with a loss that holds all logits, as the published runs' did: 12 bytes each."""
    whole = memory.Term("logits", 3 * 4 * planned.micro_tokens * (planned.model.vocab_size or 0))
    moments = [
        dataclasses.replace(moment, terms=tuple(whole if term.name == "logits" else term for term in moment.terms))
        for moment in memory.gpu_moments(planned)
    ]
    assert sum(whole in moment.terms for moment in moments) == 1
    return tuple(moments)


@pytest.mark.parametrize(("num_nodes", "measured_gib"), [(1, 82.4), (16, 67.0)])
def test_published_readings_of_torchtitan(num_nodes: int, measured_gib: float) -> None:
    """Llama-3.1-8B, batch 2 x 8,192, selective, eager (torchtitan benchmarks/llama3_h100_202412): reserved memory."""
    planned = job("llama3_1_8b", "p5", num_nodes, train_batch_size=2, activation_checkpointing="selective")
    assert memory.reserved_bytes(with_whole_logits(planned)) / memory.GIB == pytest.approx(measured_gib, rel=0.02)


def test_the_replayed_trace_of_llama_3_2_1b() -> None:
    """Context 2,048, full checkpointing, 8 GPUs: allocator replay says 7,366 MiB reserved, the tracker 632 gathered."""
    planned = job("llama3_2_1b", max_context_width=2048, activation_checkpointing="full")
    assert memory.reserved_bytes(with_whole_logits(planned)) / 2**20 == pytest.approx(7366, rel=0.02)
    gathered = memory.gpu_moments(planned)[1].reserved_in("gather") / memory.FRAGMENTATION
    assert gathered / 2**20 == pytest.approx(632, rel=0.005)


@pytest.mark.parametrize(("kind", "batch", "ran"), [("full", 2, True), ("selective", 2, False), ("selective", 1, True)])
def test_runs_of_torchtitan_that_ran_and_one_that_ran_out_of_memory(kind: str, batch: int, ran: bool) -> None:
    """Llama-2-70B, 4,096 tokens, on 64 A100 with 80 GB (torchtitan's table of 2024)."""
    planned = job("llama2_70b", "p4de", 8, train_batch_size=batch, activation_checkpointing=kind)
    fit = memory.gpu_fit(planned, with_whole_logits(planned))
    assert (fit.verdict != "does not fit") == ran


def test_verdicts() -> None:
    """Needed, and at least: 92 % of what is usable still fits, more is tight while the least has room."""
    cases = {(92, 92): "fits", (93, 93): "tight", (110, 100): "tight", (110, 101): "does not fit"}
    for (needed, least), verdict in cases.items():
        assert memory.Fit("a GPU's memory", needed, least, 100).verdict == verdict


def test_static_bytes_by_hand() -> None:
    """12 bytes a parameter over the GPUs: 8,030,261,248 x 12 / 8; all of it on the host with --cpu_offload."""
    start = memory.gpu_moments(job("llama3_8b"))[0]
    assert start.num_bytes == pytest.approx(8_030_261_248 * 12 / 8, rel=1e-6)
    offloaded = job("llama3_8b", cpu_offload=True)
    assert memory.gpu_moments(offloaded)[0].num_bytes == 0
    host = {term.name: term.num_bytes for term in memory.host_terms(offloaded)}
    assert host["weights, gradients, optimizer"] == pytest.approx(8_030_261_248 * 16, rel=1e-6)


def test_shards_count_whole_rows() -> None:
    sizes = sizes_of(small("tiny_llama2").model)
    # A norm's 128 numbers over 100 GPUs: the fullest have 2 rows each, not 1.28.
    assert sizes.shapes[128,] == 5
    assert sizes.shard(1) == sizes.total
    assert sizes.shard(100) > sizes.total / 100


def test_shards_of_experts_fewer_than_the_gpus_are_even() -> None:
    """Mixtral's 8 experts over 64 GPUs: by whole experts one GPU in eight would hold them all."""
    sizes = sizes_of(job("mixtral_8x7b", num_nodes=8).model)
    assert sizes.shard(64) == pytest.approx(sizes.total / 64, rel=1e-3)


def test_scout_in_bf16_is_217_gb_with_its_vision_and_its_text_alone_215_5() -> None:
    text = sizes_of(job("llama4_scout_17b_16e").model).total
    assert text * 2 / 1e9 == pytest.approx(215.5, abs=0.05)
    vision = 871_932_416  # tower and projector, which are not trained here
    assert (text + vision) * 2 / 1e9 == pytest.approx(217, abs=0.5)


def peak_bytes(**flags: Any) -> float:
    return memory.reserved_bytes(memory.gpu_moments(job("llama3_8b", **flags)))


def test_what_must_grow_grows_and_what_must_shrink_shrinks() -> None:
    kinds = [peak_bytes(activation_checkpointing=kind) for kind in ("none", "selective", "full")]
    assert kinds == sorted(kinds, reverse=True) and len(set(kinds)) == 3
    contexts = [peak_bytes(max_context_width=tokens) for tokens in (1024, 2048, 4096, 8192)]
    assert contexts == sorted(contexts)
    strategies = [peak_bytes(sharding_strategy=name) for name in ("full", "zero2", "none")]
    assert strategies == sorted(strategies)
    assert peak_bytes(num_nodes=4) < peak_bytes()
    assert peak_bytes(offload_activations=True) < peak_bytes()
    assert peak_bytes(cpu_offload=True) < peak_bytes()
    assert peak_bytes(bf16=False) > peak_bytes()
    # Gradients of earlier micro-steps are whole under zero1: 4 bytes for each of 8.03 billion parameters.
    zero1 = {"sharding_strategy": "zero1"}
    more = peak_bytes(**zero1, gradient_accumulation_steps=2) - peak_bytes(**zero1)
    assert more == pytest.approx(4 * 8_030_261_248, rel=0.01)


def test_hybrid_shards_over_a_node_and_none_over_nobody() -> None:
    assert job("llama3_8b", "p5", 4, sharding_strategy="hybrid").shard_degree == 8
    assert job("llama3_8b", "p5", 4, sharding_strategy="hybrid", hybrid_shard_degree=4).shard_degree == 4
    assert job("llama3_8b", "p5", 4, sharding_strategy="none").shard_degree == 1
    assert job("llama3_8b", "p5", 4).shard_degree == 32


def test_offload_moves_what_is_kept_but_not_selective_results() -> None:
    full = memory.saved_by_token(job("llama3_8b", activation_checkpointing="full", offload_activations=True))
    assert full.kept == full.on_host == 2 * 4096
    some = memory.saved_by_token(job("llama3_8b", activation_checkpointing="selective", offload_activations=True))
    assert some.on_host == 2 * 4096 < some.kept


def test_slots_and_copies_are_the_checkpoint_tiers_own() -> None:
    assert memory._COPY_SLOTS == checkpoint_memory._NUM_COPY_SLOTS
    assert memory.num_slots(job("llama3_8b")) == 3  # the newest, the one being written, one read by the disk's lane
    assert memory.num_slots(job("llama3_8b", async_checkpointing=False)) == 2
    assert memory.num_slots(job("llama3_8b", s3_tier_base_path="s3://bucket/run")) == 4
    assert memory.num_slots(job("llama3_8b", in_memory_checkpointing_freq=0)) == 1
    assert memory.num_slots(job("llama3_8b", in_memory_checkpointing_freq=0, async_checkpointing=False)) == 0
    host = {term.name: term.num_bytes for term in memory.host_terms(job("llama3_8b", "p5", 4))}
    state = 8_030_261_248 * 12
    assert host["checkpoint slots"] == pytest.approx(3 * state / 4, rel=1e-5)
    assert host["copies of other nodes"] == pytest.approx(2 * state / 4, rel=1e-5)
    alone = {term.name: term.num_bytes for term in memory.host_terms(job("llama3_8b"))}
    assert alone["copies of other nodes"] == 0


def test_the_loss_holds_as_many_logits_as_it_does() -> None:
    assert memory.CHUNK_NUMEL == loss.CHUNK_NUMEL
    planned = job("llama3_8b", train_batch_size=4)
    by_hand = 4 * 128_256 * 4096 + max(8 * 1046 * 128_256, 2 * (1046 + 4096) * 128_256)
    assert memory.logits(planned).num_bytes == by_hand
    few = dataclasses.replace(planned.model, max_context_width=16)
    short = memory.logits(dataclasses.replace(planned, model=few)).num_bytes
    assert short == 4 * 128_256 * 4096 + 2 * (64 + 4096) * 128_256


def test_beside_frozen_weights_only_adapters_have_gradients_and_moments() -> None:
    """Llama-3-8B, rank 16 on all matrices of the blocks: 41,943,040 numbers are trained, as PEFT counts them."""
    planned = job("llama3_8b", lora_r=16, num_nodes=1)
    assert planned.trained.total == 41_943_040
    start = {term.name: term.num_bytes for term in memory.gpu_moments(planned)[0].terms}
    assert start["weights"] == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-3)
    assert start["adapters"] == start["optimizer"] / 2 == pytest.approx(4 * 41_943_040 / 8, rel=0.01)
    assert memory.state_bytes(planned) == 12 * 41_943_040
    terms = {term.name for moment in memory.gpu_moments(planned) for term in moment.terms if term.num_bytes}
    assert not terms & {"the head's gradient", "the root's gradients"}
    dropped = memory.saved_by_token(job("llama3_8b", lora_r=16, lora_dropout=0.1)).whole
    own, whole = memory.saved_by_token(planned).whole, memory.saved_by_token(job("llama3_8b")).whole
    # x A^T of seven matrices; but two norms keep no normed values, whose weights have no gradient.
    assert own == whole + 7 * 2 * 16 - 2 * 2 * 4096
    assert dropped > own


def test_matrices_in_nf4_take_half_a_byte_and_one_of_them_is_dequantised() -> None:
    """Llama-3-8B's blocks have 6.979e9 weights in matrices, of 0.5176 bytes in rows of 4096 and 0.5162 in 14336, and
    266,240 in norms; the embedding and the head stay. The largest matrix is 14336 x 4096. Mixtral's largest tensor is
    of eight experts' gate and up, 2 x 14336 x 4096 each, of which two are 2**28 at most."""
    planned = job("llama3_8b", lora_r=16, num_nodes=1, bnb_quant_type="nf4")
    matrices = 32 * (4096 * (2 * 4096 + 2 * 1024 + 2 * 14336) * (0.5 + 1 / 64 + 8 / 4096))
    matrices += 32 * 4096 * 14336 * (0.5 + 1 / 64 + 8 / 14336)
    rest = 2 * (2 * 128256 * 4096 + 65 * 4096)
    moments = memory.gpu_moments(planned)
    start, backward = ({term.name: term.num_bytes for term in moments[index].terms} for index in (0, 3))
    assert start["weights"] == pytest.approx((matrices + rest) / 8, rel=1e-6)
    assert backward["gathered weights"] == pytest.approx(matrices / 32 + 2 * 2 * 4096 + rest - 2 * 64 * 4096, rel=1e-6)
    assert backward["one dequantised weight"] == 2 * 4096 * 14336 + 12 * 2**23
    assert memory.state_bytes(planned) == 12 * 41_943_040
    assert job("mixtral_8x7b", lora_r=16, bnb_quant_type="nf4").num_unpacked == 2 * 2 * 14336 * 4096
