"""Count what a sweep sends to other machines, and time the way there and back.

    python benchmarks/cluster.py

Bytes are those of pickle, which dask uses; the round trip is that of a call that does nothing, through
a scheduler and a worker on the loopback (left out where the extra `cluster` is missing); keeping a row is
what the sweep does when a run is done, here with a thousand rows there already. What follows from the
figures is in cluster.md. Writes results/cluster.json.
"""

import importlib.util
import json
import pickle
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import write

import minilora as ml
from minilora.data import corpora
from minilora.experiments.rank_sweep import Plan, Row, Stock, Store, Workers, fingerprint, grid, read_rows
from minilora.tree import named_params

ROWS = Path(__file__).parent.parent / "figures" / "rows.jsonl"


def nothing(run: Any, shared: Any) -> None:
    """A call that does nothing."""


def round_trips(run: Any, stock: Stock, count: int = 200) -> float:
    """Median milliseconds of one call, one after the other."""
    import distributed

    from minilora.experiments.cluster import Cluster

    place = {"n_workers": 1, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with (
        distributed.LocalCluster(processes=True, **place) as machines,
        distributed.Client(machines) as client,
    ):
        executor = Cluster(client, stock)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            executor.submit(nothing, run).result()
            times.append(1000 * (time.perf_counter() - start))
        executor.closed.set()
    return median(times)


def keeping(plan: Plan, stock: Stock, rows: list[Row], count: int = 1000) -> float:
    """Milliseconds in which a sweep keeps one more row beside `count`."""
    many = [rows[i % len(rows)] | {"id": f"{i:016x}"} for i in range(count + 5)]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), fingerprint(plan, stock.texts), Workers(1, None), None)
        store.order = dict.fromkeys(row["id"] for row in many)
        store.done = {row["id"]: row for row in many[:count]}
        times = []
        for row in many[count:]:
            start = time.perf_counter()
            store.add(row)
            times.append(1000 * (time.perf_counter() - start))
    return median(times)


def main() -> None:
    """Count, time, print and write."""
    plan = Plan()
    texts = {target: corpora.corpus_or_fallback(target) for target in plan.targets}
    stock = Stock(ml.load(), texts)
    run = grid(plan, texts)[-1]
    rows = read_rows(ROWS)
    lines = [json.dumps(row).encode() for row in rows]
    row = {
        "base_parameters": sum(p.data.size for p in named_params(stock.base).values()),
        "stock_bytes": len(pickle.dumps(stock)),
        "run_bytes": len(pickle.dumps(run)),
        "rows": len(lines),
        "row_bytes_mean": sum(map(len, lines)) / len(lines),
        "row_bytes_max": max(map(len, lines)),
        "keep_row_beside_1000_ms": keeping(plan, stock, rows),
    }
    if importlib.util.find_spec("distributed"):
        row["round_trip_ms"] = round_trips(run, stock)
    print(json.dumps(row, indent=1))
    write("cluster", [row])


if __name__ == "__main__":
    main()
