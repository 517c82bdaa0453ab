"""Direct preference optimisation: to prefer the chosen to the rejected answer, measured against the frozen model.

Rafailov et al., 2023 (arXiv 2305.18290). The reference is the model without its adapters, so there is one copy of the
weights and each micro-step runs them twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.lora import without_adapters
from ..config.schema import LearningConfig
from ..data.packing import IGNORED_LABEL, Batch
from .loss import CHUNK_NUMEL, LanguageModel


class PreferenceModel(LanguageModel):
    """A model beside adapters that answers with the summed loss of its pairs of answers.

    Rows hold pairs, the chosen answer and after it the rejected one, each a document with its prompt; what follows the
    last pair of a row is padding.
    """

    statistics = ("preference_accuracy", "reward_margin", "chosen_reward")

    def __init__(
        self, hf_model: nn.Module, *, backbone: nn.Module, output_weight_owner: nn.Module, learning: LearningConfig
    ) -> None:
        super().__init__(hf_model, backbone=backbone, output_weight_owner=output_weight_owner)
        self._beta, self._label_smoothing = learning.dpo_beta, learning.dpo_label_smoothing

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Sums over pairs, float32 [4]: the loss in nats, and what `statistics` names; arguments as of the base class.

        Rewards are beta * log(p / p_reference) of an answer; a pair is judged right where the chosen one's is higher.
        """

        def log_probs() -> torch.Tensor:
            hidden, weight = self.hidden(input_ids, position_ids, segments)
            return summed_by_document(token_log_probs(hidden, weight, labels.flatten()), position_ids)

        with torch.no_grad(), without_adapters(self.hf_model), _not_training(self.hf_model):
            reference = log_probs()
        rewards = self._beta * (log_probs() - reference)
        return preference_sums(rewards, position_ids, label_smoothing=self._label_smoothing)

    @staticmethod
    def num_terms(batch: Batch) -> int:
        """The pairs in it."""
        return int(_num_pairs(batch.position_ids).sum())


def preference_sums(rewards: torch.Tensor, position_ids: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
    """Sums over pairs [4]: loss, pairs judged right, margins, rewards of the chosen answers.

    rewards float32 [B, D] of each row's documents (more places than documents), position_ids int64 [B, T]. The loss is
    -log sigmoid(margin); with label smoothing s, (1 - s) of that and s of -log sigmoid(-margin) (cDPO, Mitchell 2023).
    """
    chosen, rejected = rewards[:, 0::2], rewards[:, 1::2]
    margin = chosen - rejected
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    places = torch.arange(margin.shape[1], device=margin.device)
    is_pair = places < _num_pairs(position_ids).unsqueeze(1)
    each = torch.stack([losses, (margin > 0).float(), margin, chosen])
    return torch.where(is_pair, each, 0.0).sum(dim=(1, 2))


def summed_by_document(values: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """float32 [B*T] -> [B, D]: summed over each document of a row, of which a row of T tokens has less than D.

    D depends on T alone, so that nothing waits for the device: no document of a pair is shorter than two tokens.
    """
    num_rows, num_tokens = position_ids.shape
    document = (position_ids == 0).cumsum(1) - 1
    places = 2 * (num_tokens // 4 + 1)  # even
    sums = torch.zeros(num_rows, places, dtype=values.dtype, device=values.device)
    return sums.scatter_add(1, document, values.view(num_rows, num_tokens))


def _num_pairs(position_ids: torch.Tensor) -> torch.Tensor:
    """Pairs in each row [B]; an odd last document is padding."""
    return (position_ids == 0).sum(1) // 2


@contextlib.contextmanager
def _not_training(module: nn.Module) -> Iterator[None]:
    """Without dropout: a reference is the same each time it is asked."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, chunk_rows: int | None = None
) -> torch.Tensor:
    """log softmax(hidden @ weight.T)[label] of each token, 0 for labels of -100; never holds the whole logits.

    hidden [N, H], weight [V, H] of one floating dtype, labels int64 [N]; returns float32 [N]. Backward computes the
    logits again: what each token counts is known only when all of a pair's are.
    """
    rows = chunk_rows or max(1, CHUNK_NUMEL // weight.shape[0])
    found: torch.Tensor = _ChunkedLogProbs.apply(hidden, weight, labels, rows)
    return found


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.rows = rows
        found = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for part, part_labels, out in zip(hidden.split(rows), labels.split(rows), found.split(rows), strict=True):
            logits = F.linear(part, weight).float()
            picked = logits.gather(1, part_labels.clamp(min=0).unsqueeze(1)).squeeze(1)
            out.copy_(torch.where(part_labels != IGNORED_LABEL, picked - logits.logsumexp(dim=1), 0.0))
        return found

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:  # type: ignore[override]
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        counted = torch.where(labels != IGNORED_LABEL, grad, 0.0)
        for start in range(0, hidden.shape[0], ctx.rows):
            chosen = slice(start, start + ctx.rows)
            logits = F.linear(hidden[chosen], weight).float()
            # d log p / d logits = one_hot(label) - softmax, in place of the logits.
            logits.sub_(logits.logsumexp(dim=1, keepdim=True)).exp_().neg_()
            index = labels[chosen].clamp(min=0).unsqueeze(1)
            logits.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))
            grad_logits = logits.mul_(counted[chosen].unsqueeze(1)).to(hidden.dtype)
            del logits
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chosen])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[chosen]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None
