"""Time LoRA beside its rivals: a training step, a forward pass, a decoded token.

    python benchmarks/methods.py [--quick] [--draw]

The methods are those of the experiment `rivals`, sized to LoRA of rank 2 where they have a size, at the
shape of its base (D = 96) and at D = 256: a step as `train` makes it, with AdamW and clipping, of N x T
tokens; a forward pass of as many; and one token of cached decoding at batch 1: the rows of a prompt are read
within the TOKENS that are timed. At inference LoRA and what else a weight can hold runs unmerged and merged;
a bottleneck, a prefix and a prompt only as they are; all weights and norms are then the base itself. The base
runs twice: what two processes of the same code differ by is the error of this clock.

Each contestant has a process of its own and one thread; all take turns (common.py), to and fro, and are
launched anew LAUNCHES times, since memory lies elsewhere every time. Milliseconds are medians; ratios, to
full fine-tuning's step or to the base's latency, are medians over the rounds. Writes results/methods.json,
.md, .png and .svg; --draw writes the last three again; --quick tries a small size and writes nothing.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from common import RESULTS, Contestant, alternate, answer, named, ratio, threads, write
from inference import TOKENS, text

import minilora as ml
from minilora.backend import floats, keep_memory
from minilora.experiments.rivals import FULL, METHODS, nearest_size, prepared
from minilora.experiments.rivals_figures import UNMERGED
from minilora.fast import parallel
from minilora.optim import squared_norm
from minilora.table import Table

RANK = 2
BASE, AGAIN, MERGED = "base", "base again", ", merged"
SHAPES = (
    # D, L, H, F, T, V, N
    (96, 3, 4, 256, 128, 128, 8),  # the experiment's
    (256, 6, 8, 704, 128, 256, 8),
)
SMALL = (16, 1, 2, 24, 8, 32, 2)
JOBS = ("step", "forward", "token")
ROUNDS = {96: 12, 256: 3, 16: 1}
LAUNCHES = 2
PLAIN = (FULL, "norms", "biases")  # nothing beside the weights after training
SHOWN = ("LoRA", f"LoRA{MERGED}", "bottleneck, Houlsby", "prefix", "prompt")  # in the figure's title
QUICK = (FULL, "LoRA", "prefix", "norms")


def runners(job: str, methods: tuple[str, ...] = METHODS) -> list[str]:
    """Who runs in a job: the methods; at inference the base twice, and merged what can be."""
    if job == "step":
        return list(methods)
    beside = [method for method in methods if method not in PLAIN]
    merged = [method + MERGED for method in beside if method not in UNMERGED]
    return [BASE, AGAIN, *beside, *merged, *({"biases"} & {*methods})]


# ---- a contestant


def ready(name: str, size: tuple[int, ...]) -> tuple[ml.Llama, np.random.Generator]:
    """The model of a contestant: bare, with a method's adapters, or with them merged."""
    D, L, H, F, _, V, _ = size
    rng = np.random.default_rng(0)
    base = ml.llama(ml.Config(V, D, F, L, H, H), rng)
    ml.freeze(base)
    if name in (BASE, AGAIN):
        return base, rng
    method = name.removesuffix(MERGED)
    model = prepared(method, nearest_size(method, RANK, base), base, rng)
    if name != method:
        ml.merge(model)
    return model, rng


KEPT = contextlib.ExitStack()  # replicas live as long as the process


def run_of(job: str, name: str, size: tuple[int, ...]) -> Callable[[], Any]:
    """One training step, a forward pass of N x T tokens, or TOKENS tokens of decoding."""
    model, rng = ready(name, size)
    *_, T, V, N = size
    ids, labels = rng.integers(0, V, (2, N, T))
    if job == "forward":
        return lambda: model(ids)
    if job == "token":
        return lambda: text(model, ids[:1, :1], TOKENS)
    params, optimizer = ml.trained(model), ml.AdamW(1e-3)
    gradient = KEPT.enter_context(parallel.on_threads(model, 1))

    def run() -> float:
        loss, square = floats(gradient([(ids, labels)]), squared_norm(params))
        optimizer.step(params, norm=math.sqrt(square))
        return loss

    return run


# ---- the race


