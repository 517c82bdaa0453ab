"""Which way attention goes in this run, and what it needs of each batch.

Dense: one mask over the whole row, [B, 1, T, T], which rules out flash kernels and costs the square of the row
whatever the documents' lengths. Varlen: the documents' borders go with the batch, and no mask exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.checks import check_attention, flash_obstacle
from ..config.schema import Config, ModelConfig
from ..data.packing import Batch
from ..models.family import family_of

# Borders int32 [num_segments + 1], from 0 to B*T; and a tensor without content whose first size is the longest
# segment's length in tokens (models/attention_modules.py).
Segments = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Attention:
    """The way taken (`dense` or `varlen`), and in how many tokens some layers cut documents (None: none does)."""

    path: str
    chunk_tokens: int | None

    def segments(self, batch: Batch, device: torch.device) -> dict[str, Segments]:
        """What the backbone is called with besides tokens and positions; nothing where a mask is made from these.

        Worked out on the CPU: the kernel's launch needs the longest segment's length on the host, and reading that
        from the device would wait for it.
        """
        if self.path == "dense":
            return {}
        cuts = {"documents": None} if self.chunk_tokens is None else {"documents": None, "chunks": self.chunk_tokens}
        return {name: segments(batch.position_ids, chunk_tokens=cut, device=device) for name, cut in cuts.items()}


def segments(position_ids: torch.Tensor, *, chunk_tokens: int | None, device: torch.device) -> Segments:
    """Where the documents of the flattened [B*T] tokens begin and end, and how long the longest is; on `device`.

    No document goes on in the next row. With `chunk_tokens` documents are cut at multiples of it, counted from their
    own starts. position_ids is int64 [B, T], on the CPU.
    """
    starts = position_ids % chunk_tokens == 0 if chunk_tokens else position_ids == 0
    starts[:, 0] = True
    end = torch.tensor([position_ids.numel()])
    on_host = torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)
    borders = on_host.to(device, non_blocking=True)
    # Of integers: FSDP2 casts floats to bfloat16 in front of each block, and the copies would not be marked.
    longest = torch.empty(int(on_host.diff().max()), 0, dtype=torch.int32, device=device)
    # Both sizes change from batch to batch. A compiled block takes any from the start, and is never compiled again;
    # a plain int would first be compiled as a constant, and twice the graphs would pass the compiler's limit of 8.
    for changing in (borders, longest):
        torch._dynamo.maybe_mark_dynamic(changing, 0)  # type: ignore[no-untyped-call]
    return borders, longest


def choose_attention(config: Config, model: ModelConfig, device: torch.device) -> Attention:
    """`--attention`, with auto decided. Raises ConfigError for varlen on a GPU whose kernel does not serve.

    Comes after refuse_missing_bf16, which leaves only GPUs that the kernel runs on.
    """
    family = family_of(model.model_type)
    complete, parallel = family.complete(model), config.parallel
    path = "varlen" if parallel.attention == "varlen" else "dense"
    # On a CPU both are made of the same products; dense keeps a run's losses what they were.
    if device.type == "cuda":
        check_attention(complete, parallel)
        if parallel.attention == "auto" and config.data.document_mask and not model.attn_pdrop:
            path = "dense" if flash_obstacle(complete, parallel) is not None else "varlen"
    return Attention(path, family.chunk_tokens(model))
