"""Panel 2: letters change places in a text, and the spectrum of ΔE shows how many pairs did.

    ΔE = (P - I) E undoes k swaps P exactly, and has rank k

The base writes the text itself. LoRA of rank RANK on the embedding learns, on the swapped text, the
probabilities that the base has on the plain one, so the least loss is 0, at that ΔE. Nothing tells it k.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import decoding, spectra
from ..backend import to_host
from ..data.batching import batches
from ..data.corpora import SWAPS, permutation
from ..errors import ConfigError, check_int
from ..experiments.known_rank import divergence
from ..experiments.rank_sweep import true_delta
from ..formats.tokenizer import decode
from ..lora import inject
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..optim import AdamW, Schedule
from ..table import counted
from ..tree import replica, trained
from .events import Event, change, matrix, numbers

MOST = 5  # pairs: letters beyond them are too rare in so short a text
RANK, ALPHA = 12, 0.25
STEPS, BATCH, LENGTH = 60, 4, 64
RATE, EPS = (
    1.0,
    1e-2,
)  # AdamW's eps keeps rare letters, whose gradient is small, from moving as fast as others
TEXTS, WRITTEN = 32, 96  # texts that the base writes, and their characters
SHOWN = 160  # characters of all of them
LETTERS = np.arange(ord("a"), ord("z") + 1)


def write(base: Llama) -> np.ndarray:
    """A text (T,) by the base, always from the same seed."""
    start = np.full((TEXTS, 1), ord("\n"), np.int64)
    rng = np.random.default_rng(0)
    tokens = decoding.generate(base, start, WRITTEN, rng=rng, temperature=0.9)
    return np.stack(list(tokens), 1).reshape(-1)


def shown(text: np.ndarray) -> str:
    """The beginning of a text in one line."""
    return " ".join(decode(text).split())[:SHOWN]


def search(base: Llama, text: np.ndarray, k: int) -> Iterator[Event]:
    """Swap k pairs of letters of the text and train: what is read, each step, and the rank that is found."""
    if not 1 <= check_int("the number of pairs", k, 1) <= MOST:
        raise ConfigError(f"the number of pairs is {k}; expected 1 to {MOST}")
    P, model = permutation(k), replica(base)
    inject(model, LoraConfig(RANK, ALPHA, ("embed_tokens",)), rng=np.random.default_rng(0))
    true = np.linalg.svd(to_host(true_delta(base, k)).astype(np.float64), compute_uv=False)
    yield {
        "event": "wrote", "plain": shown(text), "swapped": shown(P[text]),
        "pairs": SWAPS[:k], "steps": STEPS, "rank": RANK, "true": numbers(true[:k]),
    }  # fmt: skip
    params, optimizer = trained(model), AdamW(RATE, betas=(0.9, 0.99), eps=EPS)
    schedule = Schedule(STEPS, warmup=STEPS // 20)
    drawn = batches(text, np.random.default_rng(1), BATCH, LENGTH)
    for step, (ids, _) in zip(range(STEPS), drawn, strict=False):
        logits, back = model(P[ids], train=True)
        loss, gradient = divergence(base(ids)[0][..., P], logits)
        back(gradient)
        optimizer.step(params, optimizer.lr * schedule(step))
        values = spectra.spectrum(model)["model.embed_tokens"]
        found = spectra.rank_shown(values)
        yield {
            "event": "searched", "step": step + 1, "steps": STEPS, "loss": numbers(loss),
            "values": numbers(values), "found": found,
            "delta": matrix(change(model, "model.embed_tokens")[:, LETTERS].T),
        }  # fmt: skip
    yield {
        "event": "answered",
        "says": f"The singular values fall most after the first {found}, "
        + ("and " if found == k else "but ")
        + f"{counted(k, 'pair', 'pairs')} of letters changed places.",
    }  # fmt: skip
