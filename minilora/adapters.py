"""LoRA adapters in PEFT's form: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.MODULE.lora_A.weight (r, I)   .lora_B.weight (O, r)   s = alpha / r of the config

Reading is strict where PEFT is not: a tensor without its module, a module without its tensors, a rank that
is not the config's, a value that is not finite and another base are errors, each with the name of module
and file. An adapter of any architecture can be opened; only its header is read until a matrix is asked
for. Stands in for PeftModel.from_pretrained and save_pretrained; what they can do and this cannot is
refused by name. No pickle is ever opened, and no regular expression of a file is run that could hang.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .adapter_config import (
    NAME,
    Settings,
    alphas_of,
    chosen,
    contested,
    meant,
    named,
    peft_config,
    read_settings,
    targets,
)
from .backend import to_device, to_host
from .errors import (
    ConfigError,
    MismatchError,
    NonFiniteError,
    StateError,
    StorageError,
    UnsupportedError,
    nearest,
    short,
)
from .files import fingerprint
from .layers import Dropout, Embedding, Linear, Param, named_params
from .lora import (
    LAYER,
    Adapted,
    DoRA,
    LowRank,
    LowRankEmbedding,
    Replacement,
    WithBias,
    adapted,
    attach,
    base_of,
    matches,
    open_for,
    sites,
    unbiased,
)
from .model import Llama
from .shown import told
from .storage import exists, write_atomic, write_folder
from .tensors import CALLED, Tensors, layout, open_tensors, sealed, stored

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_(?P<linear>[AB])(?P<d1>\.default)?\.weight|lora_embedding_(?P<table>[AB])(?P<d2>\.default)?|"
    r"(?P<magnitude>lora_magnitude_vector)(?P<d3>\.default\.weight)?|"
    r"base_layer\.(?P<copy>weight|bias)|(?P<own>weight|bias))"
)


@dataclass(frozen=True)
class Pair:
    """Where the factors of one module lie in the file, and what they mean: ΔW = s B A, (O, I)."""

    A: str
    B: str
    shape: tuple[int, int]  # (O, I); of an embedding (D, V), as A and B have it
    r: int
    alpha: float
    scale: float
    embedding: bool = False
    magnitude: str | None = None  # DoRA's
    bias: str | None = None  # in the place of the base's
    copy: str | None = None  # the base's own weight, which PEFT adds for embedding and head


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter's folder: its config, and where the factors of each module lie."""

    where: Path
    settings: Settings
    pairs: Mapping[str, Pair]  # by module
    replaced: Mapping[str, str]  # parameter of the base -> the tensor in its place
    tensors: Tensors
    notes: tuple[str, ...] = ()  # what is unusual and was accepted
    made: Mapping[str, str] = field(default_factory=dict)  # minilora's own: base (its fingerprint), sha256

    def value(self, tensor: str) -> np.ndarray:
        """A tensor of the file, or NonFiniteError."""
        a = self.tensors[tensor]
        if bad := int(a.size - np.isfinite(a).sum()):
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(a))[0])
            raise NonFiniteError(
                f"{self.where}: {tensor} has {bad} values that are not finite, the first at {at}"
            )
        return a

    def factors(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A (r, I) and B (O, r) of a module; those of a convolution as matrices."""
        pair = self.pairs[module]
        A, B = self.value(pair.A), self.value(pair.B)
        return A.reshape(pair.r, -1), B.reshape(-1, pair.r)


# ---- reading


def open_adapter(folder: Path | str) -> Adapter:
    """The adapter in a folder: config, names and shapes of the tensors, checked against each other.

    Numbers are read now only to compare the digest that minilora's own files carry.
    StorageError, FormatError, ConfigError, UnsupportedError or MismatchError name file and field or tensor.
    """
    folder = Path(folder)
    if not exists(folder / CONFIG) and folder.is_dir():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; there is one in {short(inside[0])}" if inside else ""
        raise StorageError(f"{folder / CONFIG}: is missing{hint}")
    settings, notes = read_settings(folder / CONFIG)
    if not exists(folder / WEIGHTS) and exists(folder / "adapter_model.bin"):
        raise UnsupportedError(
            f"{folder}: has adapter_model.bin only: a pickle runs code and is never opened"
        )
    tensors = open_tensors(folder / WEIGHTS)
    pairs, replaced, more = sort_out(folder / WEIGHTS, settings, tensors)
    said = tensors.metadata.get("minilora", "{}")
    try:
        made = {k: v for k, v in json.loads(said).items() if isinstance(v, str)}
    except (ValueError, AttributeError, RecursionError) as e:
        raise MismatchError(f"{folder / WEIGHTS}: its metadata is damaged: minilora is {short(said)}") from e
    found = Adapter(folder, settings, pairs, replaced, tensors, (*notes, *more), made)
    if "sha256" in made and made["sha256"] != sealed(tensors):
        raise MismatchError(
            f"{folder / WEIGHTS}: its numbers are not those that were written: sha256 differs"
        )
    return found


def sort_out(
    path: Path, settings: Settings, tensors: Tensors
) -> tuple[dict[str, Pair], dict[str, str], list[str]]:
    """The pairs by module, the replaced parameters, and notes, from the names and shapes of all tensors."""
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    first: dict[str, str] = {}  # note -> the first key that it is about
    strange = []
    for key in sorted(tensors):
        found = KEY.fullmatch(key.removeprefix(PREFIX))
        if not found or not NAME.fullmatch(module := found["module"]):
            strange.append(key)
            continue
        if not key.startswith(PREFIX):
            first.setdefault(f"names do not begin with {PREFIX}", key)
        if found["d1"] or found["d2"] or found["d3"]:
            first.setdefault("names hold that of the adapter", key)
        if found["own"]:
            name = f"{module}.{found['own']}"
            if name in replaced or not licensed(settings, module, found["own"]):
                strange.append(key)
            replaced[name] = key
            continue
        half = found["linear"] or found["table"]
        part = (
            ("e" if found["table"] else "") + half if half else found["magnitude"] or f"base.{found['copy']}"
        )
        if part in parts.setdefault(module, {}):
            strange.append(key)  # the same twice, with and without prefix
        parts[module][part] = key
    if strange:
        hint = "; train text adapters on the language model alone" if "language_model" in strange[0] else ""
        raise MismatchError(
            f"{path}: {len(strange)} tensors are not those of a LoRA with this config, the first "
            f"{ascii(strange[0])[:200]}{hint}"
        )
    pairs = {}
    for module, part in parts.items():
        if set(part) <= {"base.bias"} and settings.bias == "all" and f"{module}.bias" not in replaced:
            replaced[f"{module}.bias"] = part["base.bias"]
            continue
        pairs[module] = pair_up(path, settings, module, part, tensors)
    if not pairs:
        given = short(settings.target_modules)
        raise MismatchError(f"{path}: has no lora_A and lora_B; expected those of {given}")
    if twice := [key for name, key in replaced.items() if name.rpartition(".")[0] in pairs]:
        raise MismatchError(f"{path}: {twice[0]} is for a module that has lora_A and lora_B")
    check_modules(path, settings, pairs, replaced)
    for module, pair in pairs.items():
        if pair.r > min(pair.shape):
            first.setdefault(f"r = {pair.r} is larger than the rank that a module can have", module)
        for name in ("rank_pattern", "alpha_pattern"):
            if contested(getattr(settings, name), module):
                first.setdefault(f"keys of {name} disagree and the first one counts", module)
    numbers = {int(found[1]) for m in pairs if (found := LAYER.match(m))}
    for idle in sorted({*(settings.layers_to_transform or ())} - numbers):
        first.setdefault("layers_to_transform has layers that the file has not", short(idle))
    return pairs, replaced, [f"{note}, as in {key}" for note, key in first.items()]


def licensed(settings: Settings, module: str, kind: str) -> bool:
    """Whether the config lets the file replace a parameter of the base."""
    saved = any(module.endswith(entry) or f".{entry}." in f".{module}." for entry in settings.modules_to_save)
    return saved or (kind == "bias" and settings.bias == "all")


def pair_up(path: Path, settings: Settings, module: str, part: Mapping[str, str], tensors: Tensors) -> Pair:
    """One module's pair, whose shapes are those of the config's rank; MismatchError if not."""
    embedding = "eA" in part or "eB" in part
    a, b = ("eA", "eB") if embedding else ("A", "B")
    for half, other in ((a, b), (b, a)):
        if half not in part:
            given = part.get(other) or next(iter(part.values()))
            raise MismatchError(f"{path}: {module} has no lora_{half[-1]}; there is {given}")
    if embedding and ("A" in part or "B" in part):
        raise MismatchError(f"{path}: {module} has factors of a linear map and of an embedding")
    A, B = tensors.shapes[part[a]], tensors.shapes[part[b]]
    r = chosen(settings.rank_pattern, module, settings.r)
    flat = len(A) == len(B) == 2
    convolution = not embedding and len(A) == len(B) and len(A) in (3, 4, 5) and set(B[2:]) == {1}
    if not flat and not convolution:
        raise MismatchError(f"{path}: {module} has factors of shapes {A} and {B}; expected (r, I) and (O, r)")
    if A[0] != r or B[1] != r:
        what = f"lora_A {A} and lora_B {B}"
        raise MismatchError(
            f"{path}: {module} has {what}; expected (r, I) and (O, r) with the config's r = {r}"
        )
    magnitude = part.get("lora_magnitude_vector")
    if bool(magnitude) != settings.use_dora:
        state = "has a lora_magnitude_vector" if magnitude else "has no lora_magnitude_vector"
        raise MismatchError(f"{path}: {module} {state}; use_dora is {settings.use_dora}")
    if magnitude and math.prod(tensors.shapes[magnitude]) != B[0]:
        raise MismatchError(f"{path}: {magnitude} has shape {tensors.shapes[magnitude]}; expected ({B[0]},)")
    bias = part.get("base.bias")
    if bias and (settings.bias == "none" or tensors.shapes[bias] != (B[0],)):
        found = f"{bias} of shape {tensors.shapes[bias]}"
        raise MismatchError(f"{path}: has {found}; expected ({B[0]},), and none with bias 'none'")
    alpha, scale = settings.scale(module, r)
    shape = (B[0], math.prod(A[1:]))
    return Pair(part[a], part[b], shape, r, alpha, scale, embedding, magnitude, bias, part.get("base.weight"))


def check_modules(
    path: Path, settings: Settings, pairs: Mapping[str, Pair], replaced: Mapping[str, str]
) -> None:
    """Config and file agree on the modules, as far as that can be told without the base."""
    linears = [m for m, pair in pairs.items() if not pair.embedding]
    agreed = set(meant(settings, list(pairs), linears))
    if all(named(settings.exclude_modules, m) for m in pairs):
        given = short(settings.exclude_modules)
        raise ConfigError(f"{path.with_name(CONFIG)}: exclude_modules {given} leaves none of the modules")
    if extra := [m for m in pairs if m not in agreed]:
        given = short(settings.target_modules)
        raise MismatchError(f"{path}: has factors of {extra[0]}, which target_modules {given} does not mean")
    targets = settings.target_modules
    left_out = settings.exclude_modules or settings.layers_to_transform is not None
    if not isinstance(targets, str) and not left_out:  # else the base is needed to tell
        saved = [name.rpartition(".")[0] for name in replaced]  # PEFT saves what is in both lists
        for entry in targets:
            if not any(matches(entry, m) for m in [*pairs, *saved]):
                known = {m.rpartition(".")[2] for m in pairs}
                raise MismatchError(
                    f"{path}: has no factors for target_modules {short(entry)}; {nearest(entry, known)}"
                )
    for entry in settings.modules_to_save:
        if not any(
            name.rpartition(".")[0].endswith(entry) or f".{entry}." in f".{name}" for name in replaced
        ):
            raise MismatchError(f"{path}: has no tensor for modules_to_save {short(entry)}")


# ---- beside a model


@dataclass(frozen=True)
class Attached:
    """What `load_adapter` did; prints as two lines and the notes."""

    where: str
    norms: Mapping[str, tuple[float, float]]  # module -> |ΔW| and |W|, Frobenius
    modules: int  # that the model has
    replaced: tuple[str, ...]  # parameters in whose place the file has others
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """|ΔW| / |W| over all adapted modules together."""
        change, base = (math.fsum(pair[i] ** 2 for pair in self.norms.values()) for i in (0, 1))
        return math.sqrt(change / base) if base else 0.0

    def __str__(self) -> str:
        lines = [f"{self.where}: {len(self.norms)} of {self.modules} modules, |ΔW| / |W| = {self.share:.3g}"]
        if self.replaced:
            lines.append(f"replaced: {', '.join(self.replaced)}")
        return told(*lines, *(f"note: {note}" for note in self.notes))


def load_adapter(
    model: Llama,
    folder: Path | str,
    name: str = "default",
    *,
    force: bool = False,
    rng: np.random.Generator | None = None,
) -> Attached:
    """Put the adapter in a folder beside a model, active; the base is only read.

    All or nothing. Another base (by the fingerprint in minilora's own files, unless `force`; by names and
    shapes in PEFT's) is a MismatchError; further errors as `open_adapter`, and NonFiniteError. With an
    `rng` the config's dropout acts when training goes on. Where the head is tied and one of the two is
    adapted, the head becomes a layer of its own on the same table, as in PEFT.
    """
    given = open_adapter(folder)
    layers = open_for(model, name)
    head = None
    if model.lm_head is None and touches_tied(given):
        if isinstance(layers["model.embed_tokens"], Adapted):
            raise StateError("the head is tied to an embedding that has adapters; load into a fresh model")
        layers["lm_head"] = head = Linear(layers["model.embed_tokens"].weight)
    check_fit(given, {path: base_of(layer) for path, layer in layers.items()}, model.lm_head is None)
    if given.made.get("base") and not force and given.made["base"] != (found := base_print(model)):
        raise MismatchError(
            f"{given.where}: was trained beside another base: fingerprint {given.made['base'][:12]!a}, this "
            f"one has {found[:12]!a}"
        )
    dtype = next(iter(named_params(model).values())).dense().dtype

    def param(tensor: str, shape: tuple[int, ...]) -> Param:
        with np.errstate(over="ignore"):
            a = given.value(tensor).reshape(shape).astype(dtype)
        if not np.isfinite(a).all():
            raise NonFiniteError(f"{given.where}: {tensor} is not finite in {dtype}")
        return Param(to_device(a))

    new: dict[str, Any] = {}
    norms = {}
    for module, pair in given.pairs.items():
        (O, I), r = pair.shape, pair.r  # noqa: E741
        A, B = param(pair.A, (r, I)), param(pair.B, (O, r))
        adapter: Any = LowRankEmbedding(A, B, pair.scale)
        if not pair.embedding:
            drop = given.settings.lora_dropout if rng else 0
            adapter = LowRank(A, B, pair.scale, Dropout(drop, rng) if drop and rng else None)
        if pair.magnitude:
            adapter = DoRA(adapter, param(pair.magnitude, (O,)), detach=True)
        if pair.bias:
            adapter = WithBias(adapter, param(pair.bias, (O,)))
        new[module] = adapter
        W = to_host(base_of(layers[module]).weight.dense())
        norms[module] = change_norm(to_host(A.data), to_host(B.data), pair.scale), float(np.linalg.norm(W))
        if not norms[module][0] <= float(np.finfo(dtype).max):
            raise NonFiniteError(f"{given.where}: the ΔW of {module} is not finite in {dtype}")
    for parameter, tensor in given.replaced.items():
        module, _, kind = parameter.rpartition(".")
        base = base_of(layers[module])
        p = param(tensor, tuple(getattr(base, kind).data.shape))
        if kind == "bias" and f"{module}.weight" not in given.replaced:
            new[module] = WithBias(None, p)
        else:
            copy = new.setdefault(module, Replacement(deepcopy(base)))
            setattr(copy.layer, kind, p)
    if head:
        model.lm_head = head
    attach(model, new, name)
    places = [layer for layer in map(base_of, layers.values()) if isinstance(layer, Linear | Embedding)]
    notes = list(given.notes)
    if given.settings.base and not given.made.get("base"):
        notes.append(f"its base is called {short(given.settings.base)}; only names and shapes were compared")
    return Attached(str(given.where), norms, len(places), tuple(given.replaced), tuple(notes))


def touches_tied(given: Adapter) -> bool:
    """Whether an adapter changes the embedding's table or the head, which a tied model has in common."""
    modules = {*given.pairs, *(name.rpartition(".")[0] for name in given.replaced)}
    return bool(modules & {"model.embed_tokens", "lm_head"})


def check_fit(given: Adapter, layers: Mapping[str, Any], tied: bool) -> None:
    """MismatchError, naming module and file, unless every tensor has its place in these layers."""
    path = given.where / WEIGHTS
    for module, pair in given.pairs.items():
        layer = layers.get(module)
        if not isinstance(layer, Linear | Embedding):
            raise MismatchError(f"{path}: the base has no module {module}; {nearest(module, layers)}")
        shape = tuple(layer.weight.dense().shape)
        wanted = shape[::-1] if isinstance(layer, Embedding) else shape
        flat = len(given.tensors.shapes[pair.A]) == 2
        if pair.shape != wanted or pair.embedding != isinstance(layer, Embedding) or not flat:
            kind = "an embedding" if pair.embedding else "a linear map" if flat else "a convolution"
            raise MismatchError(
                f"{path}: {module} has factors for {kind} of {pair.shape}; the base's weight is {shape}"
            )
        if pair.embedding and pair.magnitude:
            raise UnsupportedError(f"{path}: {module}: use_dora on an embedding is not done here")
        if pair.bias and getattr(layer, "bias", None) is None:
            raise MismatchError(f"{path}: the base has no parameter {module}.bias")
        if pair.copy:
            check_copy(given, pair.copy, to_host(layer.weight.dense()))
    if given.settings.fan_in_fan_out:
        raise UnsupportedError(f"{path}: fan_in_fan_out is true; a Llama has no transposed weights")
    for parameter, tensor in given.replaced.items():
        module, _, kind = parameter.rpartition(".")
        p = getattr(layers.get(module), kind, None) if kind in ("weight", "bias") else None
        if not isinstance(p, Param):
            known = [f"{m}.{k}" for m, layer in layers.items() for k in named_params(layer)]
            raise MismatchError(f"{path}: the base has no parameter {parameter}; {nearest(parameter, known)}")
        if (found := given.tensors.shapes[tensor]) != tuple(p.data.shape):
            raise MismatchError(f"{path}: {tensor} has shape {found}; the base's is {tuple(p.data.shape)}")
    own = {*given.replaced, *(f"{m}.bias" for m, pair in given.pairs.items() if pair.bias)}
    for name in (f"{m}.{kind}" for m, layer in layers.items() for kind in named_params(layer)):
        module, _, kind = name.rpartition(".")
        biased = kind == "bias" and given.settings.bias == "lora_only" and module in given.pairs
        if name not in own and (biased or licensed(given.settings, module, kind)):
            raise MismatchError(f"{path}: has no tensor for {name}, which the config means to be in it")
    linears = [m for m, layer in layers.items() if isinstance(layer, Linear)]
    wanted_modules = meant(given.settings, [*layers, *(["lm_head"] if tied else [])], linears)
    if missing := [m for m in dict.fromkeys(wanted_modules) if m not in given.pairs]:
        raise MismatchError(
            f"{path}: has no factors for {len(missing)} modules that the config means, the first {missing[0]}"
        )


def check_copy(given: Adapter, tensor: str, W: np.ndarray) -> None:
    """MismatchError unless the base's weight that PEFT added to the file is this base's, in any dtype."""
    if given.tensors.shapes[tensor] != W.shape:
        raise MismatchError(
            f"{given.where}: {tensor} has shape {given.tensors.shapes[tensor]}; the base's is {W.shape}"
        )
    found = given.value(tensor)  # which may have been narrower before it was compressed
    if not any(np.array_equal(found, stored(W, kind)) for kind in CALLED):
        raise MismatchError(f"{given.where}: {tensor} is not the base's weight: this is another base")


def change_norm(A: np.ndarray, B: np.ndarray, scale: float) -> float:
    """|s B A|, Frobenius, from the r x r products: |ΔW|² = s² tr(BᵀB AAᵀ)."""
    A, B = A.astype(np.float64), B.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.sum((B.T @ B) * (A @ A.T)))
        return abs(scale) * math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.inf


def base_tensors(model: Any) -> dict[str, np.ndarray]:
    """The parameters of the base beneath all adapters, by their names in a checkpoint; a shared one once."""
    found: dict[int, tuple[str, Any]] = {}
    for path, layer in sites(model):
        for kind, p in named_params(base_of(layer)).items():
            found.setdefault(id(p), (f"{path}.{kind}", p.dense()))
    return dict(found.values())


def base_print(model: Any) -> str:
    """The fingerprint of the base of a model."""
    return fingerprint(base_tensors(model))


# ---- writing


def save_adapter(
    model: Llama,
    folder: Path | str,
    *,
    base: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Write the active adapter as a PEFT folder, complete or not at all, with the same bytes always.

    `base` goes into the config as base_model_name_or_path, the fingerprint of the base into the file. An
    adapted embedding with a tied head becomes two pairs, for in PEFT the head stays what it was. StorageError
    if the folder exists, unless `overwrite`; UnsupportedError for what PEFT has no form for.
    """
    active = {m: layer.adapters[layer.active] for m, layer in adapted(model).items() if layer.active}
    if not active:
        raise StateError("no adapter is active; set_adapter() chooses one")
    layers = {path: base_of(layer) for path, layer in sites(model)}
    low, tensors, saved, dropout = {}, {}, [], 0.0
    for module, adapter in active.items():
        inner, bias = unbiased(adapter), adapter.bias if isinstance(adapter, WithBias) else None
        at = PREFIX + module
        if bias is not None:
            tensors[f"{at}.base_layer.bias" if inner else f"{at}.bias"] = bias.data
        if isinstance(inner, Replacement):
            saved.append(module)
            tensors |= {f"{at}.{kind}": p.data for kind, p in named_params(inner.layer).items()}
            if module == "model.embed_tokens" and model.lm_head is None:
                saved.append("lm_head")
                tensors[f"{PREFIX}lm_head.weight"] = inner.layer.weight.data
            continue
        factors = inner.low_rank if isinstance(inner, DoRA) else inner
        if isinstance(inner, DoRA):
            tensors[f"{at}.lora_magnitude_vector"] = inner.magnitude.data
        if isinstance(factors, LowRank):
            tensors |= {f"{at}.lora_A.weight": factors.A.data, f"{at}.lora_B.weight": factors.B.data}
            dropout = factors.dropout.p if factors.dropout else dropout
        elif factors is not None:
            tensors |= {f"{at}.lora_embedding_A": factors.A.data, f"{at}.lora_embedding_B": factors.B.data}
            if model.lm_head is None:  # ΔE = s (B A)ᵀ is s Aᵀ Bᵀ for the head
                tensors[f"{PREFIX}lm_head.lora_A.weight"] = factors.B.data.T
                tensors[f"{PREFIX}lm_head.lora_B.weight"] = factors.A.data.T
                low["lm_head"] = factors
        if factors is not None:
            low[module] = factors
    doras = [isinstance(unbiased(adapter), DoRA) for m, adapter in active.items() if m in low]
    if any(doras) and not all(doras):
        raise UnsupportedError("some modules have DoRA and others not; PEFT's use_dora is for all or none")
    if not low:
        raise UnsupportedError("the adapter has no low-rank part; PEFT has no LoRA without one")
    alone = any(isinstance(a, WithBias) and a.adapter is None for a in active.values())
    both = any(isinstance(a, WithBias) for a in active.values())
    alphas, rslora = alphas_of({m: (f.scale, len(f.A.data)) for m, f in low.items()})
    config = peft_config(
        {m: (len(f.A.data), alphas[m]) for m, f in low.items()},
        targets([*layers, *(["lm_head"] if "lm_head" in low else [])], set(low)),
        rslora,
    ) | {
        "base_model_name_or_path": base,
        "bias": "all" if alone else "lora_only" if both else "none",
        "lora_dropout": dropout,
        "modules_to_save": sorted(saved) or None,
        "use_dora": any(doras),
    }
    host = {name: to_host(a) for name, a in tensors.items()}
    write_adapter(folder, config, host, base_print(model), dtype, overwrite)


def write_adapter(
    folder: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    base: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Write config and tensors as an adapter's folder, with digest and the fingerprint of the base."""
    for name, a in tensors.items():
        if not np.isfinite(a).all():
            raise NonFiniteError(f"{name} is not finite; nothing was written")
    tensors = {name: stored(a, dtype) for name, a in tensors.items()}
    made = {"sha256": sealed(tensors)} | ({"base": base} if base else {})
    metadata = {"format": "pt", "minilora": json.dumps(made, sort_keys=True)}

    def fill(temp: Path) -> None:
        write_atomic(temp / CONFIG, (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode())
        write_atomic(temp / WEIGHTS, layout(tensors, dtype, metadata))

    write_folder(folder, fill, overwrite)
