"""What to adapt with LoRA and its kin, and how: every option of PEFT's LoraConfig that is here.

    s = alpha / r, or alpha / sqrt(r) with `rslora` (Kalajdzievski 2023)

A starts as U(-1/sqrt(I), 1/sqrt(I)) and B at zero, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..backend import normal, uniform, xp
from ..errors import ConfigError, check_float, check_int, nearest, short
from ..layers import Adapter, Dropout, Embedding, Linear, Param
from ..lora import LowRank
from ..table import settings
from ..targets import check_targets, find_targets, names, pick, resolve
from .bias import WithBias
from .dora import DoRA, row_norms
from .embedding import LowRankEmbedding
from .full_copy import FullCopy

BIASES = ("none", "lora_only", "all")
INITS = ("kaiming", "gaussian", "both")
PEFT = {  # PEFT's name -> ours
    "target_modules": "targets", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora",
    "use_dora": "dora", "init_lora_weights": "init ('kaiming' is PEFT's True)",
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt, and how. Every entry of `targets` and the like must match something.

    A name matches a module whose path is that name or ends with "." and that name. s = alpha / r, or
    alpha / sqrt(r) with `rslora` (Kalajdzievski 2023). Exclusions win over targets.
    """

    r: int = 8
    alpha: float = 16
    targets: str | re.Pattern[str] | Sequence[str] = "all-linear"  # all but lm_head; a compiled regex
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # name -> r where it differs
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: Sequence[str] = ()
    layers_to_transform: Sequence[int] | None = None  # of the targets, only those in these layers
    bias: str = "none"  # "lora_only": the biases of the targets are trained too; "all": all biases
    modules_to_save: Sequence[str] = ()  # trained in full beside LoRA: norms, embedding, head
    rslora: bool = False
    dropout: float = 0.0  # on the input of A; an embedding's lookup has none
    init: str = "kaiming"  # A ~ U(-1/sqrt(I), 1/sqrt(I)); "gaussian" N(0, 1/r²); "both": B random too
    dora: bool = False
    detach: bool = False  # DoRA's norm is a constant in the backward

    def __new__(cls, *args: Any, **options: Any) -> LoraConfig:
        """ConfigError for PEFT's name of an option, with ours."""
        for name in options:
            if name in PEFT:
                raise ConfigError(f"{name} is PEFT's name; expected {PEFT[name]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_int("r", self.r, 1)
        check_float("alpha", self.alpha, 0, math.inf, open_low=True)
        check_float("dropout", self.dropout, 0, 1)
        for what in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, what), Mapping):
                raise ConfigError(f"{what} is {getattr(self, what)!r}; expected a mapping from names")
        for name, r in self.rank_pattern.items():
            check_int(f"rank_pattern[{name!r}]", r, 1)
        for name, alpha in self.alpha_pattern.items():
            check_float(f"alpha_pattern[{name!r}]", alpha, 0, math.inf, open_low=True)
        for flag in ("rslora", "dora", "detach"):
            if type(getattr(self, flag)) is not bool:
                raise ConfigError(f"{flag} is {getattr(self, flag)!r}; expected True or False")
        if self.init not in INITS:
            raise ConfigError(f"init is {self.init!r}; {nearest(str(self.init), INITS)}")
        if self.dora and self.dropout:
            raise ConfigError(f"dropout is {self.dropout}; expected 0 with dora, which takes none")
        check_targets(self.targets)
        names("modules_to_save", self.modules_to_save)
        names("exclude_modules", self.exclude_modules)
        if self.bias not in BIASES:
            raise ConfigError(f"bias is {short(self.bias)}; {nearest(str(self.bias), BIASES)}")
        if self.layers_to_transform is not None:
            if not isinstance(self.layers_to_transform, list | tuple | range) or not self.layers_to_transform:
                numbers = short(self.layers_to_transform)
                raise ConfigError(f"layers_to_transform is {numbers}; expected a list of layer numbers")
            for number in self.layers_to_transform:
                check_int("layers_to_transform", number, 0)

    def _repr_html_(self) -> str:
        return settings(self).html()

    def fresh(self, layers: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Adapter]:
        """Path -> a fresh adapter for every target, then for modules saved in full and for other biases.

        ConfigError or MismatchError for a rank that does not fit, or a name that matches nothing.
        """
        saved = names("modules_to_save", self.modules_to_save)
        targets = find_targets(
            layers,
            self.targets,
            exclude=names("exclude_modules", self.exclude_modules),
            numbers=self.layers_to_transform,
            saved=saved,
        )
        copies = resolve("modules_to_save", saved, list(layers))
        if both := sorted(set(targets) & set(copies)):
            raise ConfigError(f"{both[0]} is in targets and in modules_to_save; expected one of the two")
        for what in ("rank_pattern", "alpha_pattern"):
            resolve(what, list(getattr(self, what)), targets)
        new: dict[str, Adapter] = {path: self.low_rank(path, layers[path], rng) for path in targets}
        for path, base in layers.items():
            biased = self.bias == "all" or (self.bias == "lora_only" and path in new)
            if path in copies:
                new[path] = FullCopy.of(base)
            elif biased and isinstance(base, Linear) and base.bias is not None:
                new[path] = WithBias(new.get(path), Param(base.bias.data.copy()))
        return new

    def low_rank(self, path: str, base: Any, rng: np.random.Generator) -> Adapter:
        """A fresh low-rank adapter for one layer: LoRA, or DoRA if `dora` is set."""
        r, alpha = pick(path, self.rank_pattern, self.r), pick(path, self.alpha_pattern, self.alpha)
        W = base.weight
        O, I = W.shape if isinstance(base, Linear) else W.shape[::-1]  # noqa: E741
        if r > min(O, I):
            raise ConfigError(f"r is {r} for {path} of shape {W.shape}; expected at most {min(O, I)}")
        if self.dora and isinstance(base, Embedding):
            raise ConfigError(f"dora is for linear maps; {path} is an embedding")
        scale = alpha / (math.sqrt(r) if self.rslora else r)

        def draw(shape: tuple[int, int], kind: str) -> Param:
            if kind == "zero":
                return Param(xp.zeros(shape, W.dtype))
            if kind == "kaiming":
                return Param(uniform(rng, shape, 1 / math.sqrt(shape[1]), W.dtype))
            return Param(normal(rng, shape, 1.0 if kind == "unit" else 1 / r, W.dtype))

        if isinstance(base, Embedding):
            A = draw((r, I), "gaussian" if self.init == "both" else "zero")
            return LowRankEmbedding(A, draw((O, r), "unit"), scale)
        A = draw((r, I), "gaussian" if self.init == "both" else self.init)
        B = draw((O, r), "gaussian" if self.init == "both" else "zero")
        adapter = LowRank(A, B, scale, Dropout(self.dropout, rng) if self.dropout else None)
        return DoRA(adapter, Param(row_norms(W.dense())), self.detach) if self.dora else adapter
