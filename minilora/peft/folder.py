"""LoRA adapters in PEFT's form: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.MODULE.lora_A.weight (r, I)   .lora_B.weight (O, r)   s = alpha / r of the config

A file of another tool (lora_files/) is opened as the folder that would mean the same.
Reading is lenient: the file counts, ranks come from the shapes, and a note says where the config disagrees.
Loading (loading.py) is strict. An adapter of any architecture can be opened; only its header is read until a
matrix is needed. No pickle is ever opened, and no regular expression from a file can take long.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, MismatchError, NonFiniteError, UnsupportedError, nearest, short
from ..formats.atomic import write_atomic, write_folder
from ..formats.safetensors import Tensors, layout, open_tensors, sealed, stored
from ..lora_files import contents
from ..lora_files.contents import PREFIX as PREFIX
from ..lora_files.contents import Contents
from ..lora_files.grammar import WRAPPERS
from ..lora_files.opening import read_contents
from ..lora_files.recognise import CONFIG, PEFT, WEIGHTS, recognised, whose
from ..table import counted
from ..targets import LAYER
from .config import (
    NAME,
    Settings,
    alphas_of,
    check_targets,
    chosen,
    meant,
    named,
    peft_config,
    read_settings,
    settings_of,
)
from .kinds import KINDS, vectors
from .patterns import starts

PATTERNS = "rank_pattern", "alpha_pattern"
BEFORE = re.compile(r"((_forward_module|module|model)\.)*(base_model\.model\.)+")  # module: DDP, DeepSpeed
FACTORS, OF_TABLE = (contents.A, contents.B), (contents.TABLE_A, contents.TABLE_B)
INPUTS = contents.INPUTS
COPY, BIAS = "base_layer.weight", "base_layer.bias"
ADDED = {  # tensors that act beside B A, and the config's field for each
    "lora_B.bias": "lora_bias", "token_adapter.trainable_tokens_delta": "trainable_token_indices",
}  # fmt: skip
PARTS = (*FACTORS, *OF_TABLE, COPY, BIAS, *ADDED)  # of an adapted module, besides the vectors of its kind
OF_LORA = re.compile(r"(?<![^.])(lora_|(base_layer|token_adapter|dora_scale)(?![^.]))")  # in no base's names
TABLES = ("embed_tokens.weight", "lm_head.weight")  # PEFT adds them unasked if the vocabulary was resized


def key_form() -> re.Pattern[str]:
    """The pattern of a tensor's name: the module, then which of its tensors it is."""
    bare = "|".join(map(re.escape, [*OF_TABLE, *vectors(), "token_adapter.trainable_tokens_delta"]))
    return re.compile(
        r"(?P<module>.+?)\.(?:"
        r"(?P<linear>lora_[AB])(?:\.(?P<name>[^.]+))?(?P<end>\.weight|\.bias)|"
        rf"(?P<bare>{bare})(?:\.(?P<its>(?!weight$)[^.]+))?(?:\.weight)?|"
        r"(?P<copy>base_layer\.(?:weight|bias)))"
    )


@dataclass(frozen=True)
class Pair:
    """The factors of one module, by tensor name, and what they mean: ΔW = s B A, (O, I)."""

    A: str
    B: str
    shape: tuple[int, int]  # (O, I); of an embedding (D, V), as in A and B
    r: int
    alpha: float
    scale: float
    embedding: bool = False
    vectors: Mapping[str, str] = field(default_factory=dict)  # further ones: of its kind (kinds.py), INPUTS
    bias: str | None = None  # replaces the base's
    copy: str | None = None  # the base's own weight, which PEFT adds for embedding and head


