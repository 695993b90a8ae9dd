"""A base on disk and an adapter -> what is to be done to each tensor, or an error: what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..errors import MismatchError, UnsupportedError, nearest
from ..formats.atomic import exists, named
from ..formats.huggingface import components, heads_in, located, read_json, weight_files
from ..formats.safetensors import FLOATS, Tensors, joined, open_tensors
from ..lora_files.contents import INPUTS
from ..peft.config import meant
from ..peft.folder import Adapter, check_agreement
from ..peft.loading import check_copy
from .places import HEAD, TABLES, Names, Part, Place, misfit, places

LANGUAGE = ("CausalLM", "LMHead", "ForConditionalGeneration")  # of what has a head, maybe tied


@dataclass(frozen=True, eq=False)
class Base:
    """The tensors of a base on disk, and in which file each is."""

    where: Path
    files: Mapping[Path, Mapping[str, str]]  # file -> name there -> name here
    indices: tuple[Path, ...]
    tensors: Tensors  # of a pipeline, names begin with the component's


@dataclass(frozen=True)
class Plan:
    """What is to be done to the tensors of a base; all others stay."""

    changes: Mapping[str, list[tuple[str, Part]]]  # tensor -> modules, and the places of their rows in it
    replaced: Mapping[str, str]  # tensor -> the adapter's that takes its place


def opened(spec: Path | str) -> Base:
    """A base in safetensors, a file, a model's folder or a pipeline's; only headers are read."""
    where = named(spec)
    parts = components(where)
    if not parts:
        located(where)  # which names what is often mistaken for a base
    models: dict[str, tuple[Path | None, dict[Path, Tensors]]] = {}
    if where.is_file():
        models[""] = None, {where: open_tensors(where)}
    for component, folder in (parts or ({} if models else {"": where})).items():
        models[component] = weight_files(folder)
    files: dict[Path, dict[str, str]] = {}
    homes: dict[str, tuple[Tensors, str]] = {}
    for component, (_, inside) in models.items():
        for path, tensors in inside.items():
            files[path] = {own: f"{component}.{own}" if component else own for own in tensors}
            homes |= {name: (tensors, own) for own, name in files[path].items()}
    indices = tuple(index for index, _ in models.values() if index)
    return Base(where, files, indices, joined(str(where), homes))


def planned(given: Adapter, source: Base) -> Plan:
    """Every module, bias and saved weight of an adapter at its place in a base.

    MismatchError for one without a place, and for two at one place; UnsupportedError for a tensor that is no
    float, magnitudes that cannot be applied, and a table that is a tied head, too; others as in
    `check_agreement`.
    """
    check_agreement(given)
    base = source.tensors
    names = Names(base)
    found = places(given, names)
    changes: dict[str, list[tuple[str, Part]]] = {}
    for module, pair in given.pairs.items():
        if module not in found:
            raise misfit(given, names, module)
        if pair.embedding and pair.vectors:
            raise UnsupportedError(f"{given.where}: {module}: magnitudes of an embedding are not supported")
        if INPUTS in pair.vectors and found[module][1:]:
            what = f"{module} has a magnitude of each input, and the base has its rows in several places"
            raise UnsupportedError(f"{given.where}: {what}; its norms cannot be taken")
        for part in found[module]:
            changes.setdefault(part.key, []).append((module, part))
        if pair.copy:
            check_copy(given, pair.copy, base[found[module][0].key])
    for parts in changes.values():
        parts.sort(key=lambda item: item[1].at)
        for (one, first), (other, second) in pairwise(parts):
            if second.at < first.at + first.rows:
                raise MismatchError(f"{given.where}: {one} and {other} both change {first.key}")
    check_split(given, source, names, found)
    replaced: dict[str, str] = {}
    biases = {f"{module}.bias": pair.bias for module, pair in given.pairs.items() if pair.bias}
    for parameter, tensor in {**given.replaced, **biases}.items():
        at = names.parameter(parameter)
        if at is None:
            near = nearest(parameter, base)
            raise MismatchError(f"{given.where}: the base has no parameter {parameter}; {near}")
        if (shape := given.tensors.shapes[tensor]) != base.shapes[at]:
            raise MismatchError(f"{given.where}: {tensor} has shape {shape}; the base's is {base.shapes[at]}")
        if at in replaced or at in changes:
            other = replaced[at] if at in replaced else changes[at][0][0]
            raise MismatchError(f"{given.where}: {other} and {tensor} both change {at}")
        replaced[at] = tensor
    for key in (*changes, *replaced):
        if (kind := base.dtypes[key]) not in FLOATS:
            raise UnsupportedError(
                f"{source.where}: {key}: dtype is {kind}; expected one of {', '.join(FLOATS)}"
            )
    check_untied(given, source, {*changes, *replaced})
    return Plan(changes, replaced)


def check_split(given: Adapter, source: Base, names: Names, found: Mapping[str, Place]) -> None:
    """MismatchError unless q, k and v have the rows of a fused map that the heads of the base give them.

    Where no config tells the heads, the three are equal, or all are there and fill the map.
    """
    rows: dict[str, dict[int, int]] = {}  # fused tensor -> 0, 1, 2 for q, k, v -> rows
    totals = {}
    for module, place in found.items():
        (slot,) = names.find(module)
        if len(slot.parts) == 3:
            key, shape = place[0].key, source.tensors.shapes[place[0].key]
            totals[key] = shape[1] if place[0].turned else shape[0]
            rows.setdefault(key, {})[slot.parts.index(slot.own)] = place[0].rows
    q, k = (None if source.where.is_file() else heads_in(source.where)) or (1, 1)
    for key, some in rows.items():
        share = {i: totals[key] * (k if i else q) // (q + 2 * k) for i in some}
        if some != share and sum(some.values()) != totals[key]:
            what = f"parts of {key} have {[*some.values()]} of its {totals[key]} rows"
            raise MismatchError(f"{given.where}: {what}; expected {[*share.values()]}, by the base's heads")


def check_untied(given: Adapter, source: Base, keys: Collection[str]) -> None:
    """UnsupportedError if a table is to change that is embedding and head at once: one of them is meant."""
    path = (source.where if components(source.where) else located(source.where)) / "config.json"
    config = read_json(path) if path.parent.is_dir() and exists(path) else {}
    inner = config.get("text_config")
    language = any(word in str(config.get("architectures")) for word in LANGUAGE)
    asked = {*given.pairs, *(name.rpartition(".")[0] for name in given.replaced)}
    alone = not any(name.endswith(f"{HEAD}.weight") for name in source.tensors)
    told = any(c.get("tie_word_embeddings") is True for c in (config, inner) if isinstance(c, dict))
    tied = told or (alone and (language or HEAD in asked))
    for key in sorted(keys):
        if tied and key.removesuffix(".weight").rpartition(".")[2] in (*TABLES, HEAD):
            what = f"changes {key}, which is both embedding and head in this base"
            raise UnsupportedError(f"{given.where}: {what}; expected a base with a head of its own")


def without_factors(given: Adapter, source: Base, plan: Plan) -> list[str]:
    """The modules of a base that the config names and the adapter does not have; of all linear maps, none."""
    modules = [name.removesuffix(".weight") for name in source.tensors if name.endswith(".weight")]
    there = {*plan.changes, *plan.replaced}
    return [name for name in meant(given.settings, modules, ()) if f"{name}.weight" not in there]
