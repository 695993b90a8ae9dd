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
FOLDERS = {  # files of a folder without a PEFT adapter -> what it is
    (r"adapter_model\.bin",): f"has adapter_model.bin only: {PICKLE}",
    (r"config\.json", r"(pytorch_)?model.*\.(safetensors|bin).*"):
        f"is a model, not an adapter; {WANTED}: `minilora extract BASE MODEL OUT` makes one",
    (r"adapters\.safetensors",): f"is an adapter of MLX; {WANTED} of PEFT",
    (r"pytorch_lora_weights\.safetensors",): f"is a LoRA of diffusers, without a config; {WANTED}",
    (r".*\.gguf",): f"has a file of llama.cpp; {WANTED}, which it was made from",
    (r".*\.(pt|pth|ckpt)",): f"has pickles only: {PICKLE}; {WANTED}",
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
        return of_file(path)
    if CONFIG not in names:
        raise no_config(path, names)
    config = read_fields(path / CONFIG)
    if "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config):
        raise UnsupportedError(f"{path}: is an adapter of MLX; {WANTED} of PEFT")
    if WEIGHTS not in names and (other := other_kind(names)):
        raise UnsupportedError(f"{path}: {other}")
    return path


def of_file(path: Path) -> Path:
    """The folder of an adapter's file, or the error that says what the file is, or may be on the hub."""
    if not exists(path):
        if match := HUB.fullmatch(str(path)):
            command = f"hf download {match[1]} --local-dir {match[1].rpartition('/')[2]}"
            what = "there is no such folder; if this is a name on the Hugging Face hub, fetch it first"
            raise StorageError(f"{path}: {what}: {command}")
        raise StorageError(f"{path}: is missing; {WANTED}")
    if path.name in (CONFIG, WEIGHTS) and exists(path.with_name(CONFIG)):
        return adapter_folder(path.parent)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UnsupportedError(f"{path}: {PICKLE}; {WANTED}")
    if path.suffix == ".gguf":
        raise UnsupportedError(f"{path}: is a file of llama.cpp; {WANTED}, which it was made from")
    if path.suffix == ".safetensors":
        what = of_names(open_tensors(path)) or f"has no {CONFIG} beside it, which holds the scale"
        raise UnsupportedError(f"{path}: {what}; {WANTED}")
    raise StorageError(f"{path}: cannot be read as an adapter; {WANTED}")


def no_config(path: Path, names: set[str]) -> Exception:
    """The error for a folder without adapter_config.json."""
    if inside := sorted((p.parent.name for p in path.glob(f"*/{CONFIG}")), key=step):
        where = "there is one" if len(inside) == 1 else f"there are {len(inside)} below, the last"
        return StorageError(f"{path / CONFIG}: is missing; {where} in {short(inside[-1])}")
    if other := other_kind(names):
        return UnsupportedError(f"{path}: {other}")
    return StorageError(f"{path / CONFIG}: is missing; {WANTED}")


def step(name: str) -> tuple[str, int]:
    """The sort key that puts checkpoint-60 before checkpoint-500."""
    match = STEP.fullmatch(name)
    return (match[1], int(match[2][:18] or 0)) if match else (name, 0)


def other_kind(names: set[str]) -> str | None:
    """What a folder without a PEFT adapter is, by the names in it; None if that is unclear."""
    for patterns, what in FOLDERS.items():
        if all(any(re.fullmatch(pattern, name, re.DOTALL) for name in names) for pattern in patterns):
            return what
    return None


def of_names(names: Iterable[str]) -> str | None:
    """Whose tensors these are: another tool's LoRA or a model's; None if neither."""
    names = sorted(names)
    for pattern, tool in TOOLS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return f"is {tool}"
    if names and not any("lora" in name for name in names):
        return "has the weights of a model, not of a LoRA"
    return None
