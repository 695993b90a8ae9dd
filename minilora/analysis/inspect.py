"""An adapter -> what it really does, module by module: its spectrum, and what noise would show in its place.

    |ΔW|, singular values s_i, effective rank exp(H(s / sum s)), stable rank |ΔW|² / s_1², rank at 90 and 99 %

With the base: |ΔW| / |W|, how much ΔW amplifies its directions (Hu et al. 2021, section 7.3), intruder
dimensions (Shuttleworth et al. 2024) and the overlap with W's top directions. With a second adapter: their
common subspace, phi. Every number that chance can produce comes with chance's value. Only factors are read,
one module at a time, so any PEFT LoRA of any architecture works. The numbers leave out DoRA's magnitudes,
biases and saved modules; notes say so. Notes also list where config and file, or adapter and base,
disagree: looking at an adapter does not require settling that.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import spectra
from ..backend import Array, cores, one_blas_thread, to_device, to_host
from ..errors import MismatchError, NonFiniteError, UnsupportedError, nearest
from ..formats.huggingface import name_in, transposed, weights
from ..formats.safetensors import Tensors
from ..peft.folder import Adapter, open_adapter
from ..peft.kinds import KINDS
from ..spectra import norm, quotient, rank_at, similarity
from ..table import Table, counted, report
from ..targets import LAYER

if TYPE_CHECKING:
    from .plotting import Picture

FIRST = 10  # singular vectors of W + ΔW checked for intruders
WHOLE = 2048  # all singular vectors of W are computed if its smaller side is at most this


@dataclass(frozen=True)
class Ranks:
    """How many directions a spectrum has, by four measures."""

    effective: float
    stable: float
    at90: int  # singular values that hold 90 % of the energy
    at99: int


@dataclass(frozen=True)
class BesideBase:
    """A ΔW compared with its W."""

    relative: float  # |ΔW| / |W|
    amplification: float
    random_amplification: float  # along random directions
    overlap: float  # phi(k, k) of the first k left singular vectors of ΔW and W, k the true rank of ΔW
    random_overlap: float
    intruders: int | None  # among the first 10 of W + ΔW; None where W is too large to decompose
    cosines: tuple[float, ...]  # max |cos| of each of them with W's
    threshold: float  # below which a vector resembles W no more than 99 % of random ones


@dataclass(frozen=True)
class BesideOther:
    """A ΔW compared with another adapter's of the same module."""

    cosine: float  # <ΔW_1, ΔW_2> / (|ΔW_1| |ΔW_2|)
    inputs: tuple[float, ...]  # phi(i, i) of right singular vectors, up to the lesser true rank
    outputs: tuple[float, ...]  # phi(i, i) of left ones
    random_inputs: tuple[float, ...]
    random_outputs: tuple[float, ...]


@dataclass(frozen=True)
class Module:
    """The numbers of one adapted module."""

    module: str
    kind: str  # the last part of its name
    layer: int | None
    shape: tuple[int, int]  # (O, I)
    r: int
    alpha: float
    scale: float
    norm: float  # |ΔW|, Frobenius
    singular_values: tuple[float, ...]
    ranks: Ranks
    noise: Ranks  # of a product of two Gaussian factors of the same shapes
    base: BesideBase | None = None
    other: BesideOther | None = None


