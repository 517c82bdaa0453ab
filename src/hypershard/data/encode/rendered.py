"""Text with the characters that the loss counts -> tokens with those that it counts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import Encoded
from .chat import Rendered, Spans
from .tokenizer import TextTokenizer


class RenderedEncoder:
    """Tokenises whole texts, and marks their tokens by where they lie."""

    def __init__(self, tokenizer: TextTokenizer, *, eos_token_id: int):
        self._eos_token_id = eos_token_id
        self._added_ids = np.array(sorted(tokenizer.backend.get_added_tokens_decoder()), dtype=np.int64)
        self._backend = tokenizer.backend
        # It would add tokens of its own or shorten offsets; what a template writes is complete.
        self._backend.post_processor = None

    def encode(self, texts: Sequence[Rendered], *, are_of_template: bool) -> list[Encoded]:
        """One result for each text, in order; the tokenizer is called once.

        `are_of_template`: special tokens in them are the template's; else they are text like any other.
        """
        self._backend.encode_special_tokens = not are_of_template
        encodings = self._backend.encode_batch([one.text for one in texts], add_special_tokens=False)
        return [self._encoded(*pair) for pair in zip(texts, encodings, strict=True)]

    def _encoded(self, rendered: Rendered, encoding: Any) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int64)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
        targets = in_spans(offsets, rendered.spans, is_added=np.isin(ids, self._added_ids))
        if not rendered.is_ended:
            ids = np.append(ids, self._eos_token_id)
            targets = np.append(targets, rendered.is_answered)
        return Encoded(tokens=ids, targets=targets)


def in_spans(offsets: NDArray[np.int64], spans: Spans, *, is_added: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which tokens [n] the loss counts: those whose last character (of `offsets` [n, 2]) lies in one of `spans`.

    So a token that begins in the header and reaches into the answer counts (" Hello", where the header ends with the
    space), but not an added token, `is_added` [n], that only took in white space after it; and a token that ends in
    the next header does not.
    """
    edges = np.array(spans, dtype=np.int64).reshape(-1, 2)
    # A token of no characters (a sentence's "▁") lies where it begins.
    last = np.maximum(offsets[:, 1] - 1, offsets[:, 0])
    span = np.searchsorted(edges[:, 0], last, side="right") - 1
    inside = (span >= 0) & (last < edges[span, 1])
    straddles = offsets[:, 0] < edges[span, 0]
    return inside & ~(straddles & is_added)
