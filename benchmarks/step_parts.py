"""Where the time of one LoRA step goes, kind by kind, beside its bare matrix products.

    python benchmarks/step_parts.py [--draw]

The step is that of step.py (r = 8, all linear maps, AdamW), on one thread. Functions and layers are wrapped
in clocks while it runs; a clock stands still while another one runs inside it, so the kinds add up to the
step. What no clock sees is the rest: residuals, the layout of heads, the loop. "calls" is the same step of a
model so narrow that its arrays do not matter: what Python and NumPy take to be called at all. The floor is
the bare products of step.py. Step, parts and floor take turns, and each number is a median. Writes
results/step_parts.json; --draw only draws results/step_parts.png and .svg from it.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from types import FunctionType
from typing import Any
from unittest.mock import patch

import step as steps
from common import RESULTS, SIZES, named, write

from minilora import layers, lora, model, optim
from minilora.backend import keep_memory, one_blas_thread, xp
from minilora.fast import folded, parallel
from minilora.table import Table

KINDS = (
    "products",
    "thin products",
    "attention",
    "exp",
    "swiglu",
    "norms",
    "rope",
    "loss",
    "optimizer",
    "rest",
)
PLACES = (  # kind, where the name is looked up, and the name
    ("products", layers.Linear, "__call__"),
    ("products", layers.Linear, "backward"),
    ("thin products", lora.LowRank, "__call__"),
    ("thin products", lora.LowRank, "learn"),
    ("thin products", lora.LowRank, "learn_from"),
    ("thin products", lora.LowRank, "merged"),
    ("thin products", folded.Folded, "__call__"),
    ("attention", model, "attention"),
    ("exp", xp, "exp"),
    ("swiglu", model, "swiglu"),
    ("norms", layers.RMSNorm, "__call__"),
    ("rope", model, "rope"),
    ("loss", model, "cross_entropy"),
    ("optimizer", optim.AdamW, "step"),
    ("optimizer", steps, "squared_norm"),
)


class Clocks:
    """One clock for each kind, of which the innermost runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.running, self.since = ["rest"], time.perf_counter()

    def stop(self) -> None:
        """Give the time since the last change to the clock that runs."""
        now = time.perf_counter()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Let one clock run, in place of the one that did."""
        self.stop()
        self.running.append(kind)
        try:
            yield
        finally:
            self.stop()
            self.running.pop()

    def timed(self, kind: str, f: Callable[..., Any]) -> Callable[..., Any]:
        """The function, and the backward that it returns, with a clock."""

        def call(*args: Any, **how: Any) -> Any:
            with self.of(kind):
                out = f(*args, **how)
            if isinstance(out, FunctionType):
                return self.timed(kind, out)
            if isinstance(out, tuple) and isinstance(out[-1], FunctionType):
                return (*out[:-1], self.timed(kind, out[-1]))
            return out

        return call


def parts(run: Callable[[], Any]) -> dict[str, float]:
    """Kind -> milliseconds of one run."""
    clocks = Clocks()
    with contextlib.ExitStack() as stack:
        for kind, owner, name in PLACES:
            stack.enter_context(patch.object(owner, name, clocks.timed(kind, getattr(owner, name))))
        clocks.since = time.perf_counter()
        run()
        clocks.stop()
    return {kind: 1000 * clocks.seconds[kind] for kind in KINDS}


def calls(D: int, L: int, H: int, F: int, T: int, V: int, N: int) -> Callable[[], Any]:
    """The same step, cut into as many micro-batches, of one token each, in a model of width 2 H."""
    width, n = 2 * H, math.ceil(N * T * D / parallel.MICRO_BATCH)
    run = steps.step("lora", width, L, H, width, 1, width, n)

    def one() -> Any:
        with (
            patch.object(folded, "pays", lambda adapter, M: True),
            patch.object(folded, "through_weight", lambda adapter, M: False),
            patch.object(parallel, "MICRO_BATCH", width),
        ):
            return run()

    return one


def measure(size: tuple[int, ...]) -> dict[str, Any]:
    """The row of one size."""
    run, seen = steps.step("lora", *size), []
    runs = {"step": run, "parts": lambda: seen.append(parts(run)), "floor": steps.products(*size)}
    times = steps.medians(runs, steps.ROUNDS[size[0]])
    ms = {kind: median(found[kind] for found in seen[2:]) for kind in KINDS}
    return {
        "size": named(size), "ms": ms, "step": times["step"], "with_clocks": times["parts"],
        "floor": times["floor"], "calls": steps.medians({"": calls(*size)}, steps.ROUNDS[size[0]])[""],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, in milliseconds."""
    lines = [
        (str(row["size"]["D"]), *(f"{row[what]:.1f}" for what in ("step", "floor", "calls")),
         *(f"{row['ms'][kind]:.1f}" for kind in KINDS))
        for row in rows
    ]  # fmt: skip
    head = ("D", "step", "bare products", "calls", *KINDS)
    return Table(head, lines).markdown("r" * len(head))


