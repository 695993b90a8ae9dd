"""PEFT's adapter_config.json: what it says, which modules it means, and how ours is written.

Every field that changes the numbers is honoured or refused by name, and its exact type is checked: PEFT
takes "false" for true and NaN for an alpha. Its patterns are regular expressions (patterns.py), matched only
when their modules are needed. Ours have one key for each module that differs and no wildcards, since PEFT
sorts the keys on saving and takes the first match on reading.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedError, check_float, check_int, short
from ..formats import safetensors
from ..formats.atomic import read_at
from ..formats.huggingface import read_json
from ..targets import LAYER, matches
from . import patterns
from .kinds import KINDS

NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
REFUSED = (  # fields that change what B A means, in ways not done here
    "use_qalora", "arrow_config", "use_bdlora", "velora_config", "monteclora_config", "kasa_config",
    "megatron_config", "target_parameters",
)  # fmt: skip
BESIDE = (  # fields that act beside B A, or not on every token: shown, but not loaded
    "lora_bias", "alora_invocation_tokens", "layer_replication", "trainable_token_indices",
    "ensure_weight_tying",
)  # fmt: skip
OF_NO_EFFECT = (  # on the numbers
    "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode",
    "qalora_group_size", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config",
)  # fmt: skip
USED = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "fan_in_fan_out", "init_lora_weights", "lora_dropout",
)  # fmt: skip
SWITCHES = ("lora_bias", "use_qalora", "ensure_weight_tying")  # the booleans in both lists
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits that change the base
HIGHEST = 1 << 20  # rank
MOST = safetensors.MOST // 2  # keys of a pattern: one for each module that a file can hold
LARGEST = 1 << 23  # bytes of a config: so many keys in both patterns, 80 bytes each
FEW = 1000  # names in a list that is compared with every module
PLAIN = {  # the fields of a plain LoRA in a config of ours, besides sizes and targets
    "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA",
    "revision": None, "task_type": "CAUSAL_LM",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A checked adapter_config.json, by PEFT's names; see PEFT's LoraConfig."""

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...] = ()
    use_rslora: bool = False
    flags: frozenset[str] = frozenset()  # of the kinds of adapters (kinds.py): {"use_dora"}
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    fan_in_fan_out: bool = False
    lora_dropout: float = 0.0
    base: str | None = None  # base_model_name_or_path, never compared
    beside: tuple[str, ...] = ()  # fields that act beside B A, as "lora_bias is True"
    where: str = "adapter_config.json"  # the file, for messages
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)  # as they are in the file

    def scale(self, alpha: float, r: int) -> float:
        """The scale s for this alpha and rank: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)


@dataclass(frozen=True)
class Chosen:
    """What rank_pattern or alpha_pattern says about some modules: the value of the first key that matches."""

    values: Mapping[str, Any]  # by module; one that no key matches has the default
    contested: tuple[str, ...]  # modules that a later key gives another value: the order decides
    idle: tuple[str, ...]  # keys that match none of the modules


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of an adapter_config.json as they are; FormatError if it is not a JSON object."""
    return read_json(path, LARGEST)


