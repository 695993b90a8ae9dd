"""The base: a tiny character-level Llama trained on Shakespeare in modern spelling, from seed to folder.

All other experiments start from its checkpoint, which ships with the package. Five plays are held out in
every spelling, so the base has not memorised what later experiments learn from them. Bases in other widths
are pretrained in memory, for experiments with size, and in fewer steps.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .. import __version__
from ..data import corpora
from ..data.corpora import Corpus
from ..errors import check_int
from ..formats import huggingface
from ..model import Config, Llama, llama
from ..optim import AdamW
from ..session import begin, fit, workshop
from ..tree import freeze, size
from .recipe import LENGTH, drawn, learn, loss_on


@dataclass(frozen=True)
class Recipe:
    """How the base is trained. The defaults are those of the checkpoint that ships."""

    corpus: str = "shakespeare"
    steps: int = 8000
    batch: int = 16
    lr: float = 4e-3
    warmup: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.99
    seed: int = 0
    test_windows: int = 4096  # of LENGTH characters, spread evenly over the held-out plays

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("warmup", 0), ("seed", 0), ("test_windows", 4)):
            check_int(name, getattr(self, name), least)

    def optimizer(self) -> AdamW:
        """AdamW at the start of a training."""
        return AdamW(self.lr, betas=(0.9, self.beta2), weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Outcome:
    """The result: losses in nats per character; speed in characters per second of training."""

    test: float
    valid: float
    characters: int
    speed: float


CARD = """# minilora base

A character-level Llama with {parameters:,} parameters, trained from scratch in NumPy.

| | |
|---|---|
| corpus | {source} |
| command | `minilora pretrain` (minilora {version}) |
| recipe | `{recipe}` |
| loss on the held-out plays | **{test:.4f} nats per character**, {windows:,} windows of {length} characters |
| loss on the validation split | {valid:.4f} nats per character |
| characters seen | {characters:,} |

Tokenizer: a character is its own id, its ASCII code point; vocabulary 128, of which 96 occur.
The weights are this project's own (MIT). No text of the corpus is in them but what a model remembers.
"""


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    config: Config | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Outcome:
    """Train, measure, and write the model as the new folder `out`.

    A checkpoint is kept beside it; a killed run resumes from it and ends in the same bytes. It is deleted
    at the end. StorageError if `out` exists.
    """
    out = begin(out, "pretrain")
    text = corpora.corpus_or_fallback(recipe.corpus)
    model = llama(config or Config(), np.random.default_rng(recipe.seed))
    rng = np.random.default_rng([recipe.seed, 1])
    with workshop(out, "pretrain") as saved:
        _, speed = fit(
            model,
            drawn(text, rng, recipe.batch),
            recipe.optimizer(),
            recipe,
            length=LENGTH,
            text=text.digest,
            rng=rng,
            saved=saved,
            every=250,
            progress=progress,
        )
        freeze(model)
        losses = {
            split: loss_on(model, text, split, windows)
            for split, windows in (("test", recipe.test_windows), ("valid", recipe.test_windows // 4))
        }
        characters = recipe.steps * recipe.batch * LENGTH
        card = CARD.format(
            parameters=size(model), source=text.source, version=__version__, length=LENGTH, **losses,
            recipe=json.dumps(asdict(recipe)), windows=recipe.test_windows, characters=characters,
        )  # fmt: skip
        facts = {"corpus": text.source, "corpus_sha256": text.digest, "recipe": asdict(recipe), **losses}
        huggingface.save_model(
            model, out, card, {"minilora": facts, "bos_token_id": None, "eos_token_id": None}
        )
    return Outcome(losses["test"], losses["valid"], characters, speed)


# ---- bases in other widths


def shape(width: int) -> Config:
    """The base's shape in another width."""
    return Config(hidden_size=width, intermediate_size=8 * width // 3)


@functools.cache
def pretrained(width: int, steps: int, batch: int, text: Corpus) -> Llama:
    """Frozen random weights after so many steps on the text; made once in each process."""
    model = llama(shape(width), np.random.default_rng(0))
    if steps:
        learn(model, drawn(text, np.random.default_rng([0, 1]), batch), Recipe().optimizer(), steps)
    freeze(model)
    return model
