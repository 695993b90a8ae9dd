"""The modules of an adapter -> their places in a base, by names and shapes alone.

    unet.input_blocks.4.1.proj_in               model.diffusion_model.input_blocks.4.1.proj_in.weight
    transformer.transformer_blocks.3.attn.to_k  rows O to 2 O of double_blocks.3.img_attn.qkv.weight

A base has the true names, so that a flattened one is found by flattening those. Each tensor is listed under
every name that an adapter can have for it: with and without the component and the root, in diffusers' names
and in those of Stability AI, OpenCLIP or Black Forest Labs, as a part of a fused map and as the map itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import MismatchError, nearest
from ..formats.huggingface import transposed
from ..formats.safetensors import FLOATS, Tensors
from ..lora_files.names import AROUND, FUSED, SWAPPED, WIDTHS, of_sgm, to_sgm
from ..peft.folder import Adapter

DENOISERS = ("unet", "transformer", "prior", "diffusion_model")  # of which a pipeline has one
PREFIXES = {  # of names in a pipeline or in a checkpoint of all -> the component
    **{f"{name}.": name for name in (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")},
    "model.diffusion_model.": "diffusion_model",
    "cond_stage_model.transformer.": "text_encoder", "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}  # fmt: skip
ROOTS = ("text_model.", "model.")  # files of other versions begin with it or leave it out
HEAD, TABLES = "lm_head", ("embed_tokens", "wte", "word_embeddings", "shared")  # its table, if it is tied
QKV = ("q_proj", "k_proj", "v_proj")
MAPS = {  # the last name of a fused map -> those of its parts, in the order of the rows
    "qkv": (("to_q", "to_k", "to_v"), QKV, ("q", "k", "v")), "to_qkv": (("to_q", "to_k", "to_v"),),
    "qkv_proj": (QKV,), "in_proj": (QKV,), "gate_up_proj": (("gate_proj", "up_proj"),),
}  # fmt: skip
OPEN_CLIP = re.compile(r"transformer\.resblocks\.(\d+)\.(?:attn|mlp)\.(in_proj|out_proj|c_fc|c_proj)")
OF_OPEN_CLIP = {
    "in_proj": "self_attn.in_proj", "out_proj": "self_attn.out_proj", "c_fc": "mlp.fc1", "c_proj": "mlp.fc2",
}  # fmt: skip
UNET = re.compile(r"(down|up|input|output)_blocks\.")
FLUX = re.compile(r"single_(transformer_)?blocks\.")
BLOCK = re.compile(r"(\w+)\.(\d+)\.(.+)")
WEIGHT = re.compile(r"(.+?)(?:\.weight|(?<=\.in_proj)_weight)")


class Slot(NamedTuple):
    """What a name means in a base: all rows of these tensors in this order, or a part of a fused one."""

    keys: tuple[str, ...]
    parts: tuple[str, ...] = ()  # of the fused map
    own: str = ""  # which of them
    swapped: bool = False  # the halves of the rows are in the other order


class Part(NamedTuple):
    """Rows of a module's ΔW, and where they are added: a tensor of the base, and its first row there."""

    key: str
    first: int
    rows: int
    at: int
    turned: bool  # the tensor is stored (I, O)

    def of(self, a: np.ndarray) -> np.ndarray:
        """Its place (rows, I) in the tensor, as a view; a convolution's is a matrix."""
        a = a.reshape(len(a), -1)
        return (a.T if self.turned else a)[self.at : self.at + self.rows]


Place = tuple[Part, ...]


