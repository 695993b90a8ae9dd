"""A Llama and an adapter -> one plain checkpoint: W + ΔW in the stored dtype, and the rounding error.

In exact arithmetic the merged and the unmerged model compute the same function. In floating point they
differ by rounding. The report compares that difference with rounding alone: the unmerged model in float32
against itself in float64. A bfloat16 weight has 8 significant bits, so a small ΔW can vanish in W; the
report gives the loss per module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import lora
from ..backend import quiet_overflow, to_device, to_host
from ..decoding import past_of
from ..formats.atomic import check_free, refuse_same
from ..formats.huggingface import Checkpoint, assemble, beside, checkpoint, save_model, token_ids
from ..formats.safetensors import stored
from ..lora_files.recognise import recognised
from ..model import Llama
from ..peft.loading import load_adapter
from ..spectra import quotient
from ..table import Table, plain, report
from ..tree import named_params, unpack
from .changes import Change, check_dtype, table_of


@report
@dataclass(frozen=True)
class Merge:
    """What `merge_llama` wrote; prints as a table."""

    out: str
    dtype: str
    rows: tuple[Change, ...]
    float32: float  # largest |logits merged - unmerged| on the probe, both in float32
    rounding: float  # largest |logits in float32 - in float64|, unmerged: rounding alone
    float64: float  # largest |logits merged - unmerged|, both in float64
    written: float  # the written model, in float32 (float64 if written so), against unmerged in float64
    logits: float  # the largest |logit|, to compare with

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> list[str | Table]:
        return [
            table_of(self.rows),
            f"{self.out}: written in {self.dtype}",
            f"largest difference of logits (up to {self.logits:.3g}), merged against unmerged:",
            f"  float32            {self.float32:.1e}   (rounding alone: {self.rounding:.1e})",
            f"  float64            {self.float64:.1e}",
            f"  as written         {self.written:.1e}",
        ]


@quiet_overflow()  # of logits, which the report tells; what is written is looked at
def merge_llama(
    base: Path | str,
    adapter: Path | str,
    out: Path | str,
    *,
    dtype: str | None = None,
    probe: Sequence[int] | None = None,
    force: bool = False,
) -> Merge:
    """Write W + ΔW as a new Hugging Face folder, in `dtype` or the base's; the base is only read.

    Merged and unmerged logits are compared on the token ids in `probe` (default: up to 32 random ones). The
    model is loaded in float32, then in float64; the float64 W + ΔW is written. InputError for an unknown
    dtype, and whatever loading and saving raise.
    """
    source = checkpoint(base)
    kind = dtype or source.dtype
    check_dtype(kind)
    _, adapter = recognised(adapter)
    refuse_same(out, source.where, adapter)
    check_free(out)
    V, T = source.config.vocab_size, min(32, source.config.max_position_embeddings)
    random = np.random.default_rng(0).integers(V, size=T)
    ids = np.asarray(random if probe is None else probe, np.int64)[None, :]

    model = assemble(source, np.float32)
    load_adapter(model, adapter, force=force)
    unmerged = logits(model, ids)
    lora.fuse(model)
    single = logits(model, ids) - unmerged
    model = assemble(source, np.float64)
    load_adapter(model, adapter, force=force)
    exact = logits(model, ids)
    lora.merge(model)
    double = logits(model, ids) - exact
    rows = tuple(changes(model, kind))
    lora.unmerge(model)
    lora.fuse(model)
    unpack(model)
    for p in named_params(model).values():
        p.data = to_device(stored(to_host(p.dense()), kind))
    save_model(model, out, card(source, adapter), token_ids(source.where), kind, beside(source.where))
    written = logits(model, ids)  # last: saving has refused values too large for the dtype
    return Merge(
        str(out), kind, rows,
        float32=largest(single),
        rounding=largest(unmerged - exact),
        float64=largest(double),
        written=largest(written - exact),
        logits=largest(exact),
    )  # fmt: skip


def logits(model: Llama, ids: np.ndarray) -> np.ndarray:
    """The logits (T, V) of token ids (1, T), fed one at a time, so that no ΔW is folded into its W."""
    ids = model.check(ids)
    past = past_of(model, *ids.shape)
    steps = (model.forward(ids[:, t : t + 1], past=past)[0] for t in range(ids.shape[1]))
    return np.concatenate([to_host(step)[0] for step in steps]).astype(np.float64)


def largest(a: np.ndarray) -> float:
    """max |a|."""
    return float(abs(a).max())


def changes(model: Llama, kind: str) -> Iterator[Change]:
    """The change of each matrix in a merged float64 model, and what storing it in `kind` would lose."""
    for module, layer in lora.adapted(model).items():
        W, whole = (to_host(x.weight.dense()) for x in (layer.base, layer.merged or layer.base))
        if W.ndim == 2 and (size := float(np.linalg.norm(change := whole - W))) > 0:
            lost = float(np.linalg.norm(stored(whole, kind) - whole))
            yield Change(module, largest(change), quotient(size, float(np.linalg.norm(W))), lost / size)


def card(source: Checkpoint, adapter: Path) -> str:
    """The README.md of a merged model."""
    name = adapter.resolve().name
    return plain(f"{source.where.name} with the adapter {name} merged into it by minilora.") + "\n"
