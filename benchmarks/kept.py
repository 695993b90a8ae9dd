"""List what the way back of one block keeps alive, by the name of the variable that holds it.

    python benchmarks/kept.py [D]

One block of the Llama of step.py, one part of its batch, every gradient wanted: the frozen base, LoRA
(r = 8) on all linear maps, LoRA with recomputation, and everything trained. Memory that several closures
share is listed once, under its first name. Writes results/kept.json and results/kept.md.
"""

import argparse
import contextlib
from typing import Any

import numpy as np
from common import RESULTS, SIZES, write

import minilora as ml
from minilora.fast.parallel import PART
from minilora.lora import holding, low_ranks
from minilora.ops import saved
from minilora.table import Table

KINDS = ("frozen base", "LoRA", "LoRA, recomputed", "everything trained")
PARTS = {"back_a": "attention", "back_m": "MLP"}


def kept(kind: str, size: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What the block's `back` keeps, without W + ΔW, which all blocks of a batch share."""
    D, L, H, F, T, V, N = size
    rng = np.random.default_rng(0)
    model = ml.llama(ml.Config(V, D, F, L, H, H), rng)
    if kind == "frozen base":
        ml.freeze(model)
    if kind.startswith("LoRA"):
        ml.inject(model, ml.LoraConfig(r=8), rng=rng)
    x = rng.standard_normal((min(N, PART // (T * D)), T, D), dtype=np.float32)
    with contextlib.ExitStack() as stack:
        adapters = low_ranks(model) if kind.startswith("LoRA") else []
        for pair in adapters:
            stack.enter_context(holding([pair], x.size // D))
        block = model.model.layers[-1]
        _, back = block(x, model.tables(T, np.float32), True, None, kind.endswith("recomputed"))
        seen = {id(adapter.held) for _, adapter in adapters}
        found = {}
        for name, a in saved(back).items():
            place = a.__array_interface__["data"][0]
            if place not in seen and id(a) not in seen:
                found[name] = a
            seen.add(place)
        return found


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("D", nargs="?", type=int, default=128, choices=[size[0] for size in SIZES])
    D = parser.parse_args().D
    size = next(size for size in SIZES if size[0] == D)
    found = {kind: kept(kind, size) for kind in KINDS}
    rows: list[dict[str, Any]] = []
    lines = []
    for name in dict.fromkeys(name for arrays in found.values() for name in arrays):
        half, _, rest = name.partition(".")
        arrays = [found[kind].get(name) for kind in KINDS]
        shape = next(a.shape for a in arrays if a is not None)
        rows.append({"name": name, "shape": shape, "bytes": {
            kind: a.nbytes for kind, a in zip(KINDS, arrays, strict=True) if a is not None
        }})  # fmt: skip
        cells = ["" if a is None else f"{a.nbytes / 1024:,.0f}" for a in arrays]
        lines.append((PARTS[half], f"`{rest}`", " x ".join(map(str, shape)), *cells))
    totals = [sum(a.nbytes for a in arrays.values()) / 1024 for arrays in found.values()]
    lines.append(("", "**all**", "", *(f"**{total:,.0f}**" for total in totals)))
    table = Table(("half", "array", "shape", *KINDS), lines).markdown("lll" + "r" * len(KINDS))
    print(table)
    write("kept", rows)
    title = f"What the way back of one block keeps alive, in KiB (D = {D}; `python benchmarks/kept.py`)"
    (RESULTS / "kept.md").write_text(f"# {title}\n\n{table}\n")


if __name__ == "__main__":
    main()
