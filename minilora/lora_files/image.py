"""The single safetensors files of kohya's sd-scripts, LyCORIS, diffusers, ai-toolkit, OneTrainer and XLabs.

    s = alpha / r by the module's `.alpha`, else by the configs in the header, else 1, as all readers take it

Stands in for diffusers' load_lora_weights, which judges a file by its first name and refuses Tucker forms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, StorageError, short
from ..formats.atomic import exists
from ..formats.safetensors import Tensors, json_object
from ..table import counted
from .contents import (
    INPUTS,
    MAGNITUDE,
    NUMBERS,
    PREFIX,
    TABLE_A,
    TABLE_B,
    A,
    B,
    Contents,
    Entry,
    gathered,
    listed,
    one_number,
    plain,
    product,
)
from .grammar import Keys
from .recognise import CONFIG, WEIGHTS

CONFIGS = "lora_adapter_metadata"  # in diffusers' headers: PEFT's config of each component
SPLIT = "processor.qkv_lora."  # XLabs adapts q, k and v of a single block's linear1, which also has the MLP's


def read_image(tensors: Tensors, keys: Keys, alpha: float | None = None) -> Contents:
    """The contents of a file; `alpha` is for modules that have none there.

    MismatchError for tensors that do not belong together, FormatError for a damaged header, StorageError if
    the names are those of a PEFT folder, whose config is not there, and there is no alpha.
    """
    entries: dict[str, Entry] = {}
    alphas: dict[str, float] = {}
    others = {kind: [*names] for kind, names in keys.others.items()}
    without, zero = [], []
    configs = headers(tensors)
    usual = alpha if alpha is not None else number_for_all(tensors)
    for module, part in keys.parts.items():
        made = factors(tensors, module, part)
        if "dora_scale" in part:
            made |= dora(tensors, module, part["dora_scale"], made, others)
        entries |= made
        if "alpha" in part:
            alphas[module] = one_number(tensors, part["alpha"])
            if not alphas[module]:
                zero.append(module)
                alphas[module] = float(rank_of(made))
        elif usual is not None:
            alphas[module] = usual
        elif not any(name == "" or module.startswith(f"{name}.") for name in configs):
            without.append(module)
    notes = []
    if without:
        first = next(iter(keys.parts[without[0]].values()))
        if first.startswith(PREFIX):
            config, name = Path(tensors.where).with_name(CONFIG), Path(tensors.where).name
            what = f"is missing, and only it has the scale of {name}; or give the alpha"
            if exists(config):
                what = f"is for {WEIGHTS}, not for {name}; expected that name, or the alpha"
            raise StorageError(f"{config}: {what}")
        what = counted(len(without), "module has", "modules have")
        notes.append(f"{what} no alpha, so the scale is 1, whatever it was in training, as for {without[0]}")
    tool, *more = dict.fromkeys(keys.tools[module] for module in keys.parts)
    if more:
        notes.append(f"some names are those of {tool}, others of {' and '.join(more)}")
    doubts = listed(others)
    if zero:
        what = counted(len(zero), "module has", "modules have")
        doubts.append(f"{what} an alpha of 0, read as r here and as 0 by some tools, such as {zero[0]}")
    base = tensors.metadata.get("ss_base_model_version")
    found = gathered(tensors.where, entries, tensors.metadata)
    return Contents(tool, found, alphas, configs, tuple(notes), tuple(doubts), base)


def rank_of(made: Mapping[str, Entry]) -> int:
    """The rank by A's shape, 1 if there is no A."""
    ends = (f".{A}", f".{TABLE_A}")
    return next((entry.shape[0] for name, entry in made.items() if name.endswith(ends) and entry.shape), 1)


def factors(tensors: Tensors, module: str, part: Mapping[str, str]) -> dict[str, Entry]:
    """The tensors of one module in PEFT's form; B of a convolution gets as many axes as A."""
    made = {}
    for name, kind in (("table A", TABLE_A), ("table B", TABLE_B), ("A", A)):
        if name in part:
            made[f"{module}.{kind}"] = plain(tensors, part[name])
    if "mid" in part and "A" in part:
        made[f"{module}.{A}"] = product(tensors, module, part["mid"], part["A"])
    if "B" in part:
        O, *rest = tensors.shapes[part["B"]] or (0,)  # noqa: E741
        axes = len(made[f"{module}.{A}"].shape) if "A" in part else 2
        made[f"{module}.{B}"] = plain(tensors, part["B"], (O, math.prod(rest), *(1,) * (axes - 2)))
        if SPLIT in part["B"]:
            made[f"{module}.{B}"] = beside_zeros(made[f"{module}.{B}"], 4 * O // 3)
    if "magnitude" in part:
        made[f"{module}.{MAGNITUDE}"] = plain(tensors, part["magnitude"])
    return made


def beside_zeros(entry: Entry, count: int) -> Entry:
    """An entry with this many rows of zeros below its own."""
    rows, *rest = entry.shape
    return Entry(
        (rows + count, *rest),
        entry.dtype,
        lambda: np.pad(entry.read(), ((0, count), *((0, 0) for _ in rest))),
    )


def dora(
    tensors: Tensors, module: str, key: str, made: Mapping[str, Entry], others: dict[str, list[str]]
) -> dict[str, Entry]:
    """The magnitudes of LyCORIS' DoRA, of the outputs, as PEFT's, or of the inputs; else one of `others`.

    W' = m (W + ΔW) / |W + ΔW|: one m and one norm for each output (O, 1), or for each input (1, I), as in all
    files until 2024. Where O is 1, or there is one axis only, it can be either.
    """
    shape = tensors.shapes[key]
    halves = [made.get(f"{module}.{half}") for half in (B, A)]
    outputs, inputs = ((*half.shape, 0, 0)[i] if half else 0 for i, half in enumerate(halves))
    ones = (1,) * (len(shape) - 1)
    if ones and outputs > 1 and shape == (outputs, *ones):
        flat = len(made[f"{module}.{B}"].shape) == 2
        return {f"{module}.{MAGNITUDE}": plain(tensors, key, (outputs,) if flat else (1, outputs, *ones[1:]))}
    if ones and outputs > 1 and shape == (1, inputs, *ones[1:]):
        return {f"{module}.{INPUTS}": plain(tensors, key, (inputs,))}
    others.setdefault("magnitude of inputs or outputs", []).append(module)
    return {}


def headers(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """PEFT's configs in the header, component -> fields, "" for a file of one; FormatError if damaged."""
    if CONFIGS not in tensors.metadata:
        return {}
    raw = tensors.metadata[CONFIGS].encode("utf-8", "surrogatepass")
    fields = json_object(f"{tensors.where}: {CONFIGS}", raw)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, _, name = key.rpartition(".")
        configs.setdefault(component, {})[name] = value
    return configs


def number_for_all(tensors: Tensors) -> float | None:
    """The alpha of all modules, if the header has one as a plain number; ConfigError if it is none."""
    for name in NUMBERS:
        text = tensors.metadata.get(name, "None")
        if text == "None":  # so kohya's scripts write that there is none
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            what = f"{name} in the header is {short(text)}; expected a number above 0"
            raise ConfigError(f"{tensors.where}: {what}")
        return value
    return None
