"""Models whose matrices are in NF4: they compute as the dense ones with the same values, on any number of ranks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from tests.models.tiny_models import tiny_model
from tests.rank_pool import RankPool
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypershard.adapters.lora import add_adapters
from hypershard.adapters.nf4 import dequantise, quantise
from hypershard.adapters.nf4_format import Format
from hypershard.adapters.nf4_ops import grouped_product, is_product, nf4_grouped_mm, nf4_linear, packed, unpacked
from hypershard.adapters.nf4_weights import hold_in_nf4, nf4_weights
from hypershard.adapters.targets import adapter_specs, adapter_targets
from hypershard.config.schema import AdapterConfig, ModelConfig, ParallelConfig
from hypershard.distributed.mesh import build_mesh, local_part
from hypershard.distributed.process_group import World
from hypershard.models.base import ParameterSpec
from hypershard.models.family import family_of
from hypershard.parallel.apply import apply
from hypershard.parallel.init import initialise

FAMILIES = ("llama_v3", "qwen2", "gpt2", "mixtral", "llama4")
ADAPTERS = AdapterConfig(lora_r=8)


def a_model(model_type: str) -> ModelConfig:
    experts = {"num_experts": 3} if model_type in ("mixtral", "llama4") else {}  # which two ranks cannot share evenly
    return tiny_model(model_type, num_layers=2, vocab_size=96, **experts)


def whole_value(spec: ParameterSpec) -> torch.Tensor:
    """A weight's first value on one rank; of adapters' B numbers too, or half of the gradients would be zero."""
    drawn = dataclasses.replace(spec, init="normal", std=0.05) if "lora_B" in spec.name else spec
    value = torch.empty(spec.shape)
    initialise({spec.name: value}, [drawn], seed=5, device=torch.device("cpu"))
    return value


def specs_of(model: ModelConfig) -> list[ParameterSpec]:
    return [*family_of(model.model_type).parameters(model), *adapter_specs(adapter_targets(model, ADAPTERS))]


def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """This rank's part of `value` into `parameter`."""
    local, starts = local_part(parameter)
    with torch.no_grad():
        local.copy_(value[tuple(slice(start, start + size) for start, size in zip(starts, local.shape, strict=True))])


def a_job(world: World, model_type: str, *, in_nf4: bool, parallel: ParallelConfig) -> tuple[nn.Module, Any]:
    """A sharded model with adapters whose matrices are in NF4, or dense with the values NF4 gives them."""
    model = a_model(model_type)
    family = family_of(model_type)
    hf_model = family.build(model)
    frozen = torch.bfloat16 if parallel.bf16 else torch.float32
    add_adapters(hf_model, adapter_targets(model, ADAPTERS), adapters=ADAPTERS, frozen_dtype=frozen)
    matrices = family.matrices(model)
    if in_nf4:
        hold_in_nf4(hf_model, matrices, double_quant=True)
    mesh = build_mesh(
        parallel.sharding_strategy, world_size=world.size, hybrid_shard_degree=1, device_type=world.device.type
    )
    sharded = apply(
        hf_model,
        family.blocks(hf_model),
        mesh=mesh,
        parallel=parallel,
        device=world.device,
        low_rank=ADAPTERS.lora_r,
        is_product=is_product,
    )
    held, parameters = nf4_weights(hf_model), dict(hf_model.named_parameters())
    assert set(held) == ({matrix.spec.name for matrix in matrices} if in_nf4 else set())
    for spec in specs_of(model):
        value = whole_value(spec)
        if spec.name in held:
            for box in held[spec.name].boxes():
                held[spec.name].fill(box, value[box])
            continue
        if spec.name in {matrix.spec.name for matrix in matrices}:
            layout = Format(tuple(value.shape), True)
            value = dequantise(quantise(value, double_quant=True), layout, dtype=frozen).view(value.shape)
        put(parameters[spec.name], value)
    return hf_model, sharded


class Gathered(TorchDispatchMode):
    """Counts the bytes that all-gathers bring together, and products with packed weights."""

    num_bytes = num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d" and "allgather" in func._schema.name:
            self.num_bytes += args[0].nbytes if isinstance(args[0], torch.Tensor) else args[0][0].nbytes
        self.num_products += func.namespace == "hypershard"
        return func(*args, **(kwargs or {}))


