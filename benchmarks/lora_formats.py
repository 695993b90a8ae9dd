"""How exactly the LoRA files of other tools are read: the ΔW of every module beside the tool's own.

    python benchmarks/lora_formats.py

Reads every file of tests/fixtures/lora_files and compares; writes results/lora_formats.md. The tests assert a
bound for each entry that follows from the dtype and the rank; here is what was found.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import RESULTS

import minilora as ml
from minilora.errors import MiniloraError
from minilora.peft.convert import convert
from minilora.table import Table

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from lora_cases import READ, ROOT, change, expected, how

TOOLS = {  # folder -> who writes such files, and what is written for it by `convert`
    "peft": ("PEFT", "peft"), "kohya_sdscripts": ("kohya's sd-scripts", "kohya"),
    "kohya_sdxl": ("kohya's sd-scripts, SDXL", "kohya"), "kohya_flux": ("kohya's sd-scripts, Flux", "kohya"),
    "kohya_lycoris": ("LyCORIS", "kohya"), "diffusers": ("diffusers", "diffusers"),
    "diffusers_old": ("diffusers 0.17", ""), "mlx": ("mlx-lm", "mlx"), "gguf": ("llama.cpp", "gguf"),
    "torchtune": ("torchtune", ""), "loralib": ("loralib", ""),
    "synthetic_names": ("names of OneTrainer, ai-toolkit, ComfyUI, SimpleTuner, XLabs", ""),
}  # fmt: skip
LOADED = {
    "peft": "PEFT",
    "kohya": "diffusers, LyCORIS",
    "diffusers": "diffusers",
    "mlx": "mlx-lm",
    "gguf": "gguf",
}

HEAD = """# LoRA files of other tools

`python benchmarks/lora_formats.py`: the largest |ΔW' - ΔW| / |ΔW| of a module, where ΔW' is what minilora
reads and ΔW what the tool itself computed from the same file (of DoRA: the merged weight). The tools compute
in float32, whose unit roundoff is 6e-8; GGUF in f16, bf16 and q8_0 is compared with values before rounding.
The last column is the form that `convert` writes, and what reads it in the tests.

"""


def compared(path: Path, name: str) -> tuple[int, float]:
    """How many modules a file has, and the largest |ΔW' - ΔW| / |ΔW|."""
    adapter, (changes, held) = ml.open_adapter(path, **how(name)), expected(name)
    if "xlabs" in name:  # the expected parts are those of diffusers
        with tempfile.TemporaryDirectory() as temp:
            convert(path, Path(temp, "a.safetensors"), "diffusers")
            adapter = ml.open_adapter(Path(temp, "a.safetensors"))
            return len(changes), max(relative(change(adapter, m), dW) for m, dW in changes.items())
    off = []
    for module, pair in adapter.pairs.items():
        ours, theirs = change(adapter, module), changes[module]
        if pair.vectors and f"W::{module}" in held:  # DoRA: what it makes of W
            W = held[f"W::{module}"].astype(np.float64).reshape(pair.shape)
            m = adapter.value(pair.vectors["lora_magnitude_vector"]).astype(np.float64).reshape(-1, 1)
            whole = W + ours
            ours = m * whole / np.linalg.norm(whole, axis=1, keepdims=True)
            theirs = held[f"Wmerged::{module}"]
        if name.startswith("loralib") and module == "qkv":  # one of its three parts is not adapted
            theirs = theirs.reshape(3, -1, theirs.shape[1])[[0, 2]]
        if adapter.settings.fan_in_fan_out or (name.startswith("loralib") and module in ("emb", "c_attn")):
            theirs = theirs.T
        off.append(relative(ours, theirs))
    return len(off), max(off)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|, whatever the shape."""
    theirs = theirs.astype(np.float64).ravel()
    return float(np.linalg.norm(ours.ravel() - theirs) / np.linalg.norm(theirs))


def main() -> None:
    """Compare every file and write the table."""
    found = defaultdict(list)
    refused = defaultdict(list)
    for name in READ:
        family = name.split("/")[0]
        folder = ROOT / name
        if name == "torchtune/dora" or name == "gguf/qwen_small":
            continue  # magnitudes in torchtune's order, a scale that the file has lost: the tests say how
        for path in sorted(folder.glob("*.gguf")) or [folder / "style" if "subfolder" in name else folder]:
            kind = path.suffixes[0][1:] if path.suffix == ".gguf" else ""
            try:
                found[family, kind].append(compared(path, name))
            except MiniloraError as e:
                refused[family].append(f"{path.name}: {type(e).__name__}")
    lines = []
    for (family, kind), results in found.items():
        tool, form = TOOLS[family]
        modules = sum(count for count, _ in results)
        worst = max(off for _, off in results)
        written = f"{form}, read by {LOADED[form]}" if form else "-"
        called = f"{tool}, {kind}" if kind else tool
        lines.append((called, str(len(results)), str(modules), f"{worst:.0e}", written))
    table = Table(("written by", "files", "modules", "largest difference", "`convert --to`"), lines)
    some = "; ".join(sorted(name for names in refused.values() for name in names))
    text = f"{HEAD}{table.markdown('lrrrl')}\n\nRefused by name: {some}.\n"
    (RESULTS / "lora_formats.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
