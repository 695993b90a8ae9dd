"""How long `minilora merge` takes on a base that it merges by names, beside a plain copy of its files.

    python benchmarks/merge_by_name.py         writes benchmarks/results/merge_by_name.md and .json

The base is generated: a gigabyte of bfloat16 in four shards, a decoder's maps of width 2048 without a config;
the LoRA has r = 16 on every map. The copy goes through the page cache in pieces of 1 MiB and ends, as merging
does, when each file is on the disk. A command runs as a user types it, in a process of its own.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import COMMAND, RESULTS, machine, write
from lora_files import Run, measured

from minilora.formats.safetensors import layout
from minilora.table import Table

R, LAYERS, SHARDS = 16, 10, 4
MAPS = {
    "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (2048, 2048), "self_attn.v_proj": (2048, 2048),
    "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (5632, 2048), "mlp.up_proj": (5632, 2048),
    "mlp.down_proj": (2048, 5632),
}  # fmt: skip
COPY = """
import os, sys
from pathlib import Path
os.mkdir(sys.argv[2])
for path in Path(sys.argv[1]).iterdir():
    with open(path, "rb", buffering=0) as old, open(Path(sys.argv[2], path.name), "wb", buffering=0) as new:
        while piece := old.read(1 << 20):
            new.write(piece)
        os.fsync(new.fileno())
"""


def generate(folder: Path) -> tuple[Path, Path, int]:
    """A base's folder, an adapter's file, and the bytes of the base."""
    rng, shapes = np.random.default_rng(0), dict(MAPS)
    names = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in shapes]
    weight_map, size, base, factors = {}, 0, folder / "base", {}
    base.mkdir()
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        some = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        tensors = {f"{n}.weight": rng.standard_normal(shapes[n.split(".", 3)[3]], np.float32) for n in some}
        with open(base / file, "wb") as out:
            out.writelines(layout(tensors, "bfloat16"))
        weight_map |= dict.fromkeys(tensors, file)
        size += (base / file).stat().st_size
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in names:
        O, I = shapes[name.split(".", 3)[3]]  # noqa: E741
        factors[f"{name}.lora_A.weight"] = rng.standard_normal((R, I), np.float32)
        factors[f"{name}.lora_B.weight"] = rng.standard_normal((O, R), np.float32) / np.float32(100)
        factors[f"{name}.alpha"] = np.array(R, np.float32)
    with open(folder / "lora.safetensors", "wb") as out:
        out.writelines(layout(factors))
    return base, folder / "lora.safetensors", size


def main() -> None:
    """Generate, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    found: dict[str, list[Run]] = {"a plain copy": [], "merge": []}
    with tempfile.TemporaryDirectory() as name:
        base, lora, size = generate(folder := Path(name))
        load, out = os.getloadavg()[0], folder / "out"
        for _ in range(rounds):
            for what, program, given in (
                ("a plain copy", COPY, (base, out)),
                ("merge", COMMAND, ("merge", base, lora, out)),
            ):
                found[what].append(measured(program, *given))
                shutil.rmtree(out)
    rows: list[dict[str, Any]] = [
        {
            "what": what,
            "seconds": statistics.median(run.seconds for run in runs),
            "processor_seconds": statistics.median(run.processor for run in runs),
            "peak_MB": max(run.peak for run in runs),
        }
        for what, runs in found.items()
    ]
    cells = [
        (row["what"], f"{row['seconds']:.2f}", f"{row['processor_seconds']:.2f}", f"{row['peak_MB']:.0f}")
        for row in rows
    ]
    table = Table(("command", "seconds", "of processors", "peak MB"), cells).markdown("lrrr")
    about, largest = machine(), max(map(math.prod, MAPS.values()))
    text = (
        f"# Merging by names beside a plain copy (`python benchmarks/merge_by_name.py`)\n\n"
        f"A base of {size / 1e6:,.0f} MB in bfloat16, {LAYERS * len(MAPS)} maps in {SHARDS} shards, and a "
        f"LoRA with r = {R} on each. The largest tensor takes {8 * largest / 1e6:.0f} MB in float64. Medians "
        f"of {rounds} runs, and the highest peak; {about['cores']} cores of {about['processor']}, "
        f"Python {about['python']}, NumPy {about['numpy']}. The machine's load before it was {load:.1f}."
        f"\n\n{table}\n"
    )
    print(text)
    write("merge_by_name", [{"bytes": size, "load": load, **row} for row in rows])
    (RESULTS / "merge_by_name.md").write_text(text)


if __name__ == "__main__":
    main()
