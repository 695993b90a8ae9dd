"""An adapter -> MLX's file, or llama.cpp's: one scale for all modules, and for MLX one rank."""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, MismatchError, NonFiniteError, UnsupportedError, nearest, short
from ..formats.atomic import read
from ..formats.gguf import NAMES, neighbours, package
from ..lora_files.contents import Entry, inherited, reordered, turned
from ..lora_files.dictionaries import TABLES
from ..lora_files.llama_cpp import PERMUTED
from .image_forms import Module, Written, folded, sizes

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "granite": "granite",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}


def flat_only(modules: Mapping[str, Module], form: str) -> None:
    """UnsupportedError if a module is a convolution."""
    for name, module in modules.items():
        if len(module.A.shape) > 2:
            raise UnsupportedError(f"{name} is a convolution, which {form} cannot hold")


def mlx(modules: Mapping[str, Module], header: Mapping[str, str]) -> Written:
    """MLX's file and config: one rank and one scale for all, so ranks are filled up with zeros."""
    flat_only(modules, "MLX's form")
    dora = {module.magnitude is not None for module in modules.values()}
    if len(dora) > 1:
        raise UnsupportedError("some modules have magnitudes and others do not; MLX's form holds one kind")
    r = max(module.r for module in modules.values())
    scales = {module.scale for module in modules.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tensors: dict[str, Entry] = {}
    keys = set()
    for path, module in modules.items():
        if module.table != (path.rpartition(".")[2] in TABLES):
            raise UnsupportedError(
                f"{path}: MLX's form knows an embedding by its name, one of {', '.join(TABLES)}"
            )
        if ".experts." in path:
            raise UnsupportedError(
                f"{path} is an expert; MLX's form stacks all of them, which is not supported"
            )
        tensors[f"{path}.lora_a"] = filled(module.A, r, 0)
        tensors[f"{path}.lora_b"] = filled(folded(module.B, module.scale / scale), r, 1)
        if module.magnitude:
            tensors[f"{path}.m"] = module.magnitude
        keys.add(re.sub(r"^model\.layers\.\d+\.", "", path))
    config = {
        "fine_tune_type": "dora" if True in dora else "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": r, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
    }
    kept = inherited(header, sizes(modules), {(r, scale * r)})
    return Written(tensors, {**kept, "format": "mlx"}, config)


def filled(entry: Entry, r: int, axis: int) -> Entry:
    """A factor, filled up with zeros to rank r along an axis, and transposed."""
    more = [(0, 0), (0, 0)]
    more[axis] = (0, r - entry.shape[axis])
    shape = [n + after for n, (_, after) in zip(entry.shape, more, strict=True)]
    return Entry((shape[1], shape[0]), entry.dtype, lambda: np.pad(entry.read(), more).T)


def gguf(
    modules: Mapping[str, Module], config: Mapping[str, Any] | None, heads: tuple[int, int] | None
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """llama.cpp's values and tensors; `config` is the base's, `heads` its queries and keys.

    One alpha for all: the most common one, and what another module's scale differs by goes into its B.
    UnsupportedError for another architecture and for what the form cannot hold, ConfigError without a config,
    MismatchError for heads that do not fit.
    """
    flat_only(modules, "llama.cpp's form")
    if config is None or heads is None:
        what = "a folder with its config.json, and there num_attention_heads"
        raise ConfigError(f"llama.cpp's form depends on the base; expected base, {what}")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UnsupportedError(f"the base's model_type is {short(kind)}; {nearest(str(kind), ARCHITECTURES)}")
    architecture = ARCHITECTURES[kind]
    alphas = Counter(module.scale * module.r for module in modules.values())
    alpha = max(alphas, key=lambda alpha: (alphas[alpha], -alpha))
    theirs = {ours: name for name, ours in NAMES.items()}
    tensors: dict[str, Entry] = {}
    for path, module in modules.items():
        if module.magnitude:
            raise UnsupportedError(f"{path} has magnitudes (DoRA), which llama.cpp's form cannot hold")
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
        inner = match[2] if match else path
        if inner not in theirs:
            raise UnsupportedError(f"{path} has no name in llama.cpp's form; {nearest(inner, theirs)}")
        name = f"{f'blk.{match[1]}.' if match else ''}{theirs[inner]}.weight"
        A, B = module.A, folded(module.B, module.scale * module.r / alpha)
        if architecture in PERMUTED and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            count = heads[inner.endswith("k_proj")]
            if module.B.shape[0] % (2 * count):
                what = f"{module.B.shape[0]} rows; expected pairs for the base's {count} heads"
                raise MismatchError(f"{path} has {what}")
            B = reordered(B, functools.partial(neighbours, heads=count))
        tensors[f"{name}.lora_a"] = turned(A) if module.table else A
        tensors[f"{name}.lora_b"] = B
    values = {"general.architecture": architecture, "adapter.lora.alpha": float(alpha)}
    return values, tensors


def gguf_bytes(values: Mapping[str, Any], tensors: Mapping[str, Entry]) -> bytes:
    """A GGUF file, as the package `gguf` writes it; float16 stays float16, all else becomes float32.

    NonFiniteError for a value that float32 cannot hold.
    """
    writer_of = package().GGUFWriter
    with tempfile.TemporaryDirectory(prefix="minilora-") as temp:
        path = Path(temp, "adapter.gguf")
        writer = writer_of(path, values["general.architecture"])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", values["adapter.lora.alpha"])
        for name, entry in tensors.items():
            kind = np.float16 if entry.dtype == "F16" else np.float32
            with np.errstate(over="ignore"):
                a = np.ascontiguousarray(entry.read(), kind)
            if not np.isfinite(a).all():
                raise NonFiniteError(f"{name} is too large for {np.dtype(kind)}; nothing was written")
            writer.add_tensor(name, a)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return read(path)
