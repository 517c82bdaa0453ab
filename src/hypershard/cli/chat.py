"""`hypershard chat RUN`: talk to a model that was trained on conversations, on one device."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .checkpoint_places import PLACE
from .generate import Opened, add_sampling, opened_model

_ASKED = {"role": "user", "content": "?"}
_EPILOG = """examples:
  hypershard chat runs/chat                                    # line by line, until an empty one
  hypershard chat runs/chat --step best --system "Be brief." --prompt "What is FSDP?" --temperature 0
  hypershard chat s3://bucket/chat --tools tools.json --prompt "How heavy is it?"
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard chat",
        description="Talk to a checkpoint of a run. Loads the whole model on one device.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN", help=PLACE)
    parser.add_argument("--system", metavar="TEXT", help="the system's message; default: none")
    parser.add_argument(
        "--tools", type=Path, metavar="FILE", help="JSON list of the tools that it is told of, as rows have it"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask this and end; default: what you type, line by line")
    parser.add_argument("--chat_template", type=Path, metavar="FILE", help="Jinja template; default: the tokenizer's")
    add_sampling(parser, max_new_tokens=512)
    return parser


def run(argv: Sequence[str]) -> int:
    """Answer until nothing more is asked. Raises CheckpointError, and DataError for a tokenizer without a template."""
    args = build_parser().parse_args(argv)
    tools = None if args.tools is None else _tools(args.tools)
    given = "".join([args.system or "", args.prompt or "", "" if tools is None else json.dumps(tools)])
    with opened_model(args, given=given) as opened:
        talk = _Talk(opened, args, tools)
        if args.prompt is not None:
            talk.answer(args.prompt)
            return 0
        while question := _asked():
            talk.answer(question)
    return 0


def _tools(path: Path) -> list[dict[str, Any]] | None:
    from ..data.encode.chat_messages import Refused, read_tools

    try:
        return read_tools(path.read_text(encoding="utf-8"), "--tools")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--tools={path}: cannot be read ({error}); expected a JSON list of objects") from error
    except Refused as error:
        raise DataError(f"--tools={path}: {error}") from None


def _asked() -> str:
    """A line from the terminal or a pipe; empty at its end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()


class _Talk:
    """A conversation: all of it is given to the model again for each answer."""

    def __init__(self, opened: Opened, args: argparse.Namespace, tools: list[dict[str, Any]] | None) -> None:
        from ..data.encode.chat import ChatRenderer
        from ..data.encode.chat_template import read_chat_template

        self._opened, self._args, self._tools = opened, args, tools
        template = read_chat_template(opened.tokenizer, args.chat_template)
        self._renderer = ChatRenderer(template, opened.tokenizer.special_tokens)
        end = self._renderer.end_of_turn()
        self._ends = [] if end is None else [opened.texts.token_to_id(end)]
        self._messages = [] if args.system is None else [{"role": "system", "content": args.system}]
        if tools and self._prompt([_ASKED], tools) == self._prompt([_ASKED], None):
            raise DataError(
                f"--tools={args.tools}: the chat template ({template.source}) writes nothing of them; drop the flag or "
                f"give a template that knows tools (--chat_template)"
            )

    def answer(self, question: str) -> None:
        """Print the answer as it comes. Raises DataError for a question that would forge turns."""
        self._messages.append({"role": "user", "content": question})
        prompt = self._prompt(self._messages, self._tools)
        ids = self._opened.texts.encode(prompt, add_special_tokens=False).ids
        stream = _Stream(self._opened.texts)
        self._opened.continued(ids, self._args, ends=self._ends, streamer=stream)
        self._messages.append({"role": "assistant", "content": stream.text})

    def _prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        from ..data.encode.chat_messages import Refused

        try:
            return self._renderer.prompt(messages, tools)
        except Refused as error:
            raise DataError(str(error)) from None


class _Stream:
    """Prints tokens as they are generated; transformers gives it the prompt first. `text`: all that was printed."""

    def __init__(self, texts: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self.text = ""
        self._texts, self._decoded = texts, DecodeStream(skip_special_tokens=True)
        self._is_prompt = True

    def put(self, ids: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in ids.tolist():
            piece = self._decoded.step(self._texts, token)
            if piece:
                print(piece, end="", flush=True)
                self.text += piece

    def end(self) -> None:
        print(flush=True)