def settings_of(fields: Mapping[str, Any], path: Path | str) -> tuple[Settings, tuple[str, ...]]:
    """The settings in the fields of a config, and notes; ConfigError or UnsupportedError names the field."""

    def wrong(name: str, expected: str) -> ConfigError:
        return ConfigError(f"{path}: {name} is {short(fields.get(name))}; expected {expected}")

    kind = fields.get("peft_type")
    if not isinstance(kind, str) or not re.fullmatch("[A-Z0-9_]+", kind):  # as all methods' names do
        raise wrong("peft_type", "'LORA'")
    if kind != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {short(kind)}; expected 'LORA'")

    def flag(name: str) -> bool:
        value = fields.get(name)
        if value is not None and type(value) is not bool:
            raise wrong(name, "true or false")
        return bool(value)

    beside = []
    for name in (*REFUSED, *BESIDE):
        if name in SWITCHES:
            flag(name)
        if fields.get(name) not in (None, False, {}, []):
            beside.append(f"{name} is {short(fields[name])}")
            if name in REFUSED:
                raise UnsupportedError(f"{path}: {beside[-1]}, which is not supported")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(OTHER_BASE):
        raise UnsupportedError(
            f"{path}: init_lora_weights is {short(init)}, which changes the base; make it a plain LoRA with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )

    def words(name: str) -> str | tuple[str, ...]:
        value = fields.get(name)
        if value is None or (isinstance(value, str) and value):
            return value or ()
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise wrong(name, "a list of module names")
        return tuple(dict.fromkeys(value))

    def pattern(name: str, check: Any) -> dict[str, Any]:
        numbers = {} if fields.get(name) is None else fields[name]
        if not isinstance(numbers, dict) or len(numbers) > MOST:
            raise wrong(name, f"an object of at most {MOST} numbers by module name")
        for key, number in numbers.items():
            check(f"{name}[{short(key)}]", number)
        return numbers

    def rank(name: str, value: Any) -> int:
        if check_int(f"{path}: {name}", value, 1) > HIGHEST:
            raise ConfigError(f"{path}: {name} is {short(value)}; expected at most {HIGHEST}")
        return value

    def alpha(name: str, value: Any) -> float:
        return check_float(f"{path}: {name}", value, 0, math.inf, open_low=True)

    for name in ("r", "lora_alpha"):
        if name not in fields:
            raise ConfigError(f"{path}: {name} is missing; expected a number")
    numbers = fields.get("layers_to_transform")
    numbers = [numbers] if type(numbers) is int else numbers
    valid = isinstance(numbers, list) and numbers and all(type(n) is int and n >= 0 for n in numbers)
    if numbers is not None and not valid:
        raise wrong("layers_to_transform", "layer numbers")
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        raise wrong("bias", "'none', 'lora_only' or 'all'")
    base = fields.get("base_model_name_or_path")
    saved, layers = words("modules_to_save"), fields.get("layers_pattern")
    layers = [] if layers is None else [layers] if isinstance(layers, str) else layers
    if isinstance(saved, str) or len(saved) > FEW:
        raise wrong("modules_to_save", f"a list of at most {FEW} names")
    if not isinstance(layers, list) or len(layers) > FEW or not all(isinstance(n, str) for n in layers):
        raise wrong("layers_pattern", f"a list of at most {FEW} names")
    settings = Settings(
        r=rank("r", fields["r"]),
        lora_alpha=alpha("lora_alpha", fields["lora_alpha"]),
        target_modules=words("target_modules"),
        use_rslora=flag("use_rslora"),
        flags=frozenset(kind.flag for kind in KINDS if flag(kind.flag)),
        rank_pattern=pattern("rank_pattern", rank),
        alpha_pattern=pattern("alpha_pattern", alpha),
        exclude_modules=words("exclude_modules"),
        layers_to_transform=None if numbers is None else tuple(numbers),
        layers_pattern=tuple(layers),
        modules_to_save=saved,
        bias=fields.get("bias", "none"),
        fan_in_fan_out=flag("fan_in_fan_out"),
        lora_dropout=check_float(f"{path}: lora_dropout", fields.get("lora_dropout", 0.0), 0, 1),
        base=base if isinstance(base, str) else None,
        beside=tuple(beside),
        where=str(path),
        fields=fields,
    )
    known = {*USED, *REFUSED, *BESIDE, *OF_NO_EFFECT, *(kind.flag for kind in KINDS)}
    strange = sorted(name for name, value in fields.items() if value and name not in known)
    some = ", ".join(map(short, strange[:3])) + (f" and {len(strange) - 3} more" if strange[3:] else "")
    notes = [f"unknown and ignored: {some}"] if strange else []
    return settings, tuple(notes)


def read_settings(path: Path) -> tuple[Settings, tuple[str, ...]]:
    """The settings in an adapter_config.json, and notes; FormatError, and errors as in `settings_of`."""
    settings, notes = settings_of(read_fields(path), path)
    if read_at(path, 0, 3) == codecs.BOM_UTF8:
        notes += ("the config begins with a byte order mark, which PEFT cannot read",)
    return settings, notes


def check_targets(settings: Settings) -> None:
    """ConfigError unless the config makes clear which modules of a base it means."""
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        entries = getattr(settings, name)
        for word in () if isinstance(entries, str) else entries:
            if not NAME.fullmatch(word):
                what = f"{name} has the entry {short(word)}"
                raise ConfigError(f"{settings.where}: {what}; expected a module's name")
    if not settings.target_modules:
        raise ConfigError(f"{settings.where}: target_modules is empty; expected at least one module name")
    if settings.layers_to_transform is not None and isinstance(settings.target_modules, str):
        what = f"layers_to_transform is {short(settings.layers_to_transform)}"
        raise ConfigError(f"{settings.where}: {what}; expected null where target_modules is one string")


def chosen(settings: Settings, name: str, modules: Sequence[str]) -> Chosen:
    """What rank_pattern or alpha_pattern says: as in PEFT, the first key that matches a name's end counts."""
    pattern = getattr(settings, name)
    fits = patterns.fitting(pattern, modules, f"{settings.where}: {name}")
    keys, numbers = list(pattern), list(pattern.values())
    used = {place for fit in fits for place in fit}
    return Chosen(
        {module: numbers[fit[0]] for module, fit in zip(modules, fits, strict=True) if fit},
        tuple(m for m, fit in zip(modules, fits, strict=True) if len({numbers[place] for place in fit}) > 1),
        tuple(key for place, key in enumerate(keys) if place not in used),
    )


def meant(settings: Settings, modules: Sequence[str], linears: Sequence[str]) -> list[str]:
    """The modules of a base that the config adapts, by PEFT's rules."""
    excluded = set(named(settings, "exclude_modules", modules))
    free = [m for m in modules if m not in excluded]
    free = [m for m in free if not any(f".{entry}." in f".{m}." for entry in settings.modules_to_save)]
    targets = settings.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        adaptable = set(linears)
        return [m for m in free if m in adaptable and not matches("lm_head", m)]
    matching = named(settings, "target_modules", free)
    if settings.layers_to_transform is None:
        return matching
    exact, layers = set(targets), set(settings.layers_to_transform)
    kept = {m for m in matching if (layer := LAYER.match(m)) and int(layer[1]) in layers}
    if settings.layers_pattern:
        kept = {m for m in kept if any(f".{p}." in f".{m}." for p in settings.layers_pattern)}
    return [m for m in matching if m in kept or m in exact]


def named(settings: Settings, name: str, modules: Sequence[str]) -> list[str]:
    """The modules in target_modules or exclude_modules, a list of names or one regular expression."""
    entries = getattr(settings, name)
    if isinstance(entries, str):
        return patterns.whole(entries, modules, f"{settings.where}: {name}")
    names = set(entries)
    return [m for m in modules if any(m[start:] in names for start in patterns.starts(m))]


def peft_config(
    sizes: Mapping[str, tuple[int, float]], targets: Sequence[str], rslora: bool = False
) -> dict[str, Any]:
    """A config for modules of these (rank, alpha): the most common pair, and patterns where others differ."""
    (r, alpha), _ = min(Counter(sizes.values()).items(), key=lambda item: (-item[1], item[0]))

    def differing(i: int, usual: float) -> dict[str, float]:
        return {f"^{re.escape(m)}": size[i] for m, size in sizes.items() if size[i] != usual}

    ranks, alphas = differing(0, r), differing(1, alpha)
    sized = {"r": r, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": alphas}
    flags = {kind.flag: False for kind in KINDS} | {"use_rslora": rslora}
    return PLAIN | sized | flags | {"target_modules": sorted(targets)}


def targets(modules: Sequence[str], wanted: set[str]) -> list[str]:
    """The shortest list for exactly these modules: last names if they suffice, else full names."""
    last = {m.rpartition(".")[2] for m in wanted}
    return sorted(last if {m for m in modules if m.rpartition(".")[2] in last} == wanted else wanted)


def alphas_of(scales: Mapping[str, tuple[float, int]]) -> tuple[dict[str, float], bool]:
    """The alphas of modules of these (scale, rank), and whether they are rsLoRA's, s = alpha / sqrt(r).

    Takes the rule that gives every scale to the last bit, with whole alphas if possible; else the nearest
    alphas for s = alpha / r.
    """
    ways = []
    for rslora in (False, True):
        over = {m: math.sqrt(r) if rslora else r for m, (_, r) in scales.items()}
        alphas = {m: alpha_of(s, over[m]) for m, (s, _) in scales.items()}
        exact = all(alphas[m] / over[m] == s for m, (s, _) in scales.items())
        whole = all(type(alpha) is int for alpha in alphas.values())
        ways.append((exact, exact and whole, not rslora, alphas))
    _, _, plain, alphas = max(ways, key=lambda way: way[:3])
    return alphas, not plain


def alpha_of(scale: float, over: float) -> float:
    """The alpha with alpha / over = scale to the last bit, a whole one if possible; else the nearest."""
    near = scale * over
    candidates = (round(near), near, math.nextafter(near, 0), math.nextafter(near, math.inf))
    return next((alpha for alpha in candidates if alpha / over == scale), near)
