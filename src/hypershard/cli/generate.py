"""`hypershard generate RUN`: let a trained model continue a text, on one device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.manifest import StoredCheckpoint, existing_place
from ..checkpoint.survey import survey
from ..config.schema import ModelConfig
from ..errors import CheckpointError
from ..models.family import family_of
from .place import place_tokenizer

if TYPE_CHECKING:
    import torch

    from ..data.encode.tokenizer import TextTokenizer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard generate",
        description="Continue a text with the newest checkpoint of a run. Loads the whole model on one device.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN", help="run directory, checkpoint directory, or one step's directory")
    parser.add_argument("--prompt", default="The", help="text to continue; default: %(default)r")
    parser.add_argument("--max_new_tokens", type=int, default=80, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling; default: %(default)s")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the run directory's")
    return parser


def run(argv: Sequence[str]) -> int:
    """Print the prompt and its continuation. Raises CheckpointError and DataError."""
    args = build_parser().parse_args(argv)
    from ..data.encode.tokenizer import load_tokenizer

    place = existing_place(args.run_dir)
    whole = [found.stored for found in survey(place) if found.is_complete]
    if not whole:
        raise CheckpointError(
            f"{args.run_dir}: found no finished checkpoint; expected a run directory with checkpoints/"
        )
    with place_tokenizer(place, args.tokenizer) as tokenizer_path:
        if tokenizer_path is None:
            raise CheckpointError(f"found no tokenizer beside {place.store.location}; give --tokenizer")
        tokenizer = load_tokenizer(tokenizer_path)
        return _generate(args, tokenizer, *_load(whole[0]))


def _generate(args: argparse.Namespace, tokenizer: TextTokenizer, model: Any, eos_token_id: int | None) -> int:
    import torch
    from tokenizers import Tokenizer

    torch.manual_seed(args.seed)
    texts = Tokenizer.from_file(str(tokenizer.path))
    ids = torch.tensor([texts.encode(args.prompt).ids], device=model.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    # Of an untrained row of the embedding nothing can be decoded: the model may have more rows than the tokenizer ids.
    unknown = list(range(tokenizer.vocab_size, model.config.vocab_size))
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        suppress_tokens=unknown or None,
        use_cache=True,
        **sampling,
    )
    print(texts.decode(output[0].tolist()))
    return 0


def _load(checkpoint: StoredCheckpoint) -> tuple[Any, int | None]:
    """The model of a checkpoint on one device, in bfloat16 on a GPU; and its end-of-text token."""
    import torch

    from ..checkpoint.metadata import read_metadata, read_tensors
    from ..parallel.init import materialise

    manifest = checkpoint.manifest()
    facts = checkpoint.facts(manifest)
    model = ModelConfig(**facts["model"])
    hf_model = family_of(model.model_type).build(model)
    materialise(hf_model, parameter_device=torch.device("cpu"), buffer_device=torch.device("cpu"))
    tensors: dict[str, torch.Tensor] = {f"model/{name}": p.detach() for name, p in hf_model.named_parameters()}
    read_tensors(checkpoint, manifest, read_metadata(checkpoint, manifest), tensors)
    if torch.cuda.is_available():
        hf_model = hf_model.to("cuda", torch.bfloat16)
    return hf_model.eval(), facts.get("eos_token_id")
