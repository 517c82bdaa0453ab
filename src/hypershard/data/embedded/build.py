"""Make the embedded corpus and its tokenizer again: `python -m hypershard.data.embedded.build`.

Run by hand, seldom: the results are kept in the repository. The text is the documentation that a Python
interpreter carries with it: the language reference (`pydoc_data.topics`) and the docstrings of the
standard library, read with `ast`, so nothing of it is executed. The same interpreter release gives the
same bytes; the one used last is named in README.md.
"""

from __future__ import annotations

import ast
import inspect
import json
import lzma
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from hypershard.data.embedded import CORPUS_PATH, EOS_TOKEN, TOKENIZER_PATH, VOCAB_SIZE

# Below this a docstring says little more than the function's name.
MIN_DOCSTRING_CHARACTERS = 80
MIN_DOCUMENT_CHARACTERS = 240
# Not the library itself, or test data in strange encodings.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def language_reference() -> Iterator[str]:
    """One document per topic of the language reference, by name."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip()


def library_docstrings(library: Path) -> Iterator[str]:
    """One document per module docstring, function, and class with its methods, by file and line."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        # _sysconfigdata*.py holds the paths of the machine that built the interpreter.
        if SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            with warnings.catch_warnings():  # old escape sequences in old modules
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and deliberately broken files are not documentation
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if docstring := _docstring(tree):
            yield f"module {module}\n\n{docstring}"
        for node in tree.body:
            if isinstance(node, Definition):
                yield "\n\n".join(_described(node, prefix=module))


def _described(node: Definition, *, prefix: str) -> Iterator[str]:
    name = f"{prefix}.{node.name}"
    if docstring := _docstring(node):
        if isinstance(node, ast.ClassDef):
            yield f"class {name}\n\n{docstring}"
        else:
            yield f"{name}({ast.unparse(node.args)})\n\n{docstring}"
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, Definition):
                yield from _described(child, prefix=name)


def _docstring(node: ast.Module | Definition) -> str | None:
    text = ast.get_docstring(node, clean=False)
    if text is None or len(text) < MIN_DOCSTRING_CHARACTERS:
        return None
    return inspect.cleandoc(text)


def distinct(documents: Iterator[str]) -> Iterator[str]:
    """Documents long enough to learn from, each once: several modules carry copies of one docstring."""
    seen: set[str] = set()
    for document in documents:
        # The first paragraph names the module; copies differ only there.
        body = " ".join(document.split("\n\n", 1)[-1].split())
        if len(document) >= MIN_DOCUMENT_CHARACTERS and body not in seen:
            seen.add(body)
            yield document


def write_corpus(documents: list[str]) -> None:
    """One {"text": ...} per line, compressed."""
    lines = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    CORPUS_PATH.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))


def write_tokenizer(documents: list[str]) -> None:
    """A byte-level BPE, so any text can be encoded; the end-of-text token is the first id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(TOKENIZER_PATH), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS_TOKEN}
    TOKENIZER_PATH.with_name("tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def main() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = list(distinct(language_reference())) + list(distinct(library_docstrings(library)))
    write_corpus(documents)
    write_tokenizer(documents)
    shutil.copyfile(library / "LICENSE.txt", CORPUS_PATH.with_name("LICENSE-PSF"))
    num_characters = sum(map(len, documents))
    print(f"{len(documents)} documents, {num_characters:,} characters, {CORPUS_PATH.stat().st_size:,} bytes packed")


if __name__ == "__main__":
    main()
