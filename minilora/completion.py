"""Text in, text out: a base's tokenizer around `decoding.generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import decoding
from .errors import InputError
from .formats import tokenizer
from .formats.huggingface import Checkpoint, assemble, checkpoint, tokenizer_of
from .formats.tokenizer import ALPHABET, VOCAB, Tokenizer
from .model import Llama


def complete(
    model: Llama | Checkpoint | Path | str,
    prompt: str,
    max_tokens: int = 200,
    *,
    rng: np.random.Generator,
    base: Checkpoint | Path | str | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> str:
    """Continue a prompt; returns the new text alone, of at most `max_tokens` tokens.

    `model` is a Llama, or anything that `load` takes. A Llama does not know its tokenizer, so `base` names
    the model that has it; the base that ships needs none, since its tokens are characters. The other
    arguments are as in `generate`. InputError for a Llama whose tokenizer is unknown, and every error of
    loading.
    """
    if base is None and isinstance(model, Llama):
        if model.config.vocab_size != VOCAB:
            raise InputError("this model's tokenizer is not known; expected base=, the model that has it")
        llama, words = model, ALPHABET
    else:
        source = base if isinstance(model, Llama) else model
        opened = source if isinstance(source, Checkpoint) else checkpoint(source or "base")
        llama, words = model if isinstance(model, Llama) else assemble(opened), tokenizer_of(opened)
    how = (max_tokens, rng, temperature, top_k, top_p)
    return "".join(pieces(llama, words, prompt, *how))


def pieces(
    model: Llama,
    words: Tokenizer,
    prompt: str,
    max_tokens: int,
    rng: np.random.Generator,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> Iterator[str]:
    """As `complete`, piece by piece as they come; stops early at the longest text the model takes."""
    ids = words.begun(words.encode(prompt))[None, :]
    room = model.config.max_position_embeddings - ids.shape[1]
    tokens = decoding.generate(
        model, ids, min(max_tokens, max(room, 1)), rng=rng, temperature=temperature, top_k=top_k, top_p=top_p
    )
    return tokenizer.stream(words, (int(token[0]) for token in tokens))
