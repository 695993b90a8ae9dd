"""A base -> the same base with its linear maps in 4 bits.

The folder is one that transformers and bitsandbytes load, too (methods/bitsandbytes.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..formats.atomic import check_free, refuse_same
from ..formats.huggingface import assemble, beside, checkpoint, save_model, token_ids
from ..methods.bitsandbytes import KINDS
from ..methods.four_bit import check_form
from ..methods.quantize import Quantized, quantize
from ..table import plain


def quantize_checkpoint(
    base: Path | str,
    out: Path | str,
    *,
    kind: str = "nf4",
    block: int = 64,
    double: bool = True,
    overwrite: bool = False,
) -> Quantized:
    """Write a base as a new folder in which the linear maps of the blocks are in 4 bits.

    `kind` is "nf4" or "fp4"; `block` and `double` are those of `ml.quantize`, whose report is returned. All
    other weights keep the base's dtype, and the folder loads again to the bit. StorageError if it exists,
    unless `overwrite`; InputError if it is the base; and whatever loading, quantizing and saving raise.
    """
    check_form(kind, block, KINDS)
    source = checkpoint(base)
    refuse_same(out, source.where)
    check_free(out, overwrite)
    model = assemble(source, np.float64 if source.dtype == "float64" else np.float32)
    result = quantize(model, kind=kind, block=block, double=double)
    card = plain(f"{source.where.name}, its linear maps quantized to {kind} by minilora.") + "\n"
    extra = token_ids(source.where)
    save_model(model, out, card, extra, source.dtype, beside=beside(source.where), overwrite=overwrite)
    return replace(result, out=str(out))
