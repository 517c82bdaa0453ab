"""Next-token cross entropy without ever holding the whole logits tensor.

torch 2.13 has `torch.nn.functional.linear_cross_entropy`, which is chunked too, but it returns the loss in the
dtype of its inputs: for 2,048 tokens in bfloat16 it says 15,232 where float64 says 15,137.8 (8 bits of mantissa).
A loss that is wrong in its third digit is a silent defect, so one implementation of our own serves every torch:
chunk sums in float32, the gradient taken in the same pass (three matrix products instead of recomputation's four).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.packing import IGNORED_LABEL, Batch

CHUNK_NUMEL = 2**27  # float32 logits held at a time: 512 MiB, large enough products for any GPU


class LanguageModel(nn.Module):
    """A causal language model that answers with its summed loss; what FSDP2 wraps as the root.

    The head's product happens inside this forward, so that the root's weights are gathered then.
    """

    statistics: tuple[str, ...] = ()  # what is summed besides the loss

    def __init__(self, hf_model: nn.Module, *, backbone: nn.Module, output_weight_owner: nn.Module) -> None:
        super().__init__()
        self.hf_model = hf_model
        # Kept out of the module tree: they are parts of hf_model, and a parameter has one name.
        self._parts = (backbone, output_weight_owner)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Sums over what `num_terms` counts, float32 [1 + len(statistics)], the loss first: cross entropy in nats.

        input_ids, labels, position_ids are int64 [B, T]. `segments` is what attention without a mask needs besides
        (train/attention.py); else it is empty.
        """
        hidden, weight = self.hidden(input_ids, position_ids, segments)
        return torch.stack([summed_cross_entropy(hidden, weight, labels.flatten())])  # no view: FSDP2 warns of these

    @staticmethod
    def num_terms(batch: Batch) -> int:
        """How many terms the summed loss of this batch has: what it is divided by, over all ranks and micro-steps."""
        return batch.num_valid_tokens

    def hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the output head is multiplied with, [B*T, H], and the head's weight, [V, H]."""
        backbone, head = self._parts
        hidden = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False, **segments).last_hidden_state
        weight: torch.Tensor = head.weight  # type: ignore[assignment]
        return hidden.flatten(0, 1), weight

    def next_tokens(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        places: torch.Tensor,
        num_ids: int,
    ) -> torch.Tensor:
        """The likeliest token, of ids below `num_ids`, to follow that at `places` [B] in each row; int64 [B]."""
        hidden, weight = self.hidden(input_ids, position_ids, segments)
        row_starts = torch.arange(len(places), device=places.device) * input_ids.shape[1]
        return F.linear(hidden[row_starts + places], weight[:num_ids]).float().argmax(dim=1)


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, chunk_rows: int | None = None
) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[label], labels of -100 left out.

    hidden [N, H], weight [V, H] of one floating dtype, labels int64 [N]; returns a float32 scalar. A gradient that is
    not asked for, as that of a frozen head, is neither computed nor held.
    """
    rows = chunk_rows or max(1, CHUNK_NUMEL // weight.shape[0])
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, rows, torch.is_grad_enabled())
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: int, with_grad: bool
    ) -> torch.Tensor:
        for_hidden = with_grad and ctx.needs_input_grad[0]
        for_weight = with_grad and ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        # Chunks' products are summed in float32 whatever their dtype.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        for part, part_labels, start in zip(
            hidden.split(rows), labels.split(rows), range(0, hidden.shape[0], rows), strict=True
        ):
            logits = F.linear(part, weight).float()
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            valid = (part_labels != IGNORED_LABEL).unsqueeze(1)
            index = part_labels.clamp(min=0).unsqueeze(1)
            loss += torch.where(valid, log_sum - logits.gather(1, index), 0.0).sum()
            if not (for_hidden or for_weight):
                continue
            # d loss / d logits = softmax - one_hot(label), in place of the logits.
            logits.sub_(log_sum).exp_()
            logits.scatter_add_(1, index, torch.full_like(log_sum, -1.0))
            grad_logits = logits.mul_(valid).to(hidden.dtype)
            del logits
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + part.shape[0]])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ part
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(
        ctx: Any, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # Multiplied in float32 by the scalar, rounded once to the gradient's dtype.
        scaled = [None if grad is None else (grad * grad_loss).to(grad.dtype) for grad in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None, None
