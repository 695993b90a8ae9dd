"""A Llama in a GGUF file, llama.cpp's format: its shape, its tensors by Hugging Face's names, its tokenizer.

    4-bit weights in blocks of 32:  w = q d + m (Q4_1), w = q d (Q8_0), ...  decoded to float32

llama.cpp rotates neighbouring pairs (2j, 2j+1) of a query, Hugging Face the pairs (j, j + E/2). A GGUF file
has the rows of q_proj and k_proj in llama.cpp's order; they are put back here. The wrong order raises no
error but gives a much worse model. The package `gguf` (extra `gguf`) decodes the blocks. The header is read
here, because the package follows a damaged length until memory runs out. Leaves out other architectures,
scaled rotary positions and tokenizers other than byte-level BPE.
"""

from __future__ import annotations

import functools
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, MismatchError, UnsupportedError, needed, short
from ..model import Config
from .atomic import Stamp, named, read_at, stamp_of
from .safetensors import BRIEF, Tensors, refuse_pointer

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK = re.compile(r"(?:blk\.([0-9]{1,6})\.)?([a-z_]+)\.(weight|bias)")
CONTROL = 3  # the type of tokens that no text contains, such as the end of a turn
SCALARS = "BbHhIif?--Qqd"  # struct's format characters, by GGUF's type number
STRING, ARRAY = 8, 9
LONGEST = 1 << 26  # bytes of header


def hf_name(name: str) -> str:
    """Hugging Face's name of a tensor: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    match = BLOCK.fullmatch(name)
    if not match or match[2] not in NAMES:
        raise UnsupportedError(f"has the tensor {short(name)}; expected those of a plain Llama")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def half_split(W: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows (H*E, ...) from pairs (2j, 2j+1) to pairs (j, j + E/2) within each head."""
    half = len(W) // heads // 2
    return W.reshape(heads, half, 2, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)


def neighbours(W: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `half_split`."""
    half = len(W) // heads // 2
    return W.reshape(heads, 2, half, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)


@dataclass(frozen=True)
class Blocks:
    """A tensor in the file: blocks of one of ggml's types, from byte `start` on."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int  # in bytes


@dataclass(frozen=True, eq=False)
class Header:
    """Everything in a GGUF file before the tensors' numbers."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Blocks]
    stamp: Stamp


class Cursor:
    """Reads the bytes of a header in order; FormatError beyond the end of the file."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self.path, self.stamp, self.size, self.at, self.seen = path, stamp, stamp.size, 0, bytearray()

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start, self.at = self.at, self.at + count
        if self.at > (end := min(self.size, LONGEST)):
            raise FormatError(f"{self.path}: its header does not end by byte {end}; the file has {self.size}")
        if self.at > len(self.seen):
            more = min(max(self.at - len(self.seen), 1 << 20), self.size - len(self.seen))
            self.seen += read_at(self.path, len(self.seen), more, self.stamp)
        return bytes(self.seen[start : self.at])

    def numbers(self, kind: str, count: int = 1) -> list[Any]:
        """The next `count` numbers of one of struct's types."""
        return list(struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(f"<{kind}"))))

    def number(self, kind: str = "Q") -> Any:
        """The next number."""
        return self.numbers(kind)[0]

    def text(self) -> str:
        """The next string."""
        try:
            return self.take(self.number()).decode()
        except UnicodeDecodeError as e:
            raise FormatError(f"{self.path}: the text before byte {self.at} is not UTF-8") from e

    def value(self) -> Any:
        """The next metadata value; its type comes first."""
        kind = self.number("I")
        return self.values(self.number("I"), self.number()) if kind == ARRAY else self.values(kind, 1)[0]

    def values(self, kind: int, count: int) -> list[Any]:
        """The next `count` values of one of GGUF's types, or FormatError."""
        if kind == STRING:
            return [self.text() for _ in range(count)]
        if kind >= len(SCALARS) or SCALARS[kind] == "-":
            raise FormatError(f"{self.path}: has a value of unknown type {kind} before byte {self.at}")
        return self.numbers(SCALARS[kind], count)


