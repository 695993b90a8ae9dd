"""An adapter -> the tensors of another tool's file: the inverse of the readers in lora_files/.

A tool's form may have no place for a scale of each module, or one rank for all. Then the factors change and
their product stays: s B goes into the file for B (`folded`), zeros fill up the ranks. What a form cannot hold
is refused by name. Nothing is read before it is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import MismatchError, UnsupportedError
from ..formats.safetensors import FLOATS
from ..lora_files.contents import Entry
from ..lora_files.names import AROUND, FUSED, SWAPPED, flattened, of_sgm, to_sgm
from .folder import Adapter


@dataclass(frozen=True)
class Module:
    """One module to write: A (r, I, ...), B (O, r, ...), s, and what else its adapter has."""

    A: Entry
    B: Entry
    scale: float
    table: bool = False  # of an embedding: A (r, V), B (D, r)
    magnitude: Entry | None = None

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
        magnitude = entry(vector, (math.prod(given.tensors.shapes[vector]),)) if vector else None
        made[module] = Module(entry(pair.A), entry(pair.B), pair.scale, pair.embedding, magnitude)
    return made


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
    modules = fused(modules)
    components = {name.partition(".")[0] for name in modules}
    flux = any(path.startswith(tuple(f"transformer.{blocks}." for blocks in FUSED)) for path in modules)
    numbered = flux or not components.isdisjoint({"text_encoder_2", "text_encoder_3"})
    sdxl = "text_encoder_2" in components or header.get("ss_base_model_version", "").startswith("sdxl")
    tensors: dict[str, Entry] = {}
    for path, module in modules.items():
        name = flattened(to_sgm(path) if sdxl else path, numbered, flux)
        if f"{name}.alpha" in tensors:
            raise MismatchError(f"{path} and another module are both called {name} in kohya's form")
        tensors[f"{name}.lora_down.weight"] = module.A
        tensors[f"{name}.lora_up.weight"] = module.B
        tensors[f"{name}.alpha"] = number(module.scale * module.r)
        if m := module.magnitude:
            shape = (*m.shape, *(1,) * (len(module.A.shape) - 1))
            tensors[f"{name}.dora_scale"] = Entry(shape, m.dtype, reshaped(m, shape))
    ranks = {str(module.r) for module in modules.values()}
    alphas = {f"{module.scale * module.r:g}" for module in modules.values()}
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
    }
    return Written(tensors, {**header, **about})


def diffusers(modules: Mapping[str, Module], header: Mapping[str, str]) -> Written:
    """diffusers' file with PEFT's names; the scale goes into B, since readers seek it in different places."""
    no_tables(modules, "diffusers' form")
    tensors: dict[str, Entry] = {}
    for path, module in split(modules).items():
        name = of_sgm(path)
        tensors[f"{name}.lora_A.weight"] = module.A
        tensors[f"{name}.lora_B.weight"] = folded(module.B, module.scale)
        if module.magnitude:
            tensors[f"{name}.lora_magnitude_vector"] = module.magnitude
    return Written(tensors, {key: text for key, text in header.items() if key != "lora_adapter_metadata"})


def reshaped(entry: Entry, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """The reading of a tensor in another shape."""
    return lambda: entry.read().reshape(shape)


def places(path: str) -> tuple[str, str, tuple[str, ...]] | None:
    """The beginning of the new name, the fused map, its parts, of a module of Flux; None for any other."""
    match = re.fullmatch(r"transformer\.(double_blocks|single_blocks)\.(\d+)\.(.+)", path)
    if match and match[3] in FUSED[match[1]][1]:
        to, names = FUSED[match[1]]
        return f"transformer.{to}.{match[2]}.", match[3], names[match[3]]
    inner = path.removeprefix("transformer.")
    return ("transformer.", inner, (AROUND[inner],)) if inner != path and inner in AROUND else None


def split(modules: Mapping[str, Module]) -> dict[str, Module]:
    """Flux's fused maps as diffusers has them: each part gets A, and its rows of B."""
    made = {}
    for path, module in modules.items():
        if (place := places(path)) is None:
            made[path] = module
            continue
        above, inner, names = place
        O = module.B.shape[0]  # noqa: E741
        h = O // (7 if len(names) == 4 else len(names))
        ends = [min(h * (i + 1), O) for i in range(len(names) - 1)] + [O]
        for name, start, end in zip(names, [0, *ends], ends, strict=False):
            made[above + name] = rows(module, start, end) if len(names) > 1 else module
        if inner == SWAPPED:
            made[above + names[0]] = rows(module, O // 2, O // 2)
    return made


def rows(module: Module, start: int, end: int) -> Module:
    """The module of some rows; from the same row on to it again, all of them."""

    def take(entry: Entry) -> Entry:
        size = end - start if end > start else entry.shape[0]
        return Entry(
            (size, *entry.shape[1:]), entry.dtype,
            lambda: entry.read()[start:end] if end > start else np.roll(entry.read(), -start, 0),
        )  # fmt: skip

    magnitude = take(module.magnitude) if module.magnitude else None
    return Module(module.A, take(module.B), module.scale, False, magnitude)


def fused(modules: Mapping[str, Module]) -> dict[str, Module]:
    """diffusers' Flux with the fused maps of Black Forest Labs; other modules as they are.

    Parts that share one A become one module of its rank. Others stand below each other, rank by rank, with B
    block by block; parts that have no LoRA are rows of zeros.
    """
    homes = {}
    if any(path.startswith("transformer.single_transformer_blocks.") for path in modules):
        for blocks, (to, names) in FUSED.items():
            for path in modules:
                if match := re.fullmatch(rf"transformer\.{to}\.(\d+)\.(.+)", path):
                    for fused_name, parts in names.items():
                        if match[2] in parts:
                            homes[path] = f"transformer.{blocks}.{match[1]}.{fused_name}", parts
        for ours, theirs in AROUND.items():
            homes[f"transformer.{theirs}"] = f"transformer.{ours}", (theirs,)
    made: dict[str, Module] = {}
    groups: dict[str, dict[str, Module]] = {}
    for path, module in modules.items():
        home, parts = homes.get(path, (path, ("",)))
        if len(parts) == 1:
            made[home] = rows(module, *(2 * (module.B.shape[0] // 2,))) if home.endswith(SWAPPED) else module
        else:
            part = next(part for part in parts if path.endswith(f".{part}"))
            groups.setdefault(home, {})[part] = module
    for home, group in groups.items():
        made[home] = stacked(home, group, homes_parts(homes, home))
    return made


def homes_parts(homes: Mapping[str, tuple[str, tuple[str, ...]]], home: str) -> tuple[str, ...]:
    """The parts of a fused map."""
    return next(parts for place, parts in homes.values() if place == home)


def stacked(home: str, group: Mapping[str, Module], parts: tuple[str, ...]) -> Module:
    """One module of the parts of a fused map, in the order of their rows."""
    if any(module.magnitude for module in group.values()):
        raise UnsupportedError(f"{home}: the magnitudes of its parts cannot be those of one map")
    whole = {part: module.B.shape[0] // (4 if part == "proj_mlp" else 1) for part, module in group.items()}
    (h, *more) = set(whole.values())
    inputs = {module.A.shape[1:] for module in group.values()}
    if more or len(inputs) > 1:
        raise MismatchError(
            f"{home}: its parts are of different sizes, {sorted(inputs)} and {sorted(whole.values())}"
        )
    starts, O = {}, 0  # noqa: E741
    for part in parts:
        starts[part] = O
        O += h * (4 if part == "proj_mlp" else 1)  # noqa: E741
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

    plain = alike or scales == {1.0}
    kind = first.B.dtype if plain and len({module.B.dtype for _, module in own}) == 1 else "F32"
    A = Entry((r, *first.A.shape[1:]), first.A.dtype, read_A)
    return Module(A, Entry((O, r), kind, read_B), first.scale if alike else 1.0)
