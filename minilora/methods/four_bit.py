"""A weight in 4 bits: codes of 16 values, and a scale for each block of them (QLoRA, Dettmers et al. 2023).

    ŵ = q[code] c,   c = max |w| over a block of 64 weights,   code: the nearest of the 16 values q to w / c

NF4's values are quantiles of the normal distribution, so that weights like Gaussian noise use all of them.
Two codes share a byte, the first in its upper half. Double quantization stores the scales in 8 bits, after
their mean is taken off, in blocks of 256. With G the largest gap between two values and c in float32,
|w - ŵ| <= c (G / 2 + 4 u).

Stands in for bitsandbytes' functional.py, with its numbers. Theirs multiplies by 1 / c where this divides, so
a code may differ where w / c is within rounding of the middle between two values. Leaves out kernels that
compute with codes: a product decodes its weight, and drops it again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ..backend import Array, on_host, quiet_overflow, take_into, to_device, to_host, xp
from ..errors import InputError, NonFiniteError, StateError, nearest, short
from ..layers import Param

BLOCKS = tuple(1 << n for n in range(5, 13))  # sizes of a block, 32 to 4096: those of bitsandbytes
SCALES = 256  # scales in a block of double quantization
CHUNK = 1 << 16  # weights that are encoded or decoded at once: what fits a core's cache
U = 2.0**-24  # unit roundoff of float32, in which codes and scales are computed


# ---- the values that codes stand for


def spaced(start: float, stop: float, count: int) -> np.ndarray:
    """`count` numbers from start to stop in float32, each half from its own end, as torch.linspace rounds."""
    a, b, i = np.float32(start), np.float32(stop), np.arange(count)
    step = float((b - a) / np.float32(count - 1))  # a float32, so step * i is exact in float64
    return np.where(i < count // 2, float(a) + step * i, float(b) - step * i[::-1]).astype(np.float32)


def normal_floats() -> np.ndarray:
    """NF4: quantiles of N(0, 1), 7 below zero, zero, and 8 above, scaled to [-1, 1].

    They are evenly spaced in probability between 1/2 and 1 - (1/30 + 1/32) / 2 on either side. The paper's
    equation 4 gives other values, the first of them infinite; these are the published ones, bit for bit.
    """

    def quantiles(count: int) -> np.ndarray:
        points = spaced(0.9677083, 0.5, count + 1)[:-1].tolist()
        return np.array([NormalDist().inv_cdf(p) for p in points], np.float32)

    values = np.sort(np.concatenate([-quantiles(7), np.zeros(1, np.float32), quantiles(8)]))
    return values / values.max()


def small_floats() -> np.ndarray:
    """FP4 with 2 bits of exponent and 1 of mantissa, in bitsandbytes' order: the upper half is negative."""
    positive = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    return np.concatenate([positive, np.float32(0) - positive])  # zero twice, and not -0


def dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' 8-bit "dynamic" numbers, sorted: seven decades, finer towards 1."""
    values = [np.array([0, 1], np.float32)]
    for i in range(7):
        edges = spaced(0.1, 1, (1 << i) + 1)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


BOOKS: dict[str, Callable[[], np.ndarray]] = {
    "nf4": normal_floats,
    "fp4": small_floats,
    "int4": lambda: np.arange(-7, 8, dtype=np.float32) / np.float32(7),  # symmetric: 15 steps
    "int4-affine": lambda: np.arange(16, dtype=np.float32) / np.float32(15),  # from a block's least value up
}


def middles(values: np.ndarray) -> np.ndarray:
    """The middles between neighbours."""
    return (values[1:] + values[:-1]) / np.float32(2)


def unwritten(a: Array) -> Array:
    """The same array, read-only if it is NumPy's; CuPy has no such flag."""
    if isinstance(a, np.ndarray):
        a.flags.writeable = False
    return a


@functools.cache
def book(kind: str) -> np.ndarray:
    """The values of the codes of a kind, float32, at most 16."""
    return unwritten(BOOKS[kind]())


