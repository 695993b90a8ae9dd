"""An adapter folder -> a model and back: load_adapter and save_adapter, all or nothing.

Stands in for PeftModel.from_pretrained and save_pretrained; what they can do and this cannot is refused by
name. A tensor without its module, a module without its tensors, a rank that is not the config's, a value that
is not finite and another base are errors that name module and file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import to_device, to_host
from ..errors import MismatchError, NonFiniteError, StateError, UnsupportedError, nearest, short
from ..formats.safetensors import CALLED, stored
from ..layers import Dropout, Embedding, Linear, Pair, Param
from ..lora import LowRank, active, attach, bases, check_apart, check_name, unmerged, untie
from ..methods.bias import WithBias
from ..methods.embedding import LowRankEmbedding
from ..methods.full_copy import FullCopy
from ..model import Llama
from ..table import counted, report
from ..targets import tied, with_head
from ..tree import digest, dtype_of, named_params
from .config import alphas_of, chosen, meant, peft_config, targets
from .folder import (
    PATTERNS,
    PREFIX,
    TABLES,
    Adapter,
    change_norm,
    check_agreement,
    licensed,
    open_adapter,
    unlisted,
    write_adapter,
)
from .kinds import of_adapter, of_vectors


@report
@dataclass(frozen=True)
class Attached:
    """What `load_adapter` did; prints as two lines and the notes."""

    where: str
    norms: Mapping[str, tuple[float, float]]  # module -> |ΔW| and |W|, Frobenius
    modules: int  # how many the model has
    replaced: tuple[str, ...]  # parameters that the file replaces
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """|ΔW| / |W| over all adapted modules together."""
        change, base = (math.fsum(pair[i] ** 2 for pair in self.norms.values()) for i in (0, 1))
        return math.sqrt(change / base) if base else 0.0

    def parts(self) -> list[str]:
        lines = [f"{self.where}: {len(self.norms)} of {self.modules} modules, |ΔW| / |W| = {self.share:.3g}"]
        if self.replaced:
            lines.append(f"replaced: {', '.join(self.replaced)}")
        return [*lines, *(f"note: {note}" for note in self.notes)]


def load_adapter(
    model: Llama,
    source: Adapter | Path | str,
    name: str = "default",
    *,
    force: bool = False,
    rng: np.random.Generator | None = None,
) -> Attached:
    """Attach an adapter, opened or by its path, to a model and make it active; the base is only read.

    All or nothing. Another base is a MismatchError: by the fingerprint in minilora's own files (unless
    `force`), by names and shapes in PEFT's. Other errors as in `open_adapter`, and NonFiniteError. With an
    `rng`, the config's dropout acts in further training. If head and embedding are tied and one of them is
    adapted, the head becomes a separate layer on the same table, as in PEFT.
    """
    shape = model.config
    heads = shape.num_attention_heads, shape.num_key_value_heads
    given = source if isinstance(source, Adapter) else open_adapter(source, heads=heads)
    check_agreement(given)
    check_name(model, name)
    layers, shared = bases(model), tied(model)
    changed = {*given.pairs, *(name.rpartition(".")[0] for name in given.replaced)}
    split = shared and not changed.isdisjoint({"model.embed_tokens", "lm_head"})  # they share one table
    if split:
        layers = with_head(model, layers)
    check_fit(given, layers, shared)
    if not force:
        check_base(given, lambda: base_print(model))
    dtype = dtype_of(model)
    new: dict[str, Any] = {}
    norms, p_drop = {}, given.settings.lora_dropout
    for module, pair in given.pairs.items():
        A, B, norm = factors(given, module, dtype)
        adapter: Any = LowRankEmbedding(A, B, pair.scale)
        if not pair.embedding:
            adapter = LowRank(A, B, pair.scale, Dropout(p_drop, rng) if p_drop and rng else None)
        if row := of_vectors(pair.vectors, f"{given.where}: {module}"):
            adapter = row.build(adapter, param(given, pair.vectors[row.vector], pair.shape[:1], dtype))
        if pair.bias:
            adapter = WithBias(adapter, param(given, pair.bias, pair.shape[:1], dtype))
        new[module] = adapter
        norms[module] = norm, float(np.linalg.norm(to_host(layers[module].weight.dense())))
    for parameter, tensor in given.replaced.items():
        module, _, kind = parameter.rpartition(".")
        p = param(given, tensor, tuple(getattr(layers[module], kind).shape), dtype)
        if kind == "bias" and f"{module}.weight" not in given.replaced:
            new[module] = WithBias(None, p)
        else:
            copy = new.setdefault(module, FullCopy.of(layers[module]))
            setattr(copy.layer, kind, p)
    check_apart(new, unmerged(model))
    if split:
        untie(model)
    attach(model, new, name)
    maps = [layer for layer in layers.values() if isinstance(layer, Linear | Embedding)]
    notes = list(given.notes)
    if given.settings.base and "base" not in given.made:
        notes.append(f"its base is called {short(given.settings.base)}; only names and shapes were compared")
    return Attached(str(given.where), norms, len(maps), tuple(given.replaced), tuple(notes))


def param(given: Adapter, tensor: str, shape: tuple[int, ...], dtype: Any) -> Param:
    """A tensor of the file as a parameter of this shape and dtype; NonFiniteError names it."""
    with np.errstate(over="ignore"):
        a = given.value(tensor).reshape(shape).astype(dtype)
    if not np.isfinite(a).all():
        raise NonFiniteError(f"{given.where}: {tensor} is not finite in {dtype}")
    return Param(to_device(a))


def factors(given: Adapter, module: str, dtype: Any) -> tuple[Param, Param, float]:
    """A (r, I), B (O, r) and |ΔW| of one module; NonFiniteError if any of them is not finite in `dtype`."""
    pair = given.pairs[module]
    (O, I), r = pair.shape, pair.r  # noqa: E741
    A, B = param(given, pair.A, (r, I), dtype), param(given, pair.B, (O, r), dtype)
    norm = change_norm(to_host(A.data), to_host(B.data), pair.scale)
    if not norm <= float(np.finfo(dtype).max):
        raise NonFiniteError(f"{given.where}: the ΔW of {module} is not finite in {dtype}")
    return A, B, norm


def check_base(given: Adapter, fingerprint: Callable[[], str]) -> None:
    """MismatchError unless `fingerprint()` is one of those in the file, if it has any."""
    base = given.made.get("base")
    if base and (own := fingerprint()) not in base.split():
        what = f"fingerprint {base[:12]!a}, this one has {own[:12]!a}"
        raise MismatchError(f"{given.where}: was trained on another base: {what}")


def check_fit(given: Adapter, layers: Mapping[str, Any], shared: bool) -> None:
    """MismatchError or UnsupportedError, naming module and file, unless every tensor fits these layers."""
    path = given.tensors.where
    for module, pair in given.pairs.items():
        layer = layers.get(module)
        if not isinstance(layer, Linear | Embedding):
            hint = "; train adapters of text on the language model only" if "language_model" in module else ""
            raise MismatchError(f"{path}: the base has no module {module}; {nearest(module, layers)}{hint}")
        shape = tuple(layer.weight.shape)
        expected = shape[::-1] if isinstance(layer, Embedding) else shape
        flat = len(given.tensors.shapes[pair.A]) == 2
        if pair.shape != expected or pair.embedding != isinstance(layer, Embedding) or not flat:
            kind = "an embedding" if pair.embedding else "a linear map" if flat else "a convolution"
            what = f"{module} has factors for {kind} of {pair.shape}"
            raise MismatchError(f"{path}: {what}; the base's weight is {shape}")
        if pair.embedding and (row := of_vectors(pair.vectors, f"{path}: {module}")):
            raise UnsupportedError(f"{path}: {module}: {row.flag} on an embedding is not supported")
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
        if (shape := given.tensors.shapes[tensor]) != (own := tuple(p.shape)):
            hint = "; resize the base's vocabulary first" if parameter.endswith(TABLES) else ""
            raise MismatchError(f"{path}: {tensor} has shape {shape}; the base's is {own}{hint}")
    tables, _ = unlisted(given)
    if shared and tables:  # PEFT puts such a table into the base itself, where the two are one
        a, b = (given.value(given.replaced[name]) for name in (tables[0], tables[-1]))
        if len(tables) < 2 or not np.array_equal(a, b):
            raise MismatchError(
                f"{path}: has {tables[0]}; this base ties head and embedding: expected both, and equal"
            )
    replaced = {*given.replaced, *(f"{m}.bias" for m, pair in given.pairs.items() if pair.bias)}
    for name in (f"{m}.{kind}" for m, layer in layers.items() for kind in named_params(layer)):
        module, _, kind = name.rpartition(".")
        biased = kind == "bias" and given.settings.bias == "lora_only" and module in given.pairs
        if name not in replaced and (biased or licensed(given.settings, name)):
            raise MismatchError(f"{path}: has no tensor for {name}, which its config asks for")
    modules = list(dict.fromkeys([*layers, "lm_head"]))  # a tied head can be adapted, too
    for name in PATTERNS:
        for key in chosen(given.settings, name, modules).idle:
            what = f"{name} has {short(key)}, which matches no module of the base; {nearest(key, modules)}"
            raise MismatchError(f"{given.settings.where}: {what}")
    linears = [m for m, layer in layers.items() if isinstance(layer, Linear)]
    if missing := [m for m in meant(given.settings, modules, linears) if m not in given.pairs]:
        what = counted(len(missing), "module", "modules")
        raise MismatchError(f"{path}: has no factors for {what} of the config, the first {missing[0]}")


def check_copy(given: Adapter, tensor: str, W: np.ndarray) -> None:
    """MismatchError unless the base's weight that PEFT put into the file is this base's, in any dtype."""
    if (shape := given.tensors.shapes[tensor]) != W.shape:
        raise MismatchError(f"{given.where}: {tensor} has shape {shape}; the base's is {W.shape}")
    copy = given.value(tensor)  # which may have been narrower before it was compressed
    if not any(np.array_equal(copy, stored(W, kind)) for kind in CALLED):
        raise MismatchError(f"{given.where}: {tensor} is not the base's weight: this is another base")


def base_print(model: Any) -> str:
    """The fingerprint of the base of a model beneath all adapters; a shared parameter counts once."""
    return digest(bases(model), np.float32)  # as huggingface.fingerprint, with one weight decoded at a time


def save_adapter(
    model: Llama,
    folder: Path | str,
    *,
    base: str | None = None,
    quantized_from: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Write the active adapter as a PEFT folder, whole or not at all; the same adapter gives the same bytes.

    `base` goes into the config as base_model_name_or_path, the base's fingerprint into the file. For a base
    that was quantized, `quantized_from` is the fingerprint of the float one: with it the adapter loads beside
    either. An adapted embedding with a tied head becomes two pairs, since PEFT leaves the head unchanged.
    StorageError if the folder exists, unless `overwrite`; StateError if no adapter is active; NonFiniteError;
    UnsupportedError for an adapter that PEFT's files cannot hold.
    """
    adapters = active(model)
    if not adapters:
        raise StateError("no adapter is active; set_adapter() chooses one")
    layers, shared = bases(model), tied(model)
    low: dict[str, Pair] = {}
    tensors: dict[str, Any] = {}
    saved, biased, kinds, dropout = [], [], {}, 0.0
    for module, adapter in adapters.items():
        at = PREFIX + module
        if isinstance(adapter, WithBias):
            biased.append(adapter.adapter)
            tensors[f"{at}.base_layer.bias" if adapter.adapter else f"{at}.bias"] = adapter.bias.data
        inner = adapter.adapter if isinstance(adapter, WithBias) else adapter
        if isinstance(inner, FullCopy):
            saved.append(module)
            tensors |= {f"{at}.{name}": p.data for name, p in named_params(inner.layer).items()}
            if shared and module == "model.embed_tokens":
                saved.append("lm_head")
                tensors[f"{PREFIX}lm_head.weight"] = inner.layer.weight.data
        elif inner is not None:
            kinds[module] = kind = of_adapter(inner)
            if kind:
                tensors[f"{at}.{kind.vector}"] = getattr(inner, kind.field).data
            pair: Any = inner.low_rank
            low[module] = pair
            if isinstance(pair, LowRank):
                tensors |= {f"{at}.lora_A.weight": pair.A.data, f"{at}.lora_B.weight": pair.B.data}
                dropout = pair.dropout.p if pair.dropout else dropout
            else:
                tensors |= {f"{at}.lora_embedding_A": pair.A.data, f"{at}.lora_embedding_B": pair.B.data}
                if shared:  # ΔE = s (B A)ᵀ is s Aᵀ Bᵀ for the head
                    tensors[f"{PREFIX}lm_head.lora_A.weight"] = pair.B.data.T
                    tensors[f"{PREFIX}lm_head.lora_B.weight"] = pair.A.data.T
                    low["lm_head"] = pair
    if len(set(kinds.values())) > 1:
        one, other, *_ = sorted({kind.adapter.__name__ if kind else "LowRank" for kind in kinds.values()})
        raise UnsupportedError(f"some adapters are {one} and others {other}; a PEFT folder holds one kind")
    if not low:
        raise UnsupportedError("the adapter has no low-rank part; a PEFT folder needs at least one")
    alphas, rslora = alphas_of({m: (pair.scale, len(pair.A.data)) for m, pair in low.items()})
    sizes = {m: (len(pair.A.data), alphas[m]) for m, pair in low.items()}
    config = peft_config(sizes, targets([*{*layers, *low}], set(low)), rslora)
    config |= {
        "base_model_name_or_path": base,
        "bias": "none" if not biased else "lora_only" if all(biased) else "all",
        "lora_dropout": dropout,
        "modules_to_save": sorted(saved) or None,
    }
    config |= {kind.flag: True for kind in kinds.values() if kind}
    host = {name: to_host(a) for name, a in tensors.items()}
    fingerprints = " ".join(filter(None, (quantized_from, base_print(model))))
    write_adapter(folder, config, host, fingerprints, dtype, overwrite)
