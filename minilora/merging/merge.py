"""A base of any kind and an adapter -> the merged base, by the way that fits: a Llama's, or names alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError, UnsupportedError
from ..formats.atomic import exists
from ..formats.huggingface import NAMES, components, located, read_json, read_outline
from ..peft.folder import open_adapter
from .by_name import MergeByName, merge_by_name
from .changes import check_dtype
from .llama import Merge, merge_llama


def merge_checkpoint(
    base: Path | str,
    adapter: Path | str,
    out: Path | str,
    *,
    dtype: str | None = None,
    probe: Sequence[int] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Merge | MergeByName:
    """Write a base with an adapter merged into it, in `dtype` or the base's; both are only read.

    A Llama, as a folder or GGUF file, becomes a folder, and its logits are compared on the token ids in
    `probe` (merging/llama.py). Any other base in safetensors, a file, a model's folder or a diffusers
    pipeline's, is merged by the names of its tensors (merging/by_name.py). Errors as there, and InputError
    for a `probe` that nothing can run on.
    """
    check_dtype(dtype)
    if reason := beyond(base) or of_inputs(adapter):
        if probe is not None:
            raise InputError(f"{base}: {reason}; expected no probe, since no logits are compared")
        return merge_by_name(base, adapter, out, dtype=dtype, force=force, why=reason, progress=progress)
    return merge_llama(base, adapter, out, dtype=dtype, probe=probe, force=force)


def of_inputs(adapter: Path | str) -> str | None:
    """Why an adapter cannot be loaded for a forward pass, if that is because of magnitudes of inputs."""
    return "no model here has magnitudes of inputs" if open_adapter(adapter).by_inputs else None


def beyond(base: Path | str) -> str | None:
    """Why no forward pass of a base runs here; None if one does, or if that is for its reader to say."""
    if str(base) in NAMES or Path(base).suffix == ".gguf":
        return None
    if components(Path(base)):
        return "the base is a pipeline of several models"
    where = located(base)
    if where.is_file():
        return "the base is a file without a config"
    config = where / "config.json"
    if not exists(config):
        return "the base has no config.json" if where.is_dir() else None
    if "_class_name" in read_json(config):  # of diffusers
        return "the base is no language model"
    try:
        return read_outline(config).beyond or None
    except UnsupportedError as e:
        return str(e)