@report
@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; prints as a table."""

    adapter: str
    base: str | None
    against: str | None
    modules: tuple[Module, ...]
    parameters: int
    notes: tuple[str, ...]

    @property
    def norm(self) -> float:
        """|ΔW| over all modules together."""
        return math.hypot(*(m.norm for m in self.modules))

    @property
    def needed(self) -> int:
        """Parameters that would hold 99 % of the energy of each module."""
        return sum(max(m.ranks.at99, 1) * sum(m.shape) for m in self.modules)

    def data(self) -> dict[str, Any]:
        return asdict(self) | {"norm": self.norm, "parameters_at_99": self.needed}

    def parts(self) -> list[str | Table]:
        shown: list[str | Table] = [part for table in tables(self) for part in (table, "")]
        return [*shown, self.summary(), *(f"note: {note}" for note in self.notes)]

    def summary(self) -> str:
        """The whole adapter in one line."""
        r = sum(m.r for m in self.modules)
        at99 = sum(m.ranks.at99 for m in self.modules)
        effective = math.fsum(m.ranks.effective for m in self.modules)
        noise = math.fsum(m.noise.effective for m in self.modules)
        what = counted(len(self.modules), "module", "modules")
        return (
            f"{self.adapter}: {what}, {self.parameters:,} parameters, |ΔW| {self.norm:.4g}; "
            f"of {r} ranks {effective:.0f} are effective (noise: {noise:.0f}), {at99} "
            f"hold 99 % of each module's energy, in {self.needed / self.parameters:.0%} of the parameters"
        )


def inspect(
    adapter: Path | str,
    base: Path | str | None = None,
    against: Path | str | None = None,
    *,
    whole: int = WHOLE,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure an adapter's folder, also `against` another and a `base` (any checkpoint with its modules).

    Modules that the base lacks, or has in another shape, are noted and not compared; at least one must match.
    Memory: the factors of one module per core; with a base, the factors and the weight of one module.
    Intruders are computed if the smaller side of the weight is at most `whole`. StorageError, FormatError,
    ConfigError, UnsupportedError, MismatchError or NonFiniteError name file and module.
    """
    given = open_adapter(adapter)
    other = None if against is None else open_adapter(against)
    tensors = None if base is None else weights(base)
    places = {} if tensors is None else placed(given, tensors)
    common = given.pairs.keys() & other.pairs.keys() if other else set()
    if other and not common:
        near = nearest(next(iter(given.pairs)), other.pairs)
        raise MismatchError(f"{against}: adapts no module of {adapter}; {near}")
    modules = []

    def one(name: str) -> Module:
        W = weight_of(tensors, *places[name]) if tensors is not None and name in places else None
        return look(given, name, W, other if name in common else None, whole)

    with contextlib.ExitStack() as stack:  # a thin QR is too small for BLAS threads
        several = base is None and stack.enter_context(one_blas_thread())
        threads = cores() if several else 1
        each = stack.enter_context(ThreadPoolExecutor(threads)).map if threads > 1 else map
        for module in each(one, given.pairs):
            modules.append(module)
            if progress:
                progress(len(modules), len(given.pairs))
    notes = [*given.all_notes, *(tensors.notes if tensors else ())]
    for kind in KINDS:
        if kind.flag in given.settings.flags:
            notes.append(f"{kind.adapter.__name__}: the numbers are those of B A alone; {kind.besides}")
    if replaced := len(given.replaced) + sum(pair.bias is not None for pair in given.pairs.values()):
        what = counted(replaced, "parameter is", "parameters are")
        notes.append(f"{what} replaced in full, not in the numbers")
    if other:
        if alone := given.pairs.keys() ^ other.pairs.keys():
            what = counted(len(alone), "module is", "modules are")
            notes.append(f"{what} adapted by only one of the two, such as {min(alone)}")
        notes += [f"{against}: {note}" for note in other.all_notes]
    if tensors is not None and (apart := [name for name in given.pairs if name not in places]):
        what = counted(len(apart), "module is", "modules are")
        notes.append(f"{what} not in the base, or in another shape, such as {apart[0]}")
    if any(m.base and m.base.intruders is None for m in modules):
        notes.append(f"intruders were not computed where both sides are larger than {whole}")
    parameters = sum(pair.r * sum(pair.shape) for pair in given.pairs.values())
    return Inspection(
        str(adapter), None if base is None else str(base), None if against is None else str(against),
        tuple(sorted(modules, key=lambda m: (m.layer is None, m.layer or 0))), parameters, tuple(notes),
    )  # fmt: skip


def look(given: Adapter, name: str, W: np.ndarray | None, other: Adapter | None, whole: int) -> Module:
    """The numbers of one module; singular vectors are computed only for a comparison."""
    pair = given.pairs[name]
    if W is None and other is None:
        S = spectra.thin_values(*thin(given, name))
    else:
        parts = spectra.thin_svd(*thin(given, name))
        S = to_host(parts[1])
    number = LAYER.match(name)
    return Module(
        name, name.rpartition(".")[2], int(number[1]) if number else None, pair.shape, pair.r, pair.alpha,
        pair.scale, norm(S), tuple(S.tolist()), ranks(S), noise(pair.shape, pair.r),
        None if W is None else beside_base(given, name, W, *directions(*parts), whole),
        None if other is None else beside_other(*directions(*parts), other, name),
    )  # fmt: skip


