"""What the model goes on from when it is validated: beginnings of held-out documents, or the lines of a file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config.schema import Config
from ..data.encode.chat import ChatRenderer
from ..data.encode.chat_messages import Refused
from ..data.encode.chat_template import read_chat_template
from ..data.encode.tokenizer import TextTokenizer, load_tokenizer
from ..data.open import Dataset
from ..data.source import TokenSource
from ..distributed.collectives import from_main
from ..errors import ConfigError, DataError, UserError
from ..log import logger
from ..storage import local_path

_TEXT_PROMPT_TOKENS = 32  # of a document without turns
_DOCUMENTS_LOOKED_AT = 8  # of each source, for the tokens that end answers
_BLOCK_TOKENS = 2**20  # read at a time

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Token ids to go on from, the same on every rank and at every validation.

    A text ends after one of `ends`; it is made of ids below `num_ids`, which are those the tokenizer can read.
    """

    ids: tuple[Ids, ...]
    ends: Ids
    num_ids: int
    max_new_tokens: int


def choose_prompts(
    config: Config, dataset: Dataset, *, tokenizer_path: Path | None, context_tokens: int, is_main: bool
) -> Prompts | None:
    """The prompts of --validation_texts; None where it asks for none. Rank 0 chooses for all: collective.

    Raises on every rank ConfigError: no tokenizer, a file of prompts that cannot be read or has too few; DataError:
    no held-out document, a line that does not fit or that the chat template refuses.
    """
    if not config.train.validation_texts:
        return None
    if tokenizer_path is None:
        raise ConfigError(
            f"--validation_texts={config.train.validation_texts}: --dataset={config.data.dataset} holds tokens, and "
            f"nothing says what text they are; give the --tokenizer that made them, or drop the flag"
        )
    found: Prompts | UserError | None = None
    if is_main:
        try:
            found = _chosen(config, dataset, load_tokenizer(tokenizer_path), context_tokens)
        except UserError as error:  # the others wait for an answer
            found = error
    found = from_main(found)
    if isinstance(found, UserError):
        raise found
    return found


def _chosen(config: Config, dataset: Dataset, tokenizer: TextTokenizer, context_tokens: int) -> Prompts:
    train, sources = config.train, [member.val for member in dataset.members]
    if train.validation_prompts is None:
        ids = held_out_prompts(sources, train.validation_texts, context_tokens=context_tokens)
    else:
        path = local_path(train.validation_prompts, flag="--validation_prompts")
        lines = _lines(path, train.validation_texts)
        renderer = _renderer(sources, tokenizer, config.data.chat_template)
        ids = [_encoded(line, tokenizer, renderer, context_tokens=context_tokens, path=path) for line in lines]
    added = tokenizer.backend.get_added_tokens_decoder().items()
    special = np.array([number for number, token in added if token.special], dtype=np.int64)
    ends = set() if dataset.eos_token_id is None else {dataset.eos_token_id}
    for source in sources:
        ends |= answer_ends(source, special, context_tokens=context_tokens)
    return Prompts(
        ids=tuple(ids),
        ends=tuple(sorted(ends)),
        num_ids=tokenizer.vocab_size,
        max_new_tokens=train.validation_text_tokens,
    )


# --- from held-out documents


def held_out_prompts(sources: Sequence[TokenSource], number: int, *, context_tokens: int) -> list[Ids]:
    """`number` prompts, of each source in turn, from documents spread evenly over it; fewer, with a warning, where that
    is all there is.

    Of a conversation, what comes before the first token the loss counts; of text, its first 32 tokens, or half of it if
    that is less. None is longer than context_tokens - 1. DataError: no document will do.
    """
    taken = [
        _spread(source, len(range(turn, number, len(sources))), context_tokens) for turn, source in enumerate(sources)
    ]
    found = [prompt for turn in itertools.zip_longest(*taken) for prompt in turn if prompt is not None]
    if not found:
        raise DataError(
            f"--validation_texts={number}: found no held-out document to go on from, expected some with a beginning of "
            f"at most {context_tokens - 1} tokens, and an answer where they are conversations; raise "
            f"--max_context_width, or give --validation_prompts"
        )
    if len(found) < number:
        logger.warning(f"--validation_texts={number}: {len(found)} held-out documents can be gone on from, no more")
    return found


def _spread(source: TokenSource, count: int, context_tokens: int) -> list[Ids]:
    starts = _starts(source, count)
    prompts: list[Ids] = []
    seen: set[int] = set()
    for turn in range(count):
        first = turn * len(starts) // count
        # A document that will not do leaves its turn to the next one.
        for document in (place % len(starts) for place in range(first, first + len(starts))):
            if document in seen:
                continue
            seen.add(document)
            if prompt := _beginning(source, *_bounds(source, starts, document), context_tokens=context_tokens):
                prompts.append(prompt)
                break
    return prompts