def one_step(world: World, model_type: str, in_nf4: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """The loss over two sequences, shared by the ranks, its gradients, and what was held and gathered."""
    model, sharded = a_job(world, model_type, in_nf4=in_nf4, parallel=ParallelConfig(**settings))
    tokens = torch.arange(2 * 48).view(2, 48).mul_(7).remainder_(96)
    rank = world.ranks.rank
    mine = tokens[rank : rank + 1] if world.size == 2 else tokens
    with Gathered() as gathered:
        sharded.begin_micro_step(0, 1)
        logits = model(input_ids=mine).logits.float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten(), reduction="sum") / 94
        loss.backward()
        sharded.reshard()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return {
        "loss": loss.item(),
        "gradients": {name: p.grad.full_tensor() for name, p in trained.items()},  # type: ignore[union-attr]
        "held": sum(one.untyped_storage().nbytes() for one in local),
        "gathered": gathered.num_bytes,
        "products": gathered.num_products,
    }


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_computes_as_the_dense_model_with_the_same_values(
    pools: Callable[[int], RankPool], model_type: str, bf16: bool
) -> None:
    """Loss and gradients bit for bit: a dequantised weight is the same in forward, backward and the dense model."""
    found = pools(1).run(one_step, model_type, True, {"bf16": bf16})[0]
    dense = pools(1).run(one_step, model_type, False, {"bf16": bf16})[0]
    assert found["loss"] == dense["loss"]
    assert all(torch.equal(found["gradients"][name], dense["gradients"][name]) for name in dense["gradients"])
    assert all(bool(gradient.any()) for gradient in found["gradients"].values())