def thin(given: Adapter, name: str) -> tuple[Array, Array, float]:
    """B (O, r), A (r, I) and scale s of a module on the device; NonFiniteError if its ΔW is not finite."""
    A, B = given.factors(name)
    return to_device(B), to_device(A), given.pairs[name].scale


def directions(U: Array, S: Array, Vt: Array) -> tuple[Array, Array, Array]:
    """U, S and Vᵀ without the arbitrary directions that carry no energy; for ΔW = 0, one zero direction."""
    k = max(rank_at(to_host(S), 1.0), 1)
    some = S[:k] > 0
    return U[:, :k] * some, S[:k], Vt[:k] * some[:, None]


def ranks(S: np.ndarray) -> Ranks:
    """The four measures of a spectrum."""
    return Ranks(spectra.effective_rank(S), spectra.stable_rank(S), rank_at(S, 0.9), rank_at(S, 0.99))


@functools.cache
def noise(shape: tuple[int, int], r: int) -> Ranks:
    """The four measures of noise: B A with Gaussian factors, the mean spectrum of four draws."""
    return ranks(spectra.noise_spectrum(shape, np.random.default_rng(0), r, draws=4))


def placed(given: Adapter, base: Tensors) -> dict[str, tuple[str, bool]]:
    """Module -> its weight's name in the base, and whether that is stored (I, O), where the shapes agree.

    MismatchError if none do; UnsupportedError if the adapter numbers its layers unlike the base.
    """
    if beside := [field for field in given.settings.beside if field.startswith("layer_replication")]:
        raise UnsupportedError(f"{given.where}: {beside[0]}; the base numbers its layers differently")
    places = {}
    for name, pair in given.pairs.items():
        key = name_in(base, name)
        O, *rest = base.shapes.get(key) or (0,)  # noqa: E741
        shape = O, math.prod(rest)
        turned = pair.embedding or transposed(base.shapes, key.removesuffix(".weight"))
        if turned is None:  # the base does not tell
            turned = given.settings.fan_in_fan_out and pair.shape == shape[::-1]
        if pair.shape == (shape[::-1] if turned else shape):
            places[name] = key, turned
    if not places:
        name, pair = next(iter(given.pairs.items()))
        if (key := f"{name}.weight") not in base:
            raise MismatchError(f"{given.where}: the base has no {key}; {nearest(key, base)}")
        raise MismatchError(f"{given.where}: {name} is {pair.shape}; the base's is {base.shapes[key]}")
    return places


def weight_of(base: Tensors, key: str, turned: bool) -> np.ndarray:
    """W (O, I) of a module in float64; a convolution's is flattened to a matrix."""
    W = base[key].astype(np.float64)
    W = W.reshape(len(W), -1)
    return W.T if turned else W


def beside_base(given: Adapter, name: str, W: Array, U: Array, S: Array, Vt: Array, whole: int) -> BesideBase:
    """ΔW = U S Vᵀ compared with W (O, I)."""
    size = float(np.linalg.norm(W))
    if not math.isfinite(size):
        raise NonFiniteError(f"{given.where}: the base's {name}.weight has values that are not finite")
    W, k = to_device(W), len(S)
    top, _ = spectra.top_vectors(W, k)
    factor, random = spectra.amplification(W, U, S, Vt)
    cosines = spectra.intruders(W, (U * S) @ Vt, FIRST) if min(W.shape) <= whole else np.zeros(0)
    threshold = spectra.intruder_threshold(W.shape[0], min(W.shape))
    return BesideBase(
        quotient(norm(to_host(S)), size), factor, random, float(similarity(U, top)[-1, -1]),
        spectra.random_similarity(k, k, len(W)), int((cosines < threshold).sum()) if cosines.size else None,
        tuple(cosines.tolist()), threshold,
    )  # fmt: skip


