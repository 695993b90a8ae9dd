"""The singular values of every module -> how many of them to keep: a rank, a budget, a share, kohya's rules.

    |ΔW|² = sum of s_i²        so each kept value s_i brings the energy s_i² for O + I parameters

Stands in for the choices of kohya's resize_lora.py; leaves out those of LyCORIS, whose threshold is absolute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import ConfigError, check_float, check_int, nearest, short
from ..spectra import rank_at

DYNAMIC = ("sv_ratio", "sv_fro", "sv_cumulative")
ZERO = 1e-6  # kohya takes up @ down for zero if no singular value is larger


def check_choice(rank: int | None, energy: float | None) -> None:
    """ConfigError unless exactly one of the two is given, and is valid."""
    if (rank is None) == (energy is None):
        raise ConfigError("rank and energy are two ways to choose; expected exactly one of them")
    if rank is not None:
        check_int("rank", rank, 1)
    else:
        check_share("energy", energy)


def check_share(name: str, value: object) -> None:
    """ConfigError unless the value is a number in (0, 1]."""
    if type(value) not in (int, float) or not 0 < value <= 1:  # type: ignore[operator]
        raise ConfigError(f"{name} is {short(value)}; expected a number in (0, 1]")


def check_resize(
    rank: int | None,
    energy: float | None,
    per_module: bool,
    conv_rank: int | None,
    dynamic: str | None,
    param: float | None,
    minimum: bool,
) -> None:
    """ConfigError unless the arguments of `compress` are valid and one way to choose."""
    for name, value in (("conv_rank", conv_rank), ("dynamic", dynamic)):
        if value is not None and (energy is not None or per_module):
            raise ConfigError(f"{name} goes with rank; expected neither energy nor per_module beside it")
    if conv_rank is not None:
        check_int("conv_rank", conv_rank, 1)
    if dynamic is None:
        if param is not None or minimum:
            raise ConfigError(f"param and minimum need a rule; expected dynamic: {', '.join(DYNAMIC)}")
        return check_choice(rank, energy)
    if dynamic not in DYNAMIC:
        raise ConfigError(f"dynamic is {short(dynamic)}; {nearest(str(dynamic), DYNAMIC)}")
    if rank is not None:
        check_int("rank", rank, 1)
    if dynamic == "sv_ratio":
        check_float("param", param, 1, math.inf)
    else:
        check_share("param", param)


def choose(
    spectra: Mapping[str, np.ndarray],
    costs: Mapping[str, int],
    rank: int | None,
    energy: float | None,
    per_module: bool,
) -> dict[str, int]:
    """The rank of every module, at least 1 each.

    `rank`: the same for all modules. With `per_module`, the parameters that this rank costs are a budget. It
    is spent on the singular values that bring the most energy for their O + I parameters, unless the same
    rank for all keeps more. `energy`: the least common rank that keeps this share of the whole; with
    `per_module`, each module's least rank that keeps this share of it.

    The budget never keeps less energy than the same rank for all. It falls short of the most that it could
    keep by at most the energy of the first value that did not fit: filling a budget to the last parameter
    is a knapsack problem. Where all modules cost the same, it keeps the most.
    """
    largest = max((float(S.max()) for S in spectra.values()), default=0.0) or 1.0
    spectra = {m: S / largest for m, S in spectra.items()}  # so that squares do not underflow
    if energy is not None and per_module:
        return {m: max(rank_at(S, energy), 1) for m, S in spectra.items()}
    if energy is not None:
        squares = [np.pad(S * S, (0, max(map(len, spectra.values())) - len(S))) for S in spectra.values()]
        total = np.sqrt(np.sum(squares, 0))
        rank = max(rank_at(total, energy), 1)
    common = {m: min(rank or 1, len(S)) for m, S in spectra.items()}
    if not per_module:
        return common
    budget = (rank or 1) * sum(costs.values())
    worth = [(S[i] ** 2 / costs[m], m) for m, S in spectra.items() for i in range(1, len(S)) if S[i] > 0]
    chosen = dict.fromkeys(spectra, 1)
    spent = sum(costs.values())
    for _, module in sorted(worth, key=lambda item: -item[0]):  # values fall within a module, so in order
        if spent + costs[module] <= budget:
            chosen[module] += 1
            spent += costs[module]
    # once a wide module's value no longer fits, narrow modules get the rest, which may keep less
    return max(chosen, common, key=lambda ks: math.fsum(sum(S[: ks[m]] ** 2) for m, S in spectra.items()))


def dynamic_rank(S: np.ndarray, method: str, param: float, cap: int, minimum: bool = False) -> int:
    """The rank, from 1 to `cap`, that kohya's resize_lora.py gives a module.

    S (k,) are the singular values of up @ down, without the scale, largest first; zeros at the end do not
    matter to a cap of at most k. A rule needs the first n values:

        sv_ratio         all above s_1 / param
        sv_fro           as many as have a norm of at least param |S|
        sv_cumulative    as many as have a sum of at least param times that of S

    kohya keeps one more than these, so at least 2; where s_1 is at most 1e-6, only 1. `minimum` keeps these.
    What is within rounding of a threshold in float32, kohya's dtype, may be decided otherwise.
    """
    if S[0] <= ZERO:
        return 1
    s = (S / S[0]).astype(np.float32)
    if method == "sv_ratio":
        n = int((s > np.float32(1 / param)).sum())
    else:
        power = {"sv_fro": 2, "sv_cumulative": 1}[method]
        sums = np.cumsum(s.astype(np.float64) ** power)
        n = int(np.searchsorted((sums / sums[-1]).astype(np.float32), np.float32(param**power))) + 1
    if not minimum:
        n = max(n, 1) + 1
    return max(min(n, len(S), cap), 1)