@dataclass(frozen=True, eq=False)
class Adapter:
    """An opened adapter folder: its config and its tensors, by PEFT's names, whatever the file calls them."""

    where: Path  # its folder, or another tool's file
    settings: Settings  # its config; that of another tool's file is made here
    pairs: Mapping[str, Pair]  # by module
    replaced: Mapping[str, str]  # parameter of the base -> the tensor that replaces it
    tensors: Tensors
    notes: tuple[str, ...] = ()  # unusual, but accepted
    doubts: tuple[str, ...] = ()  # where config and file disagree: shown on reading, refused on loading
    unread: tuple[str, ...] = ()  # those of them that say what of the file is not in B A, or in another order
    made: Mapping[str, str] = field(default_factory=dict)  # minilora's own: base (its fingerprint), sha256

    @property
    def by_inputs(self) -> list[str]:
        """The modules with a magnitude of each input, which PEFT's form cannot hold."""
        return [module for module, pair in self.pairs.items() if INPUTS in pair.vectors]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """All notes to show when the adapter is only inspected."""
        beside = (f"{field}: acts beside B A and is not in the numbers" for field in self.settings.beside)
        return (*self.notes, *beside, *self.doubts)

    def value(self, tensor: str) -> np.ndarray:
        """A tensor of the file, or NonFiniteError."""
        a = self.tensors[tensor]
        if bad := int(a.size - np.isfinite(a).sum()):
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(a))[0])
            what = f"{bad} values that are not finite, the first at {at}"
            raise NonFiniteError(f"{self.where}: {tensor} has {what}")
        return a

    def factors(self, module: str, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
        """A (r, I) and B (O, r), a convolution's as matrices; NonFiniteError if |ΔW| overflows `dtype`."""
        pair = self.pairs[module]
        A, B = self.value(pair.A).reshape(pair.r, -1), self.value(pair.B).reshape(-1, pair.r)
        most, (O, I) = float(np.finfo(dtype).max), pair.shape  # noqa: E741
        bound = abs(pair.scale) * pair.r * math.sqrt(O * I) * largest(A) * largest(B)  # takes less time
        if not (bound <= most or change_norm(A, B, pair.scale) <= most):
            what = f"is not finite in {np.dtype(dtype)}: its factors are too large"
            raise NonFiniteError(f"{self.where}: the ΔW of {module} {what}")
        return A, B


# ---- reading


def open_adapter(
    path: Path | str,
    *,
    alpha: float | None = None,
    r: int | None = None,
    heads: tuple[int, int] | None = None,
) -> Adapter:
    """Open a LoRA, PEFT's folder or any tool's file: what it holds, and where it contradicts itself.

    `alpha` and `r` are for files without them (PEFT's without its config, torchtune's, loralib's). `heads`,
    the base's numbers of query and key heads, bring the rows of q and k in llama.cpp's and torchtune's files
    into Hugging Face's order. Numbers are read now only for a scale, or a digest in minilora's own files.
    StorageError, FormatError, ConfigError, UnsupportedError or MismatchError name file and field or tensor.
    """
    form, where = recognised(path)
    if form == PEFT:
        return of_folder(where)
    return of_contents(where, read_contents(form, where, alpha, r, heads))


def of_contents(where: Path, given: Contents) -> Adapter:
    """The contents of another tool's file as the PEFT folder that would mean the same."""
    tensors, parts = given.tensors, dict[str, dict[str, str]]()
    known = (*PARTS, *vectors(), INPUTS)
    for name in tensors:
        kind = next(kind for kind in known if name.endswith(f".{kind}"))
        module = name.removesuffix(f".{kind}")
        if not NAME.fullmatch(module):
            raise MismatchError(f"{tensors.where}: {short(module)} cannot be the name of a module")
        parts.setdefault(module, {})[kind] = PREFIX + name
    ranks = {m: rank_of(tensors, m) for m in parts}
    scales = {m: given.alphas[m] / ranks[m] for m in parts if m in given.alphas}
    for component, fields in given.configs.items():
        start = f"{component}." if component else ""
        inside = {m.removeprefix(start): m for m in parts if m.startswith(start) and m not in scales}
        settings, _ = settings_of({"peft_type": "LORA", **fields}, f"{tensors.where}: its header")
        alphas = chosen(settings, "alpha_pattern", list(inside)).values
        for name, module in inside.items():
            scales[module] = settings.scale(alphas.get(name, settings.lora_alpha), ranks[module])
    for module, scale in scales.items():
        if not 0 < scale * ranks[module] < math.inf:  # which is its alpha
            what = f"the scale of {module} is {short(scale)}; expected one with a finite alpha above 0"
            raise ConfigError(f"{tensors.where}: {what}")
    alphas, rslora = alphas_of({m: (scales.get(m, 1.0), r) for m, r in ranks.items()})
    config = peft_config({m: (r, alphas[m]) for m, r in ranks.items()}, sorted(parts), rslora)
    config |= {kind.flag: any(kind.vector in part for part in parts.values()) for kind in KINDS}
    config["base_model_name_or_path"] = given.base
    if not all(module.startswith(("model.", "lm_head")) for module in parts):
        config["task_type"] = None  # PEFT asks a language model for what others lack
    settings, _ = settings_of(config, str(where))
    tensors = tensors.renamed({PREFIX + name: name for name in tensors})
    pairs, replaced = read_parts(tensors, settings, parts)
    adapter = Adapter(where, settings, pairs, replaced, tensors)
    doubts = (*given.doubts, *disagreements(adapter, ()))
    notes = (*given.notes, *peculiar(adapter))
    return replace(adapter, notes=notes, doubts=doubts, unread=given.doubts)


def rank_of(tensors: Tensors, module: str) -> int:
    """r by the shape of A; 1 where there is no A, which is an error elsewhere."""
    shape = tensors.shapes.get(f"{module}.{FACTORS[0]}") or tensors.shapes.get(f"{module}.{OF_TABLE[0]}")
    return max(shape[0], 1) if shape else 1


def of_folder(folder: Path) -> Adapter:
    """The adapter in a PEFT folder."""
    settings, notes = read_settings(folder / CONFIG)
    tensors = open_tensors(folder / WEIGHTS)
    entry = tensors.metadata.get("minilora", "{}")
    try:
        made = {k: v for k, v in json.loads(entry).items() if isinstance(v, str)}
    except (ValueError, AttributeError, RecursionError) as e:
        raise MismatchError(f"{tensors.where}: its metadata is damaged: minilora is {short(entry)}") from e
    if "sha256" in made and made["sha256"] != sealed(tensors):
        raise MismatchError(f"{tensors.where}: is damaged: its sha256 differs from the one in its metadata")
    keys, parts, strange, odd = sort_out(tensors)
    known = tensors.renamed(keys)
    pairs, replaced = read_parts(known, settings, parts)
    if not pairs:
        what = whose(tensors) or f"expected those of {short(settings.target_modules)}"
        raise MismatchError(f"{tensors.where}: has no lora_A and lora_B; {what}")
    adapter = Adapter(folder, settings, pairs, replaced, known, made=made)
    return replace(
        adapter, notes=(*notes, *odd, *peculiar(adapter)), doubts=tuple(disagreements(adapter, strange))
    )


def sort_out(tensors: Tensors) -> tuple[dict[str, str], dict[str, dict[str, str]], list[str], list[str]]:
    """PEFT's name -> key in the file; module -> kind of tensor -> PEFT's name; unknown keys; notes.

    Wrappers used in training (torch.compile, DDP, FSDP, DeepSpeed) leave their names in the keys, and so can
    the adapter's name. Two keys for one tensor are a MismatchError, and so are two adapters.
    """
    keys: dict[str, str] = {}
    parts: dict[str, dict[str, str]] = {}
    strange: list[str] = []
    first: dict[str, str] = {}  # note -> the first key that it is about
    names: dict[str, str] = {}  # of adapters
    form, of_module = key_form(), (*PARTS, *vectors())
    for key in sorted(tensors):
        plain = WRAPPERS.sub("", key)
        bare = BEFORE.sub("", plain, count=1) if (before := BEFORE.match(plain)) else plain
        match = form.fullmatch(bare)
        part = (match["bare"] or match["copy"] or match["linear"] + match["end"]) if match else ""
        module = match["module"] if match else bare.rpartition(".")[0]
        sensible = part in of_module if match else not OF_LORA.search(bare)
        if not (sensible and module and NAME.fullmatch(bare)):
            strange.append(key)
            continue
        name = f"{PREFIX}{module}.{part}" if match else PREFIX + bare
        if name in keys:
            raise MismatchError(f"{tensors.where}: {keys[name]} and {key} are the same tensor, {name}")
        keys[name] = key
        parts.setdefault(module, {})[part or bare.rpartition(".")[2]] = name
        if not before:
            first.setdefault(f"names do not begin with {PREFIX}", key)
        elif before[0] != PREFIX or plain != key:
            first.setdefault("names contain names of wrappers", key)
        if label := match and (match["name"] or match["its"]):
            names.setdefault(label, key)
            first.setdefault("names contain the adapter's name", key)
    if len(names) > 1:
        (one, key), (other, second), *_ = names.items()
        what = f"{short(one)} and {short(other)}, as in {key} and {second}"
        raise MismatchError(f"{tensors.where}: holds the adapters {what}; expected one")
    return keys, parts, strange, [f"{note}, as in {key}" for note, key in first.items()]


def read_parts(
    tensors: Tensors, settings: Settings, parts: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Pair], dict[str, str]]:
    """The pairs by module, and parameter of the base -> the tensor that replaces it."""
    pairs: dict[str, Pair] = {}
    replaced: dict[str, str] = {}
    alphas = chosen(settings, "alpha_pattern", list(parts)).values
    of_module = (*PARTS, *vectors(), INPUTS)
    for module, part in parts.items():
        replaced |= {f"{module}.{kind}": name for kind, name in part.items() if kind not in of_module}
        added = part.keys() & {*of_module}
        if added == {BIAS} and f"{module}.bias" not in replaced:
            replaced[f"{module}.bias"] = part[BIAS]
        elif added - {*ADDED}:
            alpha = alphas.get(module, settings.lora_alpha)
            pairs[module] = pair_up(tensors, settings, module, part, alpha)
    return pairs, replaced