def beside_other(U: Array, S: Array, Vt: Array, other: Adapter, name: str) -> BesideOther:
    """ΔW = U S Vᵀ compared with another adapter's."""
    O, I = len(U), Vt.shape[1]  # noqa: E741
    if (shape := other.pairs[name].shape) != (O, I):
        raise MismatchError(f"{other.where}: {name} is {shape}; the first adapter's is {O, I}")
    U2, S2, Vt2 = directions(*spectra.thin_svd(*thin(other, name)))
    s, s2 = (spectra.relative(to_host(x)) for x in (S, S2))
    inner = float((to_host((U.T @ U2) * (Vt @ Vt2.T)) * s[:, None] * s2).sum())
    n = range(1, min(len(S), len(S2)) + 1)
    at_random = (tuple(spectra.random_similarity(i, i, D) for i in n) for D in (I, O))
    return BesideOther(
        quotient(inner, norm(s) * norm(s2)),
        tuple(np.diag(similarity(Vt.T, Vt2.T)).tolist()),
        tuple(np.diag(similarity(U, U2)).tolist()),
        *at_random,
    )


# ---- the tables, for terminal and page; chance's values in brackets


def tables(seen: Inspection) -> Iterator[Table]:
    """Every table of an inspection."""
    yield Table(HEAD, [cells(m) for m in seen.modules], "Every module")
    if seen.base:
        rows = [base_cells(m.module, m.base) for m in seen.modules if m.base]
        yield Table(BASE_HEAD, rows, f"Against the base {seen.base}")
    if seen.against:
        rows = [other_cells(m.module, m.other) for m in seen.modules if m.other]
        yield Table(OTHER_HEAD, rows, f"Against the adapter {seen.against}")


HEAD = (
    "module", "O x I", "r", "scale", "|ΔW|", "s_1", "s_r", "eff. rank", "(noise)", "stable", "(noise)",
    "at 90 %", "(noise)", "at 99 %", "(noise)",
)  # fmt: skip
BASE_HEAD = (
    "module", "|ΔW|/|W|", "amplifies", "(random)", "overlap", "(random)", "intruders", "(below |cos|)",
)  # fmt: skip
OTHER_HEAD = (
    "module", "cosine", "phi(1) in", "(random)", "phi(r) in", "(random)", "phi(r) out", "(random)",
)  # fmt: skip


def cells(m: Module) -> Sequence[str]:
    """The row of a module."""
    S, w, n = m.singular_values, m.ranks, m.noise
    return (
        m.module, "{} x {}".format(*m.shape), str(m.r), f"{m.scale:.4g}", f"{m.norm:.3g}", f"{S[0]:.3g}",
        f"{S[-1]:.2g}", f"{w.effective:.1f}", f"({n.effective:.1f})", f"{w.stable:.1f}", f"({n.stable:.1f})",
        str(w.at90), f"({n.at90})", str(w.at99), f"({n.at99})",
    )  # fmt: skip


def base_cells(module: str, b: BesideBase) -> Sequence[str]:
    """The row that compares a module with its base."""
    intruders = "-" if b.intruders is None else f"{b.intruders} of {len(b.cosines)}"
    return (
        module, f"{b.relative:.2e}", f"{b.amplification:.3g}", f"({b.random_amplification:.3g})",
        f"{b.overlap:.3f}", f"({b.random_overlap:.3f})", intruders, f"({b.threshold:.2f})",
    )  # fmt: skip


def other_cells(module: str, o: BesideOther) -> Sequence[str]:
    """The row that compares a module with another adapter's."""
    return (
        module, f"{o.cosine:.3f}", f"{o.inputs[0]:.3f}", f"({o.random_inputs[0]:.3f})", f"{o.inputs[-1]:.3f}",
        f"({o.random_inputs[-1]:.3f})", f"{o.outputs[-1]:.3f}", f"({o.random_outputs[-1]:.3f})",
    )  # fmt: skip


# ---- figures and report


def pictures(seen: Inspection) -> dict[str, Picture]:
    """The figures of an inspection by name."""
    from . import figures

    drawn = {"heat_map": figures.heat_map(seen.modules), "spectra": figures.adapter_spectra(seen.modules)}
    if seen.against:
        drawn["similarity"] = figures.subspaces(seen.modules)
    return drawn


def report_page(seen: Inspection, drawn: Mapping[str, Picture]) -> str:
    """The whole inspection as one HTML page."""
    from . import report as pages

    parts = [pages.paragraph(seen.summary()), *(pages.drawing(name, p) for name, p in drawn.items())]
    parts += [table.html() for table in tables(seen)]
    parts += [pages.paragraph(f"Note: {note}.") for note in seen.notes]
    parts.append(pages.facts({"adapter": seen.adapter, "base": seen.base, "against": seen.against}))
    return pages.page("An adapter under the microscope", parts)
