"""Time a LoRA training step on a GPU beside PyTorch with PEFT, and beside its own bare matrix products.

    python benchmarks/gpu.py [D ...]                # matrix products in float32
    CUPY_TF32=1 python benchmarks/gpu.py [D ...]    # in TF32, in PyTorch too
    python benchmarks/gpu.py --dry-run              # all of this code without a GPU; no figure

Step and products are those of step.py, on CuPy; the share is the time of the products in that of the step.
The rival is the same step of the same weights in PyTorch: eager mode (no torch.compile), the `sdpa`
attention of transformers, PEFT's LoRA on the same maps, torch.optim.AdamW with the same clipping. Both
round products alike, as CUPY_TF32 says. Medians over rounds that time one after the other, each round
waiting for the device.

The numbers are held against the CPU's. Both make the same roundings in another order, so the device may be
off by what the CPU is off by: for the loss and each gradient, |device - cpu| is at most 8 |cpu - exact| in
the norm, with float64 for exact, u |exact| where the CPU was lucky, and 2^13 times that in TF32, which
keeps 11 bits of 24; 8 allows for luck. Transfers to the host are counted on the stand-in device of the
tests, which runs the same step. Prints a table and writes benchmarks/results/gpu.json.
"""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

import numpy as np
from step import fresh, medians, products, step

import minilora as ml
from minilora import backend
from minilora.backend import to_host
from minilora.errors import ConfigError
from minilora.tree import named_params

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from device import DeviceArray, namespace

SIZES = (
    # D, L, H, F, T, V, N
    (128, 4, 4, 352, 128, 256, 16),
    (512, 4, 8, 1376, 256, 1024, 8),
    (2048, 2, 16, 5504, 512, 4096, 4),
    (4096, 2, 32, 11008, 512, 4096, 4),
)
DRY = ((24, 2, 3, 40, 10, 29, 2), (32, 1, 4, 24, 6, 19, 3))
PACKAGES = ("torch", "transformers", "peft")
PRECISION = "TF32" if os.environ.get("CUPY_TF32", "0") != "0" else "float32"
UNIT = {"float32": 2.0**-24, "TF32": 2.0**-11}


def use(library: str) -> None:
    """Arrays lie on the host, on a GPU, or on the stand-in device."""
    if library == "standin":
        backend.install(namespace)
    else:
        backend.use(library)