def pair_up(tensors: Tensors, settings: Settings, module: str, part: Mapping[str, str], alpha: float) -> Pair:
    """One module's pair; MismatchError if a factor is missing or their shapes do not fit."""
    at = f"{tensors.where}: {module}"
    embedding = any(half in part for half in OF_TABLE)
    a, b = OF_TABLE if embedding else FACTORS
    for half, other in ((a, b), (b, a)):
        if half not in part:
            there = part.get(other) or next(iter(part.values()))
            raise MismatchError(f"{at} has no {half.removesuffix('.weight')}; there is {there}")
    if embedding and any(half in part for half in FACTORS):
        raise MismatchError(f"{at} has factors of a linear map and of an embedding")
    rows, columns = tensors.shapes[part[a]], tensors.shapes[part[b]]
    if 0 in (*rows, *columns):
        raise MismatchError(
            f"{at} has empty factors, lora_A {rows} and lora_B {columns}; DeepSpeed (ZeRO-3) writes such if "
            "weights are not gathered before saving"
        )
    ones = (1,) * (len(rows) - 2)  # the further axes of a convolution's B
    if len(rows) not in ((2,) if embedding else (2, 3, 4, 5)) or columns != (*columns[:1], rows[0], *ones):
        raise MismatchError(f"{at} has lora_A {rows} and lora_B {columns}; expected (r, I) and (O, r)")
    r, shape = rows[0], (columns[0], math.prod(rows[1:]))
    for name in (part.get(kind) for kind in (*vectors(), BIAS, "lora_B.bias")):
        if name and math.prod(size := tensors.shapes[name]) != columns[0]:
            raise MismatchError(f"{tensors.where}: {name} has shape {size}; expected ({columns[0]},)")
    if INPUTS in part and math.prod(size := tensors.shapes[part[INPUTS]]) != rows[1]:
        raise MismatchError(f"{tensors.where}: {part[INPUTS]} has shape {size}; expected ({rows[1]},)")
    beside = {name: part[name] for name in (*vectors(), INPUTS) if name in part}
    scale = settings.scale(alpha, r)
    return Pair(part[a], part[b], shape, r, alpha, scale, embedding, beside, part.get(BIAS), part.get(COPY))


