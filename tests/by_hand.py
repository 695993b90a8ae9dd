"""Adapters' folders and merged weights without the package's code: the oracle of what it reads and writes.

NumPy alone, on the host; only the bytes of a safetensors file are left to `open_tensors`, which has its own
oracle.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from minilora.formats.safetensors import open_tensors

U32, U64 = 2.0**-24, 2.0**-53
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FILES = Path(__file__).parent / "fixtures/lora_files"
USUAL = {"peft_type": "LORA", "lora_alpha": 16, "task_type": "CAUSAL_LM"}


def write_peft(folder, factors, more=None, metadata=None, **config):
    """A folder as PEFT writes it: module -> (A, B), and more tensors by their whole names.

    `target_modules` are all modules, the rank that of the first; the others have an entry in rank_pattern.
    """
    first = len(next(iter(factors.values()))[0])
    given = USUAL | {"r": first, "target_modules": sorted(factors)} | config
    given["rank_pattern"] = {f"^{re.escape(m)}": len(A) for m, (A, _) in factors.items() if len(A) != first}
    tensors = dict(more or {})
    for module, (A, B) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(A)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(B)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(given))
    save_file(tensors, folder / WEIGHTS, metadata or {"format": "pt"})
    return folder


def of_pattern(pattern, module, usual):
    """The first value whose key PEFT takes to mean this module."""
    return next((v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", module)), usual)


def read_peft(folder):
    """(module -> (A, B, s) in float64, tensors by name without the prefix, config) of a folder."""
    config = json.loads((folder / CONFIG).read_text())
    stored = open_tensors(folder / WEIGHTS)
    tensors = {name.removeprefix(PREFIX): stored[name] for name in stored}
    found = {}
    for name in tensors:
        if match := re.fullmatch(r"(.+)\.(lora_|lora_embedding_)A(\.weight)?", name):
            module, kind, end = match.groups("")
            A, B = (tensors[f"{module}.{kind}{half}{end}"] for half in "AB")
            A, B = A.reshape(len(A), -1).astype(float), B.reshape(B.shape[0], B.shape[1]).astype(float)
            r = of_pattern(config.get("rank_pattern"), module, config["r"])
            alpha = of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
            assert (len(A), B.shape[1]) == (r, r)
            found[module] = A, B, alpha / (np.sqrt(r) if config.get("use_rslora") else r)
    return found, tensors, config


def read_kohya(file):
    """Module -> (down, up, scale) of one of kohya's files, as stored."""
    tensors, found = open_tensors(file), {}
    for m in (name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")):
        down, up, alpha = (tensors[f"{m}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        found[m] = down, up, float(alpha) / len(down)
    return found


def flat(down, up):
    """B (O, r) and A (r, I) in float64, of a convolution's factors, too."""
    return up.reshape(len(up), -1).astype(float), down.reshape(len(down), -1).astype(float)


def changes(folder):
    """Module -> ΔW (O, I) in float64 of an adapter's folder; of an embedding (D, V)."""
    return {module: s * (B @ A) for module, (A, B, s) in read_peft(folder)[0].items()}


def base_weights(folder):
    """Name -> float64 array of a checkpoint's folder, in one file or several."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored = open_tensors(file)
        found |= {name: stored[name].astype(float) for name in stored}
    return found


def merged(base, adapter):
    """Name -> float64 array of a base with an adapter: W + ΔW, DoRA, biases and saved modules."""
    W, (pairs, tensors, config) = base_weights(base), read_peft(adapter)
    touched = {*pairs, *(name.removesuffix(".weight") for name in tensors)}
    if "lm_head.weight" not in W and touched & {"lm_head", "model.embed_tokens"}:
        W["lm_head.weight"] = W["model.embed_tokens.weight"]  # one of the two is changed, so they are two
    for name, a in tensors.items():
        if name in W:  # a saved module, or a bias of its own
            W[name] = a.astype(float)
        elif name.endswith("base_layer.bias"):
            W[name.replace("base_layer.", "")] = a.astype(float)
    for module, (A, B, s) in pairs.items():
        change = s * (B @ A)
        table = f"{module}.lora_embedding_A" in tensors
        V = W[f"{module}.weight"] + (change.T if table else change)
        if config.get("use_dora"):
            m = tensors[f"{module}.lora_magnitude_vector"].astype(float)
            V = m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)
        W[f"{module}.weight"] = V
    return W


def bound64(A, B, s=1.0):
    """(O + I + r + 2) u s |B||A| in Frobenius norms: what QR, SVD or a product in float64 may err by."""
    return (len(B) + A.shape[1] + len(A) + 2) * U64 * abs(s) * np.linalg.norm(B) * np.linalg.norm(A)


def bound32(S):
    """(2u + u²) sum of s_i, Frobenius: U sqrt(S) and sqrt(S) Vᵀ with each entry rounded to float32.

    |B'A' - BA| <= (2u + u²) |B||A| entry by entry, and the norm of |B||A| is at most |B||A| = sum s_i.
    """
    return (2 * U32 + U32**2) * float(np.sum(S))
