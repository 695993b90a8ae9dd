"""A LoRA in a GGUF file, as llama.cpp applies it: NAME.weight.lora_a (r, I), NAME.weight.lora_b (O, r).

    s = adapter.lora.alpha / r, or 1 if alpha is 0 or absent

One alpha for all modules; a converter that was given an rsLoRA has lost its scale, and nothing tells. In a
Llama the rows of q and k are in llama.cpp's order (formats/gguf.py). The package `gguf` decodes the blocks.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from ..errors import ConfigError, UnsupportedError, short
from ..formats.gguf import hf_name, open_any
from ..formats.safetensors import check_name
from .contents import TABLE_A, TABLE_B, A, B, Contents, Entry, gathered, listed, plain, reordered, turned
from .dictionaries import rows_of, unturned

FORM = re.compile(r"(.+\.weight)\.lora_([ab])")
PERMUTED = ("llama", "granite", "llada")  # architectures whose rows of q and k llama.cpp reorders


def read_gguf(path: Path, heads: tuple[int, int] | None = None) -> Contents:
    """The contents of a GGUF file; `heads` of queries and keys bring rows into Hugging Face's order.

    UnsupportedError for a file that is no LoRA, FormatError for a damaged one.
    """
    values, tensors = open_any(path)
    kinds = {name: values.get(name) for name in ("general.type", "adapter.type")}
    if kinds != {"general.type": "adapter", "adapter.type": "lora"}:
        raise UnsupportedError(f"{path}: is {short(kinds)}; expected an adapter of type lora")
    architecture = values.get("general.architecture")
    alpha = values.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not 0 <= alpha < math.inf:
        raise ConfigError(f"{path}: adapter.lora.alpha is {short(alpha)}; expected a number, at least 0")
    entries: dict[str, Entry] = {}
    alphas: dict[str, float] = {}
    others: dict[str, list[str]] = {}
    permuted = architecture in PERMUTED
    for name in tensors:
        check_name(path, name)
        match = FORM.fullmatch(name)
        if not match:
            others.setdefault("full weight", []).append(name)
            continue
        module = path_of(match[1])
        table = module.endswith("embed_tokens")
        kind = {"a": TABLE_A if table else A, "b": TABLE_B if table else B}[match[2]]
        entry = plain(tensors, name)
        entry = turned(entry) if table and match[2] == "a" else entry
        order = rows_of(str(path), module, heads) if permuted and match[2] == "b" else None
        entries[f"{module}.{kind}"] = reordered(entry, order) if order else entry
        if alpha:
            alphas[module] = alpha
    doubts = listed(others)
    if permuted and heads is None:
        doubts.append(unturned("llama.cpp"))
    found = gathered(str(path), entries, {})
    return Contents("llama.cpp", found, alphas, {}, (), tuple(doubts), values.get("general.name"))


def path_of(name: str) -> str:
    """Hugging Face's path of a module; a name that a Llama does not have stays as it is."""
    try:
        return hf_name(name).removesuffix(".weight")
    except UnsupportedError:
        return name.removesuffix(".weight")
