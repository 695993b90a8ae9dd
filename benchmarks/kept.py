"""List what the backward of one block keeps alive, by the name of the variable that holds it.

    python benchmarks/kept.py [D]

One block of the Llama of step.py, one micro-batch, every gradient needed: the frozen base, LoRA
(r = 8) on all linear maps, LoRA with the two ways of recomputation, and everything trained. Memory that
several closures share is listed once, under its first name. Writes results/kept.json and results/kept.md.
"""

import argparse
from typing import Any

import numpy as np
from common import RESULTS, SIZES, write

import minilora as ml
from minilora.fast.folded import folded, places
from minilora.fast.parallel import MICRO_BATCH
from minilora.fast.recompute import HOW, recompute
from minilora.layers import Need
from minilora.ops import saved
from minilora.table import Table

KINDS = ("frozen base", "LoRA", *(f"LoRA, {how}" for how in HOW), "everything trained")
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
    x = rng.standard_normal((min(N, MICRO_BATCH // (T * D)), T, D), dtype=np.float32)
    if how := kind.partition(", ")[2]:
        recompute(model, how)
    adapters = places(model)
    with folded([adapters], x.size // D):
        _, back = model.model.layers[-1](x, model.tables(T, np.float32), Need.ALL)
        seen = {id(place.parent[place.name].weight.data) for place in adapters}
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
    title = f"What the backward of one block keeps alive, in KiB (D = {D}; `python benchmarks/kept.py`)"
    (RESULTS / "kept.md").write_text(f"# {title}\n\n{table}\n")


if __name__ == "__main__":
    main()
