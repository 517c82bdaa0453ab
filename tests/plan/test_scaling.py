"""The scaling law against its authors' own numbers, and against calculus."""

import math

import pytest

from hypershard.plan.scaling import (
    BESIROGLU,
    HOFFMANN,
    LOSS_BAND_NATS,
    compute_optimal,
    effective_tokens,
    loss_nats,
    optimal_tokens,
    predicted_loss,
    tokens_for_loss,
)


def test_the_law_gives_its_published_losses() -> None:
    # Chinchilla itself, 70B after 1.4T tokens: 1.69 + 0.0840 + 0.1629 by hand from the printed constants.
    assert loss_nats(70e9, 1.4e12, fit=HOFFMANN) == pytest.approx(1.9366, abs=2e-3)
    assert loss_nats(1.29e9, 85e9, fit=HOFFMANN) == pytest.approx(2.372, abs=1e-3)
    assert loss_nats(1.29e9, 85e9) == pytest.approx(2.353, abs=1e-3)
    assert loss_nats(1.29e9, 6e9) == pytest.approx(2.70, abs=5e-3)


@pytest.mark.parametrize(("parameters", "tokens", "measured"), [(1.27e9, 73e9, 2.37), (1.43e9, 6.8e9, 2.66)])
def test_runs_of_the_fit_lie_on_the_law(parameters: float, tokens: float, measured: float) -> None:
    law = predicted_loss(parameters, tokens)
    assert law.loss_nats == pytest.approx(measured, abs=0.01)
    assert law.low_nats < measured < law.high_nats
    assert law.high_nats - law.low_nats == pytest.approx(2 * LOSS_BAND_NATS)
    assert "tokenizer" in law.depends_on
    assert "arXiv:2404.10102" in str(law)


def test_about_twenty_tokens_per_parameter_are_optimal() -> None:
    ratios = [optimum.num_tokens / optimum.num_parameters for optimum in map(compute_optimal, (1e20, 6e23))]
    assert ratios == pytest.approx([23, 18], abs=0.5)
    first, last = (compute_optimal(flops, fit=HOFFMANN) for flops in (1e20, 6e23))
    assert first.num_tokens / first.num_parameters == pytest.approx(40, abs=1)
    assert last.num_tokens / last.num_parameters == pytest.approx(93, abs=1)


@pytest.mark.parametrize("fit", [BESIROGLU, HOFFMANN], ids=lambda fit: fit.name)
@pytest.mark.parametrize("flops", [1e18, 1e21, 1e25])
def test_no_other_share_of_the_budget_is_better(fit, flops: float) -> None:
    best = compute_optimal(flops, fit=fit)
    assert 6 * best.num_parameters * best.num_tokens == pytest.approx(flops)
    for factor in (0.9, 0.99, 1.01, 1.1):
        parameters = best.num_parameters * factor
        assert loss_nats(parameters, flops / 6 / parameters, fit=fit) > best.loss_nats
    assert optimal_tokens(best.num_parameters, fit=fit) == pytest.approx(best.num_tokens)


def test_tokens_for_loss_inverts_the_law() -> None:
    assert tokens_for_loss(loss_nats(8e9, 3e11), 8e9) == pytest.approx(3e11)
    assert tokens_for_loss(BESIROGLU.irreducible_nats, 1e12) is None
    floor = loss_nats(1e9, math.inf)
    assert tokens_for_loss(floor - 1e-6, 1e9) is None


def test_repeated_tokens_count_for_less() -> None:
    # Muennighoff et al. 2023, R*_D = 15.387756.
    for epochs, worth in ((1, 1.0), (2, 1.97), (4, 3.73), (8, 6.62), (16, 10.58), (40, 15.17)):
        assert effective_tokens(epochs * 1e9, num_unique_tokens=1e9) == pytest.approx(worth * 1e9, rel=2e-3)
    assert effective_tokens(5e9, num_unique_tokens=None) == effective_tokens(5e9, num_unique_tokens=7e9) == 5e9
    new, repeated = predicted_loss(1e9, 4e10), predicted_loss(1e9, 4e10, num_unique_tokens=1e9)
    assert repeated.loss_nats > new.loss_nats
    assert repeated.effective_tokens == pytest.approx(15.17e9, rel=1e-3)
    assert repeated.loss_nats == pytest.approx(loss_nats(1e9, repeated.effective_tokens))
