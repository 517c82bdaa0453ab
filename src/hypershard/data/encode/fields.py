"""The fields of a row: a JSON line, or a table's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..records import RawDocument
from .chat_messages import Refused

TOOLS_FIELD = "tools"
# JSON can spell halves of characters ("\\ud800") that no text can hold.
NOT_UTF8 = "the text cannot be written as UTF-8 ({}); mend or drop the line"


def fields_of(document: RawDocument, *, example: str) -> Mapping[str, Any]:
    """The fields of a JSON line or a table's row; `example` is what a good line looks like. Refused: it has none."""
    content = document.content
    if isinstance(content, Mapping):
        return content
    if isinstance(content, str):
        raise Refused(f"found plain text; expected an object, such as {example}")
    try:
        row = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(f"not UTF-8 ({error}); convert the file") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON ({error}); expected one object per line, such as {example}") from error
    if not isinstance(row, dict):
        raise Refused(f"found {type(row).__name__}; expected an object, such as {example}")
    return row
