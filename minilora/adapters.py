"""Several adapters over one base: take one away, turn all off, scale them.

`set_adapter` (lora.py) chooses the active one. The base is shared and never written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ConfigError, MismatchError, StateError, nearest
from .layers import Pair
from .lora import active, adapted, known, unmerged
from .tree import replace


@contextlib.contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Within the context the model computes what its base computes, bit for bit."""
    layers = adapted(model).values()
    before = [(layer.active, layer.merged) for layer in layers]
    for layer in layers:
        layer.active = layer.merged = None
    try:
        yield
    finally:
        for layer, (active, merged) in zip(layers, before, strict=True):
            layer.active, layer.merged = active, merged


def scales(model: Any) -> dict[str, float]:
    """Path -> s of the active low-rank adapters."""
    return {path: pair.scale for path, pair in pairs(model).items()}


def pairs(model: Any) -> dict[str, Pair]:
    """Path -> factors of the active low-rank adapters."""
    return {path: pair for path, adapter in active(model).items() if (pair := adapter.low_rank)}


def set_scale(model: Any, scale: float | Mapping[str, float]) -> None:
    """Set s of the active low-rank adapters: one number, or path -> number as `scales` returns it.

    MismatchError for a path without such an adapter, ConfigError for a number that is not finite, StateError
    while the model is merged, or if no active adapter has a scale.
    """
    factors = pairs(model)
    if not factors:
        raise StateError("no active adapter has a scale; expected a low-rank one")
    new = scale if isinstance(scale, Mapping) else dict.fromkeys(factors, scale)
    for path, s in new.items():
        if path not in factors:
            raise MismatchError(f"{path!r} has no active low-rank adapter; {nearest(path, factors)}")
        if type(s) not in (int, float) or not math.isfinite(s):
            raise ConfigError(f"scale of {path} is {s!r}; expected a finite number")
    unmerged(model)
    for path, s in new.items():
        factors[path].scale = float(s)


def remove(model: Any, name: str) -> None:
    """Remove an adapter; a layer with none left becomes the plain base layer again.

    MismatchError if no adapter has that name, StateError while the model is merged.
    """
    for path, layer in known(model, name).items():
        layer.adapters.pop(name, None)
        layer.active = None if layer.active == name else layer.active
        if not layer.adapters:
            replace(model, path, layer.base)
