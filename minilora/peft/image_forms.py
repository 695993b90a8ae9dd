"""An adapter -> the tensors of another tool's file: the inverse of the readers in lora_files/.

A tool's form may have no place for a scale of each module, or one rank for all. Then the factors change and
their product stays: s B goes into the file for B (`folded`), zeros fill up the ranks. What a form cannot hold
is refused by name. Numbers are read when they are written, one tensor at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import MismatchError, UnsupportedError
from ..formats.safetensors import FLOATS
from ..lora_files.contents import Entry, inherited, reordered
from ..lora_files.names import (
    AROUND,
    FUSED,
    HOMES,
    SWAPPED,
    UNET,
    WIDTHS,
    flattened,
    of_sgm,
    to_sgm,
    whole,
)
from .folder import INPUTS, Adapter


@dataclass(frozen=True)
class Module:
    """One module to write: A (r, I, ...), B (O, r, ...), s, and what else its adapter has."""

    A: Entry
    B: Entry
    scale: float
    table: bool = False  # of an embedding: A (r, V), B (D, r)
    magnitude: Entry | None = None
    axis: int = 0  # of the weight (O, I, ...) that the magnitude scales: 1 for that of each input

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Written:
    """What a file will hold: its tensors, the strings of its header, and the fields of a config beside it."""

    tensors: Mapping[str, Entry]
    header: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def modules_of(given: Adapter, form: str) -> dict[str, Module]:
    """The modules of an adapter; UnsupportedError for what only PEFT can hold, MismatchError for a doubt."""
    beside = [*given.replaced, *(pair.bias for pair in given.pairs.values() if pair.bias)]
    if beside or given.settings.beside:
        what = beside[0] if beside else given.settings.beside[0]
        raise UnsupportedError(f"{given.where}: has {what}; {form} holds factors only")
    if given.doubts:
        raise MismatchError(f"{given.where}: {given.doubts[0]}")

    def entry(name: str, shape: tuple[int, ...] | None = None) -> Entry:
        tensors = given.tensors
        dtype = tensors.dtypes[name] if tensors.dtypes[name] in FLOATS else "F32"
        shape = tensors.shapes[name] if shape is None else shape
        return Entry(shape, dtype, lambda: given.value(name).reshape(shape))

    made = {}
    for module, pair in given.pairs.items():
        vector = next(iter(pair.vectors.values()), None)
        magnitude = entry(vector) if vector else None
        axis = int(INPUTS in pair.vectors)
        made[module] = Module(entry(pair.A), entry(pair.B), pair.scale, pair.embedding, magnitude, axis)
    return made


def sizes(modules: Mapping[str, Module]) -> set[tuple[int, float]]:
    """r and alpha of the modules."""
    return {(module.r, module.scale * module.r) for module in modules.values()}


def folded(entry: Entry, factor: float) -> Entry:
    """A tensor times a factor: in float32, unless a power of two keeps a wide exponent's bits."""
    if factor == 1:
        return entry
    exact = math.frexp(factor)[0] == 0.5 and entry.dtype in ("F64", "F32", "BF16")
    return Entry(entry.shape, entry.dtype if exact else "F32", lambda: entry.read() * np.float64(factor))


def number(value: float) -> Entry:
    """One number."""
    return Entry((), "F32", lambda: np.array(value, np.float32))


def no_tables(modules: Mapping[str, Module], form: str) -> None:
    """UnsupportedError if a module is an embedding."""
    for name, module in modules.items():
        if module.table:
            raise UnsupportedError(f"{name} is an embedding, which {form} cannot hold")


# ---- the image models' forms


