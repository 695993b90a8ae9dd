"""The rows of a rank sweep, read: means over seeds, spectra by kind of module, and the answer in words.

A rank's gain is the base's test loss less its own. A rank is enough if it gives all but ENOUGH of the largest
gain, and it stands out if the rank before leaves more than LEFT.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.plotting import KINDS
from ..data.corpora import swaps_of
from ..errors import InputError
from ..spectra import effective_rank, noise_spectrum
from ..table import counted, drawn
from .harness import Row

ENOUGH, LEFT = 0.02, 0.05  # of the largest gain
NAMES = {
    "folio": "First Folio",
    "kjv": "King James Bible",
    "code": "Python code",
    "shakespeare": "modern Shakespeare",
    "reversed": "reversed text",
}


def select(rows: Sequence[Row], **config: Any) -> list[Row]:
    """The finished rows whose config has these values."""
    return [row for row in rows if row["status"] == "done" and config.items() <= row["config"].items()]


def final(rows: Sequence[Row], target: str, method: str = "lora") -> list[Row]:
    """The measured runs of one method on one target; InputError if there is none."""
    runs = select(rows, kind="base" if method == "none" else "final", target=target, method=method)
    if not runs:
        raise InputError(f"no finished run of {method!r} on {target!r} among {len(rows)} rows")
    return runs


def ranks_of(rows: Sequence[Row]) -> list[int]:
    """The ranks in the rows, in order."""
    return sorted({row["config"]["rank"] for row in rows})


def by_rank(rows: Sequence[Row], key: str) -> tuple[list[int], np.ndarray]:
    """The ranks, and for each the (mean, least, greatest) of a value over the seeds: (ranks, 3)."""
    ranks = ranks_of(rows)
    values = [[row[key] for row in rows if row["config"]["rank"] == r] for r in ranks]
    return ranks, np.array([(math.fsum(v) / len(v), min(v), max(v)) for v in values]).reshape(-1, 3)


def targets(rows: Sequence[Row]) -> list[str]:
    """The targets that have finished runs of the base, LoRA and full fine-tuning, in order."""
    names = dict.fromkeys(row["config"]["target"] for row in select(rows, kind="final", method="full"))
    others = ({"kind": "base"}, {"kind": "final", "method": "lora"})
    return [name for name in names if all(select(rows, target=name, **other) for other in others)]


def kinds(rows: Sequence[Row]) -> list[str]:
    """The kinds of adapted modules in the rows."""
    ends = {path.rpartition(".")[2] for row in rows for path in row["spectra"]}
    usual = [kind for kind in (*KINDS, "embed_tokens") if kind in ends]
    return usual + sorted(ends - {*usual})


def mean_spectrum(rows: Sequence[Row], kind: str) -> np.ndarray:
    """The mean over rows and layers of the spectra of one kind of module."""
    values = [s for row in rows for path, s in row["spectra"].items() if path.rpartition(".")[2] == kind]
    return np.array(values).mean(0) if values else np.zeros(0)


def shape_of(kind: str, rows: Sequence[Row]) -> tuple[int, int]:
    """The shape (O, I) of one kind of module."""
    shapes = (item for row in rows for item in row["shapes"].items())
    m, n = next(shape for path, shape in shapes if path.rpartition(".")[2] == kind)
    return m, n


def mean_curve(rows: Sequence[Row]) -> np.ndarray:
    """The steps and the mean validation losses at them: (2, steps)."""
    return np.array([row["curve"] for row in rows]).mean(0).T


def flattening(full: Sequence[Row]) -> str:
    """Whether the curve has flattened, in words: how much the last quarter of the steps still gained."""
    steps, losses = mean_curve(full)
    late = losses[np.searchsorted(steps, 0.75 * steps[-1])]
    fall, last = losses[0] - losses[-1], late - losses[-1]
    return (
        f"{losses[0]:.3f} at the start, {losses[-1]:.3f} after {steps[-1]:.0f} steps; "
        f"the last quarter brought {last:.4f} nats, {last / fall if fall else 0:.1%} of the whole fall"
    )


def title(target: str) -> str:
    """A target as a heading."""
    if swaps := swaps_of(target):
        return f"letter permutation, {swaps} swaps"
    return NAMES.get(target, Path(target).name or target)


def seeds(rows: Sequence[Row]) -> str:
    """How many seeds the rows hold, in words."""
    return counted(len({row["config"]["seed"] for row in rows}), "seed", "seeds")


def over_seeds(rows: Sequence[Row]) -> str:
    """What a band or a range shows of the seeds, in words; of a single one there is none."""
    number = len({row["config"]["seed"] for row in rows})
    return f"mean and range of {number} seeds" if number > 1 else "a single seed"


def adapted(rows: Sequence[Row]) -> str:
    """What LoRA adapts, in words."""
    there = kinds(rows)
    if there == ["embed_tokens"]:
        return "the embedding only"
    return "all linear maps" if there == [*KINDS] else ", ".join(map(drawn, there))


# ---- the answer in words


def gains(rows: Sequence[Row], target: str) -> tuple[list[int], np.ndarray, float]:
    """The ranks, the share of the largest gain that each gives, and that gain in nats per character."""
    ranks, y = by_rank(final(rows, target), "test")
    gain = final(rows, target, "none")[0]["test"] - y[:, 0]
    most = float(gain.max())
    return ranks, gain / most if most > 0 else 0 * gain, most


def answer(rows: Sequence[Row], target: str) -> str:
    """Which rank is enough for a target."""
    ranks, share, most = gains(rows, target)
    if most <= 0:
        return "LoRA gains nothing over the frozen base at any rank"
    i = int(np.argmax(share >= 1 - ENOUGH))
    directions = counted(ranks[i], "direction is", "directions are")
    if i == 0:
        return f"{directions} enough: r = {ranks[0]} gives {share[0]:.0%} of the largest gain"
    if share[i - 1] < 1 - LEFT:
        given = f"{share[i - 1]:.0%} of the largest gain, r = {ranks[i]} gives {share[i]:.0%}"
        return f"{directions} enough: r = {ranks[i - 1]} gives {given}"
    parts = ", ".join(f"r = {ranks[j]} gives {share[j]:.0%}" for j in sorted({0, len(ranks) // 2, i}))
    return f"no rank stands out: {parts} of the largest gain"


def spectra_of(rows: Sequence[Row], there: Sequence[str]) -> list[np.ndarray]:
    """The spectra of all modules of these kinds."""
    items = [item for row in rows for item in row["spectra"].items()]
    return [np.array(s) for path, s in items if path.rpartition(".")[2] in there]


def mean_rank(rows: Sequence[Row], there: Sequence[str]) -> float:
    """The mean effective rank of these kinds of modules."""
    return float(np.mean([effective_rank(s) for s in spectra_of(rows, there)]))


def noise_ranks(lora: Sequence[Row]) -> list[float]:
    """For each rank, the mean effective rank of products of two noise factors in the modules' shapes."""
    return noise_of(tuple(shape_of(kind, lora) for kind in kinds(lora)), tuple(ranks_of(lora)))


@cache
def noise_of(shapes: tuple[tuple[int, int], ...], ranks: tuple[int, ...]) -> list[float]:
    """`noise_ranks` of modules of these shapes."""
    rng = np.random.default_rng(0)
    return [
        float(np.mean([effective_rank(noise_spectrum(shape, rng, rank=r, draws=4)) for shape in shapes]))
        for r in ranks
    ]


def used(rows: Sequence[Row], target: str) -> str:
    """The effective rank of ΔW at the largest rank, beside noise's and that of full fine-tuning."""
    lora, there = final(rows, target), kinds(final(rows, target))
    r, full = ranks_of(lora)[-1], mean_rank(final(rows, target, "full"), there)
    own, noise = mean_rank(select(lora, rank=r), there), noise_ranks(lora)[-1]
    return f"at r = {r} the effective rank is {own:.1f}, of noise {noise:.1f}, of full fine-tuning {full:.1f}"
