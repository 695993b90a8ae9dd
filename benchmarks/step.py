"""Time one training step, LoRA on all linear maps and full, beside the bare matrix products of the step.

    OPENBLAS_NUM_THREADS=1 python benchmarks/step.py [D ...]

Four sizes; each round times, one after the other, the products alone (into ready buffers, nothing
else), a LoRA step (r = 8) and a full step, AdamW included; medians over the rounds. The products are
those of forward and of the gradients that a step with a frozen base needs: y = x Wᵀ and dx = dy W for
every map, without the dx that nobody wants (q, k, v of the first block), two in the attention forward
and four on the way back, and the head. LoRA's own thin products are not among them. Prints a table and
writes benchmarks/results/step.json.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import minilora as ml
from minilora.backend import keep_memory

SIZES = (
    # D, L, H, F, T, V, N
    (64, 2, 4, 176, 64, 96, 16),
    (128, 4, 4, 352, 128, 256, 16),
    (256, 6, 8, 704, 128, 256, 16),
    (512, 6, 8, 1376, 256, 1024, 8),
)
ROUNDS = {64: 60, 128: 20, 256: 9, 512: 5}


def products(D: int, L: int, H: int, F: int, T: int, V: int, N: int) -> Callable[[], None]:
    """All bare matrix products of a LoRA step, with operands and results in place."""
    rng = np.random.default_rng(0)
    M, E = N * T, D // H

    def array(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    jobs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def job(a: np.ndarray, b: np.ndarray) -> None:
        jobs.append((a, b, np.matmul(a, b)))

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
            np.matmul(a, b, out=out)

    return run


def step(mode: str, D: int, L: int, H: int, F: int, T: int, V: int, N: int) -> Callable[[], None]:
    """One training step of a fresh model."""
    rng = np.random.default_rng(0)
    model = ml.llama(ml.Config(V, D, F, L, H, H), rng)
    if mode == "lora":
        ml.inject(model, ml.LoraConfig(r=8), rng=rng)
    params, optimizer = ml.trained(model), ml.AdamW(1e-3)
    ids, labels = rng.integers(0, V, (2, N, T))

    def run() -> None:
        _, back = model.loss(ids, labels, train=True)
        back()
        optimizer.step(params)

    return run


def measure(size: tuple[int, ...]) -> dict[str, float]:
    """Median milliseconds of each, the three timed in turn."""
    runs = {"products": products(*size), "lora": step("lora", *size), "full": step("full", *size)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ROUNDS[size[0]] + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= 2:  # the first two warm up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(t) for name, t in times.items()}


def main() -> None:
    """Measure, print and write."""
    keep_memory()
    chosen = [int(a) for a in sys.argv[1:]] or [size[0] for size in SIZES]
    rows = []
    print(f"{'D':>4} {'products':>9} {'LoRA':>8} {'full':>8} {'LoRA/products':>14} {'LoRA/full':>10}   (ms)")
    for size in SIZES:
        if size[0] not in chosen:
            continue
        t = measure(size)
        ratios = {"lora_to_products": t["lora"] / t["products"], "lora_to_full": t["lora"] / t["full"]}
        rows.append({"size": dict(zip("DLHFTVN", size, strict=True)), "ms": t, **ratios})
        print(f"{size[0]:4} {t['products']:9.1f} {t['lora']:8.1f} {t['full']:8.1f} "
              f"{ratios['lora_to_products']:14.2f} {ratios['lora_to_full']:10.2f}", flush=True)  # fmt: skip
    result = {
        "rows": rows,
        "threads": os.environ["OPENBLAS_NUM_THREADS"],
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    if len(rows) == len(SIZES):
        out = Path(__file__).parent / "results"
        out.mkdir(exist_ok=True)
        (out / "step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
