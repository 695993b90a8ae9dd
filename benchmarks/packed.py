"""Train K adapters packed, in one pass, or one after the other: rows per second, and calls per row.

    python benchmarks/packed.py

K adapters of rank 8 on all linear maps of one base. "unpacked" is ml.train for each, with all its shortcuts
(fast/); "packed" is ml.train_packed. Each contestant is a process with one thread, whose processor time is
counted; they take turns, and "packed / unpacked" is the median over the rounds of the ratio of their rows per
second: above 1 packing pays. Two sizes: batches as the sweep has them, and tiny ones, where the interpreter
takes more time than the products.

Calls are the array operations of one step, divided by K, on the stand-in device of the tests: products, sums,
copies, allocations, and chains that CuPy would fuse as one; not views. On a GPU they would be launches.
Writes results/packed.json and results/packed.md.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import RESULTS, Contestant, alternate, answer, named, ratio, threads, write

import minilora as ml
from minilora import backend
from minilora.table import Table

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import device

RUNS = (1, 2, 4, 8)  # K
KINDS = ("packed", "unpacked")
SIZES = (
    # D, L, H, F, T, V, n: rows of each run
    (128, 4, 4, 352, 128, 256, 16),
    (64, 2, 4, 176, 16, 96, 2),
)
STEPS = (2, 20)  # of each run, in one turn
ROUNDS = (9, 15)


def adapters(size: tuple[int, ...], K: int) -> tuple[ml.Llama, dict[str, list[Any]]]:
    """A model with K adapters, and each one's batch."""
    D, L, H, F, T, V, n = size
    rng = np.random.default_rng(0)
    model = ml.llama(ml.Config(V, D, F, L, H, H), rng)
    for k in range(K):
        ml.inject(model, ml.LoraConfig(r=8, init="both"), rng=rng, name=f"run{k}")
    return model, {f"run{k}": list(rng.integers(0, V, (2, n, T))) for k in range(K)}


def training(size: tuple[int, ...], K: int, kind: str, steps: int) -> Callable[[], Any]:
    """`steps` updates of each of K adapters."""
    model, batches = adapters(size, K)

    def packed() -> None:
        runs = {name: ml.PackedRun([batch] * steps, ml.AdamW(lr=1e-3)) for name, batch in batches.items()}
        ml.train_packed(model, runs, steps=steps)

    def unpacked() -> None:
        for name, batch in batches.items():
            ml.set_adapter(model, name)
            ml.train(model, [batch] * steps, ml.AdamW(lr=1e-3), steps=steps, threads=1)

    return packed if kind == "packed" else unpacked


def measure(i: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each K."""
    size, steps = SIZES[i], STEPS[i]
    runners = {
        (kind, K): Contestant([__file__, "--as", str(i), str(K), kind], threads(1))
        for K in RUNS
        for kind in KINDS
    }
    times = alternate(runners, rounds, 1)
    rows = size[-1] * steps
    return [
        {
            "size": named(size), "runs": K,
            "rows_per_second": {kind: 1000 * K * rows / median(times[kind, K]) for kind in KINDS},
            "packed_to_unpacked": ratio(times["unpacked", K], times["packed", K]),
        }
        for K in RUNS
    ]  # fmt: skip


# ---- calls


def calls(K: int, kind: str, size: tuple[int, ...] = SIZES[0]) -> dict[str, int]:
    """Array operations of one step of each of K adapters, and how many of them are matrix products."""
    counted: Counter[str] = Counter()
    DeviceArray, on_device = device.DeviceArray, device.on_device
    in_place = ["__setitem__", *(f"__i{name}__" for name in device.BINARY)]
    before = {name: getattr(DeviceArray, name) for name in ("__matmul__", *in_place)}

    def noted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any, **how: Any) -> Any:
            counted[what] += not DeviceArray.fusing  # a fused chain is one call
            return function(*operands, **how)

        return call

    def result(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.base is None:  # no view
            counted["all"] += not DeviceArray.fusing
        return on_device(value)

    try:
        device.on_device = result
        backend.install(device.namespace)
        backend.xp.fuse = lambda chain: noted("all", device.fuse(chain))
        backend.xp.matmul = noted("products", backend.xp.matmul)
        DeviceArray.__matmul__ = noted("products", before["__matmul__"])
        for name in in_place:
            setattr(DeviceArray, name, noted("all", before[name]))
        run = training(size, K, kind, 1)
        run()
        counted.clear()
        run()
    finally:
        device.on_device = on_device
        for name, function in before.items():
            setattr(DeviceArray, name, function)
        backend.use("numpy")
    return dict(counted)


# ---- the table


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    cells = [
        (
            f"{row['size']['D']}", f"{row['size']['N']} x {row['size']['T']}", f"{row['runs']}",
            *(f"{row['rows_per_second'][kind]:.1f}" for kind in reversed(KINDS)),
            f"{row['packed_to_unpacked']:.2f}",
            *(f"{row['calls'][kind]['all'] / row['runs']:,.0f}" for kind in reversed(KINDS)),
            *(f"{row['calls'][kind]['products'] / row['runs']:,.0f}" for kind in reversed(KINDS)),
        )
        for row in rows
    ]  # fmt: skip
    head = ("D", "rows x T of a run", "K", "unpacked, rows/s", "packed, rows/s", "packed / unpacked",
            "calls, unpacked", "calls, packed", "products, unpacked", "products, packed")  # fmt: skip
    return Table(head, cells).markdown("r" * len(head))


def main() -> None:
    """Measure, count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", nargs=2, type=int, default=ROUNDS, help="of the two sizes")
    parser.add_argument("--as", nargs=3, dest="part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        i, K, kind = args.part
        answer(training(SIZES[int(i)], int(K), kind, STEPS[int(i)]), 1, time.process_time)
        return
    rows = []
    for i, rounds in enumerate(args.rounds):
        rows += measure(i, rounds)
    for row in rows:
        size = tuple(row["size"].values())
        row["calls"] = {kind: calls(row["runs"], kind, size) for kind in KINDS}
    print(text := table(rows))
    write("packed", rows)
    title = "K adapters trained packed, in one pass, and one after the other (`python benchmarks/packed.py`)"
    (RESULTS / "packed.md").write_text(f"# {title}\n\n{text}\n")


if __name__ == "__main__":
    main()