def measure(job: str, size: tuple[int, ...], names: list[str], launches: int) -> dict[str, Any]:
    """One row: milliseconds of each contestant, and their ratios to full fine-tuning or to the base."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(launches):
        processes = {
            name: Contestant([__file__, "--as", job, name, json.dumps(size)], threads(1)) for name in names
        }
        for name, t in alternate(processes, ROUNDS[size[0]], 1).items():
            times[name] += t
    unit, first = TOKENS if job == "token" else 1, times[names[0]]
    return {
        "job": job, "size": named(size), "rank": RANK, "threads": 1,
        "ms": {name: median(t) / unit for name, t in times.items()},
        "ratio": {name: ratio(t, first) for name, t in times.items() if name != names[0]},
    }  # fmt: skip


def told(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    to = f"times {FULL}" if row["job"] == "step" else f"times the {BASE}"
    cells = [(name, f"{ms:.3f}", f"{row['ratio'].get(name, 1):.2f}") for name, ms in row["ms"].items()]
    return str(Table((f"{row['job']}, D = {row['size']['D']}", "ms", to), cells))


# ---- the table and the figure


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: milliseconds, and in brackets the ratio to full fine-tuning or to the base."""
    names = dict.fromkeys(name for row in rows for name in row["ms"])
    cells = [
        (name, *(f"{row['ms'][name]:.2f} ({row['ratio'].get(name, 1):.2f})" if name in row["ms"] else ""
                 for row in rows))
        for name in names
    ]  # fmt: skip
    head = ("", *(f"{row['job']}, D = {row['size']['D']}" for row in rows))
    return Table(head, cells).markdown("l" + "r" * len(rows))


def draw(rows: list[dict[str, Any]]) -> None:
    """results/methods.md, .png and .svg."""
    from minilora.analysis.plotting import BLUE, GREY, ORANGE, Picture, axes, styled

    @styled
    def picture() -> Picture:
        figure, ((left, right),) = axes(2, size=(13, 6.4))
        for ax, job in ((left, "step"), (right, "token")):
            some = [row for row in rows if row["job"] == job]
            names = [name for name in some[0]["ratio"] if not name.endswith(MERGED)]
            for row, fill in zip(some, (True, False), strict=True):
                for y, name in enumerate(names):
                    for kind, colour, mark in ((name, ORANGE, "s"), (name + MERGED, BLUE, "o")):
                        if kind in row["ratio"]:
                            ax.plot(row["ratio"][kind], y, mark, color=colour, markersize=9,
                                    markerfacecolor=colour if fill else "white")  # fmt: skip
            for row, fill in zip(some, (True, False), strict=True):
                D = row["size"]["D"]
                ax.plot([], [], "s", color=ORANGE, markerfacecolor=ORANGE if fill else "white",
                        label=f"as it is, D = {D}")  # fmt: skip
                if job == "token":
                    ax.plot([], [], "o", color=BLUE, markerfacecolor=BLUE if fill else "white",
                            label=f"merged, D = {D}")  # fmt: skip
            ax.axvline(1, color=GREY)
            ax.set_yticks(range(len(names)), names)
            ax.invert_yaxis()
            ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=2, fontsize=10)
        left.set(xlabel=f"time / that of {FULL}", title="A training step")
        right.set(xlabel="time / that of the base", title="A decoded token")
        last = next(row for row in reversed(rows) if row["job"] == "token")
        answer = "; ".join(f"{name} {last['ratio'][name]:.2f}" for name in SHOWN)
        answer = f"a token at D = {last['size']['D']}, times the base's: {answer}"
        figure.suptitle(f"What do LoRA and its rivals cost in time?\n{answer}")
        sized = "sized to LoRA of rank 2 where they have a size"
        says = f"Times of a training step and of a token: LoRA and its rivals, {sized}; "
        return Picture(figure, f"{says}{answer}.")

    picture().save(RESULTS, "methods")
    title = (
        "LoRA and its rivals, sized to LoRA of rank 2 where they have a size: ms, and times that of all "
        "weights or of the base"
    )
    page = f"# {title} (`python benchmarks/methods.py`)\n\n{table(rows)}\n"
    (RESULTS / "methods.md").write_text(page, encoding="utf-8")


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small size once, nothing written")
    parser.add_argument("--draw", action="store_true", help="only write the page and the figure again")
    parser.add_argument("--as", nargs=3, dest="part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        job, name, size = args.part
        keep_memory()  # as train and generate do
        answer(run_of(job, name, tuple(json.loads(size))))
        return
    if not args.draw:
        rows = []
        for size in (SMALL,) if args.quick else SHAPES:
            for job in JOBS[::2] if args.quick else JOBS:
                names = runners(job, QUICK if args.quick else METHODS)
                rows.append(row := measure(job, size, names, 1 if args.quick else LAUNCHES))
                print(told(row), flush=True)
        if args.quick:
            return
        write("methods", rows)
    draw(json.loads((RESULTS / "methods.json").read_text())["rows"])


if __name__ == "__main__":
    sys.exit(main())
