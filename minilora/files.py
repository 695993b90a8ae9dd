"""Llama checkpoints in Hugging Face's form: a folder with config.json and model.safetensors.

Reading is strict: every tensor must be there, of the right shape, finite, and nothing else. What is read
is frozen and its memory cannot be written. Stands in for transformers' from_pretrained and
save_pretrained; leaves out everything but Llama in float32 and float64. No pickle is ever opened.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from .backend import to_device, to_host
from .errors import (
    ConfigError,
    FormatError,
    MismatchError,
    NonFiniteError,
    StateError,
    UnsupportedError,
    nearest,
)
from .layers import freeze, named_params, walk
from .lora import Adapted
from .model import Config, Llama, llama
from .storage import read, write_atomic, write_folder

BASE = Path(__file__).parent / "base"  # the model that ships with the package

FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_scaling": None,
    "quantization_config": None,
}  # what else we cannot do


def save_model(model: Llama, folder: Path | str, card: str, extra: dict[str, Any] | None = None) -> None:
    """Write a plain model as a new folder: config.json, model.safetensors, README.md; all or nothing.

    `extra` goes into config.json beside the shape. StorageError if the folder exists.
    """
    from safetensors.numpy import save

    if any(isinstance(node, Adapted) for _, node in walk(model)):
        raise StateError("the model has adapters; fuse() makes it a plain one that can be saved")
    tensors = {path: np.ascontiguousarray(to_host(p.dense())) for path, p in named_params(model).items()}
    dtype = str(next(iter(tensors.values())).dtype)
    config = FIXED | {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype} | asdict(model.config)
    config |= extra or {}

    def fill(temp: Path) -> None:
        write_atomic(temp / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        write_atomic(temp / "README.md", card.encode())
        write_atomic(temp / "model.safetensors", save(tensors, metadata={"format": "pt"}))

    write_folder(folder, fill)


def load(folder: Path | str = "base", dtype: Any = np.float32) -> Llama:
    """The model of a folder, frozen; "base" is the one that ships ("./base" a folder here).

    StorageError, FormatError, UnsupportedError, MismatchError or NonFiniteError name file and tensor.
    """
    folder = BASE if folder == "base" else Path(folder)
    config = read_config(folder / "config.json")
    tensors = read_tensors(folder / "model.safetensors")
    held = sum(a.size for a in tensors.values())
    if matrix_size(config) > 2 * held:  # before anything of that size is made
        raise MismatchError(f"{folder}: most is missing: {held:,} parameters are fewer than config.json says")
    model = llama(config, np.random.default_rng(0), dtype)
    if model.lm_head is None and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")  # some savers repeat the tied table
        if not np.array_equal(head, tensors.get("model.embed_tokens.weight", head[:0])):
            raise MismatchError(f"{folder}: lm_head.weight is not the embedding that it should be tied to")
    params = named_params(model)
    for path in sorted(set(params) ^ set(tensors)):
        state = "is missing" if path in params else f"is not expected; {nearest(path, params)}"
        raise MismatchError(f"{folder / 'model.safetensors'}: {path} {state}")
    for path, p in params.items():
        given = tensors[path]
        if given.shape != p.data.shape:
            raise MismatchError(f"{folder}: {path} has shape {given.shape}; expected {p.data.shape}")
        with np.errstate(over="ignore"):
            cast = given.astype(dtype)
        if not np.isfinite(cast).all():
            raise NonFiniteError(f"{folder}: {path} holds values that are not finite in {np.dtype(dtype)}")
        own = np.frombuffer(cast.tobytes(), dtype)  # bytes cannot be made writable
        p.data = to_device(own.reshape(given.shape))
    freeze(model)
    return model


def read_json(path: Path | str) -> dict[str, Any]:
    """A JSON object of at most 1 MiB without repeated keys, or FormatError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is given twice")
        return found

    try:
        value = json.loads(read(path, limit=1 << 20).decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path}: is not a JSON object: {str(e)[:120]}") from e
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    return value


def read_config(path: Path | str) -> Config:
    """The Config of a config.json."""
    given = read_json(path)
    for key, only in FIXED.items():
        if given.get(key, only) != only:
            raise UnsupportedError(f"{path}: {key} is {given[key]!r}; expected {only!r}")
    rope = given.get("rope_parameters") or {}  # as transformers 5 writes it
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise UnsupportedError(f"{path}: rope_parameters are {rope!r}; expected rope_type 'default'")
    given = {"rope_theta": rope["rope_theta"], **given} if "rope_theta" in rope else given
    values = {f.name: given[f.name] for f in fields(Config) if given.get(f.name) is not None}
    if "num_attention_heads" in values:
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
    try:
        return Config(**values)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def matrix_size(c: Config) -> int:
    """The number of weights in the matrices of a model, by its shape alone."""
    D, F, E, H, G = c.hidden_size, c.intermediate_size, c.E, c.num_attention_heads, c.num_key_value_heads
    block = 2 * D * H * E + 2 * D * G * E + 3 * D * F
    return c.vocab_size * D * (1 if c.tie_word_embeddings else 2) + c.num_hidden_layers * block


def read_tensors(path: Path | str) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file by name, float32 or float64."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_bytes

    try:
        tensors = load_bytes(read(path))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise FormatError(f"{path}: is not a safetensors file of float32 or float64: {str(e)[:120]}") from e
    for name, a in tensors.items():
        if a.dtype not in (np.float32, np.float64):
            raise UnsupportedError(f"{path}: {name} has dtype {a.dtype}; expected float32 or float64")
    return dict(tensors)