@pytest.mark.parametrize(
    "settings",
    [
        {"sharding_strategy": "full"},
        {"sharding_strategy": "zero2", "activation_checkpointing": "full"},
        {"sharding_strategy": "full", "activation_checkpointing": "selective", "offload_activations": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize("model_type", ["llama_v3", "mixtral"])
def test_two_ranks_compute_as_one(pools: Callable[[int], RankPool], model_type: str, settings: dict[str, Any]) -> None:
    one = pools(1).run(one_step, model_type, True, {"bf16": False})[0]
    two = pools(2).run(one_step, model_type, True, {"bf16": False, **settings})
    # The two differ in the order of float32 sums alone.
    assert sum(rank["loss"] for rank in two) == pytest.approx(one["loss"], rel=2e-6)
    for name, expected in one["gradients"].items():
        assert torch.equal(two[0]["gradients"][name], two[1]["gradients"][name])
        torch.testing.assert_close(two[0]["gradients"][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama_v3", "mixtral"])
def test_selective_checkpointing_keeps_every_second_product(pools: Callable[[int], RankPool], model_type: str) -> None:
    """As with dense weights: of q, k, v, o, gate, up and down of each block k, o and up are computed again; of q, k, v,
    o, router, gate with up, and down k, o and the last but one."""
    plain, selective = (
        pools(1).run(one_step, model_type, True, {"bf16": False, "activation_checkpointing": kind})[0]["products"]
        for kind in ("none", "selective")
    )
    assert selective - plain == 2 * 3


@pytest.mark.parametrize("model_type", ["llama_v3", "mixtral"])
def test_ranks_hold_their_share_and_gather_packed_bytes(pools: Callable[[int], RankPool], model_type: str) -> None:
    """Of frozen weights not in NF4 each number has 2 bytes, of adapters 4, and in gathers 2."""
    found = pools(2).run(one_step, model_type, True, {"bf16": True})
    model = a_model(model_type)
    matrices = {matrix.spec.name for matrix in family_of(model_type).matrices(model)}
    held = gathered = 0
    for spec in specs_of(model):
        if spec.name in matrices:
            num_bytes = Format(spec.shape, True).num_bytes
            held += num_bytes
        else:
            is_odd = len(spec.shape) == 2 and spec.shape[0] % 2  # a router of three experts; FSDP2 adds an empty row
            numel = spec.numel + (spec.shape[1] if is_odd else 0)
            num_bytes = 2 * numel
            held += (4 if "lora_" in spec.name else 2) * numel
        # The root and the last of the two blocks are gathered once, the first block again in backward.
        gathered += num_bytes * (2 if ".layers.0." in spec.name else 1)
    assert [rank["held"] for rank in found] == [held // 2, held // 2]
    assert [rank["gathered"] for rank in found] == [gathered, gathered]


def packed_parts(world: World, model_type: str, degree: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The packed weights of a model sharded over `degree` ranks, filled piece by piece, gathered."""
    model, family = a_model(model_type), family_of(model_type)
    hf_model = family.build(model)
    hf_model.requires_grad_(False)
    hold_in_nf4(hf_model, family.matrices(model), double_quant=True)
    mesh = build_mesh("hybrid", world_size=world.size, hybrid_shard_degree=degree, device_type="cpu")
    parallel = ParallelConfig(sharding_strategy="hybrid")
    apply(hf_model, family.blocks(hf_model), mesh=mesh, parallel=parallel, device=world.device)
    specs = {spec.name: spec for spec in specs_of(model)}
    for name, weight in nf4_weights(hf_model).items():
        value = whole_value(specs[name])
        for box in weight.boxes():
            weight.fill(box, value[box])
    parameters = dict(hf_model.named_parameters())
    return {
        name: tuple(parameters[f"{name}_{part}"].full_tensor() for part in ("codes", "scales"))  # type: ignore[attr-defined, misc]
        for name in nf4_weights(hf_model)
    }


@pytest.mark.parametrize("model_type", ["llama_v3", "mixtral"])
def test_any_number_of_ranks_quantises_to_the_same_bits(pools: Callable[[int], RankPool], model_type: str) -> None:
    specs = {spec.name: spec for spec in specs_of(a_model(model_type))}
    for degree in (1, 2):
        for found in pools(2).run(packed_parts, model_type, degree):
            for name, parts in found.items():
                expected = quantise(whole_value(specs[name]), double_quant=True)
                assert torch.equal(unpacked(*parts).codes, expected.codes), (degree, name)
                assert torch.equal(unpacked(*parts).scales, expected.scales), (degree, name)


# --- the two operations


def a_weight(*shape: int) -> tuple[Format, torch.Tensor, torch.Tensor]:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    parts = quantise(value, double_quant=False)
    codes, scales = (nn.Parameter(packed(part), requires_grad=False) for part in (parts.codes, parts.scales))
    return Format(shape, False), codes, scales


def test_operations_keep_the_packed_weight_only_also_when_compiled() -> None:
    """And the compiler meets one operation that it does not look into: no break, no dequantised weight kept."""
    layout, codes, scales = a_weight(192, 128)
    expert_layout, expert_codes, expert_scales = a_weight(3, 128, 192)
    ends = torch.tensor([10, 10, 24], dtype=torch.int32)

    def compute(rows: torch.Tensor) -> torch.Tensor:
        wide = nf4_linear(rows, codes, scales, None, layout, inputs_first=False)
        back = nf4_grouped_mm(wide, ends, expert_codes, expert_scales, expert_layout, inputs_first=False)
        return nf4_grouped_mm(back, ends, expert_codes, expert_scales, expert_layout, inputs_first=True)

    found = []
    torch._dynamo.utils.counters.clear()
    for function in (compute, torch.compile(compute, backend="aot_eager", fullgraph=True)):
        rows = torch.randn(24, 128, generator=torch.Generator().manual_seed(7)).requires_grad_()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one, kept=kept: kept.append(one) or one, lambda one: one):
            out = function(rows)
        out.square().sum().backward()
        found.append((out.detach(), rows.grad))
        parameters = {one.data_ptr() for one in (codes, scales, expert_codes, expert_scales, ends)}
        others = [one for one in kept if one.data_ptr() not in parameters and one.data_ptr() != out.data_ptr()]
        assert parameters <= {one.data_ptr() for one in kept}
        assert sum(one.numel() for one in others) == 0, [one.shape for one in others]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs_first", [False, True])
def test_operations_say_the_truth_about_themselves(inputs_first: bool) -> None:
    """torch's own check of shapes, aliases and autograd; gradients against a dense product."""
    layout, codes, scales = a_weight(64, 100)  # rows that end within a block
    held = {"shape": [64, 100], "double_quant": False, "inputs_first": inputs_first}
    rows = torch.randn(2, 3, 64 if inputs_first else 100, requires_grad=True)
    bias = torch.randn(100 if inputs_first else 64)
    torch.library.opcheck(torch.ops.hypershard.nf4_linear.default, (rows, codes, scales, bias), held)
    weight = dequantise(unpacked(codes, scales), layout, dtype=torch.float32)
    dense = nn.functional.linear(rows, weight.t() if inputs_first else weight, bias)
    out = nf4_linear(rows, codes, scales, bias, layout, inputs_first=inputs_first)
    assert torch.equal(out, dense)
    gradient = torch.randn(out.shape)
    assert torch.equal(*(torch.autograd.grad(one, rows, gradient)[0] for one in (out, dense)))


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("ends", [[5, 9, 9, 20], [0, 0, 0, 20], [20, 20, 20, 20]])
def test_some_experts_at_a_time_give_what_all_at_once_give(ends: list[int], inputs_first: bool) -> None:
    layout, codes, scales = a_weight(4, 128, 64)
    rows = torch.randn(20, 128 if inputs_first else 64, generator=torch.Generator().manual_seed(8))
    whole, one, three = (
        grouped_product(
            rows,
            torch.tensor(ends, dtype=torch.int32),
            unpacked(codes, scales),
            layout,
            inputs_first=inputs_first,
            most_weights=num_experts * 128 * 64,
        )
        for num_experts in (4, 1, 3)
    )
    assert torch.equal(whole, one) and torch.equal(whole, three)
