"""Count what a sweep sends to other machines, and time the way there and back.

    python benchmarks/cluster.py

Bytes are those of pickle, which dask uses; the round trip is that of a call that does nothing, through
a scheduler and a worker on the loopback (left out where the extra `cluster` is missing); keeping a row is
what the sweep does when a run is done, here with ten rows there already and with ten thousand. What follows
from the figures is in cluster.md. Writes results/cluster.json.
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

from minilora.experiments.harness import Inputs, Job, Row, Store, id_of, read_inputs, sealed, versions
from minilora.experiments.rank_sweep import FORM, Plan, grid, read_rows, work
from minilora.tree import named_params

ROWS = Path(__file__).parent.parent / "figures" / "rows.jsonl"


def nothing(run: Any, shared: Any) -> None:
    """A call that does nothing."""


def round_trips(run: Any, inputs: Inputs, count: int = 200) -> float:
    """Median milliseconds of one call, one after the other."""
    import distributed

    from minilora.experiments.cluster import Cluster

    place = {"n_workers": 1, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with (
        distributed.LocalCluster(processes=True, **place) as machines,
        distributed.Client(machines) as client,
    ):
        executor = Cluster(client, inputs)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            executor.submit(nothing, run).result()
            times.append(1000 * (time.perf_counter() - start))
        executor.closed.set()
    return median(times)


def keeping(rows: list[Row], count: int, more: int = 100) -> float:
    """Median milliseconds in which a sweep keeps one more row beside `count`."""
    many = []
    for i in range(count + more):
        config = rows[i % len(rows)]["config"] | {"seed": i}
        many.append(rows[i % len(rows)] | {"id": id_of(config), "config": config, "versions": versions()})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_bytes(b"".join(map(sealed, many[:count])))
        store = Store(file, FORM, {}, lambda cells: (), None)
        times = []
        for row in many[count:]:
            start = time.perf_counter()
            store.add(row)
            times.append(1000 * (time.perf_counter() - start))
    return median(times)


def main() -> None:
    """Count, time, print and write."""
    plan = Plan()
    inputs = read_inputs(plan.base, plan.targets)
    run = grid(plan, inputs.texts)[-1]
    rows = read_rows(ROWS)
    lines = [json.dumps(row).encode() for row in rows]
    row = {
        "base_parameters": sum(p.data.size for p in named_params(inputs.base).values()),
        "inputs_bytes": len(pickle.dumps(inputs)),
        "run_bytes": len(pickle.dumps((Job(work, inputs.source()), run))),
        "rows": len(lines),
        "row_bytes_mean": sum(map(len, lines)) / len(lines),
        "row_bytes_max": max(map(len, lines)),
        "keep_row_beside_10_ms": keeping(rows, 10),
        "keep_row_beside_10000_ms": keeping(rows, 10_000),
    }
    if importlib.util.find_spec("distributed"):
        row["round_trip_ms"] = round_trips(run, inputs)
    print(json.dumps(row, indent=1))
    write("cluster", [row])


if __name__ == "__main__":
    main()
