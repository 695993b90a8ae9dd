"""Any LoRA file but PEFT's -> its contents in PEFT's terms."""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..errors import (
    ConfigError,
    FormatError,
    MismatchError,
    StorageError,
    UnsupportedError,
    check_float,
    check_int,
    nearest,
    short,
)
from ..formats.atomic import exists, read
from ..formats.huggingface import read_json
from ..formats.safetensors import Tensors, check_name, open_tensors
from .contents import Contents
from .dictionaries import read_loralib, read_mlx, read_torchtune
from .grammar import Keys, sort_out
from .image import read_image
from .llama_cpp import read_gguf
from .recognise import CONFIG, GGUF, LARGEST, MLX, MLX_ARRAYS

NUMPYS = {"<f2": "F16", "<f4": "F32", "<f8": "F64"}
HEADER = re.compile(  # of an array, as NumPy and MLX write it
    rb"\{'descr': ?'([!-&(-~]{1,20})', ?'fortran_order': ?(True|False), "
    rb"?'shape': ?\(([0-9, ]{0,160})\),? ?\}\s*"
)
LONGEST = 10_000  # bytes of it
DAMAGED = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # what zipfile raises
USUAL = 20.0  # the scale of MLX's LoRA where no config gives one
APART = {  # tools whose names no other tool's file has beside its own -> the parts that they write
    "MLX": {"a", "b", "magnitude"}, "torchtune": {"A", "B", "magnitude"}, "loralib": {"A", "B"},
}  # fmt: skip


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
    if alpha is not None:
        check_float(f"{path}: alpha", alpha, 0, math.inf, open_low=True)
    for name, number in (("r", r), *zip(("query heads", "key heads"), heads or (), strict=False)):
        if number is not None:
            check_int(f"{path}: {name}", number, 1)
    if form == GGUF:
        return read_gguf(path, heads)
    if form == MLX_ARRAYS:
        tensors = arrays(path)
        return read_mlx(tensors, checked(tensors, "MLX"), USUAL, (usual(),))
    if form == MLX:
        if not exists(path / "adapters.safetensors"):
            raise StorageError(f"{path / 'adapters.safetensors'}: is missing; the config is one of MLX")
        tensors = open_tensors(path / "adapters.safetensors", adapter=True)
        return read_mlx(tensors, checked(tensors, "MLX"), *mlx_scale(path / CONFIG))
    return read_single(open_tensors(path, adapter=True), alpha, r, heads)


def read_single(
    tensors: Tensors,
    alpha: float | None = None,
    r: int | None = None,
    heads: tuple[int, int] | None = None,
) -> Contents:
    """The contents of a safetensors file by its names; arguments and errors as in `read_contents`."""
    keys = checked(tensors)
    tool = next(iter(keys.tools.values()))
    if tool == "MLX":
        return read_mlx(tensors, keys, *scale_beside(tensors))
    if tool == "torchtune":
        return read_torchtune(tensors, keys, alpha, heads)
    if tool == "loralib":
        return read_loralib(tensors, keys, alpha, r)
    return read_image(tensors, keys, alpha)


def scale_beside(tensors: Tensors) -> tuple[float, tuple[str, ...]]:
    """The scale of MLX's file, and notes: by the config beside it; 1 for Flux, whose header has the rank."""
    if exists(config := Path(tensors.where).with_name(CONFIG)):
        return mlx_scale(config)
    return (1.0, ()) if "lora_rank" in tensors.metadata else (USUAL, (usual(),))


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
    for part in keys.parts.values():
        own = APART.get(tool := max(tools), part.keys())
        if strange := sorted(part.keys() - own):
            what = f"{short(part[strange[0]])} is no part of a file of {tool}"
            raise MismatchError(f"{tensors.where}: {what}; expected only {', '.join(sorted(own))}")
    return keys


def mlx_scale(path: Path) -> tuple[float, tuple[str, ...]]:
    """The scale in MLX's adapter_config.json, and notes; ConfigError or UnsupportedError names the field."""
    fields = read_json(path, LARGEST)
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        hint = nearest(str(kind), ("lora", "dora"))
        raise UnsupportedError(f"{path}: fine_tune_type is {short(kind)}; {hint}")
    numbers = fields.get("lora_parameters")
    if not isinstance(numbers, dict):
        raise ConfigError(f"{path}: lora_parameters is {short(numbers)}; expected rank and scale")

    def number(name: str, usual: float) -> float:
        what = f"{path}: lora_parameters {name}"
        return check_float(what, numbers.get(name, usual), 0, math.inf, open_low=True)

    scale = number("scale", USUAL)
    notes = () if "scale" in numbers else (f"the config has no scale, so it is MLX's usual {USUAL:g}",)
    if "alpha" in numbers:  # before 2024-03
        scale *= number("alpha", 1) / number("rank", 1)
    return scale, notes


def arrays(path: Path) -> Tensors:
    """The arrays of an .npz, each read when asked for; no pickle is opened.

    FormatError, MismatchError or UnsupportedError name the file and the array.
    """
    raw = io.BytesIO(read(path))
    try:
        archive = zipfile.ZipFile(raw)
        found = [(member, array_in(archive, member)) for member in archive.infolist()]
    except DAMAGED as e:
        raise FormatError(f"{path}: is not a file of NumPy arrays: {str(e)[:120]}") from e
    held = {member.filename.removesuffix(".npy"): (member, array) for member, array in found}
    if len(held) < len(found):
        raise FormatError(f"{path}: has two arrays of the same name")
    for name, (member, array) in held.items():
        check_name(path, name)
        if array.dtype not in NUMPYS:
            expected = ", ".join(NUMPYS)
            raise UnsupportedError(f"{path}: {name}: dtype is {short(array.dtype)}; expected {expected}")
        need = array.start + math.prod(array.shape) * np.dtype(array.dtype).itemsize
        if member.file_size != need:
            raise FormatError(f"{path}: {name}: has {member.file_size} bytes; expected {need}")

    def fetch(name: str) -> np.ndarray:
        member, array = held[name]
        try:
            flat = np.frombuffer(archive.read(member), array.dtype, offset=array.start)
            a = flat.reshape(array.shape, order=array.order)
        except DAMAGED as e:
            raise FormatError(f"{path}: {name}: cannot be read: {str(e)[:120]}") from e
        with np.errstate(invalid="ignore"):  # a signalling NaN
            return a.astype(np.promote_types(array.dtype, np.float32), copy=False)

    shapes = {name: array.shape for name, (_, array) in held.items()}
    return Tensors(str(path), shapes, {name: NUMPYS[array.dtype] for name, (_, array) in held.items()}, fetch)


class Array(NamedTuple):
    """What the header of an array in an .npz says, and where the numbers begin."""

    dtype: str
    order: Literal["C", "F"]
    shape: tuple[int, ...]
    start: int


def array_in(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """The header of a member; ValueError if it is no array."""
    with archive.open(member) as file:
        wide = {b"\x93NUMPY\1\0": 2, b"\x93NUMPY\2\0": 4}.get(file.read(8), 0)
        size = int.from_bytes(file.read(wide), "little")
        match = HEADER.fullmatch(file.read(min(size, LONGEST)))
    shape = tuple(map(int, match[3].replace(b",", b" ").split())) if match else ()
    if not match or math.prod(max(n, 1) for n in shape) >= 1 << 60:  # NumPy refuses it, even an empty one
        raise ValueError(f"{short(member.filename)} is no array")
    return Array(match[1].decode(), "F" if match[2] == b"True" else "C", shape, 8 + wide + size)
