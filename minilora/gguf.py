"""A Llama in a GGUF file, llama.cpp's format: its shape, its tensors by Hugging Face's names, its tokenizer.

    4-bit weights in blocks of 32:  w = q d + m (Q4_1), w = q d (Q8_0), ...  decoded to float32

llama.cpp turns neighbouring pairs (2j, 2j+1) of a query by rotary's angle, Hugging Face the pairs
(j, j + E/2); the rows of q_proj and k_proj lie accordingly and are put back here. The wrong order is no
error but a much worse model. The file itself is read and decoded by the package `gguf` (extra `gguf`);
left out are other architectures, stretched rotary positions and tokenizers that are not byte-level BPE.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError, FormatError, UnsupportedError, needed, short
from .model import Config
from .storage import read_at, size_of
from .tensors import Tensors

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
CONTROL = 3  # the token type of those that no text contains, such as the end of a turn


def hf_name(name: str) -> str:
    """Hugging Face's name of a tensor: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    found = BLOCK.fullmatch(name)
    if not found or found[2] not in NAMES:
        raise UnsupportedError(f"tensor {short(name)}; expected those of a plain Llama")
    layer = f"model.layers.{found[1]}." if found[1] else ""
    return f"{layer}{NAMES[found[2]]}.{found[3]}"


def half_split(W: np.ndarray, heads: int) -> np.ndarray:
    """Rows (H*E, ...) from neighbouring pairs to (j, j + E/2), within each head."""
    half = len(W) // heads // 2
    return W.reshape(heads, half, 2, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)


@functools.lru_cache(maxsize=1)  # its 100,000 strings take seconds
def reader(path: Path, changed: int) -> Any:
    """The package's reader of a file as of that moment of its last change."""
    try:
        return needed("gguf", "gguf").GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as e:
        raise FormatError(f"{path}: is not an intact GGUF file: {short(str(e))}") from e


def opened(path: Path) -> Any:
    """The reader of a GGUF file of a Llama; StorageError, FormatError or UnsupportedError."""
    if size_of(path) < 4 or read_at(path, 0, 4) != b"GGUF":
        raise FormatError(f"{path}: is not a GGUF file; expected it to begin with GGUF")
    file = reader(path.resolve(), path.stat().st_mtime_ns)
    if (kind := value(file, "general.architecture")) != "llama":
        raise UnsupportedError(f"{path}: general.architecture is {short(kind)}; expected 'llama'")
    return file


def value(file: Any, key: str, default: Any = None) -> Any:
    """A metadata value, or the default."""
    found = file.get_field(key)
    return default if found is None else found.contents()


def open_gguf(path: Path) -> tuple[Config, Tensors]:
    """Shape and tensors of a Llama, by Hugging Face's names and in its order of rows."""
    file = opened(path)
    places = {}
    for tensor in file.tensors:
        try:
            places[hf_name(tensor.name)] = tensor
        except UnsupportedError as e:
            raise UnsupportedError(f"{path}: has the {e}") from e
    if (scaling := value(file, "llama.rope.scaling.type", "none")) != "none":
        raise UnsupportedError(f"{path}: llama.rope.scaling.type is {short(scaling)}; expected none")
    try:
        config = shape(file, places)
    except (ConfigError, TypeError) as e:  # a missing one is None
        raise ConfigError(f"{path}: {e}") from e
    H, G = config.num_attention_heads, config.num_key_value_heads

    def fetch(name: str) -> np.ndarray:
        tensor = places[name]
        W = np.asarray(needed("gguf", "gguf").dequantize(tensor.data, tensor.tensor_type), np.float32)
        W = W.reshape(shapes[name])
        heads = {"q_proj": H, "k_proj": G}.get(name.split(".")[-2])
        return half_split(W, heads) if heads else W

    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in places.items()}
    kinds = {name: tensor.tensor_type.name for name, tensor in places.items()}
    return config, Tensors(str(path), shapes, kinds, fetch)


def shape(file: Any, places: dict[str, Any]) -> Config:
    """The Config of a GGUF file's metadata."""
    keys = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "head_dim": "rope.dimension_count",
    }
    given = {ours: value(file, f"llama.{theirs}") for ours, theirs in keys.items()}
    table = places.get("model.embed_tokens.weight")
    return Config(
        **given,
        vocab_size=int(table.shape[-1]) if table is not None else 0,
        num_key_value_heads=value(file, "llama.attention.head_count_kv", given["num_attention_heads"]),
        rms_norm_eps=float(f"{value(file, 'llama.attention.layer_norm_rms_epsilon', math.nan):.6g}"),
        rope_theta=float(value(file, "llama.rope.freq_base", 10000.0)),
        tie_word_embeddings="lm_head.weight" not in places,
    )


def special(path: Path) -> dict[str, int]:
    """bos_token_id and eos_token_id, as config.json has them."""
    given = {f"{k}_token_id": value(opened(path), f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos")}
    return {name: number for name, number in given.items() if number is not None}


def tokenizer_json(path: Path) -> str:
    """The tokenizer of a GGUF file in the form of the package `tokenizers`, or UnsupportedError."""
    file = opened(path)
    kind = value(file, "tokenizer.ggml.model"), value(file, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise UnsupportedError(
            f"{path}: its tokenizer is {kind}; expected ('gpt2', 'smollm'): byte-level BPE"
        )
    tokens, types = value(file, "tokenizer.ggml.tokens"), value(file, "tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": tokens[i], **flags} for i, kind in enumerate(types) if kind == CONTROL]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in value(file, "tokenizer.ggml.merges")],
    }  # fmt: skip
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level],
        },
        "post_processor": None, "decoder": level, "model": model,
    }  # fmt: skip
    return json.dumps(whole, ensure_ascii=False)
