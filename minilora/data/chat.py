r"""Messages -> the prompt that a base was trained on, by the chat template in its folder.

    [{role, content}, ...]  ->  "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

A template is a program of Jinja, from the base's folder or GGUF file. It runs in Jinja's sandbox, with
nothing to load and nothing to call but what texts and lists offer. Stands in for transformers'
apply_chat_template, with its settings; leaves out tools, documents, the date, and templates with names other
than "default". One that computes for very long is not stopped: whoever wrote it wrote the weights, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError, InputError, needed, short
from ..formats import gguf
from ..formats.atomic import exists, read
from ..formats.huggingface import read_json
from ..formats.tokenizer import utf8

Messages = Sequence[Mapping[str, str]]
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LARGEST = 1 << 24  # bytes of a tokenizer_config.json, which may list the whole vocabulary


def chat_template(where: Path) -> Callable[[Messages], str] | None:
    """What turns messages into a prompt, for a base's folder or GGUF file; None if it has no template.

    FormatError if the template cannot be read. The prompt ends where the assistant's answer begins; the
    function raises InputError for messages that the template refuses.
    """
    source, tokens = of_gguf(where) if where.suffix == ".gguf" else of_folder(where)
    return None if source is None else compiled(where, source, tokens)


def of_folder(where: Path) -> tuple[str | None, dict[str, str]]:
    """The template and the special tokens of a folder; chat_template.jinja comes before the configs."""
    names = ("special_tokens_map.json", "tokenizer_config.json")
    settings: dict[str, Any] = {}
    for file in (where / name for name in names):
        settings |= read_json(file, LARGEST) if exists(file) else {}
    source = settings.get("chat_template")
    if exists(file := where / "chat_template.jinja"):
        source = utf8(file, read(file, LARGEST))
    if isinstance(source, list):  # several, by name
        some = [one for one in source if isinstance(one, dict) and one.get("name") == "default"]
        source = some[0].get("template") if some else None
    if source is not None and not isinstance(source, str):
        raise FormatError(f"{where}: chat_template is {short(source)}; expected a text")
    found = {name: settings.get(name) for name in SPECIAL}
    tokens = {name: one.get("content") if isinstance(one, dict) else one for name, one in found.items()}
    return source, {name: token for name, token in tokens.items() if isinstance(token, str)}


def of_gguf(where: Path) -> tuple[str | None, dict[str, str]]:
    """The template and the special tokens of a GGUF file."""
    tokens = gguf.opened(where).values.get("tokenizer.ggml.tokens", [])
    ids = {name.removesuffix("_id"): number for name, number in gguf.special(where).items()}
    known = {name: tokens[number] for name, number in ids.items() if number < len(tokens)}
    return gguf.chat_template(where), known


def compiled(where: Path, source: str, tokens: Mapping[str, str]) -> Callable[[Messages], str]:
    """The template as a function; Jinja is imported here."""
    jinja2 = needed("jinja2", "serve")
    sandbox = needed("jinja2.sandbox", "serve")

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    world = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    world.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # theirs escapes HTML
    world.globals = {name: world.globals[name] for name in ("range", "dict", "namespace")}
    world.globals["raise_exception"] = refuse
    try:
        template = world.from_string(source)
    except jinja2.TemplateError as e:
        raise FormatError(f"{where}: its chat template cannot be read: {short(str(e))}") from e

    def prompt(messages: Messages) -> str:
        try:
            return template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **tokens
            )
        except Exception as e:  # a template may do anything that goes wrong
            raise InputError(f"the base's chat template refuses these messages: {short(str(e))}") from e

    return prompt