def kohya(modules: Mapping[str, Module], header: Mapping[str, str]) -> Written:
    """kohya's single file: an alpha for each module, so that nothing is folded; diffusers' Flux is fused."""
    no_tables(modules, "kohya's form")
    before, modules = sizes(modules), fused(modules)
    components = {name.partition(".")[0] for name in modules}
    flux = has_blocks(modules)
    numbered = flux or not components.isdisjoint({"text_encoder_2", "text_encoder_3"})
    sdxl = is_sdxl(modules, header)
    tensors: dict[str, Entry] = {}
    for path, module in modules.items():
        name = flattened(to_sgm(whole(path)) if sdxl else path, numbered, flux)
        if f"{name}.alpha" in tensors:
            raise MismatchError(f"{path} and another module are both called {name} in kohya's form")
        tensors[f"{name}.lora_down.weight"] = module.A
        tensors[f"{name}.lora_up.weight"] = module.B
        tensors[f"{name}.alpha"] = number(module.scale * module.r)
        if m := module.magnitude:
            if module.B.shape[0] == 1:
                raise UnsupportedError(
                    f"{path} has a magnitude of one output, which kohya's form cannot tell"
                )
            shape = [1] * len(module.A.shape)
            shape[module.axis] = math.prod(m.shape)
            tensors[f"{name}.dora_scale"] = shaped(m, tuple(shape))
    ranks = {str(module.r) for module in modules.values()}
    alphas = {f"{module.scale * module.r:g}" for module in modules.values()}
    about = {
        "ss_network_module": "networks.lora_flux" if flux else "networks.lora",
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
    }
    own = "transformer" in components and not flux
    note = "names of the transformer are those of OneTrainer; sd-scripts has others for each model"
    kept = inherited(header, before, sizes(modules))
    return Written(tensors, kept | about, notes=(note,) if own else ())


def is_sdxl(modules: Mapping[str, Module], header: Mapping[str, str]) -> bool:
    """Whether a U-Net is that of SDXL, which kohya calls by Stability AI's names.

    Its text has 2048 numbers a token, and some of its attention has more than one block.
    """
    told = header.get("ss_base_model_version", "") + header.get("modelspec.architecture", "")
    if "sdxl" in told or "stable-diffusion-xl" in told:
        return True
    for path, module in modules.items():
        deep = re.search(r"\.transformer_blocks\.[1-9]|\.add_embedding\.", f".{whole(path)}")
        wide = path.endswith(("attn2.to_k", "attn2.to_v")) and module.A.shape[1] == 2048
        if whole(path).startswith("unet.") and (deep or wide):
            return True
    return False


def diffusers(modules: Mapping[str, Module], header: Mapping[str, str]) -> Written:
    """diffusers' file with PEFT's names; the scale goes into B, since readers seek it in different places.

    UnsupportedError for a model whose names in kohya's form are not known here: SD3, Wan and others.
    """
    no_tables(modules, "diffusers' form")
    before, modules = sizes(modules), split(modules)
    tensors: dict[str, Entry] = {}
    for path, module in modules.items():
        name = of_sgm(path)
        if name.startswith("unet.") and not UNET.match(name.removeprefix("unet.")):
            raise UnsupportedError(f"{path} is no module of a U-Net; its name in diffusers is not known")
        if f"{name}.lora_A.weight" in tensors:
            raise MismatchError(f"{path} and another module are both called {name} in diffusers' form")
        tensors[f"{name}.lora_A.weight"] = module.A
        tensors[f"{name}.lora_B.weight"] = folded(module.B, module.scale)
        if module.magnitude:
            tensors[f"{name}.lora_magnitude_vector"] = module.magnitude
    return Written(tensors, inherited(header, before, {(module.r, module.r) for module in modules.values()}))


def shaped(entry: Entry, shape: tuple[int, ...]) -> Entry:
    """A tensor in another shape."""
    return Entry(shape, entry.dtype, lambda: entry.read().reshape(shape))


# ---- Flux, whose maps are fused in the names of Black Forest Labs


def has_blocks(modules: Mapping[str, Module]) -> bool:
    """Whether the names are those of Black Forest Labs."""
    return any(path.startswith(tuple(f"transformer.{blocks}." for blocks in FUSED)) for path in modules)


def split(modules: Mapping[str, Module]) -> dict[str, Module]:
    """Flux's fused maps as diffusers has them: each part gets A, and its rows of B; other models as they are.

    UnsupportedError if a map has other rows than in Flux.1.
    """
    if not has_blocks(modules):
        return dict(modules)
    made = {}
    for path, module in modules.items():
        match = re.fullmatch(r"transformer\.(?:(double_blocks|single_blocks)\.(\d+)\.)?(.+)", path)
        blocks, n, inner = match.groups() if match else (None, None, "")
        to, names = FUSED[blocks] if blocks else ("", {ours: (theirs,) for ours, theirs in AROUND.items()})
        if inner not in names:
            made[path] = module
            continue
        above, start = f"transformer.{to}.{n}." if blocks else "transformer.", 0
        if len(names[inner]) == 1:
            made[above + names[inner][0]] = swapped(module) if inner == SWAPPED else module
            continue
        O, I = module.B.shape[0], module.A.shape[1]  # noqa: E741
        if I * sum(WIDTHS.get(part, 1) for part in names[inner]) != O:
            raise UnsupportedError(f"{path} has {O} rows for {I} inputs; in Flux.1 it has others")
        for part in names[inner]:
            end = start + I * WIDTHS.get(part, 1)
            made[above + part] = Module(module.A, rows(module.B, start, end), module.scale)
            start = end
        if module.magnitude:
            raise UnsupportedError(f"{path}: the magnitudes of a fused map cannot be split")
    return made


