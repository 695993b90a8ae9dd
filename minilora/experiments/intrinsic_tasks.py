"""What is learned in random subspaces: a text, or digits from scratch.

A text is learned in windows of characters, and its right answer is the next one. Digits are what Li et al.
2018 begin with: MNIST, 28 x 28 pixels, in networks of dense or convolutional layers. Here digits have 8 x 8
pixels, and the network is the transformer of the experiment beyond language, from random weights.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import to_host, xp
from ..data import batching
from ..data import digits as data
from ..data.corpora import Corpus
from ..errors import NonFiniteError
from ..model import Llama
from ..tree import freeze
from ..vision.vit import ViT, vit
from . import recipe
from .beyond_tasks import SHAPE

DIGITS = "digits"  # the name of the task
DIMS = (64, 128, 256, 512, 1024, 2048, 4096)  # its d
LONGER = 5  # its steps, for each of a text
BATCH = 32  # of its images


@dataclass(frozen=True)
class Text:
    """A text to learn."""

    corpus: Corpus
    batch: int
    windows: dict[str, int]  # split -> how many are measured

    @property
    def source(self) -> str:
        """Where it is from."""
        return self.corpus.source

    def drawn(self, rng: np.random.Generator) -> Iterator[batching.Batch]:
        """Batches to train on, without end."""
        return recipe.drawn(self.corpus, rng, self.batch)

    def loss(self, model: Llama, split: str) -> float:
        """Nats per character of "valid" or "test"; NonFiniteError if that is not a number."""
        return recipe.loss_on(model, self.corpus, split, self.windows[split])

    def accuracy(self, model: Any) -> float:
        """How often the likeliest next character is the right one, over test windows."""
        some = recipe.windows(self.corpus, "test", self.windows["test"])
        right = [model(ids)[0].argmax(-1) == xp.asarray(labels) for ids, labels in some]
        return float(np.concatenate([to_host(one).reshape(-1) for one in right]).mean())


@dataclass(frozen=True)
class Images:
    """All ten digits to learn."""

    digits: data.Digits

    @property
    def source(self) -> str:
        """Where they are from."""
        return self.digits.source

    def drawn(self, rng: np.random.Generator) -> Iterator[data.Batch]:
        """Batches to train on, without end."""
        return data.batches(self.digits.train, rng, BATCH)

    def loss(self, model: ViT, split: str) -> float:
        """Nats per image of "valid" or "test"; NonFiniteError if that is not a number."""
        some = getattr(self.digits, split)
        loss = float(model.loss(some.pixels, some.labels)[0])
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss on {split} of {DIGITS} is {loss}")
        return loss

    def accuracy(self, model: Any) -> float:
        """The share of test images whose digit is the likeliest."""
        some = self.digits.test
        return float((to_host(model(some.pixels)[0].argmax(-1)) == some.labels).mean())


@functools.cache
def random_vit() -> ViT:
    """Where digits start: random weights, frozen, made once in each process."""
    model = vit(SHAPE, np.random.default_rng(0))
    freeze(model)
    return model
