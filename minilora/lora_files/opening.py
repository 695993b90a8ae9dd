"""Any LoRA file but PEFT's -> its contents in PEFT's terms."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, MismatchError, StorageError, UnsupportedError, nearest, short
from ..formats.atomic import exists, read
from ..formats.huggingface import read_json
from ..formats.safetensors import Tensors, open_tensors
from .contents import Contents
from .dictionaries import read_loralib, read_mlx, read_torchtune
from .grammar import Keys, sort_out
from .image import read_image
from .llama_cpp import read_gguf
from .recognise import CONFIG, GGUF, LARGEST, MLX, MLX_ARRAYS

USUAL = 20.0  # the scale of MLX's LoRA where no config gives one
APART = ("MLX", "torchtune", "loralib")  # tools whose names no other tool's file has beside its own


def read_contents(
    form: str,
    path: Path,
    alpha: float | None = None,
    r: int | None = None,
    heads: tuple[int, int] | None = None,
) -> Contents:
    """The contents of what `recognised` found. Only headers, and the alphas, are read now.

    `alpha` and `r` are for files that do not have them, `heads` (of queries, of keys) for those whose rows of
    q and k are in another order. UnsupportedError, MismatchError, ConfigError, FormatError or StorageError.
    """
    if form == GGUF:
        return read_gguf(path, heads)
    if form == MLX_ARRAYS:
        tensors = arrays(path)
        return read_mlx(tensors, checked(tensors, "MLX"), USUAL, (usual(),))
    if form == MLX:
        if not exists(path / "adapters.safetensors"):
            raise StorageError(f"{path / 'adapters.safetensors'}: is missing; the config is one of MLX")
        tensors = open_tensors(path / "adapters.safetensors", adapter=True)
        return read_mlx(tensors, checked(tensors, "MLX"), mlx_scale(path / CONFIG))
    tensors = open_tensors(path, adapter=True)
    keys = checked(tensors)
    tool = next(iter(keys.tools.values()))
    if tool == "MLX":
        return read_mlx(tensors, keys, USUAL, (usual(),))
    if tool == "torchtune":
        return read_torchtune(tensors, keys, alpha, heads)
    if tool == "loralib":
        return read_loralib(tensors, keys, alpha, r)
    return read_image(tensors, keys, alpha)


def usual() -> str:
    """What to say where MLX's usual scale is taken."""
    return f"there is no config beside it, so the scale is MLX's usual {USUAL:g}, whatever it was in training"


def checked(tensors: Tensors, expected: str | None = None) -> Keys:
    """The names, sorted; UnsupportedError if nothing is a LoRA, MismatchError for a mixture."""
    keys = sort_out(tensors.where, tensors)
    if not keys.tools:
        if any(kind in ("full weight", "unknown") for kind in keys.others) or not keys.others:
            raise UnsupportedError(f"{tensors.where}: has the weights of a model, not of a LoRA")
        what = ", ".join(f"{kind} ({len(set(names))} modules)" for kind, names in keys.others.items())
        raise UnsupportedError(
            f"{tensors.where}: holds no LoRA but {what}, which is no product of two factors"
        )
    tools = {*keys.tools.values()}
    if (expected and tools != {expected}) or (len(tools) > 1 and tools & {*APART}):
        what = f"names of {' and of '.join(sorted(tools))}"
        raise MismatchError(f"{tensors.where}: has {what}; expected those of {expected or 'one tool'}")
    return keys


def mlx_scale(path: Path) -> float:
    """The scale in MLX's adapter_config.json; ConfigError or UnsupportedError names the field."""
    fields = read_json(path, LARGEST)
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        hint = nearest(str(kind), ("lora", "dora"))
        raise UnsupportedError(f"{path}: fine_tune_type is {short(kind)}; {hint}")
    numbers = fields.get("lora_parameters")
    if not isinstance(numbers, dict):
        raise ConfigError(f"{path}: lora_parameters is {short(numbers)}; expected rank and scale")

    def number(name: str, usual: float) -> float:
        value = numbers.get(name, usual)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConfigError(f"{path}: lora_parameters {name} is {short(value)}; expected a number above 0")
        return float(value)

    scale = number("scale", USUAL)
    return scale * number("alpha", 1) / number("rank", 1) if "alpha" in numbers else scale  # before 2024-03


def arrays(path: Path) -> Tensors:
    """The arrays of an .npz, without pickles; FormatError for anything else."""
    try:
        with np.load(io.BytesIO(read(path)), allow_pickle=False) as file:
            held: dict[str, Any] = {name: np.asarray(file[name]) for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise FormatError(f"{path}: is not a file of NumPy arrays: {str(e)[:120]}") from e
    for name, a in held.items():
        if a.dtype.kind != "f" or a.dtype.itemsize > 8:
            raise UnsupportedError(f"{path}: {short(name)}: dtype is {a.dtype}; expected float16 to float64")
    called = {"float16": "F16", "float32": "F32", "float64": "F64"}
    return Tensors(
        str(path),
        {name: a.shape for name, a in held.items()},
        {name: called[a.dtype.name] for name, a in held.items()},
        lambda name: held[name].astype(np.promote_types(held[name].dtype, np.float32)),
    )
