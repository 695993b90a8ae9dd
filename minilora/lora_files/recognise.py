"""A path -> whose LoRA lies there and in which file; or what lies there instead, and what to do with it.

People give a file or its folder, of any tool; a model, a pickle, a name on the hub, or a clone whose large
files were never fetched. Each is recognised by names and by a file's first bytes, never by its ending alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import StorageError, UnsupportedError, short
from ..formats.atomic import exists, named, named_errors, read_at, stamp_of
from ..formats.huggingface import read_json
from .grammar import parsed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT, MLX, MLX_ARRAYS, GGUF, SINGLE = "PEFT", "MLX", "MLX's arrays", "GGUF", "a single file"
HUB = re.compile(r"(?:https?:/+(?:huggingface|hf)\.co/)?([A-Za-z0-9][\w.-]*/[\w.-]+)/?")
STEP = re.compile(r"(.*?)(\d*)")  # checkpoint-500 after checkpoint-60
WANTED = f"expected a folder with {CONFIG} and {WEIGHTS}, or a LoRA file of another tool"
PICKLE = "a pickle runs code and is never opened"
ELSEWHERE = (  # for a pickle {0}
    'where torch is installed, this makes a file of it that is: python -c "import torch; from '
    "safetensors.torch import save_file; save_file(torch.load('{0}', weights_only=True), "
    "'{1}.safetensors')\""
)
LARGEST = 1 << 23  # bytes of a config; peft/config.py says why
NAMED = {  # the file of a LoRA in a folder of its own without PEFT's config -> its form
    r"adapters\.safetensors": SINGLE, r"adapters\.npz": MLX_ARRAYS,
    r"pytorch_lora_weights\.safetensors": SINGLE, r"adapter_model\.safetensors": SINGLE,
}  # fmt: skip
FILES = NAMED | {r".*\.gguf": GGUF, r".*\.safetensors": SINGLE}  # the first that is there counts
UNREAD = r"(adapter_model|pytorch_lora_weights)\.bin"  # the pickles among them
MODEL = re.compile(r"(pytorch_)?model.*\.(safetensors|bin).*", re.DOTALL)
PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt)", re.DOTALL)


def recognised(given: Path | str) -> tuple[str, Path]:
    """The form of the LoRA at a path (PEFT, MLX, ...) and its folder or file; the path may be one in it.

    StorageError if nothing is there, FormatError for a pointer of Git LFS, UnsupportedError for anything that
    is no LoRA; each says what it is.
    """
    path = named(given)
    if (names := names_in(path)) is None:
        return of_file(path)
    if CONFIG in names:
        config = read_json(path / CONFIG, LARGEST)
        if "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config):
            return MLX, path
        if WEIGHTS not in names and (other := other_kind(names)):
            raise UnsupportedError(f"{path}: {other}")
        return PEFT, path
    if not is_model(names):
        for pattern, form in FILES.items():
            files = sorted(name for name in names if re.fullmatch(pattern, name, re.DOTALL))
            if len(files) > 1:
                raise UnsupportedError(
                    f"{path}: has {len(files)} files, such as {short(files[0])}; expected one"
                )
            if files:
                return form, path / files[0]
    raise no_config(path, names)


def of_file(path: Path) -> tuple[str, Path]:
    """The form of a LoRA's file, or the error that says what the file is, or may be on the hub."""
    if not exists(path):
        if match := HUB.fullmatch(str(path)):
            command = f"hf download {match[1]} --local-dir {match[1].rpartition('/')[2]}"
            what = "there is no such folder; if this is a name on the Hugging Face hub, fetch it first"
            raise StorageError(f"{path}: {what}: {command}")
        raise StorageError(f"{path}: is missing; {WANTED}")
    if path.name in (CONFIG, WEIGHTS, "adapters.safetensors") and exists(path.with_name(CONFIG)):
        return recognised(path.parent)
    stamp = stamp_of(path)
    start = read_at(path, 0, min(9, stamp.size), stamp)
    if start.endswith(b"{"):  # its header's length comes first, which can be any 8 bytes
        return SINGLE, path
    if start.startswith(b"GGUF"):
        return GGUF, path
    if path.suffix == ".npz" and start.startswith(b"PK"):
        return MLX_ARRAYS, path
    if PICKLES.fullmatch(path.name) or start.startswith((b"PK", b"\x80\x02")):
        raise UnsupportedError(f"{path}: {pickled(path.name)}")
    if path.suffix == ".safetensors":
        return SINGLE, path
    raise StorageError(f"{path}: cannot be read as an adapter; {WANTED}")


def no_config(path: Path, names: set[str]) -> Exception:
    """The error for a folder without a LoRA of its own."""
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


def names_in(path: Path) -> set[str] | None:
    """What a folder holds, None if it is none; StorageError if that cannot be read."""
    with named_errors(path):
        return {child.name for child in path.iterdir()} if path.is_dir() else None


def adapters_at(path: Path | str) -> list[Path | str]:
    """The adapters in a folder of adapters, checkpoint-60 before checkpoint-500; else the path itself."""
    names = names_in(Path(path))
    if names is None or CONFIG in names or is_model(names) or matching(names, *NAMED, UNREAD):
        return [path]
    inside = sorted((Path(path, name) for name in names), key=lambda child: step(child.name))
    return [child for child in inside if may_be_one(child)] or [path]


def may_be_one(path: Path) -> bool:
    """Whether this is, by its name, a LoRA's file, or a folder with one; a model is none."""
    if (names := names_in(path)) is None:
        return matching({path.name}, *FILES)
    return CONFIG in names or (not is_model(names) and matching(names, *FILES, UNREAD))


def matching(names: Iterable[str], *patterns: str) -> bool:
    """Whether one of the names has one of these forms."""
    return any(re.fullmatch(pattern, name, re.DOTALL) for pattern in patterns for name in names)


def is_model(names: set[str]) -> bool:
    """Whether a folder with these names holds a model."""
    return "config.json" in names and any(map(MODEL.fullmatch, names))


def other_kind(names: set[str]) -> str | None:
    """What a folder without a LoRA is, by the names in it; None if that is unclear."""
    if is_model(names):
        return f"is a model, not an adapter; {WANTED}: `minilora extract BASE MODEL OUT` makes one"
    pickles = sorted(filter(PICKLES.fullmatch, names))
    return f"has {short(pickles[0])} only: {pickled(pickles[0])}" if pickles else None


def pickled(name: str) -> str:
    """What to say of a pickle, with the line that makes a readable file of it where torch is installed."""
    return f"{PICKLE}; {ELSEWHERE.format(name, name.rpartition('.')[0])}"


def whose(names: Iterable[str]) -> str | None:
    """Whose tensors these are that are not PEFT's: another tool's LoRA or a model's; None if neither."""
    names = sorted(names)
    for name in names:
        _, part, tool = parsed(name)
        if part and tool != "PEFT":
            return f"is a LoRA of {tool}"
    if names and not any("lora" in name for name in names):
        return "has the weights of a model, not of a LoRA"
    return None
