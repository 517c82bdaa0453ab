"""Chat templates: the Jinja text that writes a conversation as a model of its kind reads it, and where it is found."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from .tokenizer import TextTokenizer

TEMPLATE_FILE = "chat_template.jinja"
# Where transformers keeps the other templates of a tokenizer that has several.
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """`text` writes a conversation, `tool_text` (if there is one) a conversation with tools."""

    source: str  # where it was found, for messages
    text: str
    tool_text: str | None
    variables: tuple[tuple[str, str], ...]  # names and texts of special tokens

    def text_for(self, tools: Sequence[Any] | None) -> str:
        return self.tool_text if tools and self.tool_text is not None else self.text

    @property
    def parts(self) -> tuple[object, ...]:
        """What decides the text it writes."""
        return (self.text, self.tool_text, self.variables)


def marks_generation(text: str) -> bool:
    """Whether a template says itself, between {% generation %} and {% endgeneration %}, what the model writes."""
    return _MARKER.search(text) is not None


def read_chat_template(tokenizer: TextTokenizer, given: Path | None) -> ChatTemplate:
    """The template in the file `given`, else in `chat_template.jinja` beside the tokenizer, else in its
    tokenizer_config.json. Of several, 'default', and 'tool_use' for conversations with tools, as in transformers.

    DataError: no template, one that is no text, or no default among several.
    """
    template = find_chat_template(tokenizer, given)
    if template is None:
        raise DataError(
            f"--chat_template: found no chat template in {tokenizer.path.with_name('tokenizer_config.json')} nor "
            f"{TEMPLATE_FILE} beside it; conversations need one, such as that of the model's instruction-tuned version"
        )
    return template


def find_chat_template(tokenizer: TextTokenizer, given: Path | None) -> ChatTemplate | None:
    """As `read_chat_template`, but None where there is no template."""
    config_path = tokenizer.path.with_name("tokenizer_config.json")
    config = _settings(config_path)
    beside = tokenizer.path.with_name(TEMPLATE_FILE)
    for_tools = tokenizer.path.parent / TOOL_TEMPLATE_FILE
    if given is not None:
        source, text, tool_text = given, _read(given), None
    elif beside.is_file():
        source, text, tool_text = beside, _read(beside), _read(for_tools) if for_tools.is_file() else None
    elif (configured := config.get("chat_template")) is not None:
        source = config_path
        text, tool_text = _configured(configured, config_path)
    else:
        return None
    return ChatTemplate(source=str(source), text=text, tool_text=tool_text, variables=_variables(config, tokenizer))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat_template={file}: cannot be read ({error}); expected a Jinja file") from error


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what only special_tokens_map.json beside it says; {} without either."""
    settings: dict[str, Any] = {}
    for file in (path.with_name("special_tokens_map.json"), path):
        if not file.is_file():
            continue
        try:
            settings |= {name: value for name, value in json.loads(file.read_bytes()).items() if value is not None}
        except (ValueError, AttributeError) as error:
            raise DataError(f"--tokenizer: {file} is not readable as a JSON object: {error}") from error
    return settings


def _configured(value: Any, path: Path) -> tuple[str, str | None]:
    """(template, template for tools) of the `chat_template` in a tokenizer_config.json."""
    if isinstance(value, str):
        return value, None
    try:
        named = {entry["name"]: str(entry["template"]) for entry in value}
        return named["default"], named.get("tool_use")
    except (TypeError, KeyError) as error:
        raise DataError(
            f"--chat_template: found neither text nor a list with a template named 'default' under 'chat_template' "
            f"in {path}; give one"
        ) from error


def _variables(config: dict[str, Any], tokenizer: TextTokenizer) -> tuple[tuple[str, str], ...]:
    """bos_token, eos_token and whatever other special tokens are named so, as transformers hands them to templates."""
    found = {"eos_token": tokenizer.backend.id_to_token(tokenizer.eos_token_id)}
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token  # an AddedToken written out
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return tuple(sorted((name, token) for name, token in found.items() if token is not None))