def peculiar(adapter: Adapter) -> list[str]:
    """Notes on what is unusual but accepted, each once with an example."""
    settings = adapter.settings
    first: dict[str, str] = {}
    for module, pair in adapter.pairs.items():
        if pair.r > min(pair.shape):
            first.setdefault(f"r = {pair.r} is larger than its module's largest possible rank", module)
    for name in PATTERNS:
        values = chosen(settings, name, list(adapter.pairs))
        for module in values.contested:
            first.setdefault(f"keys of {name} disagree and the first one counts", module)
        for key in values.idle:
            first.setdefault(f"{name} has keys that match no module of the file", short(key))
    numbers = {int(match[1]) for m in adapter.pairs if (match := LAYER.match(m))}
    for idle in sorted({*(settings.layers_to_transform or ())} - numbers):
        first.setdefault("layers_to_transform has layers that the file lacks", short(idle))
    tables, _ = unlisted(adapter)
    for parameter in tables:
        first.setdefault("has whole tables, which PEFT saves if the vocabulary was resized", parameter)
    notes = [f"{note}, as in {example}" for note, example in first.items()]
    if beside := [name for name in adapter.tensors if name.endswith(tuple(ADDED))]:
        what = counted(len(beside), "tensor acts", "tensors act")
        notes.append(f"{what} beside B A, not in the numbers: {beside[0]}")
    return notes


