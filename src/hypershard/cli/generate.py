"""`hypershard generate RUN`: let a trained model continue a text, on one device."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .checkpoint_adapters import add_adapters
from .checkpoint_places import PLACE, add_step, chosen, stored_at
from .loaded_model import load_model
from .place import place_tokenizer

if TYPE_CHECKING:
    from ..data.encode.tokenizer import TextTokenizer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard generate",
        description="Continue a text with a checkpoint of a run. Loads the whole model on one device.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN", help=PLACE)
    parser.add_argument("--prompt", default="The", help="text to continue; default: %(default)r")
    add_sampling(parser, max_new_tokens=80)
    return parser


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """The flags of `Opened.continued` and of `opened_model`."""
    add_step(parser)
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling; default: %(default)s")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the run directory's")
    add_adapters(parser)


def run(argv: Sequence[str]) -> int:
    """Print the prompt and its continuation. Raises CheckpointError and DataError."""
    args = build_parser().parse_args(argv)
    with opened_model(args, given=args.prompt) as opened:
        ids = opened.texts.encode(args.prompt).ids
        print(opened.texts.decode([*ids, *opened.continued(ids, args)]))
    return 0


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run's model on one device with its tokenizer, which `texts` is too, as the tokenizers library has it."""

    model: Any
    tokenizer: TextTokenizer
    texts: Any
    eos_token_id: int | None

    def continued(
        self, ids: Sequence[int], args: argparse.Namespace, *, ends: Sequence[int] = (), streamer: Any = None
    ) -> list[int]:
        """The ids that follow `ids`, by the flags of `add_sampling`, up to the end of the text or one of `ends`."""
        import torch

        torch.manual_seed(args.seed)
        prompt = torch.tensor([list(ids)], device=self.model.device)
        stops = sorted({*ends, *([] if self.eos_token_id is None else [self.eos_token_id])})
        # Of an untrained row of the embedding nothing can be decoded: models may have more rows than tokenizers ids.
        unknown = list(range(self.tokenizer.vocab_size, self.model.config.vocab_size))
        how = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
        try:
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=args.max_new_tokens,
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else None,
                suppress_tokens=unknown or None,
                use_cache=True,
                streamer=streamer,
                **how,
            )
        except torch.OutOfMemoryError as error:
            raise CheckpointError(
                f"the GPU has no memory left for {prompt.shape[1]} tokens and up to --max_new_tokens="
                f"{args.max_new_tokens} more; give a shorter text, or take a larger GPU"
            ) from error
        found: list[int] = output[0, prompt.shape[1] :].tolist()
        return found


@contextlib.contextmanager
def opened_model(args: argparse.Namespace, *, given: str) -> Iterator[Opened]:
    """A checkpoint of a run, in a folder or a bucket, by the flags of `add_sampling`; `given` is known to be read.

    Raises CheckpointError, also where the device has no room for the model and these texts, DataError, StorageError.
    """
    from tokenizers import Tokenizer

    from ..data.encode.tokenizer import load_tokenizer

    source = stored_at(args.run_dir)
    stored = chosen(source, args.step).stored
    with place_tokenizer(source.place, args.tokenizer) as path:
        if path is None:
            raise CheckpointError(f"found no tokenizer beside {source.location}; give --tokenizer")
        loaded = load_tokenizer(path)
        context_tokens = len(given.encode()) + args.max_new_tokens  # a token is a byte at least
        model = load_model(stored, base=args.base, adapters=args.adapter, context_tokens=context_tokens)
        texts = Tokenizer.from_file(str(loaded.path))
        eos_token_id = stored.facts(stored.manifest()).get("eos_token_id")
        yield Opened(model=model, tokenizer=loaded, texts=texts, eos_token_id=eos_token_id)