def draw(rows: list[dict[str, Any]]) -> None:
    """results/step_parts.png and .svg: for each width a bar of kinds, and below it what it stands on."""
    from minilora.analysis import plotting

    colours = (plotting.BLUE, plotting.SKY, plotting.ORANGE, plotting.GOLD, plotting.PINK, plotting.GREEN,
               plotting.WINE, "#332288", plotting.GREY, "#DDDDDD")  # fmt: skip
    plate = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    below = (("floor", "its bare products", plotting.BLUE), ("calls", "its calls", plotting.GREY))

    @plotting.styled
    def picture() -> plotting.Picture:
        figure, ((ax,),) = plotting.axes(size=(11, 6))
        for i, row in enumerate(rows):
            left, share = 0.0, {kind: 100 * ms / sum(row["ms"].values()) for kind, ms in row["ms"].items()}
            for kind, colour in zip(KINDS, colours, strict=True):
                label = None if i else kind
                ax.barh(i, share[kind], 0.42, left=left, color=colour, edgecolor="white", label=label)
                if share[kind] > 3:
                    ax.text(
                        left + share[kind] / 2,
                        i,
                        f"{share[kind]:.0f}",
                        ha="center",
                        va="center",
                        fontsize=9,
                        bbox=plate,
                    )
                left += share[kind]
            for y, (what, said, colour) in zip((0.3, 0.46), below, strict=True):
                size = 100 * row[what] / row["step"]
                ax.barh(i + y, size, 0.12, color=colour)
                ax.text(size + 0.8, i + y, f"{said}: {size:.0f}", va="center", fontsize=9)
        names = [f"D = {row['size']['D']}\n{row['step']:.0f} ms" for row in rows]
        ax.set_yticks(range(len(rows)), names)
        ax.invert_yaxis()
        ax.set(xlim=(0, 100), xlabel="share of a step on one thread (%)")
        ax.set_title("Where the time of a LoRA step goes")
        ax.grid(visible=False, axis="y")
        figure.legend(loc="outside right upper")
        says = "; ".join(
            f"at D = {row['size']['D']} its maps' products take "
            f"{100 * row['ms']['products'] / row['with_clocks']:.0f} %, "
            f"all bare products would take {100 * row['floor'] / row['step']:.0f} %"
            for row in rows
        )
        return plotting.Picture(figure, f"Shares of a LoRA step by kind of work: {says}.")

    picture().save(RESULTS, "step_parts")


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="only draw what is written")
    if not parser.parse_args().draw:
        keep_memory()
        with one_blas_thread() as held:
            if not held:
                sys.exit("BLAS cannot be held to one thread here; threadpoolctl is not installed?")
            write("step_parts", [measure(size) for size in SIZES])
    rows = json.loads((RESULTS / "step_parts.json").read_text())["rows"]
    print(table(rows))
    draw(rows)


if __name__ == "__main__":
    main()