def disagreements(adapter: Adapter, strange: Sequence[str]) -> Iterator[str]:
    """Where config and file disagree, as far as it shows without a base or a pattern of targets."""
    settings, pairs = adapter.settings, adapter.pairs
    _, others = unlisted(adapter)
    if strange:
        what = counted(len(strange), "tensor is", "tensors are")
        yield f"{what} not of a LoRA, the first {ascii(strange[0])[:200]}"
    if others:
        what = counted(len(others), "tensor is", "tensors are")
        yield f"{what} not of a LoRA with this config, the first {others[0]}"
    if both := [p for p in adapter.replaced if p.rpartition(".")[0] in pairs]:
        yield f"{adapter.replaced[both[0]]} is for a module that has lora_A and lora_B"
    about: dict[str, list[str]] = {}
    ranks = chosen(settings, "rank_pattern", list(pairs)).values
    for module, pair in pairs.items():
        for kind, text in about_pair(adapter, module, pair, ranks.get(module, settings.r)):
            about.setdefault(kind, []).append(text)
    for texts in about.values():
        yield texts[0] + (f"; and {len(texts) - 1} more" if texts[1:] else "")
    if surprises := unmentioned(adapter):
        name, flag = next(iter(surprises.items()))
        yield f"has {name}, which the config does not mention: {flag} is off"
    for entry in settings.modules_to_save:
        if not any(saves(entry, name) for name in adapter.replaced):
            yield f"has no tensor for modules_to_save {short(entry)}"
    yield from about_targets(adapter)


def about_pair(adapter: Adapter, module: str, pair: Pair, r: int) -> Iterator[tuple[str, str]]:
    """(kind, text) of every disagreement on one pair; r is its rank by the config."""
    settings, shapes = adapter.settings, adapter.tensors.shapes
    if pair.r != r:
        what = f"lora_A {shapes[pair.A]} and lora_B {shapes[pair.B]}"
        yield "rank", f"{module} has {what}; expected (r, I) and (O, r) with the config's r = {r}"
    for kind in KINDS:
        present, flag = kind.vector in pair.vectors, kind.flag in settings.flags
        if present != flag:
            yield kind.flag, f"{module} has {'a' if present else 'no'} {kind.vector}; {kind.flag} is {flag}"
    if pair.bias and settings.bias == "none":
        yield "bias", f"has {pair.bias}; expected none with bias 'none'"


def about_targets(adapter: Adapter) -> Iterator[str]:
    """Where a list of target_modules and the file's modules differ; no pattern is run."""
    settings = adapter.settings
    targets, excluded = settings.target_modules, settings.exclude_modules
    if isinstance(targets, str) or isinstance(excluded, str) or not targets:
        return
    modules = list(adapter.pairs)
    agreed = set(meant(settings, modules, modules))
    if extra := [m for m in modules if m not in agreed]:
        yield f"has factors of {extra[0]}, which target_modules {short(targets)} does not match"
    if not excluded and settings.layers_to_transform is None:  # else the base is needed to tell
        saved = [name.rpartition(".")[0] for name in adapter.replaced]  # PEFT saves what is in both lists
        there = {m[start:] for m in [*modules, *saved] for start in starts(m)}
        if idle := [entry for entry in targets if entry not in there]:
            known = {m.rpartition(".")[2] for m in modules}
            more = f" and {len(idle) - 1} more" if idle[1:] else ""
            yield f"has no factors for target_modules {short(idle[0])}{more}; {nearest(idle[0], known)}"