def rows(entry: Entry, start: int, end: int) -> Entry:
    """Some rows of a matrix."""
    return Entry((end - start, *entry.shape[1:]), entry.dtype, lambda: entry.read()[start:end])


def swapped(module: Module) -> Module:
    """A module with the halves of its rows in the other order: shift and scale."""
    half = module.B.shape[0] // 2
    if module.magnitude:
        raise UnsupportedError(f"the magnitudes of {SWAPPED} cannot be swapped")
    return Module(module.A, reordered(module.B, lambda B: np.roll(B, half, 0)), module.scale)


def fused(modules: Mapping[str, Module]) -> dict[str, Module]:
    """diffusers' Flux.1 with the fused maps of Black Forest Labs; other models as they are.

    Parts that share one A become one module of its rank. Others stand below each other, rank by rank, with B
    block by block; parts that have no LoRA are rows of zeros.
    """
    homes: dict[str, tuple[str, tuple[str, ...]]] = {}
    homes |= {f"transformer.{theirs}": (f"transformer.{ours}", (theirs,)) for ours, theirs in AROUND.items()}
    for path in modules:
        match = re.fullmatch(r"transformer\.(\w+)\.(\d+)\.(.+)", path)
        if match and match[3] in HOMES.get(match[1], ()):
            blocks, name, parts = HOMES[match[1]][match[3]]
            homes[path] = f"transformer.{blocks}.{match[2]}.{name}", parts
    ours = [path for path in modules if path.startswith("transformer.")]
    single = any(path.startswith("transformer.single_transformer_blocks.") for path in ours)
    if not single or any(path not in homes for path in ours):  # of another model
        return dict(modules)
    made: dict[str, Module] = {}
    groups: dict[str, tuple[tuple[str, ...], dict[str, Module]]] = {}
    for path, module in modules.items():
        home, parts = homes.get(path, (path, ()))
        if len(parts) > 1:
            (own,) = (part for part in parts if path.endswith(f".{part}"))
            groups.setdefault(home, (parts, {}))[1][own] = module
        else:
            made[home] = swapped(module) if home.endswith(SWAPPED) else module
    return made | {home: stacked(home, *group) for home, group in groups.items()}


def stacked(home: str, parts: tuple[str, ...], group: Mapping[str, Module]) -> Module:
    """One module of some parts of a fused map, each at its rows."""
    if any(module.magnitude for module in group.values()):
        raise UnsupportedError(f"{home}: the magnitudes of its parts cannot be those of one map")
    I = next(iter(group.values())).A.shape[1]  # noqa: E741
    starts, O = {}, 0  # noqa: E741
    for part in parts:
        starts[part], O = O, O + I * WIDTHS.get(part, 1)  # noqa: E741
    for part, module in group.items():
        expected = I * WIDTHS.get(part, 1), I
        if (shape := (module.B.shape[0], module.A.shape[1])) != expected:
            raise UnsupportedError(f"{home}: {part} is {shape}; in Flux.1 it would be {expected}")
    own = [(starts[part], module) for part, module in group.items()]
    first = own[0][1]
    scales = {module.scale for _, module in own}
    alike = len(scales) == 1 and all(np.array_equal(first.A.read(), module.A.read()) for _, module in own[1:])
    r = first.r if alike else sum(module.r for _, module in own)

    def read_A() -> np.ndarray:
        return first.A.read() if alike else np.concatenate([module.A.read() for _, module in own])

    def read_B() -> np.ndarray:
        B, at = np.zeros((O, r)), 0
        for start, module in own:
            end = start + module.B.shape[0]
            B[start:end, at : at + module.r] = module.B.read() * (1.0 if alike else module.scale)
            at += 0 if alike else module.r
        return B

    A_kinds, B_kinds = ({getattr(module, half).dtype for _, module in own} for half in ("A", "B"))
    A_kind = A_kinds.pop() if len(A_kinds) == 1 else "F32"
    B_kind = B_kinds.pop() if len(B_kinds) == 1 and (alike or scales == {1.0}) else "F32"
    return Module(Entry((r, I), A_kind, read_A), Entry((O, r), B_kind, read_B), first.scale if alike else 1.0)