class Names:
    """The tensors of a base by all the names that an adapter can have for them."""

    def __init__(self, base: Tensors) -> None:
        self.base = base
        self.own: dict[tuple[str, str], set[Slot]] = {}  # (component, flattened name) -> what it means
        self.other: dict[tuple[str, str], set[Slot]] = {}
        stems = {match[1]: key for key in base if (match := WEIGHT.fullmatch(key))}
        split = {key: component_of(stem) for stem, key in stems.items()}
        self.components = {component for component, _ in split.values()}
        unet, flux = (any(form.match(name) for _, name in split.values()) for form in (UNET, FLUX))
        fused: dict[tuple[str, str, tuple[str, ...]], dict[str, str]] = {}
        for key, (component, stem) in split.items():
            self.add(self.own, component, stem, Slot((key,)))
            for name in alike(stem, unet):
                self.add(self.other, component, name, Slot((key,)))
                for whole, parts in fusions(name, flux):
                    if len(parts) == 1:
                        (other,) = {whole, *parts} - {name}
                        self.add(self.other, component, other, Slot((key,), swapped=whole == SWAPPED))
                    elif name == whole:
                        for part in parts:
                            self.add(self.other, component, part, Slot((key,), parts, part))
                    else:
                        fused.setdefault((component, whole, parts), {})[name] = key
        for (component, whole, parts), keys in fused.items():
            if len(keys) == len(parts):
                self.add(self.other, component, whole, Slot(tuple(keys[part] for part in parts)))
        for table in [key for stem, key in stems.items() if stem.rpartition(".")[2] in TABLES]:
            self.add(self.other, "", HEAD, Slot((table,)))

    def add(self, names: dict[tuple[str, str], set[Slot]], component: str, name: str, slot: Slot) -> None:
        """List a tensor under one more name."""
        names.setdefault((component, name.replace(".", "_")), set()).add(slot)

    def find(self, module: str) -> set[Slot]:
        """What a module's name can mean: its own name before others, its component before no component."""
        if (key := f"{module}.weight") in self.base:
            return {Slot((key,))}
        component, inner = component_of(module)
        alike = (*(DENOISERS if component in DENOISERS else ()), "") if component else (*self.components,)
        for names in (self.own, self.other):
            for some in ((component,), alike):
                flat = inner.replace(".", "_")
                if found := {slot for one in some for slot in names.get((one, flat), ())}:
                    return found
        return set()

    def parameter(self, name: str) -> str | None:
        """The tensor of a parameter, such as a bias or a whole weight; None if there is none."""
        module, _, kind = name.rpartition(".")
        slots = self.find(module)
        (slot,) = slots if len(slots) == 1 else (Slot(("",)),)
        key = slot.keys[0] if slot == Slot(slot.keys[:1]) else ""  # whole, its rows as they are
        stem = match[1] if (match := WEIGHT.fullmatch(key)) else module
        return next((key for key in (name, f"{stem}.{kind}") if key in self.base), None)


def component_of(name: str) -> tuple[str, str]:
    """The component of a pipeline at the beginning of a name, "" if it says none, and the rest."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES.get(prefix, ""), name.removeprefix(prefix)


def alike(name: str, unet: bool) -> Iterator[str]:
    """The names of one module in a component: by other tools, and with or without a root."""
    names = [name]
    if unet:
        names += [turn(f"unet.{name}").removeprefix("unet.") for turn in (of_sgm, to_sgm)]
    if match := OPEN_CLIP.fullmatch(name):
        names.append(f"text_model.encoder.layers.{match[1]}.{OF_OPEN_CLIP[match[2]]}")
    for one in dict.fromkeys(names):
        yield one
        for root in ROOTS:
            yield one.removeprefix(root) if one.startswith(root) else root + one


def fusions(name: str, flux: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The fused maps that a module can be, or be a part of: each map's name and those of its parts."""
    above, dot, last = name.rpartition(".")
    for whole, splits in MAPS.items():
        for parts in splits:
            if last == whole or last in parts:
                yield above + dot + whole, tuple(above + dot + part for part in parts)
    if not flux:
        return
    for whole, part in AROUND.items():
        if name in (whole, part):
            yield whole, (part,)
    if match := BLOCK.fullmatch(name):
        blocks, n, inner = match.groups()
        for ours, (theirs, maps) in FUSED.items():
            for whole, parts in maps.items():
                if (blocks, inner) == (ours, whole) or (blocks == theirs and inner in parts):
                    yield f"{ours}.{n}.{whole}", tuple(f"{theirs}.{n}.{part}" for part in parts)


