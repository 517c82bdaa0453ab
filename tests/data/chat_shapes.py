"""Chat templates in the shapes that published models have, and a small tokenizer that knows their special tokens."""

# ruff: noqa: RUF001 (DeepSeek's special tokens are written with a wide bar)

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, processors

from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.encode.encoder import EncoderSpec, encoder_spec
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.data.records import Encoded, Malformed, RawDocument

# Qwen2: a system prompt of its own where the conversation has none.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same with marks, as templates made for training have them.
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{%- generation -%}{{ (m.content or '') + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2.5: tools in the system prompt, tool calls as tagged JSON, neighbouring answers of tools in one user turn.
QWEN_TOOLS = """{%- if tools %}
{{- '<|im_start|>system\nTools: ' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls %}
{%- set call = call.function %}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
# Qwen3: reasoning is written for the turns after the last question only, and an empty one where there is none.
THINKING = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<|im_start|>assistant\n<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' + m.content + '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
# Llama 3.1: a date, tools in the first user turn, the role ipython, content trimmed, one tool call at a time.
LLAMA31 = """{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' + system + '<|eot_id|>' }}
{%- if tools is not none %}
{%- if not messages %}{{ raise_exception('no first user message') }}{% endif %}
{{- '<|start_header_id|>user<|end_header_id|>\n\nFunctions: ' }}{% for t in tools %}{{ t | tojson }}{% endfor %}
{{- '\n' + messages[0].content | trim + '<|eot_id|>' }}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('Only single tool-calls at once!') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
# Llama 4: other names of the same, and text beside tool calls.
LLAMA4 = """{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|header_start|>ipython<|header_end|>\n\n' + m.content + '<|eot|>' }}
{%- elif 'tool_calls' in m %}
{{- '<|header_start|>assistant<|header_end|>\n\n' }}
{%- if m.content %}{{- '<|python_start|>' + m.content + '<|python_end|>' }}{% endif %}
{%- for call in m.tool_calls %}
{{- '{"name": "' + call.function.name + '", "parameters": ' }}{{ call.function.arguments | tojson }}{{ '}' }}
{%- endfor %}
{{- '<|eot|>' }}
{%- else %}
{{- '<|header_start|>' + m.role + '<|header_end|>\n\n' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
{{- '<|eot|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"""
# Mistral v3: no header for the assistant, no generation prompt, tools and system prompt with the last user turn.
MISTRAL3 = """{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools is not none and m == users[-1] %}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST]' }}{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}
{%- elif m.tool_calls is defined and m.tool_calls is not none %}
{{- '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('IDs should have length 9!') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}
{%- else %}
{{- '[TOOL_RESULTS]{"content": ' + m.content + '}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""
# Zephyr: headers are plain text, the end token ends every turn, a line ends after it.
ZEPHYR = """{% for message in messages %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
# DeepSeek R1: reasoning cut from every turn, a prompt that opens <think>, arguments of tool calls as text.
R1 = """{% set ns = namespace(is_tool=false) %}{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}{% endif %}
{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}{% endif %}
{%- if m.role == 'assistant' and m.content is none %}
{%- for call in m.tool_calls %}
{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' + call.function.name + '\n' }}
{{- call.function.arguments + '<｜tool▁calls▁end｜>' }}
{%- endfor %}
{{- '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- if m.role == 'assistant' and m.content is not none %}
{%- if ns.is_tool %}
{{- '<｜tool▁outputs▁end｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% set ns.is_tool = false %}
{%- else %}
{%- set content = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endif %}
{%- if m.role == 'tool' %}{%- set ns.is_tool = true %}{{- '<｜tool▁outputs▁begin｜>' + m.content }}{% endif %}
{%- endfor %}
{%- if ns.is_tool %}{{- '<｜tool▁outputs▁end｜>' }}{% endif %}
{%- if add_generation_prompt and not ns.is_tool %}{{- '<｜Assistant｜><think>\n' }}{% endif %}"""
# Llama 2: the system prompt inside the first user turn, nothing but text and spaces around turns.
LLAMA2 = """{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}
{%- else %}{{- ' ' + m.content | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

SPECIAL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<s>", "</s>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|header_start|>", "<|header_end|>", "<|eot|>", "<|python_start|>", "<|python_end|>"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[INST]", "[/INST]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
)
# Tokens of their own that texts may hold.
TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def save_tokenizer(folder: Path, template: object = None, *, bos: str = "<s>", eos: str = "</s>") -> Path:
    """The embedded tokenizer with the special tokens above; `template` goes into its tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer.from_file(str(TOKENIZER_PATH))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as in GPT-2's and Llama 3's
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": {"content": bos, "lstrip": False}, "eos_token": eos}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat_spec(folder: Path, template: object, *, chat_template: Path | None = None, **tokens: str) -> EncoderSpec:
    return encoder_spec(
        kind="chat",
        tokenizer=load_tokenizer(save_tokenizer(folder, template, **tokens)),
        text_field="text",
        messages_field="messages",
        chat_template=chat_template,
    )


def line(row: object, number: int = 1) -> RawDocument:
    """A row as a line of JSON."""
    content = row if isinstance(row, bytes) else json.dumps(row).encode()
    return RawDocument(content=content, location="a.jsonl", number=number, ends_document=True, read_bytes=0)


def table_row(row: dict[str, object]) -> RawDocument:
    return RawDocument(content=row, location="a.parquet", number=1, ends_document=True, read_bytes=0)


def marked(spec: EncoderSpec, encoded: Encoded | Malformed) -> str:
    """The tokens as text, those that the loss counts between ⟦ and ⟧."""
    assert isinstance(encoded, Encoded), encoded
    assert encoded.targets is not None and encoded.targets.shape == encoded.tokens.shape
    backend = load_tokenizer(spec.tokenizer_path).backend
    runs: list[tuple[bool, list[int]]] = []
    for token, counted in zip(encoded.tokens.tolist(), encoded.targets.tolist(), strict=True):
        if not runs or runs[-1][0] != counted:
            runs.append((counted, []))
        runs[-1][1].append(token)
    texts = [(counted, backend.decode(ids, skip_special_tokens=False)) for counted, ids in runs]
    return "".join(f"⟦{text}⟧" if counted else text for counted, text in texts)


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, arguments: object, call_id: str = "abcdef123") -> dict[str, object]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
