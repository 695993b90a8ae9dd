"""How long `minilora inspect` takes on an adapter of a 7B model, beside the dense decomposition of its ΔW.

    python benchmarks/microscope.py            writes benchmarks/results/microscope.json

The adapter is generated: 32 layers of seven linear maps, widths 4096 and 11008, r = 16, float32, in PEFT's
form (160 MB). The command runs as a user types it, the interpreter's start included, with the table alone
and with figures and report; its peak memory is that of the process. One module's spectrum is compared with
LAPACK's decomposition of the dense ΔW (1024 of its rows at first, then all with --whole), side by side.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import COMMAND, fresh

from minilora.peft.config import peft_config
from minilora.peft.folder import PREFIX, write_adapter
from minilora.spectra import thin_values

RESULTS = Path(__file__).parent / "results"
D, F, L, R = 4096, 11008, 32, 16
SHAPES = {
    **{f"self_attn.{k}_proj": (D, D) for k in "qkvo"},
    "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
}  # fmt: skip


def generate(folder):
    """An adapter whose spectra fall, as those of trained ones do."""
    rng = np.random.default_rng(0)
    tensors = {}
    fall = np.exp(-np.arange(R) / 6).astype(np.float32)
    for layer in range(L):
        for module, (O, I) in SHAPES.items():  # noqa: E741
            at = f"{PREFIX}model.layers.{layer}.{module}.lora_"
            A = rng.standard_normal((R, I), np.float32) / np.float32(I**0.5)
            B = rng.standard_normal((O, R), np.float32) * fall * np.float32(0.02)
            tensors |= {f"{at}A.weight": A, f"{at}B.weight": B}
    names = {f"model.layers.{layer}.{module}": (R, 16) for layer in range(L) for module in SHAPES}
    write_adapter(folder, peft_config(names, [m.split(".")[-1] for m in SHAPES]), tensors)


def dense(shape, seed=1):
    """Thin against dense on one module: seconds of both, and the largest relative difference."""
    (O, I), rng = shape, np.random.default_rng(seed)  # noqa: E741
    B, A = rng.standard_normal((O, R), np.float32), rng.standard_normal((R, I), np.float32)
    thin_values(B, A)
    start = time.perf_counter()
    thin = thin_values(B, A)
    between = time.perf_counter()
    whole = np.linalg.svd(B.astype(np.float64) @ A, compute_uv=False)[:R]
    end = time.perf_counter()
    difference = float(np.max(np.abs(thin - whole) / whole))
    return {
        "shape": shape, "thin_s": between - start, "dense_s": end - between,
        "times_faster": (end - between) / (between - start), "relative_difference": difference,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="a whole 4096 x 4096 ΔW too: minutes")
    options = parser.parse_args()
    found = {"modules": L * len(SHAPES), "rank": R}
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        generate(adapter)
        found["bytes"] = sum(f.stat().st_size for f in adapter.iterdir())
        kinds = {"table": [], "figures": []}
        for i in range(options.rounds):
            kinds["table"].append(fresh(COMMAND, "inspect", adapter))
            kinds["figures"].append(fresh(COMMAND, "inspect", adapter, "--out", Path(folder) / f"out{i}"))
        for kind, runs in kinds.items():
            found[kind] = {
                "seconds": statistics.median(s for s, _ in runs),
                "all_seconds": [s for s, _ in runs],
                "peak_MB": max(mb for _, mb in runs),
            }
    shapes = [(1024, 4096), *([(4096, 4096)] if options.whole else [])]
    found["dense"] = [dense(shape) for shape in shapes]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "microscope.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
