"""How the experiments train on a text and measure a loss: one recipe, so that their numbers can be compared.

Training takes random windows of LENGTH characters; the learning rate rises for a twentieth of the steps and
then falls. A loss is in nats per character, over windows spread evenly over a split. BLAS has one thread, so
the same run gives the same bytes. Leaves out what an experiment varies: optimizer, steps, batch and text.
"""

import math
from collections.abc import Iterator

import numpy as np

from ..data import batching
from ..data.batching import Batch
from ..data.corpora import Corpus
from ..errors import NonFiniteError
from ..model import Llama
from ..optim import AdamW, Schedule
from ..training import evaluate, train

LENGTH = 128  # characters in a window


def drawn(text: Corpus, rng: np.random.Generator, batch: int) -> Iterator[Batch]:
    """Batches of random windows of the text to train on, without end."""
    return batching.batches(text.train, rng, batch, LENGTH)


def learn(model: Llama, batches: Iterator[Batch], optimizer: AdamW, steps: int) -> list[float]:
    """Train what is trainable; the loss of each batch before its step. NonFiniteError if one is no number."""
    schedule = Schedule(steps, warmup=steps // 20)
    return train(model, batches, optimizer, steps=steps, schedule=schedule, threads=1).loss


def windows(text: Corpus, split: str, count: int) -> list[Batch]:
    """At most `count` windows of "valid" or "test"."""
    return batching.eval_batches(getattr(text, split), 16, LENGTH, limit=count * LENGTH)


def loss_on(model: Llama, text: Corpus, split: str, count: int) -> float:
    """The loss over `windows`; NonFiniteError if it is not a number."""
    loss = evaluate(model, windows(text, split, count))
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss on {split} of {text.name} is {loss}")
    return loss
