"""torch's varlen operation on the CPU, for which torch has no kernel: what a GPU would be called with runs here too.

Its shape rules, its autograd formula and its form under the compiler are torch's own; only the numbers are ours.
"""

import inspect

import torch
from torch.nn.attention import varlen

_CALL = inspect.signature(varlen._varlen_attn._init_fn)
_BACKWARD_CALL = inspect.signature(varlen._varlen_attn_backward._init_fn)


def install() -> None:
    """Give the operation and its backward kernels for the CPU, for the rest of the process."""
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _probabilities(query, key, borders, longest, *, scale, window):  # type: ignore[no-untyped-def]
    """softmax(Q K^T) [heads, N, N] in float32; query, key [N, heads, D]; window: (back, ahead), the kernel's."""
    num_tokens = query.shape[0]
    assert query.shape == key.shape or "enable_gqa" in _CALL.parameters, "torch 2.11 wants as many heads"
    assert borders.dtype == torch.int32
    assert longest >= int(borders.diff().max()), "the kernel would leave tokens out"
    place = torch.arange(num_tokens)
    document = torch.bucketize(place, borders, right=True)
    back, ahead = window
    distance = place[:, None] - place[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= -ahead) & ((distance <= back) | (back == -1))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _forward(*args, **kwargs):  # type: ignore[no-untyped-def]
    call = _CALL.bind(*args, **kwargs).arguments
    query, key, value = call["query"], call["key"], call["value"]
    weights = _probabilities(
        query, key, call["cu_seq_q"], call["max_q"], scale=call["scale"], window=call["window_size"]
    )
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    out = torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype).contiguous()
    return out, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)


def _backward(*args, **kwargs):  # type: ignore[no-untyped-def]
    call = _BACKWARD_CALL.bind(*args, **kwargs).arguments
    query, key, value, grad = call["query"], call["key"], call["value"], call["grad_out"].float()
    weights = _probabilities(
        query, key, call["cu_seq_q"], call["max_q"], scale=call["scale"], window=call["window_size"]
    )
    groups = query.shape[1] // key.shape[1]
    keys, values = (states.repeat_interleave(groups, dim=1).float() for states in (key, value))
    grad_weights = torch.einsum("qhd,khd->hqk", grad, values)
    towards = (grad * call["out"].float()).sum(-1).t()[:, :, None]
    grad_scores = weights * (grad_weights - towards) * call["scale"]
    grad_query = torch.einsum("hqk,khd->qhd", grad_scores, keys)
    of_heads = (
        torch.einsum("hqk,qhd->khd", grad_scores, query.float()), torch.einsum("hqk,qhd->khd", weights, grad)
    )  # fmt: skip
    grad_key, grad_value = (gradient.unflatten(1, (-1, groups)).sum(2) for gradient in of_heads)
    return tuple(gradient.to(query.dtype).contiguous() for gradient in (grad_query, grad_key, grad_value))
