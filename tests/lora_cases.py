"""LoRA files as the tools write them, and each module's ΔW by the tool; fixtures/lora_files says whose."""

import json
import re
from pathlib import Path

import numpy as np

from minilora.lora_files.names import is_flux, path_of

ROOT = Path(__file__).parent / "fixtures/lora_files"
READ = sorted(str(f.parent.relative_to(ROOT)) for f in ROOT.glob("*/*/expected.npz"))
UNIT = 2.0**-24  # of float32, in which the tools computed


def how(name):
    """What a file does not hold, as its user gives it."""
    about = json.loads((ROOT / name / "expected.json").read_text())
    if name.startswith("torchtune"):
        return {"alpha": about["alpha"], "heads": (about["num_heads"], about["num_kv_heads"])}
    if name.startswith("loralib"):
        return {"alpha": about["lora_alpha"], "r": about["r"]}
    if name.startswith("gguf"):
        config = json.loads((ROOT / name / "base_config.json").read_text())
        return {"heads": (config["num_attention_heads"], config["num_key_value_heads"])}
    return {}


def expected(name):
    """Module -> the tool's ΔW and perhaps W, by our names of modules."""
    with np.load(ROOT / name / "expected.npz") as file:
        held = dict(file)
    prefix = next((p for p in ("BA::", "hf::") if any(key.startswith(p) for key in held)), "")
    changes = {key[len(prefix) :].lstrip("."): held[key] for key in held if key.startswith(prefix)}
    flux = any(map(is_flux, changes))
    changes = {path_of(key, flux): dW for key, dW in changes.items() if "::" not in key}
    ours = [("transformer_bfl.", "transformer.")]
    ours += [("unet.", "")] if name.startswith("diffusers_old") else []
    for old, new in ours:
        changes = {re.sub(f"^{re.escape(old)}", new, key): dW for key, dW in changes.items()}
    experts = {m: dW for m, dW in changes.items() if dW.ndim == 3}
    apart = {
        m.replace(".switch_mlp.", f".experts.{e}."): one
        for m, dW in experts.items()
        for e, one in enumerate(dW)
    }
    return {m: dW for m, dW in changes.items() if m not in experts} | apart, held


def change(adapter, module):
    """ΔW (O, I) in float64, a convolution's as a matrix, an embedding's (V, D)."""
    A, B = (x.astype(np.float64) for x in adapter.factors(module))
    dW = adapter.pairs[module].scale * (B @ A)
    return dW.T if adapter.pairs[module].embedding else dW
