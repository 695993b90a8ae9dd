"""A model whose linear maps hold 4-bit weights: LoRA on it is QLoRA (Dettmers et al. 2023, equation 5).

    y = x Ŵᵀ + s (x Aᵀ) Bᵀ,   Ŵ = q[code] c decoded for each product, A and B in float

Weights are swapped, not layers: `quantize` puts a FourBit where a Param was, in all that "all-linear" means.
The embedding, lm_head and the norms stay as they are. The gradient passes through Ŵ to x; Ŵ has none.
Stands in for bitsandbytes' Linear4bit and PEFT's prepare_model_for_kbit_training; leaves out bfloat16 and
paging.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..backend import to_host
from ..errors import NonFiniteError, StateError
from ..layers import Param
from ..lora import bases, unmerged
from ..spectra import quotient
from ..table import Table, report
from ..targets import find_targets
from ..tree import named_params
from .four_bit import Blocks, FourBit, bound, check_form, decoded, encoded


@dataclass(frozen=True)
class Row:
    """One weight in 4 bits, and how far it is from what it was."""

    module: str
    shape: tuple[int, ...]
    bits: float  # per weight, counted from the arrays
    error: float  # |W - Ŵ| / |W|, Frobenius
    reached: float  # the largest |w - ŵ| / its bound


@report
@dataclass(frozen=True)
class Quantized:
    """What `quantize` did; prints as a table."""

    kind: str
    block: int
    rows: tuple[Row, ...]
    bits: float  # per weight of the linear maps
    all_bits: float  # per parameter of the whole model
    error: float  # over all linear maps together
    out: str = ""  # the folder, where one was written

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> tuple[Table, str]:
        cells = [
            (w.module, " x ".join(map(str, w.shape)), f"{w.bits:.4f}", f"{w.error:.4f}", f"{w.reached:.4f}")
            for w in self.rows
        ]
        what = f"{self.out}: {self.kind}" if self.out else self.kind
        total = (
            f"{what} in blocks of {self.block}: {self.bits:.4f} bits per weight, error {self.error:.4f}; "
            f"{self.all_bits:.2f} bits per parameter of the whole model"
        )
        return Table(("module", "shape", "bits", "|W - Ŵ|/|W|", "largest |w - ŵ|/bound"), cells), total


def quantize(model: Any, *, kind: str = "nf4", block: int = 64, double: bool = True) -> Quantized:
    """Store the weights of all linear maps but the head in 4 bits, frozen; adapters may stand beside them.

    `kind` is "nf4", "fp4", "int4" (symmetric) or "int4-affine"; the weights in a block share a scale, and
    `block`, their number, is a power of two from 32 to 4096; `double` stores the scales in 8 bits. An error
    leaves the model as it was: InputError for kind or block, StateError if the model is merged or quantized
    already, NonFiniteError names the weight.
    """
    unmerged(model)
    check_form(kind, block)
    layers = bases(model)
    new, rows, lost = {}, [], []
    for path in find_targets(layers, "all-linear"):
        weight: Param = layers[path].weight
        if weight.packed:
            raise StateError(f"{path}.weight is quantized already")
        try:
            new[path] = encoded(weight.dense(), kind, block, double)
        except NonFiniteError as e:
            raise NonFiniteError(f"{path}: {e}; nothing was quantized") from e
        error, size, reached = distances(weight, new[path])
        lost.append((error, size))
        rows.append(Row(path, tuple(weight.shape), bits_of([new[path]]), quotient(error, size), reached))
    for path, blocks in new.items():
        layers[path].weight = FourBit(blocks)
    error, size = np.linalg.norm(lost, axis=0).tolist()
    bits, all_bits = bits_of(new.values()), bits_of(p.data for p in named_params(bases(model)).values())
    return Quantized(kind, block, tuple(rows), bits, all_bits, quotient(error, size))


def distances(weight: Param, blocks: Blocks) -> tuple[float, float, float]:
    """|W - Ŵ| and |W|, Frobenius, and the largest |w - ŵ| relative to its bound."""
    w = to_host(weight.dense()).astype(np.float64).reshape(-1)
    e = abs(w - to_host(decoded(blocks)).astype(np.float64).reshape(-1))
    starts = np.arange(0, len(w), blocks.block)
    if blocks.least is None:
        c = np.maximum.reduceat(abs(w), starts)
    else:
        c = np.maximum.reduceat(w, starts) - np.minimum.reduceat(w, starts)
    reached = np.maximum.reduceat(e, starts) / bound(blocks, c)
    return float(np.linalg.norm(e)), float(np.linalg.norm(w)), float(reached.max())


def bits_of(stored: Iterable[Any]) -> float:
    """Bits per weight of stored arrays and Blocks."""
    sizes = [(8 * a.nbytes, a.size) for a in stored]
    return sum(bits for bits, _ in sizes) / sum(n for _, n in sizes)
