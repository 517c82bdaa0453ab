"""Grouped experts against transformers' own, and the balance loss against a plain one."""

import pytest
import torch
from tiny_models import tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from hypershard.models.family import family_of
from hypershard.models.moe_modules import AddLossGradient, balance_losses, group_llama4

NUM_EXPERTS = 4


def build(model_type: str, **changes: object) -> PreTrainedModel:
    """A small model with weights on the CPU."""
    family = family_of(model_type)
    built = family.build(tiny_model(model_type, num_layers=2, **changes)).to_empty(device="cpu")
    family.restore_buffers(built)
    torch.manual_seed(1)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return built


def llama4_pair(dtype: torch.dtype, **changes: object) -> tuple[Llama4TextMoe, Llama4TextMoe]:
    """transformers' block and ours with the same weights."""
    config = family_of("llama4").hf_config(tiny_model("llama4", **changes))
    theirs, ours = Llama4TextMoe(config), Llama4TextMoe(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    group_llama4(ours)
    return theirs.to(dtype), ours.to(dtype)


@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_grouped_llama4_is_transformers_llama4(experts_per_token: int, dtype: torch.dtype, tolerance: float) -> None:
    theirs, ours = llama4_pair(dtype, experts_per_token=experts_per_token)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    hidden = torch.randn(2, 24, 64).to(dtype)
    sent_back = torch.randn(48, 64).to(dtype)
    results = []
    for block in (theirs, ours):
        given = hidden.clone().requires_grad_()
        out, logits = block(given)
        (out * sent_back).sum().backward()
        results.append([out, logits, given.grad, *(parameter.grad for parameter in block.parameters())])
    for expected, found in zip(*results, strict=True):
        assert expected.abs().max() > 0
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def test_experts_without_tokens_are_fine() -> None:
    theirs, ours = llama4_pair(torch.float32)
    for block in (theirs, ours):
        with torch.no_grad():
            block.router.weight[1:] = 0.0
            block.router.weight[0] = 1.0
    hidden = torch.rand(1, 8, 64)  # positive: every token goes to expert 0
    torch.testing.assert_close(ours(hidden)[0], theirs(hidden)[0])
    ours(hidden)[0].square().sum().backward()
    assert torch.all(ours.experts.down_proj.grad[1:] == 0)
    assert torch.any(ours.experts.down_proj.grad[0] != 0)


def plain_balance_loss(logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """The loss of one sequence, spelled out: logits [T, E], experts [T, k]."""
    probabilities = torch.softmax(logits, dim=-1)
    loss = logits.new_zeros(())
    for expert in range(logits.shape[1]):
        share = (experts == expert).sum().item() / experts.numel()
        loss = loss + share * probabilities[:, expert].mean()
    return logits.shape[1] * loss


def test_balance_loss_has_its_known_values() -> None:
    even = torch.eye(4).repeat(2, 1).unsqueeze(0)
    chosen = even.argmax(-1, keepdim=True)
    assert balance_losses(50 * even, chosen).item() == pytest.approx(1.0)
    crowded = torch.zeros(1, 8, 4)
    crowded[..., 2] = 50.0
    assert balance_losses(crowded, crowded.argmax(-1, keepdim=True)).item() == pytest.approx(4.0)


@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss_is_the_plain_one_for_each_sequence(k: int) -> None:
    logits = torch.randn(3, 10, NUM_EXPERTS)
    experts = logits.topk(k, dim=-1).indices
    expected = torch.stack([plain_balance_loss(*pair) for pair in zip(logits, experts, strict=True)])
    torch.testing.assert_close(balance_losses(logits, experts), expected)


def test_add_loss_gradient_changes_no_value_and_adds_one_gradient() -> None:
    values, weight = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    out = AddLossGradient.apply(values, (weight**2).sum(), 0.25)
    assert torch.equal(out, values)
    (7 * out).sum().backward()
    torch.testing.assert_close(values.grad, torch.full((5,), 7.0))
    torch.testing.assert_close(weight.grad, 0.25 * 2 * weight.detach())


def gradients(
    built: PreTrainedModel, model_type: str, ids: torch.Tensor, *, loss_factor: float = 1e-3
) -> dict[str, torch.Tensor]:
    """Gradients of a small main loss plus whatever the model itself adds; accumulates over calls."""
    hidden = family_of(model_type).backbone(built)(input_ids=ids, use_cache=False).last_hidden_state
    (loss_factor * hidden.square().sum()).backward()
    return {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}


def reference_gradients(
    model_type: str, ids: torch.Tensor, *, weight: float, num_layers: int
) -> dict[str, torch.Tensor]:
    """The same main loss plus weight x mean over sequences and layers of the plain balance loss."""
    built = build(model_type)
    routers = [m for n, m in built.named_modules() if n.endswith((".router", ".mlp.gate"))]
    assert len(routers) == num_layers
    logits: list[torch.Tensor] = []
    which = {"mixtral": 0, "llama4": 1}[model_type]
    for router in routers:
        router.register_forward_hook(lambda _module, _args, out: logits.append(out[which]))
    hidden = family_of(model_type).backbone(built)(input_ids=ids, use_cache=False).last_hidden_state
    balance = torch.zeros(())
    for layer in logits:
        for sequence in layer.view(*ids.shape, NUM_EXPERTS):
            chosen = sequence.topk({"mixtral": 2, "llama4": 1}[model_type], dim=-1).indices
            balance = balance + plain_balance_loss(sequence, chosen)
    (1e-3 * hidden.square().sum() + weight * balance / (len(ids) * num_layers)).backward()
    return {n: p.grad for n, p in built.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", ["mixtral", "llama4"])
def test_router_loss_gradient_is_that_of_a_plain_loss(model_type: str) -> None:
    ids = torch.randint(0, 97, (4, 24))
    weight = 3.0
    built = build(model_type)
    without = gradients(build(model_type), model_type, ids)
    family_of(model_type).add_router_loss(built, scale_of_one_sequence=weight / len(ids))
    found = gradients(built, model_type, ids)
    expected = reference_gradients(model_type, ids, weight=weight, num_layers=2)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    router = next(name for name in found if name.endswith(("router.weight", "gate.weight")))
    assert not torch.allclose(found[router], without[router], rtol=1e-2)


@pytest.mark.parametrize("model_type", ["mixtral", "llama4"])
def test_router_loss_does_not_depend_on_how_the_batch_is_split(model_type: str) -> None:
    ids = torch.randint(0, 97, (4, 24))
    whole, split = build(model_type), build(model_type)
    for built in (whole, split):
        family_of(model_type).add_router_loss(built, scale_of_one_sequence=0.5)
    at_once = gradients(whole, model_type, ids)
    for part in ids.split([1, 3]):
        summed = gradients(split, model_type, part)
    for name, gradient in at_once.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["mixtral", "llama4"])
def test_router_loss_is_counted_once_under_recomputation(model_type: str) -> None:
    ids = torch.randint(0, 97, (2, 24))
    plain, recomputed = build(model_type), build(model_type)
    for built in (plain, recomputed):
        family_of(model_type).add_router_loss(built, scale_of_one_sequence=0.5)
    for block in family_of(model_type).blocks(recomputed):
        forward = block.forward
        block.forward = lambda *args, f=forward, **kwargs: checkpoint(f, *args, use_reentrant=False, **kwargs)
    expected = gradients(plain, model_type, ids)
    for name, gradient in gradients(recomputed, model_type, ids).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("model_type", ["mixtral", "llama4"])
def test_router_loss_leaves_outputs_and_evaluation_alone(model_type: str) -> None:
    ids = torch.randint(0, 97, (2, 24))
    without, with_loss = build(model_type), build(model_type)
    family_of(model_type).add_router_loss(with_loss, scale_of_one_sequence=1.0)
    assert torch.equal(without(ids).logits, with_loss(ids).logits)
    without.eval()
    with_loss.eval()
    expected = gradients(without, model_type, ids)
    for name, gradient in gradients(with_loss, model_type, ids).items():
        assert torch.equal(gradient, expected[name]), name


def test_dense_families_have_no_router_loss() -> None:
    family = family_of("llama_v3")
    built = family.build(tiny_model("llama_v3"))
    family.add_router_loss(built, scale_of_one_sequence=1.0)
    assert not any(hasattr(module, "router_loss_scale") for module in built.modules())
