"""What a LoRA file holds, in PEFT's terms: tensors under PEFT's names, shaped as PEFT's, read when asked for.

    MODULE.lora_A.weight (r, I)   MODULE.lora_B.weight (O, r)   ΔW = s B A, s = alpha / r

A reader says how each tensor follows from those of the file, and nothing is computed before that. So every
part of minilora that takes an adapter takes any file: none of them knows another form than PEFT's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ConfigError, MismatchError, UnsupportedError, short
from ..formats.safetensors import Tensors
from ..table import counted

PREFIX = "base_model.model."  # before every name in PEFT's files
A, B = "lora_A.weight", "lora_B.weight"
TABLE_A, TABLE_B = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"
INPUTS = "dora_scale"  # of each input (I,), as in LyCORIS' files until 2024; PEFT has no name for it
LARGEST = 1 << 27  # numbers of a computed factor: 1 GiB in float64
OWN = (  # what a header says of its own file alone
    "format", "minilora", "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash",
    "modelspec.hash_sha256",
)  # fmt: skip
ARGS = "ss_network_args"  # in kohya's headers: an object with conv_dim, conv_alpha, ...
NUMBERS = ("lora_alpha", "network_alpha", "alpha")  # in a header: one for all modules without
SIZE = re.compile(r"(?:.*_)?(?:(?P<rank>dims?|rank)|alphas?)")  # the name of a rank or an alpha in a header


@dataclass(frozen=True)
class Entry:
    """A tensor in PEFT's form: its shape, the dtype in the file, and how it is read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds: its tensors by PEFT's names, and the scales as far as it tells them."""

    tool: str  # whose file it is
    tensors: Tensors
    alphas: Mapping[str, float]  # by module; others have that of their component's config, or scale 1
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by component, "" for all
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()  # shown on reading, refused on loading
    base: str | None = None  # the name of the base


def gathered(where: str, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Tensors:
    """Entries as the tensors of a file."""
    return Tensors(
        where,
        {name: entry.shape for name, entry in entries.items()},
        {name: entry.dtype for name, entry in entries.items()},
        lambda name: entries[name].read(),
        metadata,
    )


def plain(tensors: Tensors, key: str, shape: tuple[int, ...] | None = None) -> Entry:
    """A tensor of the file as it is, or its numbers in another shape."""
    shape = tensors.shapes[key] if shape is None else shape
    return Entry(shape, tensors.dtypes[key], lambda: tensors[key].reshape(shape))


def turned(entry: Entry) -> Entry:
    """A matrix, transposed."""
    return Entry(entry.shape[::-1], entry.dtype, lambda: entry.read().T)


def reordered(entry: Entry, order: Callable[[np.ndarray], np.ndarray]) -> Entry:
    """An entry with its rows in another order."""
    return Entry(entry.shape, entry.dtype, lambda: order(entry.read()))


def product(tensors: Tensors, module: str, mid: str, down: str) -> Entry:
    """A (r, I, kh, kw) of LyCORIS' Tucker form: A[i, c, h, w] = sum over j of mid[i, j, h, w] down[j, c]."""
    core, inner = tensors.shapes[mid], tensors.shapes[down]
    if len(core) < 3 or len(inner) < 2 or core[1] != inner[0] or math.prod(inner[2:]) != 1:
        what = f"lora_mid {core} and lora_down {inner}"
        raise MismatchError(f"{tensors.where}: {module} has {what}; expected (r, r, kh, kw) and (r, I, 1, 1)")

    def read() -> np.ndarray:
        down_matrix = tensors[down].reshape(inner[:2]).astype(np.float64)
        return np.einsum("ij...,jc->ic...", tensors[mid].astype(np.float64), down_matrix)

    return computed(tensors, mid, (core[0], inner[1], *core[2:]), read)


def computed(tensors: Tensors, key: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> Entry:
    """A factor that is computed when read; UnsupportedError if it is larger than any layer's.

    A file of a few megabytes can ask for terabytes.
    """
    if math.prod(shape) > LARGEST:
        what = f"{key} makes a factor {shape}; expected at most {LARGEST} numbers"
        raise UnsupportedError(f"{tensors.where}: {what}")
    return Entry(shape, tensors.dtypes[key], read)


def one_number(tensors: Tensors, key: str) -> float:
    """The one number in a tensor; MismatchError if there are more, ConfigError if it can be no alpha."""
    if math.prod(shape := tensors.shapes[key]) != 1:
        raise MismatchError(f"{tensors.where}: {key} has shape {shape}; expected one number")
    value = float(tensors[key].reshape(()))
    if not 0 <= value < math.inf:
        raise ConfigError(f"{tensors.where}: {key} is {short(value)}; expected a finite number, at least 0")
    return value


def inherited(
    header: Mapping[str, str], before: Collection[tuple[int, float]], after: Collection[tuple[int, float]]
) -> dict[str, str]:
    """The strings of a header that are true of a file made from its own, too.

    `before` and `after` are r and alpha of the modules: if they differ, what the header says of them goes.
    """
    ranks, alphas = ([{f"{size[i]:g}" for size in sizes} for sizes in (before, after)] for i in (0, 1))

    def true(name: str) -> bool:
        match = SIZE.fullmatch(name)
        old, new = ranks if match and match["rank"] else alphas
        if match is None or old != new:
            return match is None
        one = {form for size in new if len(new) == 1 for form in (size, str(float(size)))}
        return name not in NUMBERS or not new or header.get(name) in {"None", *one}  # read as the alpha

    kept = {name: text for name, text in header.items() if name not in OWN and true(name)}
    try:
        args = json.loads(kept.get(ARGS, "null"))
    except (ValueError, RecursionError):
        args = None
    if isinstance(args, dict) and not all(map(true, args)):
        kept[ARGS] = json.dumps({name: value for name, value in args.items() if true(name)})
    return kept


def listed(others: Mapping[str, Iterable[str]]) -> list[str]:
    """A sentence on each kind of tensors that is no LoRA: of how many modules, and the first."""
    said = []
    for kind, names in others.items():
        some = sorted(set(names))
        what = counted(len(some), "module is", "modules are")
        said.append(f"{kind}: {what} not in the numbers, such as {short(some[0])}")
    return said