def start_of(slot: Slot, rows: int, total: int) -> int | None:
    """The first row of a part with so many rows in a fused map with so many; None if it cannot be there.

    The parts of a map have equal rows, or some times those of the first (`WIDTHS`); with fewer heads for keys
    than for queries, those of k and v are equal and the rest is q's.
    """
    widths = [WIDTHS.get(part.rpartition(".")[2], 1) for part in slot.parts]
    i = slot.parts.index(slot.own)
    if rows * sum(widths) == total * widths[i]:
        return rows // widths[i] * sum(widths[:i])
    if len(widths) != 3:
        return None
    few, many = (rows, total - 2 * rows) if i else ((total - rows) // 2, rows)
    if not few < many or 2 * few + many != total:
        return None
    return total - (3 - i) * few if i else 0


def places(given: Adapter, names: Names) -> dict[str, Place]:
    """Module -> its place in a base, of those whose name and shape are found there."""
    found = {module: place_of(given, names.base, module, names.find(module)) for module in given.pairs}
    return {module: place for module, place in found.items() if place}


def place_of(given: Adapter, base: Tensors, module: str, slots: set[Slot]) -> Place | None:
    """The place of one module, by what its name can mean."""
    pair = given.pairs[module]
    O, I = pair.shape  # noqa: E741
    if len(slots) != 1:
        return None
    (slot,) = slots
    kernel = given.tensors.shapes[pair.A][1:]
    sides = []
    for key in slot.keys:
        shape = base.shapes[key]
        if len(shape) > 2 and len(kernel) > 1 and shape[1:] != kernel:
            return None
        rows, columns = (*shape, 1)[0], math.prod(shape[1:])
        turned = pair.embedding or transposed(base.shapes, key.removesuffix(".weight"))
        if turned is None:  # the base does not tell
            turned = given.settings.fan_in_fan_out and rows == I
        sides.append((columns, rows, True) if turned else (rows, columns, False))
    if any(columns != I for _, columns, _ in sides):
        return None
    key, (total, _, turned) = slot.keys[0], sides[0]
    if slot.parts:
        start = start_of(slot, O, total)
        return None if start is None else (Part(key, 0, O, start, turned),)
    if sum(rows for rows, _, _ in sides) != O:
        return None
    if slot.swapped:
        half = O // 2
        return Part(key, 0, half, O - half, turned), Part(key, half, O - half, 0, turned)
    place, first = [], 0
    for key, (rows, _, turned) in zip(slot.keys, sides, strict=True):
        place.append(Part(key, first, rows, 0, turned))
        first += rows
    return tuple(place)


def misfit(given: Adapter, names: Names, module: str) -> MismatchError:
    """The error that says why a module has no place in a base."""
    base, slots = names.base, names.find(module)
    if not slots:
        key = f"{module}.weight"
        return MismatchError(f"{given.where}: the base has no {key}; {nearest(key, base)}")
    keys = sorted(key for slot in slots for key in slot.keys)
    if len(slots) > 1:
        return MismatchError(f"{given.where}: {module} could be {' or '.join(keys)} of the base")
    which = "" if keys == [f"{module}.weight"] else f" {' and '.join(keys)}"
    theirs = " and ".join(str(base.shapes[key]) for key in keys)
    kinds = sorted({base.dtypes[key] for key in keys} - {*FLOATS})
    what = f"{module} is {given.pairs[module].shape}; the base's{which} is {theirs}"
    return MismatchError(f"{given.where}: {what}{f' in {kinds[0]}' if kinds else ''}")


def weight_of(base: Tensors, place: Place) -> np.ndarray:
    """W (O, I) of a module in float64."""
    return np.concatenate([part.of(base[part.key].astype(np.float64)) for part in place])
