"""A path -> the folder of a PEFT adapter; or what lies there instead, and what to do with it.

People give the file instead of its folder, a model, a name on the hub, the adapter of another tool, or a
clone whose large files were never fetched. Each is recognised by names and by a file's first bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import StorageError, UnsupportedError, short
from ..formats.atomic import exists, named, named_errors
from ..formats.safetensors import open_tensors
from .config import read_fields

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB = re.compile(r"(?:https?:/+(?:huggingface|hf)\.co/)?([A-Za-z0-9][\w.-]*/[\w.-]+)/?")
STEP = re.compile(r"(.*?)(\d*)")  # checkpoint-500 after checkpoint-60
WANTED = f"expected a folder with {CONFIG} and {WEIGHTS}"
PICKLE = "a pickle runs code and is never opened"
TOOLS = {  # what other tools call their tensors, and whose they are
    r"lora_(unet|te\d?|transformer)_.*|.*\.lora_(down|up)\.weight": "a LoRA of kohya's sd-scripts",
    r".*\.lora\.(down|up)\.weight|(unet|transformer|text_encoder)\..*\.lora_[AB]\.weight":
        "a LoRA of diffusers, without a config",
    r".*\.lora_[ab](\.weight)?": "an adapter of MLX or torchtune",
}  # fmt: skip


def adapter_folder(given: Path | str) -> Path:
    """The folder of the adapter that a path means; the path may be a file in it.

    StorageError if nothing is there, FormatError for a pointer of Git LFS, UnsupportedError for anything that
    is not a PEFT adapter; each says what it is.
    """
    path = named(given)
    with named_errors(path):
        names = {child.name for child in path.iterdir()} if path.is_dir() else None
    if names is None:
        return of_file(path) if exists(path) else missing(path)
    if CONFIG not in names:
        raise no_config(path, names)
    config = read_fields(path / CONFIG)
    if "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config):
        raise UnsupportedError(f"{path}: is an adapter of MLX; {WANTED} of PEFT")
    if WEIGHTS not in names and (other := told(names)):
        raise UnsupportedError(f"{path}: {other}")
    return path


def missing(path: Path) -> Path:
    """StorageError for a path with nothing there, with a hint if it may be a name on the hub."""
    if match := HUB.fullmatch(str(path)):
        name = match[1]
        raise StorageError(
            f"{path}: there is no such folder; if this is a name on the Hugging Face hub, fetch it first: "
            f"hf download {name} --local-dir {name.rpartition('/')[2]}"
        )
    raise StorageError(f"{path}: is missing; {WANTED}")


def of_file(path: Path) -> Path:
    """The folder of an adapter's file, or the error that says what the file is."""
    if path.name in (CONFIG, WEIGHTS) and exists(path.with_name(CONFIG)):
        return adapter_folder(path.parent)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UnsupportedError(f"{path}: {PICKLE}; {WANTED}")
    if path.suffix == ".gguf":
        raise UnsupportedError(
            f"{path}: is a file of llama.cpp; {WANTED}, from which an adapter there is made"
        )
    if path.suffix == ".safetensors":
        what = of_names(open_tensors(path)) or f"has no {CONFIG} beside it, which holds the scale"
        raise UnsupportedError(f"{path}: {what}; {WANTED}")
    raise StorageError(f"{path}: cannot be read as an adapter; {WANTED}")


def no_config(path: Path, names: set[str]) -> Exception:
    """The error for a folder without adapter_config.json."""
    if inside := sorted((p.parent.name for p in path.glob(f"*/{CONFIG}")), key=step):
        where = f"there is one in {short(inside[-1])}"
        many = f"there are {len(inside)} below, the last in {short(inside[-1])}"
        return StorageError(f"{path / CONFIG}: is missing; {where if len(inside) == 1 else many}")
    if other := told(names):
        return UnsupportedError(f"{path}: {other}")
    return StorageError(f"{path / CONFIG}: is missing; {WANTED}")


def step(name: str) -> tuple[str, int]:
    """The sort key that puts checkpoint-60 before checkpoint-500."""
    match = STEP.fullmatch(name)
    return (match[1], int(match[2][:18] or 0)) if match else (name, 0)


def told(names: set[str]) -> str | None:
    """What a folder without a PEFT adapter is, by the names in it; None if that is unclear."""
    if "adapter_model.bin" in names:
        return f"has adapter_model.bin only: {PICKLE}"
    if "config.json" in names and any(
        re.fullmatch(r"(pytorch_)?model.*\.(safetensors|bin).*", n) for n in names
    ):
        return f"is a model and no adapter; {WANTED}: `minilora extract BASE MODEL OUT` makes one"
    if "adapters.safetensors" in names:
        return f"is an adapter of MLX; {WANTED} of PEFT"
    if "pytorch_lora_weights.safetensors" in names:
        return f"is a LoRA of diffusers, without a config; {WANTED}"
    if any(name.endswith(".gguf") for name in names):
        return f"has a file of llama.cpp; {WANTED}, from which an adapter there is made"
    if any(name.endswith((".pt", ".pth", ".ckpt")) for name in names):
        return f"has pickles only: {PICKLE}; {WANTED}"
    return None


def of_names(names: Iterable[str]) -> str | None:
    """Whose tensors these are: another tool's LoRA or a model's; None if neither."""
    names = sorted(names)
    for pattern, tool in TOOLS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return f"is {tool}"
    if names and not any("lora" in name for name in names):
        return "holds the weights of a model and no LoRA"
    return None
