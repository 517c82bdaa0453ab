"""A row that holds a conversation -> messages as chat templates expect them, or the reason why not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class Refused(Exception):
    """A row that cannot be encoded; its text says what was found and what was expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """`messages` with text (or None) as content; tool calls as {"type": "function", "function": {…}}."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def read_conversation(row: Mapping[str, Any], *, messages_field: str, tools_field: str, is_table: bool) -> Conversation:
    """The conversation in a row. In a row of a table (`is_table`) a null stands for a key that is not there, at any
    depth: all rows of a table have the same keys. Refused: anything templates cannot be given.
    """
    if is_table:
        row = without_nulls(row)
    messages = row.get(messages_field)
    if not isinstance(messages, list):
        found = f"{type(messages).__name__} under {messages_field!r}" if messages_field in row else keys_of(row)
        raise Refused(f"found {found}; expected a list of messages under {messages_field!r}; --messages_field names it")
    if not messages:
        raise Refused(f"found no messages under {messages_field!r}; expected at least one of the assistant's")
    read = read_messages(messages, where="")
    if not any(message["role"] == "assistant" for message in read):
        raise Refused("found no message of the assistant; expected at least one, since only those are learnt")
    return Conversation(messages=read, tools=read_tools(row.get(tools_field), tools_field))


def read_messages(messages: list[Any], *, where: str) -> list[dict[str, Any]]:
    """The messages as templates expect them; `where` they are, for errors. Refused: anything else."""
    return [_message(message, where=f"{where}message {number}") for number, message in enumerate(messages, start=1)]


def without_nulls(value: Any) -> Any:
    """`value` without the keys of mappings that hold None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def texts_in(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_in(item)


def _message(message: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Refused(f'{where}: found {type(message).__name__}; expected {{"role": …, "content": …}}')
    role = message.get("role")
    if role not in ROLES:
        found = f"the role {role!r}" if "role" in message else keys_of(message)
        raise Refused(f"{where}: found {found}; expected 'role' to be one of {', '.join(ROLES)}")
    # Templates ask whether a key is there, so one that holds nothing must not be.
    read = {key: value for key, value in message.items() if value is not None}
    if calls := _tool_calls(read.pop("tool_calls", None), where):
        read["tool_calls"] = calls
    read["content"] = _content(read.get("content"), where)
    if read["content"] is None and not calls:
        raise Refused(f"{where}: found no content; expected text")
    return read


def _content(content: Any, where: str) -> str | None:
    """Parts of text are joined: templates that know no parts would write them as Python lists."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"{where}: found {type(content).__name__} as content; expected text or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise Refused(f'{where}: found a part of type {kind!r}; expected {{"type": "text", "text": …}} only')
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise Refused(f"{where}: found {type(calls).__name__} under 'tool_calls'; expected a list")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    # {"name": …, "arguments": …} alone is the short form of {"type": "function", "function": {…}}.
    if isinstance(call, Mapping) and "function" not in call:
        parts = {key: call[key] for key in ("name", "arguments") if key in call}
        others = {key: value for key, value in call.items() if key not in parts}
        call = {"type": "function", **others, "function": parts}
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Refused(
            f'{where}: found a tool call without a name; expected {{"function": {{"name": …, "arguments": …}}}}'
        )
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str | Mapping):
        raise Refused(
            f"{where}: found {type(arguments).__name__} as arguments of {function['name']!r}; "
            "expected a mapping, or its JSON as text"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def with_arguments(messages: list[dict[str, Any]], *, as_text: bool) -> list[dict[str, Any]]:
    """The messages with the arguments of tool calls as JSON text or as mappings, whichever a template can write.

    Text that is not the JSON of a mapping stays text.
    """
    return [
        {**message, "tool_calls": [_with_arguments(call, as_text) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {**call, "function": {**call["function"], "arguments": arguments}}


def read_tools(tools: Any, tools_field: str) -> list[dict[str, Any]] | None:
    """Tools are often kept as JSON text, because a table's column cannot hold schemas of different shapes."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise Refused(f"found text that is not JSON under {tools_field!r} ({error}); expected a list") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused(f"found {type(tools).__name__} under {tools_field!r}; expected a list of objects, one a tool")
    return tools


def keys_of(row: Mapping[str, Any]) -> str:
    """What a row holds, for messages about what it does not."""
    return f"keys {', '.join(map(repr, row))}" if row else "no keys"
