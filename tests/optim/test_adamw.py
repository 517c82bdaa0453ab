import pytest
import torch
from tests.jobs import config_of

from hypershard.config.schema import OptimConfig
from hypershard.models.family import family_of
from hypershard.optim.adamw import MOMENTS, build_adamw, set_learning_rate, set_step_count
from hypershard.optim.gradients import clip, sum_of_squares


def parameters() -> dict[str, torch.nn.Parameter]:
    return {"matrix": torch.nn.Parameter(torch.ones(3, 3)), "norm": torch.nn.Parameter(torch.ones(3))}


def test_weight_decay_never_touches_norms_and_biases() -> None:
    found = parameters()
    optimizer = build_adamw(found, decayed=["matrix"], optim=OptimConfig(lr=0.1, weight_decay=0.5))
    for parameter in found.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(found["matrix"], torch.full((3, 3), 0.95))
    assert torch.equal(found["norm"], torch.ones(3))


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_qwen2", "tiny_mixtral", "tiny_llama4"])
def test_families_name_what_decays(model: str, tmp_path) -> None:
    config = config_of(f"--model {model} --vocab_size 128", cache_dir=tmp_path)
    specs = family_of(config.model.model_type).parameters(config.model)
    kept = {spec.name for spec in specs if not spec.decay}
    assert kept == {spec.name for spec in specs if "norm" in spec.name or ".ln_" in spec.name or "bias" in spec.name}
    assert kept


def test_state_exists_from_the_start_and_counts_as_told() -> None:
    """State made at the first step would run out of memory after the rehearsal, and restore into nothing."""
    found = parameters()
    optimizer = build_adamw(found, decayed=[], optim=OptimConfig())
    for parameter in found.values():
        assert set(optimizer.state[parameter]) == {"step", *MOMENTS}
        parameter.grad = torch.full_like(parameter, 0.5)
    set_step_count(optimizer, 1000)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    # After 1,000 steps of zero gradients the bias corrections are 1: m = 0.05, v = 0.0125, update m / sqrt(v).
    update = 0.01 * 0.05 / (0.0125**0.5 + 1e-8)
    assert found["norm"].detach() == pytest.approx(torch.full((3,), 1.0 - update), rel=1e-6)
    assert float(optimizer.state[found["norm"]]["step"]) == 1001


def test_equals_torch_with_lazy_state() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 4), [torch.randn(5, 4) for _ in range(6)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optim = OptimConfig(lr=0.01, weight_decay=0.1)
    mine = build_adamw({"w": ours}, decayed=["w"], optim=optim)
    plain = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        plain.step()
    assert torch.equal(ours, theirs)


def test_clipping() -> None:
    gradients = [torch.full((4,), 3.0), torch.full((9,), 4.0)]
    norm = float(sum_of_squares(gradients)) ** 0.5
    assert norm == pytest.approx((4 * 9 + 9 * 16) ** 0.5)
    clip(gradients, norm=norm, limit=1.0)
    assert float(sum_of_squares(gradients)) == pytest.approx(1.0)
    before = [gradient.clone() for gradient in gradients]
    clip(gradients, norm=1.0, limit=2.0)
    clip(gradients, norm=1.0, limit=0.0)
    assert all(torch.equal(one, other) for one, other in zip(gradients, before, strict=True))
    assert float(sum_of_squares([])) == 0.0
