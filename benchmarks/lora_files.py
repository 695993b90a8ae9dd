"""How long `minilora inspect`, `compress` and `convert` take on a LoRA of SDXL as kohya's trainer writes it.

    python benchmarks/lora_files.py            writes benchmarks/results/lora_files.md and .json

The file is generated: names and shapes of all linear maps that sd-scripts adapts in SDXL's U-Net and in its
two text encoders, r = 32, float32. A command runs as a user types it, in a process of its own, the
interpreter's start included; its peak memory is that of the process. The plain read, in pieces of 1 MiB,
says how fast the file comes from the page cache, the copy how fast it goes to the disk, for which `compress`
and `convert` wait, too. NumPy's QR of all factors, on all cores, is the floor of `compress`. Seconds of
processors depend little on who else works on the machine.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import COMMAND, RESULTS, fresh, machine, write

from minilora.formats.safetensors import layout
from minilora.table import Table, counted

R, ALPHA = 32, 16.0
TRANSFORMERS = {  # place in the U-Net: width, blocks
    "input_blocks_4_1": (640, 2), "input_blocks_5_1": (640, 2), "input_blocks_7_1": (1280, 10),
    "input_blocks_8_1": (1280, 10), "middle_block_1": (1280, 10), "output_blocks_0_1": (1280, 10),
    "output_blocks_1_1": (1280, 10), "output_blocks_2_1": (1280, 10), "output_blocks_3_1": (640, 2),
    "output_blocks_4_1": (640, 2), "output_blocks_5_1": (640, 2),
}  # fmt: skip
TEXT = {"lora_te1": (768, 12), "lora_te2": (1280, 32)}  # width, layers
CONTEXT = 2048  # width of both encoders' outputs together
READ = """
import sys
with open(sys.argv[1], "rb", buffering=0) as file:
    piece = bytearray(1 << 20)
    while file.readinto(piece):
        pass
"""
COPY = """
import os, sys
with open(sys.argv[1], "rb", buffering=0) as file, open(sys.argv[2], "wb", buffering=0) as out:
    while piece := file.read(1 << 20):
        out.write(piece)
    os.fsync(out.fileno())
"""
FACTORED = """
import sys
import numpy as np
from minilora.backend import on_cores
from minilora.formats.safetensors import open_tensors
tensors = open_tensors(sys.argv[1])
def factored(name):
    a = tensors[name].astype(np.float64)
    np.linalg.qr(a if len(a) > a.shape[1] else a.T)
for _ in on_cores(factored, [name for name in tensors if tensors.shapes[name]]):
    pass
"""
WORK = {  # command -> what it makes
    "compress --rank 8": "small", "compress --energy 0.9": "small", "convert --to peft": "peft",
    "convert --to diffusers": "diffusers.safetensors",
}  # fmt: skip


def maps() -> Iterator[tuple[str, int, int]]:
    """(name, O, I) of every linear map."""
    for place, (d, blocks) in TRANSFORMERS.items():
        at = f"lora_unet_{place}"
        yield f"{at}_proj_in", d, d
        yield f"{at}_proj_out", d, d
        for block in (f"{at}_transformer_blocks_{i}" for i in range(blocks)):
            for attention, width in (("attn1", d), ("attn2", CONTEXT)):
                yield f"{block}_{attention}_to_q", d, d
                yield f"{block}_{attention}_to_k", d, width
                yield f"{block}_{attention}_to_v", d, width
                yield f"{block}_{attention}_to_out_0", d, d
            yield f"{block}_ff_net_0_proj", 8 * d, d  # GEGLU: two halves
            yield f"{block}_ff_net_2", d, 4 * d
    for encoder, (d, layers) in TEXT.items():
        for layer in (f"{encoder}_text_model_encoder_layers_{i}" for i in range(layers)):
            yield from ((f"{layer}_self_attn_{part}_proj", d, d) for part in ("q", "k", "v", "out"))
            yield f"{layer}_mlp_fc1", 4 * d, d
            yield f"{layer}_mlp_fc2", d, 4 * d


def generate(path: Path) -> int:
    """Write a file whose spectra fall, as those of trained ones do; the number of its modules."""
    rng = np.random.default_rng(0)
    fall = np.exp(-np.arange(R) / 12).astype(np.float32)
    tensors = {}
    for name, O, I in maps():  # noqa: E741
        tensors[f"{name}.lora_down.weight"] = rng.standard_normal((R, I), np.float32) / np.float32(I**0.5)
        tensors[f"{name}.lora_up.weight"] = rng.standard_normal((O, R), np.float32) * fall * np.float32(0.02)
        tensors[f"{name}.alpha"] = np.array(ALPHA, np.float32)
    with open(path, "wb") as file:
        file.writelines(layout(tensors, metadata={"ss_base_model_version": "sdxl_base_v1-0"}))
    return len(tensors) // 3


class Run(NamedTuple):
    """Seconds, those of all processors that it took, and peak MB."""

    seconds: float
    processor: float
    peak: float


def measured(program: str, *args: Any) -> Run:
    """One run in a process of its own."""
    before = os.times()
    seconds, peak = fresh(program, *args)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(seconds, spent, peak)


def main() -> None:
    """Generate, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sdxl.safetensors"
        modules, size = generate(file), file.stat().st_size
        fresh(READ, file)  # the page cache is warm for all
        load = os.getloadavg()[0]
        found = {what: [] for what in ("a plain read", "a copy", "QR of all factors", "inspect", *WORK)}
        for i in range(rounds):
            found["a plain read"].append(measured(READ, file))
            found["a copy"].append(measured(COPY, file, Path(folder) / "copy"))
            found["QR of all factors"].append(measured(FACTORED, file))
            found["inspect"].append(measured(COMMAND, "inspect", file))
            for what, made in WORK.items():
                name, *options = what.split()
                out = Path(folder) / f"{i}" / made
                found[what].append(measured(COMMAND, name, file, out, *options))
                shutil.rmtree(out.parent)
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
        (
            row["what"], f"{row['seconds']:.2f}", f"{row['processor_seconds']:.2f}",
            f"{row['peak_MB']:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    table = Table(("command", "seconds", "of processors", "peak MB"), cells).markdown("lrrr")
    about = machine()
    text = (
        f"# `minilora` on a LoRA of SDXL in kohya's form (`python benchmarks/lora_files.py`)\n\n"
        f"{modules} modules, r = {R}, float32: {size / 1e6:.0f} MB. Medians of "
        f"{counted(rounds, 'run', 'runs')}, and the highest peak; {about['cores']} cores of "
        f"{about['processor']}, Python {about['python']}, NumPy {about['numpy']}. The machine's load before "
        f"it was {load:.1f}."
        f"\n\n{table}\n"
    )
    print(text)
    write("lora_files", [{"modules": modules, "bytes": size, "load": load, **row} for row in rows])
    (RESULTS / "lora_files.md").write_text(text)


if __name__ == "__main__":
    main()
