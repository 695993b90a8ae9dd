"""Time one training step with LoRA on all linear maps beside PyTorch's, and beside its own bare products.

    python benchmarks/step.py [D ...] [--threads 1 2] [--draw]

Contestants, each in a process of its own (common.py), taking turns: our LoRA step (r = 8) and our full
step, as `train` makes them; transformers + PEFT; the same network written by hand in PyTorch, eager and
through torch.compile (rivals.py); AdamW and clipping included everywhere; and the bare matrix products
of the step, into ready buffers, nothing else. Those are forward's and those of the gradients that a step
with a frozen base needs: y = x Wᵀ and dx = dy W for every map, without the dx that nobody wants (q, k,
v of the first block), two in the attention forward and four in the backward, without regard to its mask,
and the head. LoRA's own thin products are not among them. Each has `threads` of them: PyTorch and the
products inside one operation, our steps for micro-batches. Ratios are medians over rounds.

Also the peak of bytes above the weights that one LoRA step holds: tracemalloc's here (NumPy reports to
it), the profiler's there; what a step takes that does not cut its batch ("whole"); and what the two ways of
recomputation take ("selective", and in full: "recomputed"), of time too. Writes results/step.json, where rows
of other sizes, threads and processors stay; --draw only draws results/step.png and .svg from it.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import numpy as np
from common import (
    RESULTS,
    SIZES,
    Contestant,
    alternate,
    answer,
    brief,
    machine,
    named,
    ratio,
    threads,
    write_each,
)

import minilora as ml
from minilora.backend import Array, floats, keep_memory, to_device, xp
from minilora.fast import parallel
from minilora.optim import squared_norm
from minilora.table import Table

ROUNDS = {64: 40, 128: 15, 256: 11, 512: 9}
OURS = ("products", "lora", "full", "selective", "recomputed")
THEIRS = ("peft", "torch", "compiled")
HELD = ("lora", "selective", "recomputed", "whole", "selective whole")  # whose memory is measured
AGAIN = {"selective": "selective", "selective whole": "selective", "recomputed": "full"}


def products(D: int, L: int, H: int, F: int, T: int, V: int, N: int) -> Callable[[], None]:
    """All bare matrix products of a LoRA step, with operands and results in place."""
    rng = np.random.default_rng(0)
    M, E = N * T, D // H

    def array(*shape: int) -> Array:
        return to_device(rng.standard_normal(shape, dtype=np.float32))

    jobs: list[tuple[Array, Array, Array]] = []

    def job(a: Array, b: Array) -> None:
        jobs.append((a, b, xp.matmul(a, b)))

    for layer in range(L):
        for i, (outputs, inputs) in enumerate([(D, D)] * 4 + [(F, D)] * 2 + [(D, F)]):
            W = array(outputs, inputs)
            job(array(M, inputs), W.T)
            if layer or i > 2:
                job(array(M, outputs), W)
        q, k, v, p = array(N, H, T, E), array(N, H, T, E), array(N, H, T, E), array(N, H, T, T)
        job(q, k.swapaxes(-1, -2))
        job(p, v)
        job(p.swapaxes(-1, -2), q)  # dv
        job(q, v.swapaxes(-1, -2))  # dp
        job(p, k)  # dq
        job(p.swapaxes(-1, -2), q)  # dk
    table = array(V, D)
    job(array(M, D), table.T)
    job(array(M, V), table)

    def run() -> None:
        for a, b, out in jobs:
            xp.matmul(a, b, out=out)

    return run


def fresh(
    mode: str, D: int, L: int, H: int, F: int, T: int, V: int, N: int, r: int = 8
) -> tuple[Any, Any, Any]:
    """A model, and the ids and labels of one batch."""
    rng = np.random.default_rng(0)
    model = ml.llama(ml.Config(V, D, F, L, H, H), rng)
    if mode == "lora":
        ml.inject(model, ml.LoraConfig(r=r), rng=rng)
    return model, *rng.integers(0, V, (2, N, T))


KEPT = contextlib.ExitStack()  # replicas live as long as the process


def step(mode: str, *size: int, cores: int = 1, r: int = 8) -> Callable[[], float]:
    """One training step of a fresh model, as `train` makes it; it gives the loss."""
    model, ids, labels = fresh("full" if mode == "full" else "lora", *size, r=r)
    if mode.endswith("whole"):
        parallel.MICRO_BATCH = sys.maxsize
    params, optimizer = ml.trained(model), ml.AdamW(1e-3)
    gradient = KEPT.enter_context(parallel.on_threads(model, cores, AGAIN.get(mode)))

    def run() -> float:
        loss, square = floats(gradient([(ids, labels)]), squared_norm(params))
        optimizer.step(params, norm=math.sqrt(square))
        return loss

    return run


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that a run holds above what was held before."""
    run()
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def medians(runs: Mapping[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Median milliseconds of each, timed in turn."""
    return {name: median(t) for name, t in rounds(runs, count).items()}


def rounds(runs: Mapping[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """The milliseconds of each in every round; to and fro, so that nobody is always first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(count + 2):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            runs[name]()
            if i >= 2:  # the first two warm up
                times[name].append(1000 * (time.perf_counter() - start))
    return times


# ---- a contestant


def run_of(name: str, size: tuple[int, ...], cores: int) -> Callable[[], Any]:
    """What a contestant runs."""
    if name == "products":
        return products(*size)
    if name in (*OURS, *HELD):
        return step(name, *size, cores=cores)
    import rivals
    import torch

    torch.set_num_threads(cores)
    return rivals.peft(size) if name == "peft" else rivals.by_hand(size, compiled=name == "compiled")


def act(name: str, i: str, cores: int, job: str) -> None:
    """The part of one: wait and run, or tell the peak of bytes."""
    keep_memory()
    run = run_of(name, SIZES[int(i)], cores)
    if job == "time":
        answer(run)
    elif name in HELD:
        print("ready", peak_bytes(run), sep="\n", flush=True)
    else:
        import rivals

        print("ready", rivals.peak_bytes(run), sep="\n", flush=True)


def contestant(name: str, i: int, cores: int, job: str) -> Contestant:
    """The same file once more, in the part of one."""
    return Contestant([__file__, "--threads", str(cores), "--as", name, str(i), job], threads(cores))


def peak(name: str, i: int, cores: int) -> int:
    """The peak of one contestant."""
    it = contestant(name, i, cores, "memory")
    while it.line() != "ready\n":
        pass
    found = int(it.line())
    it.close()
    return found


# ---- the race


def measure(chosen: list[int], cores: list[int], there: bool) -> list[dict[str, Any]]:
    """All rows of the chosen sizes, printed as they come."""
    names = OURS + THEIRS * there
    rows = []
    print(f"{'D':>4} {'threads':>7} " + " ".join(f"{name:>10}" for name in names) + "   (ms)")
    for n in cores:
        for i in chosen:
            runners = {name: contestant(name, i, n, "time") for name in names}
            times = alternate(runners, ROUNDS[SIZES[i][0]], n)
            lora = times["lora"]
            row = {
                "size": named(SIZES[i]), "threads": n, "ms": {name: median(t) for name, t in times.items()},
                "floor": ratio(times["products"], lora), "to_full": ratio(lora, times["full"]),
                **{f"{name}_to_lora": ratio(times[name], lora) for name in ("selective", "recomputed")},
                "times_faster": {name: ratio(times[name], lora) for name in THEIRS * there},
                "peak_bytes": {name: peak(name, i, n) for name in (*HELD, *["peft"] * there)},
                "machine": machine(),
            }  # fmt: skip
            rows.append(row)
            print(f"{SIZES[i][0]:4} {n:7} " + " ".join(f"{row['ms'][name]:10.1f}" for name in names))
            faster = "  ".join(f"{name} {x:.2f}" for name, x in row["times_faster"].items())
            held = "  ".join(f"{name} {b / 2**20:.1f}" for name, b in row["peak_bytes"].items())
            print(f"{'':12} products / step {row['floor']:.2f}  step / full {row['to_full']:.2f}  "
                  f"selective / step {row['selective_to_lora']:.2f}  "
                  f"recomputed / step {row['recomputed_to_lora']:.2f}  times faster than: {faster}  "
                  f"peak MiB: {held}", flush=True)  # fmt: skip
    return rows


# ---- the tables and the figure


def processors(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Short name of a processor -> its rows."""
    of: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault(brief(row["machine"]["processor"]), []).append(row)
    return of


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old rows, with a new one in place of that of the same processor, size and threads."""
    of = {(row["machine"]["processor"], row["size"]["D"], row["threads"]): row for row in (*old, *new)}
    return list(of.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one processor in Markdown; times in ms."""
    head = ("D", "threads", "step", "PEFT", "PEFT / step", "by hand / step", "compiled / step",
            "products / step", "step / full")  # fmt: skip
    lines = []
    for row in rows:
        ms, faster = row["ms"], row["times_faster"]
        lines.append((
            str(row["size"]["D"]), str(row["threads"]), f"{ms['lora']:.1f}", f"{ms['peft']:.1f}",
            *(f"{faster[name]:.2f}" for name in THEIRS), f"{row['floor']:.2f}", f"{row['to_full']:.2f}",
        ))  # fmt: skip
    return Table(head, lines).markdown("r" * len(head))


def memory(rows: list[dict[str, Any]]) -> str:
    """The peaks of one processor's rows in Markdown, in MiB, and how long recomputation takes."""
    head = ("D", "threads", "step", "selective", "time", "full", "time", "one part", "selective, one part",
            "PEFT's")  # fmt: skip
    lines = []
    for row in rows:
        mib = {name: f"{size / 2**20:.0f}" for name, size in row["peak_bytes"].items()}
        time = {name: f"{row[f'{name}_to_lora']:.2f}" for name in ("selective", "recomputed")}
        lines.append((
            str(row["size"]["D"]), str(row["threads"]), mib["lora"], mib["selective"], time["selective"],
            mib["recomputed"], time["recomputed"], mib["whole"], mib["selective whole"], mib["peft"],
        ))  # fmt: skip
    return Table(head, lines).markdown("r" * len(head))


def span(values: Iterable[float]) -> str:
    """The least and the greatest."""
    values = list(values)
    return f"{min(values):.2f} to {max(values):.2f}"


def raced(name: str, rows: list[dict[str, Any]]) -> str:
    """The sentence on a processor's times."""
    faster = {kind: span(row["times_faster"][kind] for row in rows) for kind in THEIRS}
    return (
        f"On the {name} a step is {faster['peft']} times as fast as PEFT's, {faster['torch']} times as fast "
        f"as the one by hand, and {faster['compiled']} times as fast as that one compiled."
    )


def recomputing(rows: list[dict[str, Any]]) -> list[str]:
    """The sentences on recomputation, by the rows from D = 128 on."""
    wide = [row for row in rows if row["size"]["D"] >= 128]
    time = {name: span(row[f"{name}_to_lora"] for row in wide) for name in ("selective", "recomputed")}
    parts = span(row["peak_bytes"]["selective whole"] / row["peak_bytes"]["peft"] for row in wide)
    return [
        f"From D = 128 on it takes {time['selective']} times as long as a step that keeps everything, "
        f"and one part holds {parts} of PEFT's peak.",
        f"From D = 128 on it takes {time['recomputed']} times as long.",
    ]


def draw(rows: list[dict[str, Any]]) -> None:
    """results/step.png and .svg: a panel of times for each processor, and the memory and time of the last."""
    from minilora.analysis.plotting import BLUE, GOLD, GREEN, GREY, ORANGE, SKY, WINE, Picture, axes, styled

    D = sorted({row["size"]["D"] for row in rows})
    top = max(max(row["times_faster"].values(), default=1) for row in rows)
    kinds = (("peft", BLUE, "o", "transformers + PEFT"), ("torch", ORANGE, "s", "by hand, eager"),
             ("compiled", GREEN, "^", "by hand, torch.compile"))  # fmt: skip
    again = (
        ("selective", GOLD, "v", "selective recomputation"),
        ("recomputed", SKY, "P", "full recomputation"),
    )
    peaks = (("peft", BLUE, "o", "transformers + PEFT"), ("lora", WINE, "D", "minilora"), *again)

    def of_size(rows: list[dict[str, Any]], threads: int) -> dict[int, dict[str, Any]]:
        return {row["size"]["D"]: row for row in rows if row["threads"] == threads}

    def race(panel: Any, name: str, rows: list[dict[str, Any]]) -> None:
        panel.axhline(1, color=GREY, linewidth=1)
        for n, dashes in ((2, "-"), (1, "--")):
            some = {d: row["times_faster"] for d, row in of_size(rows, n).items() if row["times_faster"]}
            for kind, colour, marker, label in kinds:
                panel.plot([D.index(d) for d in some], [faster[kind] for faster in some.values()],
                           marker=marker, markersize=8, linestyle=dashes, color=colour,
                           label=f"{label}, {n} thread{'s' * (n > 1)}")  # fmt: skip
        panel.set_ylim(0, 1.05 * top)
        panel.set_ylabel("time of PyTorch / time of minilora")
        panel.set_title(f"A LoRA step, on {name}")

    @styled
    def picture() -> Picture:
        of = processors(rows)
        lines = math.ceil(len(of) / 2) + 1
        figure, grid = axes(2, lines, size=(12, 4.8 * lines))
        *races, held, cost = grid.flat
        for panel, (name, some) in zip(races, of.items(), strict=False):
            race(panel, name, some)
        races[0].legend(fontsize=9)
        for panel in races[len(of) :]:
            panel.remove()
        last, both = [(name, some) for name, some in of.items() if "selective" in some[0]["ms"]][-1]
        some = {d: row["peak_bytes"] for d, row in of_size(both, 2).items()}
        for kind, colour, marker, label in peaks:
            at = [d for d in D if kind in some.get(d, {})]
            held.plot([D.index(d) for d in at], [some[d][kind] / 2**20 for d in at], marker=marker,
                      markersize=8, color=colour, label=label)  # fmt: skip
        held.set_yscale("log")
        held.set_ylabel("peak above the weights (MiB)")
        held.set_title(f"What it holds on two threads, on {last}")
        held.legend(fontsize=10)
        for n, dashes in ((2, "-"), (1, "--")):
            for kind, colour, marker, label in again:
                some = {d: row[f"{kind}_to_lora"] for d, row in of_size(both, n).items()}
                cost.plot([D.index(d) for d in some], [*some.values()], marker=marker, markersize=8,
                          linestyle=dashes, color=colour,
                          label=f"{label}, {n} thread{'s' * (n > 1)}")  # fmt: skip
        cost.axhline(1, color=GREY, linewidth=1)
        cost.set_ylim(0, 1.5)
        cost.set_ylabel("time / time of a step")
        cost.set_title(f"What recomputation costs, on {last}")
        cost.legend(fontsize=10)
        for panel in (*races[: len(of)], held, cost):
            panel.set_xticks(range(len(D)), [str(d) for d in D])
            panel.set_xlabel("width D")
        return Picture(figure, "Times of a LoRA step against PyTorch's, and its peak of memory.")

    picture().save(RESULTS, "step")


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("D", nargs="*", type=int, help="64, 128, 256, 512; all unless given")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--draw", action="store_true", help="only draw what is written")
    parser.add_argument("--as", nargs=3, dest="part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, i, job = args.part
        act(name, i, args.threads[0], job)
        return
    if not args.draw:
        there = all(map(importlib.util.find_spec, ("torch", "transformers", "peft")))
        if not there:
            print(
                "torch, transformers and peft are not all installed (the extra `parity`): nothing beside them"
            )
        chosen = [i for i, size in enumerate(SIZES) if not args.D or size[0] in args.D]
        rows = measure(chosen, args.threads, there)
        path = RESULTS / "step.json"
        kept = json.loads(path.read_text())["rows"] if path.exists() else []
        write_each("step", merged(kept, rows))
    draw(json.loads((RESULTS / "step.json").read_text())["rows"])


if __name__ == "__main__":
    sys.exit(main())
