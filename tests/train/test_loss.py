"""The chunked loss against the plain one, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from hypershard.train.loss import IGNORED_LABEL, summed_cross_entropy


def example(
    dtype: torch.dtype, num_tokens: int = 100, vocab: int = 517
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 32, generator=generator).mul(0.3).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    labels[::7] = IGNORED_LABEL
    return hidden, weight, labels


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("rows", [1, 7, 64, 100, 1000])
def test_equals_float64_for_every_chunking(rows: int) -> None:
    hidden, weight, labels = example(torch.float32)
    loss = summed_cross_entropy(hidden, weight, labels, chunk_rows=rows)
    (loss / 3).backward()
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(exact_hidden, exact_weight), labels, reduction="sum")
    (exact / 3).backward()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    assert hidden.grad is not None and weight.grad is not None
    assert exact_hidden.grad is not None and exact_weight.grad is not None
    assert relative_error(hidden.grad, exact_hidden.grad) < 1e-6
    assert relative_error(weight.grad, exact_weight.grad) < 1e-6


def test_bf16_inputs_give_a_float32_loss() -> None:
    """Where the loss is computed in the inputs' dtype it is wrong in its third digit."""
    hidden, weight, labels = example(torch.bfloat16, num_tokens=2048, vocab=4096)
    loss = summed_cross_entropy(hidden, weight, labels, chunk_rows=512)
    loss.backward()
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(exact_hidden, exact_weight), labels, reduction="sum")
    exact.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=2e-4)
    assert hidden.grad is not None and weight.grad is not None
    assert exact_hidden.grad is not None and exact_weight.grad is not None
    # bfloat16 operands of the products: 2^-9 each, averaged over hundreds of terms.
    assert relative_error(hidden.grad, exact_hidden.grad) < 1e-2
    assert relative_error(weight.grad, exact_weight.grad) < 1e-2


def test_all_labels_ignored_is_zero_with_zero_gradients() -> None:
    hidden, weight, labels = example(torch.float32)
    loss = summed_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED_LABEL))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_a_frozen_head_gets_no_gradient_and_no_grad_mode_makes_none() -> None:
    hidden, weight, labels = example(torch.float32)
    summed_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not summed_cross_entropy(hidden, weight, labels).requires_grad


def test_never_holds_all_logits() -> None:
    """The largest tensor made has chunk_rows rows of logits, not all tokens'."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    hidden, weight, labels = example(torch.float32, num_tokens=512, vocab=600)
    with Largest() as largest:
        summed_cross_entropy(hidden, weight, labels, chunk_rows=32).backward()
    assert largest.numel <= max(32 * 600, weight.numel(), hidden.numel())