def _starts(source: TokenSource, count: int) -> NDArray[np.int64]:
    """Where documents begin; where nothing says so, `count` places spread evenly."""
    if source.document_starts is not None:
        return source.document_starts
    found = [np.zeros(1, dtype=np.int64)]
    for start in range(0, source.num_tokens, _BLOCK_TOKENS) if source.eos_token_id is not None else ():
        tokens = source.read(start, min(_BLOCK_TOKENS, source.num_tokens - start))
        found.append(np.flatnonzero(tokens == source.eos_token_id) + start + 1)
    starts = np.concatenate(found)
    return starts if len(starts) > 1 else np.arange(count) * source.num_tokens // max(1, count)


def _bounds(source: TokenSource, starts: NDArray[np.int64], document: int) -> tuple[int, int]:
    """(first token, number of tokens) of a document."""
    start = int(starts[document])
    end = int(starts[document + 1]) if document + 1 < len(starts) else source.num_tokens
    return start, end - start


def _beginning(source: TokenSource, start: int, length: int, *, context_tokens: int) -> Ids:
    """A document's prompt; empty where it has none that leaves room for a token behind it."""
    if not length:
        return ()
    targets = source.targets(start, min(length, context_tokens))
    if targets is None:
        return tuple(source.read(start, min(_TEXT_PROMPT_TOKENS, length // 2, context_tokens - 1)).tolist())
    return tuple(source.read(start, int(targets.argmax())).tolist())  # of none where none is counted, too


def answer_ends(source: TokenSource, special: NDArray[np.int64], *, context_tokens: int) -> set[int]:
    """The special tokens that end what the loss counts in conversations: after them it is another's turn.

    Read off the tokens, since prepared bins may have been written with a template that is not kept beside them.
    """
    starts, ends = source.document_starts, set[int]()
    if starts is None or source.targets(0, 1) is None:
        return ends
    for document in range(0, len(starts), -(-len(starts) // _DOCUMENTS_LOOKED_AT)):
        start, length = _bounds(source, starts, document)
        size = min(length, context_tokens)
        tokens, targets = source.read(start, size), source.targets(start, size)
        assert targets is not None
        # Of what is cut off here nobody knows whether it goes on.
        is_last = targets & ~np.append(targets[1:], size < length)[:size]
        ends |= set(tokens[is_last & np.isin(tokens, special)].tolist())
    return ends


# --- from a file


def _lines(path: Path, number: int) -> list[str]:
    """The first `number` lines of the file that are not empty."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--validation_prompts={path}: cannot be read ({error}); expected a text file with a prompt in each line"
        ) from error
    lines = [line for line in lines if line]
    if len(lines) < number:
        raise ConfigError(
            f"--validation_prompts={path}: found {len(lines)} lines that are not empty, expected at least "
            f"{number}, one for each of --validation_texts; add lines, or lower --validation_texts"
        )
    return lines[:number]


def _renderer(sources: Sequence[TokenSource], tokenizer: TextTokenizer, given: str | None) -> ChatRenderer | None:
    """What makes a line a user's message, where the data are conversations. DataError: a template that is none."""
    if all(source.targets(0, 1) is None for source in sources):
        return None
    try:
        template = read_chat_template(tokenizer, None if given is None else Path(given).expanduser())
    except DataError as error:
        if given is not None:
            raise
        # Answers may be learnt to plain text, and bins keep no template that was given when they were made.
        logger.warning(f"--validation_prompts: lines are plain text and not a user's messages: {error}")
        return None
    return ChatRenderer(template, tokenizer.special_tokens)


def _encoded(
    line: str, tokenizer: TextTokenizer, renderer: ChatRenderer | None, *, context_tokens: int, path: Path
) -> Ids:
    where = f"--validation_prompts={path}: {line[:40]!r}"
    if renderer is None:
        ids = tokenizer.encode([line])[0].tolist()
    else:
        try:
            text = renderer.prompt([{"role": "user", "content": line}])
        except Refused as error:
            raise DataError(f"{where}: {error}") from None
        tokenizer.backend.encode_special_tokens = False  # the template writes them
        ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    if not 0 < len(ids) < context_tokens:
        raise DataError(
            f"{where} has {len(ids)} tokens; expected 1 to {context_tokens - 1}, so that one fits behind them into "
            f"--max_context_width={context_tokens}; shorten the line"
        )
    return tuple(ids)