def waited(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run, until the device has done it all."""

    def wait() -> Any:
        result = run()
        if backend.name == "cupy":
            backend.xp.cuda.Device().synchronize()
        return result

    return wait


def transfers(size: tuple[int, ...]) -> int:
    """How often a step brings something to the host, on the stand-in device."""
    run = step("lora", *size)
    run()
    before = DeviceArray.transfers
    run()
    return DeviceArray.transfers - before


def numbers(size: tuple[int, ...], dtype: Any) -> dict[str, np.ndarray]:
    """The loss and all gradients of one short text, on the host; both factors at random."""
    D, L, H, F, T, V, _ = size
    rng = np.random.default_rng(0)
    model = ml.llama(ml.Config(V, D, F, L, H, H), rng)
    ml.inject(model, ml.LoraConfig(r=8, init="both"), rng=rng)
    for p in named_params(model).values():
        p.data = p.data.astype(dtype)
    loss, back = model.loss(*rng.integers(0, V, (2, 1, min(T, 64))), train=True)
    back()
    return {"loss": to_host(loss)} | {path: to_host(p.grad) for path, p in ml.trained(model).items()}


def worst(device: dict[str, Any], cpu: dict[str, Any], exact: dict[str, Any], precision: str) -> float:
    """The largest difference between device and CPU as a share of its bound."""
    norm, u = np.linalg.norm, UNIT["float32"]
    return max(
        float(norm(device[k] - cpu[k]) / max(norm(cpu[k] - exact[k]), u * norm(exact[k])))
        for k in exact
    ) / (8 * UNIT[precision] / u)  # fmt: skip


def installed(where: str) -> bool:
    """Whether PyTorch, for this device, and PEFT are here."""
    there = all(util.find_spec(name) for name in PACKAGES)
    return there and (where == "cpu" or import_module("torch").cuda.is_available())


def rival(size: tuple[int, ...], where: str) -> Callable[[], float]:
    """The step in PyTorch with PEFT, from the same weights; it gives the loss."""
    from dataclasses import asdict

    import peft
    import torch
    import transformers

    torch.set_float32_matmul_precision("high" if PRECISION == "TF32" else "highest")
    ours, *batch = fresh("lora", *size)
    config = transformers.LlamaConfig(**asdict(ours.config), attn_implementation="sdpa")
    base = transformers.LlamaForCausalLM(config)
    weights = {path.replace(".base.", "."): p for path, p in named_params(ours).items() if not p.trainable}
    # a tied head has a second name there
    base.load_state_dict({k: torch.tensor(to_host(p.data)) for k, p in weights.items()}, strict=False)
    lora = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(base, lora).to(where).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-3, weight_decay=0.0)
    ids, labels = (torch.tensor(a, device=where) for a in batch)

    def run() -> float:
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # which waits for the device

    return run


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import cupy

    runtime = cupy.cuda.runtime
    return {
        "gpu": runtime.getDeviceProperties(0)["name"].decode(),
        "cuda": {"runtime": runtime.runtimeGetVersion(), "driver": runtime.driverGetVersion()},
        "cupy": cupy.__version__,
        **{name: metadata.version(name) for name in ("numpy", *PACKAGES) if util.find_spec(name)},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def measure(size: tuple[int, ...], library: str, rounds: int) -> dict[str, Any]:
    """The row of one size."""
    use("standin")
    count = transfers(size if library == "standin" else DRY[0])
    use("numpy")
    cpu, exact = (numbers(size, dtype) for dtype in (np.float32, np.float64))
    use(library)
    difference = worst(numbers(size, np.float32), cpu, exact, PRECISION)
    if difference > 1:
        sys.exit(f"D = {size[0]}: the device is off the CPU by {difference:.1f} times the bound")
    runs = {"products": products(*size), "lora": step("lora", *size)}
    where = "cpu" if library == "standin" else "cuda"
    if installed(where):
        runs["torch"] = rival(size, where)
        losses = runs["lora"](), runs["torch"]()
        if not math.isclose(*losses, rel_tol=100 * UNIT[PRECISION]):
            sys.exit(f"D = {size[0]}: the losses {losses} are of two functions")
    ms = medians({name: waited(run) for name, run in runs.items()}, rounds)
    row = {"size": dict(zip("DLHFTVN", size, strict=True)), "transfers": count, "difference": difference}
    return row | {"ms": ms, "share_of_products": ms["products"] / ms["lora"]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, tiny, and without a figure")
    parser.add_argument("D", nargs="*", type=int, help="only these widths")
    given = parser.parse_args()
    try:
        use("standin" if given.dry_run else "cupy")
    except ConfigError as e:
        sys.exit(f"no GPU, so no figure; --dry-run does without: {e}")
    if given.dry_run:
        for size in DRY:
            row = measure(size, "standin", 1)
            torch = "PyTorch + PEFT: the same loss" if "torch" in row["ms"] else "no PyTorch + PEFT: skipped"
            print(f"D = {size[0]}: transfers {row['transfers']}, difference {row['difference']:g}; {torch}")
        return print("dry run on the stand-in device: no figure")
    print(f"matrix products in {PRECISION} on both sides; torch: eager mode, sdpa attention, PEFT")
    columns = ("D", "products", "LoRA", "torch", "share", "transfers", "difference")
    print(*(f"{name:>10}" for name in columns), " (ms)")
    rows = []
    for size in SIZES:
        if given.D and size[0] not in given.D:
            continue
        rows.append(row := measure(size, "cupy", 20))
        times = (f"{row['ms'].get(name, math.nan):10.2f}" for name in ("products", "lora", "torch"))
        ratios = f"{row['share_of_products']:10.0%} {row['transfers']:10} {row['difference']:10.2g}"
        print(f"{size[0]:10}", *times, ratios, flush=True)
    if len(rows) == len(SIZES):
        out = Path(__file__).parent / "results" / "gpu.json"
        results = json.loads(out.read_text()) if out.exists() else {}
        results[PRECISION] = {"rows": rows} | machine()
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