@functools.cache
def steps(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The middles between neighbouring values, and the code of each value, from the least value up."""
    values, codes = np.unique(book(kind), return_index=True)
    return unwritten(middles(values)), unwritten(codes.astype(np.uint8))


def gap(kind: str) -> float:
    """G: the largest gap between neighbouring values."""
    return float(np.diff(np.unique(book(kind)).astype(np.float64)).max())


@functools.cache
def pairs(kind: str, library: Any) -> Array:
    """The two values of each byte of codes, as one item of 8 bytes: (256,), on the device of that library."""
    values = np.zeros(16, np.float32)
    values[: len(book(kind))] = book(kind)
    both = np.stack([values.repeat(16), np.tile(values, 16)], 1)
    return unwritten(to_device(np.ascontiguousarray(both).view(np.uint64).reshape(256)))


@functools.cache
def scale_values(library: Any) -> Array:
    """`dynamic_map` on the device of that library."""
    return unwritten(to_device(dynamic_map()))


# ---- blocks of codes


@dataclass(frozen=True, eq=False)
class Scales:
    """One scale for each block in 8 bits: c = map[code] c' + offset, c' for each SCALES of them."""

    codes: Array  # (blocks,) uint8
    absmax: Array  # c', float32
    offset: Array  # the mean of all scales, float32, ()
    values: Array  # the map, (256,) float32: `dynamic_map`, or a file's own that rounds it otherwise

    def decoded(self) -> Array:
        """The scales (blocks,)."""
        q = self.values[self.codes.astype(xp.int64)]
        return q * xp.repeat(self.absmax, SCALES)[: len(q)] + self.offset


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight's codes and scales, its shape and dtype; arrays are never written, and copies share them."""

    codes: Array  # uint8, (ceil(size / 2),)
    absmax: Array | Scales  # c of each block: float32, (blocks,)
    shape: tuple[int, ...]
    dtype: Any
    kind: str = "nf4"
    block: int = 64
    least: Array | None = None  # the least value of each block where codes count from it

    def __deepcopy__(self, memo: dict[int, Any]) -> Blocks:
        return self

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All that is stored, but for the values that the kind fixes."""
        scales = self.absmax
        parts = (scales.codes, scales.absmax, scales.offset) if isinstance(scales, Scales) else (scales,)
        return (self.codes, *parts, *(() if self.least is None else (self.least,)))

    @property
    def nbytes(self) -> int:
        """The bytes that are stored."""
        return sum(a.nbytes for a in self.arrays)

    def scales(self) -> Array:
        """The scale c of each block, (blocks,) float32."""
        return self.absmax.decoded() if isinstance(self.absmax, Scales) else self.absmax


class FourBit(Param):
    """A frozen weight of 4-bit codes in the place of a Param; `dense` decodes it anew each time.

    Adapters train beside it. Training it, or storing an array in it, is a StateError.
    """

    __slots__ = ()
    packed = True

    def __init__(self, data: Blocks) -> None:
        super().__init__(data, trainable=False)

    def __setattr__(self, name: str, value: Any) -> None:
        trains = (name == "trainable" and value) or (name == "grad" and value is not None)
        if trains or (name == "data" and not isinstance(value, Blocks)):
            what = "trained; train an adapter beside it" if trains else "written; fuse() makes a dense one"
            raise StateError(f"a 4-bit weight cannot be {what}")
        super().__setattr__(name, value)

    def dense(self) -> Array:
        """The weight ŵ, in its own dtype."""
        return decoded(self.data)


def check_form(kind: object, block: object, kinds: Iterable[str] = BOOKS) -> None:
    """InputError unless these are one of the kinds and a size of blocks."""
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"kind is {short(kind)}; {nearest(str(kind), kinds)}")
    if type(block) is not int or block not in BLOCKS:
        raise InputError(f"block is {short(block)}; expected one of {', '.join(map(str, BLOCKS))}")


@quiet_overflow()
def encoded(w: Array, kind: str = "nf4", block: int = 64, double: bool = True) -> Blocks:
    """A weight of any shape as blocks of codes, row by row; the last block may be shorter.

    `double` stores the scales in 8 bits. InputError for kind, block or a weight without numbers;
    NonFiniteError for values that are not finite in float32, where all is computed, or once decoded in the
    weight's dtype.
    """
    check_form(kind, block)
    affine, n = kind == "int4-affine", math.prod(w.shape)
    if not n:
        raise InputError(f"the weight has shape {tuple(w.shape)}; expected at least one number")
    between, codes_of = steps(kind)
    count = -(-n // block)
    codes = xp.zeros(count * block // 2, xp.uint8)
    scale, least = xp.zeros(count, xp.float32), xp.zeros(count, xp.float32) if affine else None
    flat, order = w.reshape(-1), to_device(codes_of)
    ranked = bool((codes_of == np.arange(len(codes_of))).all())  # a code is the rank of its value
    for some in chunks(count, block):
        part = flat[some.start * block : some.stop * block]
        x = xp.zeros((some.stop - some.start) * block, xp.float32)
        x[: len(part)] = part
        if affine:
            x[len(part) :] = part[-1]  # a zero could be the least of its block
        x = x.reshape(-1, block)
        if least is not None:
            least[some] = x.min(1)
            x -= least[some, None]
            scale[some] = x.max(1)
        else:
            scale[some] = xp.abs(x).max(1)
        c = scale[some]
        x /= xp.where(c > 0, c, xp.ones_like(c))[:, None]
        rank = xp.zeros(x.shape, xp.uint8)
        for middle in between.tolist():
            rank += x > middle  # a tie goes down
        code = (rank if ranked else order[rank.astype(xp.int64)]).reshape(-1)
        codes[some.start * block // 2 : some.stop * block // 2] = 16 * code[::2] + code[1::2]
    if not xp.isfinite(scale).all() or (least is not None and not xp.isfinite(least).all()):
        whole = xp.isfinite(w.astype(xp.float32)).all()
        what = "a block whose range is" if whole else "values that are"
        raise NonFiniteError(f"the weight has {what} not finite in float32")
    stored = scales_of(scale) if double else scale
    blocks = Blocks(codes[: (n + 1) // 2], stored, tuple(w.shape), w.dtype, kind, block, least)
    if not finite(blocks):
        raise NonFiniteError(f"the weight has values that in {kind} are not finite in {w.dtype}")
    for a in blocks.arrays:
        unwritten(a)
    return blocks


@quiet_overflow()
def finite(blocks: Blocks) -> bool:
    """Whether all of ŵ is finite in its dtype: |q| <= 1, so the ends of each block's range decide."""
    c, low = blocks.scales(), blocks.least
    ends = [c] if low is None else [low, c + low]
    return all(bool(xp.isfinite(a.astype(blocks.dtype)).all()) for a in ends)


def chunks(count: int, block: int) -> Iterator[slice]:
    """The blocks in slices that fit a cache; on a GPU all at once."""
    step = max(CHUNK // block, 1) if on_host() else max(count, 1)
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def scales_of(scale: Array) -> Scales:
    """Scales in 8 bits, around their mean: double quantization."""
    offset = xp.asarray(scale.mean(dtype=xp.float64), dtype=xp.float32)  # a sum in float32 may overflow
    rest = scale - offset
    padded = xp.zeros(-(-len(rest) // SCALES) * SCALES, xp.float32)
    padded[: len(rest)] = rest
    padded = padded.reshape(-1, SCALES)
    absmax = xp.abs(padded).max(1)
    x = padded / xp.where(absmax > 0, absmax, xp.ones_like(absmax))[:, None]
    between = to_device(middles(dynamic_map()))
    codes = xp.searchsorted(between, x.reshape(-1)[: len(scale)]).astype(xp.uint8)
    return Scales(codes, absmax, offset, scale_values(xp.ndarray))


def decoded(blocks: Blocks) -> Array:
    """The weight ŵ of codes and scales, a new array of its shape and dtype."""
    scale, block, codes = blocks.scales(), blocks.block, blocks.codes
    out = xp.empty(len(scale) * block, xp.float32)
    out[2 * len(codes) :] = 0
    items, table = out.view(xp.uint64), pairs(blocks.kind, xp.ndarray)
    index = xp.empty(CHUNK // 2 if on_host() else 0, xp.intp)
    for some in chunks(len(scale), block):
        two = slice(some.start * block // 2, min(some.stop * block // 2, len(codes)))
        take_into(items[two], table, codes[two], index)
        part = out[some.start * block : some.stop * block].reshape(-1, block)
        part *= scale[some, None]
        if blocks.least is not None:
            part += blocks.least[some, None]
    return out[: blocks.size].reshape(blocks.shape).astype(blocks.dtype, copy=False)


def bound(blocks: Blocks, c: np.ndarray) -> np.ndarray:
    """The largest |w - ŵ| that each block can have, (blocks,) float64; `c` are its scales before 8 bits.

    Of 4 u the division takes two, a middle and the product one each. Added are the change of the scale in 8
    bits, the roundings of a least value, those to and from a dtype that is not float32, and underflow.
    """
    c, own = c.astype(np.float64), to_host(blocks.scales()).astype(np.float64)
    tiny, dtype = float(np.finfo(np.float32).smallest_subnormal), np.finfo(blocks.dtype)
    most, top = c * (gap(blocks.kind) / 2 + 4 * U) + (1 + U) * abs(own - c) + tiny, c
    if blocks.least is not None:  # w - least, its largest and the last sum are rounded, too
        low = to_host(blocks.least).astype(np.float64)
        top = np.maximum(abs(low), abs(low + c))
        most += 3 * U * c + U * top * (1 + U)
    if dtype.bits > 32:
        most += U * top
    if dtype.bits < 32:
        most += float(dtype.eps) / 2 * (top + most) + float(dtype.smallest_subnormal)
    return most