def saves(entry: str, parameter: str) -> bool:
    """Whether an entry of modules_to_save means this parameter of the base."""
    return parameter.rpartition(".")[0].endswith(entry) or f".{entry}." in f".{parameter}"


def licensed(settings: Settings, parameter: str) -> bool:
    """Whether the config lets the file replace a parameter of the base."""
    bias = settings.bias == "all" and parameter.endswith(".bias")
    return bias or any(saves(entry, parameter) for entry in settings.modules_to_save)


def unlisted(adapter: Adapter) -> tuple[list[str], list[str]]:
    """The parameters that the file replaces but the config does not mention: whole tables, and others."""
    names = [parameter for parameter in adapter.replaced if not licensed(adapter.settings, parameter)]
    return [n for n in names if n.endswith(TABLES)], [n for n in names if not n.endswith(TABLES)]


def unmentioned(adapter: Adapter) -> dict[str, str]:
    """Tensors that act beside B A although the config does not say so: tensor -> the field that would."""
    return {
        name: flag
        for name in adapter.tensors
        for end, flag in ADDED.items()
        if name.endswith(end) and not any(field.startswith(flag) for field in adapter.settings.beside)
    }


def check_agreement(adapter: Adapter) -> None:
    """The strict check before loading: any disagreement of config and file is an error.

    UnsupportedError for what acts beside B A; ConfigError or MismatchError names the first disagreement.
    """
    settings, path = adapter.settings, adapter.tensors.where
    if settings.beside:
        raise UnsupportedError(f"{settings.where}: {settings.beside[0]}, which is not supported")
    check_targets(settings)
    linears = [m for m, pair in adapter.pairs.items() if not pair.embedding]
    agreed = set(meant(settings, list(adapter.pairs), linears))
    if len(named(settings, "exclude_modules", list(adapter.pairs))) == len(adapter.pairs):
        excluded = short(settings.exclude_modules)
        raise ConfigError(f"{settings.where}: exclude_modules {excluded} excludes every module")
    if extra := [m for m in adapter.pairs if m not in agreed]:
        what = f"factors of {extra[0]}, which target_modules {short(settings.target_modules)} does not match"
        raise MismatchError(f"{path}: has {what}")
    if adapter.doubts:
        raise MismatchError(f"{path}: {adapter.doubts[0]}")


# ---- the size of a change


def largest(a: np.ndarray) -> float:
    """The largest size of an entry."""
    return max(float(a.max()), -float(a.min()))


def change_norm(A: np.ndarray, B: np.ndarray, scale: float) -> float:
    """|s B A|, Frobenius; inf if it, or B A, overflows float64. No r x r product for a large r.

    |B A|² = tr(BᵀB AAᵀ), with factors scaled to a largest entry of 1, so that no square underflows.
    """
    most_a, most_b = largest(A), largest(B)
    if not most_a or not most_b:
        return 0.0
    a, b = A / np.float64(most_a), B / np.float64(most_b)
    with np.errstate(over="ignore", invalid="ignore"):
        if len(a) > min(len(b), a.shape[1]):  # then B A is no larger than the factors
            size = float(np.linalg.norm(b @ a))
        else:
            size = math.sqrt(max(float(np.sum((b.T @ b) * (a @ a.T))), 0.0))
        return abs(scale) * (most_a * most_b * size)


# ---- writing


def labels(sha256: str, base: str | None) -> dict[str, str]:
    """The metadata of an adapter's file: its digest, and the fingerprints of bases it fits."""
    made = {"sha256": sha256} | ({"base": base} if base else {})
    return {"format": "pt", "minilora": json.dumps(made, sort_keys=True)}


def write_adapter(
    folder: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    base: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter's folder: config, tensors, their digest, and the fingerprints of bases it fits.

    `header` has further strings for the file's. NonFiniteError, StorageError.
    """
    for name, a in tensors.items():
        if not np.isfinite(a).all():
            raise NonFiniteError(f"{name} is not finite; nothing was written")
    tensors = {name: stored(a, dtype) for name, a in tensors.items()}
    metadata = {**(header or {}), **labels(sealed(tensors), base)}

    def fill(temp: Path) -> None:
        write_atomic(temp / CONFIG, (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode())
        write_atomic(temp / WEIGHTS, layout(tensors, dtype, metadata))

    write_folder(folder, fill, overwrite)
