"""Time a LoRA step with dA and dB through the thin factors, and through G = dYᵀ X, the gradient of W.

    python benchmarks/gradient_order.py

Both give the same gradients (`LowRank.learn` and `learn_from`); `fast/folded.py` takes the one with fewer
operations. Here each is forced, and the package's own choice runs beside them: the step of step.py (all
linear maps, AdamW) on one thread, for ranks from D/16 to D. The three take turns; ratios are medians over
rounds. Writes results/gradient_order.json; the table is in docs/speed.md.
"""

import sys
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import step as steps
from common import SIZES, named, ratio, write

from minilora.backend import keep_memory, one_blas_thread
from minilora.fast import folded
from minilora.table import Table

WAYS: dict[str, Any] = {
    "factors": lambda adapter, M: False,
    "weight": lambda adapter, M: True,
    "chosen": folded.through_weight,
}
SHARES = (16, 8, 4, 2, 1)  # D / r
ROUNDS = {64: 40, 128: 21, 256: 11}


def forced(run: Callable[[], float], way: str) -> Callable[[], float]:
    """The step in one way."""

    def one() -> float:
        with patch.object(folded, "through_weight", WAYS[way]):
            return run()

    return one


def measure(size: tuple[int, ...], r: int) -> dict[str, Any]:
    """The row of one size and rank."""
    run = steps.step("lora", *size, r=r)
    times = steps.rounds({way: forced(run, way) for way in WAYS}, ROUNDS[size[0]])
    return {
        "size": named(size), "r": r, "ms": {way: median(t) for way, t in times.items()},
        "to_factors": {way: ratio(times["factors"], times[way]) for way in ("weight", "chosen")},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: milliseconds, and how many times faster than through the factors."""
    head = ("D", "r", "factors", "G", "factors / G", "as chosen", "factors / chosen")
    lines = [
        (str(row["size"]["D"]), str(row["r"]), f"{row['ms']['factors']:.1f}",
         *(cell for way in ("weight", "chosen")
           for cell in (f"{row['ms'][way]:.1f}", f"{row['to_factors'][way]:.2f}")))
        for row in rows
    ]  # fmt: skip
    return Table(head, lines).markdown("r" * len(head))


def said(rows: list[dict[str, Any]]) -> str:
    """The sentence on the two orders."""
    of = {
        n: [row["to_factors"]["weight"] for row in rows if row["size"]["D"] == n * row["r"]] for n in SHARES
    }
    apart = max(abs(x - 1) for x in of[4])
    return (f"At r = D / 4 the two orders take the same time within {apart:.0%}; at r = D, G makes the whole "
            f"step {min(of[1]):.1f} to {max(of[1]):.1f} times as fast.")  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    keep_memory()
    with one_blas_thread():
        rows = [measure(size, size[0] // n) for size in SIZES if size[0] in ROUNDS for n in SHARES]
    print(table(rows), said(rows), sep="\n\n")
    write("gradient_order", rows)


if __name__ == "__main__":
    sys.exit(main())
