"""How long `minilora inspect` and `compress` take on a LoRA of SDXL as kohya's trainer writes it.

    python benchmarks/lora_files.py            writes benchmarks/results/lora_files.md and .json

The file is generated: names and shapes of all linear maps that sd-scripts adapts in SDXL's U-Net and in its
two text encoders, r = 32, float32. A command runs as a user types it, in a process of its own, the
interpreter's start included; its peak memory is that of the process. The plain read, in pieces of 1 MiB,
says how fast the file comes from the page cache.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import COMMAND, RESULTS, fresh, machine, write

from minilora.formats.safetensors import layout
from minilora.table import Table

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


def main() -> None:
    """Generate, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sdxl.safetensors"
        modules, size = generate(file), file.stat().st_size
        fresh(READ, file)  # the page cache is warm for all
        found: dict[str, list[tuple[float, float]]] = {
            "a plain read": [],
            "inspect": [],
            "compress --rank 8": [],
        }
        for i in range(rounds):
            found["a plain read"].append(fresh(READ, file))
            found["inspect"].append(fresh(COMMAND, "inspect", file))
            found["compress --rank 8"].append(
                fresh(COMMAND, "compress", file, Path(folder) / f"out{i}", "--rank", 8)
            )
    rows = [
        {"what": what, "seconds": statistics.median(s for s, _ in runs), "peak_MB": max(mb for _, mb in runs)}
        for what, runs in found.items()
    ]
    cells = [(row["what"], f"{row['seconds']:.2f}", f"{row['peak_MB']:.0f}") for row in rows]
    table = Table(("command", "seconds", "peak MB"), cells).markdown("lrr")
    about = machine()
    text = (
        f"# `minilora` on a LoRA of SDXL in kohya's form (`python benchmarks/lora_files.py`)\n\n"
        f"{modules} modules, r = {R}, float32: {size / 1e6:.0f} MB. Medians of {rounds} runs, and the "
        f"highest peak; {about['cores']} cores of {about['processor']}, Python {about['python']}, NumPy "
        f"{about['numpy']}.\n\n{table}\n"
    )
    print(text)
    write("lora_files", [{"modules": modules, "bytes": size, **row} for row in rows])
    (RESULTS / "lora_files.md").write_text(text)


if __name__ == "__main__":
    main()
