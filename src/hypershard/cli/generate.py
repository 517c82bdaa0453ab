"""`hypershard generate RUN`: let a trained model continue a text, on one device."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint.manifest import StoredCheckpoint, existing_place
from ..checkpoint.survey import survey
from ..config.schema import ModelConfig
from ..errors import CheckpointError
from ..models.family import family_of
from .checkpoint_adapters import add_adapters, whole_weights
from .checkpoint_merge import GivenAdapter
from .place import place_tokenizer

if TYPE_CHECKING:
    from ..data.encode.tokenizer import TextTokenizer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard generate",
        description="Continue a text with the newest checkpoint of a run. Loads the whole model on one device.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN", help="run directory, checkpoint directory, or one step's directory")
    parser.add_argument("--prompt", default="The", help="text to continue; default: %(default)r")
    add_sampling(parser, max_new_tokens=80)
    return parser


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """The flags of `Opened.continued` and of `opened_model`."""
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling; default: %(default)s")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the run directory's")
    add_adapters(parser)


def run(argv: Sequence[str]) -> int:
    """Print the prompt and its continuation. Raises CheckpointError and DataError."""
    args = build_parser().parse_args(argv)
    with opened_model(args) as opened:
        ids = opened.texts.encode(args.prompt).ids
        print(opened.texts.decode([*ids, *opened.continued(ids, args)]))
    return 0


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run's newest model on one device with its tokenizer, which `texts` is too, as the tokenizers library has it."""

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
        found: list[int] = output[0, prompt.shape[1] :].tolist()
        return found


@contextlib.contextmanager
def opened_model(args: argparse.Namespace) -> Iterator[Opened]:
    """The newest checkpoint of a run, a folder or a bucket, by the flags of `add_sampling`.

    Raises CheckpointError and DataError.
    """
    from tokenizers import Tokenizer

    from ..data.encode.tokenizer import load_tokenizer

    place = existing_place(args.run_dir)
    whole = [found.stored for found in survey(place) if found.is_complete]
    if not whole:
        raise CheckpointError(
            f"{args.run_dir}: found no finished checkpoint; expected a run directory with checkpoints/"
        )
    with place_tokenizer(place, args.tokenizer) as path:
        if path is None:
            raise CheckpointError(f"found no tokenizer beside {place.store.location}; give --tokenizer")
        loaded = load_tokenizer(path)
        model, eos_token_id = _load(whole[0], base=args.base, adapters=args.adapter)
        texts = Tokenizer.from_file(str(loaded.path))
        yield Opened(model=model, tokenizer=loaded, texts=texts, eos_token_id=eos_token_id)


def _load(
    checkpoint: StoredCheckpoint, *, base: str | None, adapters: Sequence[GivenAdapter]
) -> tuple[Any, int | None]:
    """The model of a checkpoint on one device, in bfloat16 on a GPU; and its end-of-text token."""
    import torch

    from ..parallel.init import materialise

    facts = checkpoint.facts(checkpoint.manifest())
    model = ModelConfig(**facts["model"])
    hf_model = family_of(model.model_type).build(model)
    materialise(hf_model, parameter_device=torch.device("cpu"), buffer_device=torch.device("cpu"))
    weights = whole_weights(checkpoint, base=base, more=adapters)
    for name, parameter in hf_model.named_parameters():
        parameter.data.copy_(weights.read([name], torch.float32)[name])
    if torch.cuda.is_available():
        hf_model = hf_model.to("cuda", torch.bfloat16)
    return hf_model.eval(), facts.get("eos_token_id")
