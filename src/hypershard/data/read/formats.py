"""Which files hold documents: what a name's end says about the format and how it is packed."""

from __future__ import annotations

from dataclasses import dataclass

# Only text formats are packed whole; Parquet and Arrow pack their columns themselves.
_PACKINGS = (".gz", ".xz", ".zst", ".bz2")
_TEXT_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "txt"}
_TABLE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
UNDERSTOOD = f"{', '.join((*_TEXT_FORMATS, *_TABLE_FORMATS))}, the first three also with {', '.join(_PACKINGS)}"
# JSON files that lie beside data and hold none: of tokenizers, of models, of `datasets`' save_to_disk, of token bins.
_NOT_DOCUMENTS = {
    "added_tokens.json",
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "generation_config.json",
    "meta.json",
    "special_tokens_map.json",
    "state.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """`name`: jsonl, txt, parquet or arrow. `packing`: .gz, .xz, .zst, .bz2, or nothing."""

    name: str
    packing: str


def format_of(name: str) -> Format | None:
    """The format of a file with this name (or path); None: it holds no documents."""
    lower = name.rsplit("/", 1)[-1].lower()
    if lower in _NOT_DOCUMENTS:
        return None
    for suffix, format_name in _TABLE_FORMATS.items():
        if lower.endswith(suffix):
            return Format(name=format_name, packing="")
    packing = next((suffix for suffix in _PACKINGS if lower.endswith(suffix)), "")
    for suffix, format_name in _TEXT_FORMATS.items():
        if lower.removesuffix(packing).endswith(suffix):
            return Format(name=format_name, packing=packing)
    return None
