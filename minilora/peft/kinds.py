"""How each kind of adapter is stored in a PEFT folder: a new kind adds a row here.

Every kind has lora_A.weight (r, I) and lora_B.weight (O, r), or lora_embedding_A and _B for an embedding.
LoRA itself has nothing more. A row says what else a kind has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from ..layers import Adapter, Param
from ..lora import LowRank
from ..methods.dora import DoRA
from ..methods.embedding import LowRankEmbedding


@dataclass(frozen=True)
class Kind:
    """A kind of adapter for linear maps, with one vector (O,) beside its factors."""

    adapter: type
    flag: str  # the field of adapter_config.json that is true where every module is of this kind
    vector: str  # the tensor's name in the file, after that of the module
    field: str  # the adapter's Param that holds it
    build: Callable[[LowRank, Param], Adapter]
    besides: str  # its effect beyond ΔW = s B A, in words


KINDS = [
    Kind(
        DoRA, "use_dora", "lora_magnitude_vector", "magnitude", lambda pair, m: DoRA(pair, m, detach=True),
        "its magnitudes also scale the rows of W + ΔW",
    ),
]  # fmt: skip


def vectors() -> list[str]:
    """The names of the vectors in all rows."""
    return [kind.vector for kind in KINDS]


def of_adapter(adapter: Any) -> Kind | None:
    """The row of an adapter, None for LoRA itself; UnsupportedError if there is no row for it."""
    kind = next((kind for kind in KINDS if type(adapter) is kind.adapter), None)
    if not kind and not isinstance(adapter, LowRank | LowRankEmbedding):
        raise UnsupportedError(f"{type(adapter).__name__} cannot be stored in PEFT's files (peft/kinds.py)")
    return kind


def of_vectors(present: Mapping[str, str], where: str) -> Kind | None:
    """The row of a module that has these vectors, None if it has none; UnsupportedError for two or others."""
    kinds = [kind for kind in KINDS if kind.vector in present]
    if others := sorted(present.keys() - {*vectors()}):
        raise UnsupportedError(f"{where}: has a {others[0]}, which no adapter here has; `merge` applies it")
    if len(kinds) > 1:
        raise UnsupportedError(f"{where}: has {' and '.join(k.vector for k in kinds)}; expected one of them")
    return kinds[0] if kinds else None