def package() -> Any:
    """The package gguf, or UnsupportedError with the line that installs it."""
    return needed("gguf", "gguf")


@functools.lru_cache(maxsize=1)
def header(path: Path, stamp: Stamp) -> Header:
    """The header of a file in the state `stamp`, checked as llama.cpp does."""
    sizes = package().GGML_QUANT_SIZES
    file = Cursor(path, stamp)
    if file.size < 4 or file.take(4) != b"GGUF":
        refuse_pointer(path, read_at(path, 0, min(file.size, BRIEF), stamp))
        raise FormatError(f"{path}: is not a GGUF file; expected it to begin with GGUF")
    if (version := file.number("I")) not in (2, 3):
        raise UnsupportedError(f"{path}: is GGUF version {version}; expected 2 or 3, little-endian")
    tensors, values = file.number(), file.number()
    pairs = [(file.text(), file.value()) for _ in range(values)]
    entries = [
        (file.text(), file.numbers("Q", file.number("I")), file.number("I"), file.number())
        for _ in range(tensors)
    ]
    metadata = dict(pairs)
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or not 0 < align < 1 << 20 or align.bit_count() > 1:
        raise FormatError(f"{path}: general.alignment is {short(align)}; expected a power of two, such as 32")
    begin = at = -(-file.at // align) * align
    places: dict[str, Blocks] = {}
    for name, dims, kind, offset in entries:
        block, each = sizes.get(kind, (0, 0))
        if not block:
            raise FormatError(f"{path}: {short(name)}: has the unknown type {kind}")
        if not 1 <= len(dims) <= 4 or 0 in dims or dims[0] % block:
            raise FormatError(
                f"{path}: {short(name)}: has dimensions {short(dims)}, which its type {kind} cannot have"
            )
        size = math.prod(dims) // block * each
        if begin + offset != at or at + size > file.size:
            raise FormatError(f"{path}: {short(name)}: {size} bytes at {offset}; expected at {at - begin}")
        places[name] = Blocks(tuple(reversed(dims)), kind, at, size)
        at += -(-size // align) * align
    for what, by_name, count in (("values", metadata, values), ("tensors", places, tensors)):
        if len(by_name) < count:
            raise FormatError(f"{path}: has two {what} of the same name")
    return Header(metadata, places, stamp)


def opened(path: Path) -> Header:
    """The header of a Llama's GGUF file; StorageError, FormatError or UnsupportedError."""
    path = named(path)
    file = header(path.absolute(), stamp_of(path))
    if (kind := file.values.get("general.architecture")) != "llama":
        raise UnsupportedError(f"{path}: general.architecture is {short(kind)}; expected 'llama'")
    return file


def open_gguf(path: Path) -> tuple[Config, Tensors]:
    """Config and tensors of a Llama, with Hugging Face's names and row order."""
    file = opened(path)
    try:
        names = {hf_name(name): name for name in file.tensors}
        config = shape(file.values, {new: file.tensors[old] for new, old in names.items()})
    except (UnsupportedError, ConfigError) as e:
        raise type(e)(f"{path}: {e}") from e
    tensors = decoded(named(path), file).renamed(names)
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def fetch(name: str) -> np.ndarray:
        W, heads = tensors[name], rotated.get(name.split(".")[-2])
        if heads and len(W) % (2 * heads):
            raise MismatchError(f"{path}: {name} has {len(W)} rows; expected pairs for {short(heads)} heads")
        return half_split(W, heads) if heads else W

    return config, replace(tensors, fetch=fetch)


def open_any(path: Path) -> tuple[Mapping[str, Any], Tensors]:
    """Values and tensors of a GGUF file of any architecture, under the names and in the order of the file."""
    path = named(path)
    file = header(path.absolute(), stamp_of(path))
    return file.values, decoded(path, file)


def decoded(path: Path, file: Header) -> Tensors:
    """The tensors of a file, decoded when read."""
    types = package().GGMLQuantizationType

    def fetch(name: str) -> np.ndarray:
        blocks = file.tensors[name]
        kind = types(blocks.kind)
        raw = np.frombuffer(read_at(path, blocks.start, blocks.size, file.stamp), np.uint8)
        try:
            with np.errstate(all="ignore"):  # a damaged scale
                W = package().dequantize(raw.reshape(*blocks.shape[:-1], -1), kind)
        except NotImplementedError as e:
            raise UnsupportedError(f"{path}: {name} is {kind.name}, which gguf cannot decode") from e
        return np.asarray(W, np.float32).reshape(blocks.shape)

    shapes = {name: blocks.shape for name, blocks in file.tensors.items()}
    kinds = {name: types(blocks.kind).name for name, blocks in file.tensors.items()}
    return Tensors(str(path), shapes, kinds, fetch)


def beyond(path: Path) -> str:
    """Why a GGUF file's forward pass cannot be run, though its tensors can be read; "" if it can."""
    for key, only in (("llama.rope.scaling.type", "none"), ("llama.rope.scale_linear", 1.0)):
        if (value := opened(path).values.get(key, only)) != only:
            return f"{path}: {key} is {short(value)}; expected {only}"
    return ""


def shape(values: Mapping[str, Any], places: Mapping[str, Blocks]) -> Config:
    """The Config from a GGUF file's metadata; ConfigError for a wrong or missing value."""
    keys = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "head_dim": "rope.dimension_count",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    fields: dict[str, Any] = {ours: values.get(f"llama.{theirs}") for ours, theirs in keys.items()}
    if isinstance(eps := fields["rms_norm_eps"], float):
        fields["rms_norm_eps"] = float(f"{eps:.6g}")  # 1e-5, which float32 cannot hold
    table = places.get("model.embed_tokens.weight")
    return Config(
        **fields,
        vocab_size=table.shape[0] if table else 0,
        num_key_value_heads=values.get("llama.attention.head_count_kv", fields["num_attention_heads"]),
        rope_theta=values.get("llama.rope.freq_base", 10000.0),
        tie_word_embeddings="lm_head.weight" not in places,
    )


def special(path: Path) -> dict[str, int]:
    """bos_token_id and eos_token_id, as in a config.json."""
    values = opened(path).values
    ids = {name: values.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    return {name: number for name, number in ids.items() if number is not None}


def chat_template(path: Path) -> str | None:
    """A GGUF file's chat template, None if it has none."""
    source = opened(path).values.get("tokenizer.chat_template")
    return source if isinstance(source, str) else None


def tokenizer_json(path: Path) -> str:
    """A GGUF file's tokenizer as the text of a tokenizer.json; UnsupportedError or FormatError."""
    values = opened(path).values
    kind = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise UnsupportedError(
            f"{path}: its tokenizer is {short(kind)}; expected ('gpt2', 'smollm'): byte-level BPE"
        )
    tokens, types, merges = (
        values.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type", "merges")
    )
    lists = all(isinstance(value, list) for value in (tokens, types, merges))
    if not lists or len(tokens) != len(types) or {*map(type, tokens + merges)} != {str}:
        raise FormatError(f"{path}: tokens, token_type and merges of its tokenizer do not fit together")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": tokens[i], **flags} for i, kind in enumerate(types) if kind == CONTROL]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in merges],
    }  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level],
        },
        "post_processor": template(path, tokens), "decoder": level, "model": model,
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False)


def template(path: Path, tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that puts bos before a text, or None if the file does not ask for it."""
    if opened(path).values.get("tokenizer.ggml.add_bos_token") is not True:
        return None
    bos = special(path).get("bos_token_id")
    if type(bos) is not int or not 0 <= bos < len(tokens):
        raise FormatError(f"{path}: bos_token_id is {short(bos)}; expected an id below {len(tokens)}")
    name = tokens[bos]
    text = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {name: {"id": name, "ids": [bos], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": text, "pair": text, "special_tokens": known}
