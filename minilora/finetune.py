"""The user's text or examples + a base -> an adapter in PEFT's form, or a whole model: `minilora train`.

Text is cut into windows at random places; JSON lines or a JSON array hold examples, {"prompt": ...,
"completion": ...} with the loss on the completion alone, or {"text": ...}. The tokens that a tokenizer puts
before a text come once, at the start of each example or of a whole text, not of each window. The held-out
loss is given in nats per token and per character, since tokens differ between models. A killed run resumes
from its checkpoint and writes the same bytes. Stands in for a trainer script; leaves out packing, chat
templates and preference data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data import batching, corpora, user_files
from .data.batching import Batch
from .data.examples import draws, examples, padded
from .digests import of_bytes, of_json
from .errors import ConfigError, InputError, check_float, check_int, nearest, short
from .formats import tokenizer
from .formats.atomic import exists
from .formats.huggingface import assemble, beside, checkpoint, save_model, token_ids, tokenizer_of
from .formats.tokenizer import Tokenizer
from .lora import inject
from .methods.lora_config import LoraConfig
from .methods.quantize import quantize
from .optim import AdamW
from .peft.loading import base_print, save_adapter
from .session import begin, fit, workshop
from .table import plain, report
from .training import evaluate
from .tree import freeze, size, trained, unfreeze

CORPORA = (*corpora.MANIFEST, corpora.STDLIB)  # names that --data takes
METHODS = ("lora", "dora", "full")
RATES = {"lora": 1e-3, "dora": 1e-3, "full": 1e-4}  # LoRA's best rate is about ten times the full one
HELD_OUT = 0.05  # of the user's text or examples, from the end
LOGITS = 1 << 24  # logits held at once when measuring


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how."""

    data: str  # text or examples, in a file or a folder of files, or a built-in corpus
    base: str = "base"  # a name, folder or GGUF file
    method: str = "lora"  # or "dora", or "full" fine-tuning
    bits: int | None = None  # 4: the base is quantized to NF4 first, which is QLoRA
    r: int = LoraConfig.r
    alpha: float = LoraConfig.alpha
    targets: str | tuple[str, ...] = "all-linear"
    lr: float | None = None  # None: RATES[method]
    steps: int = 200
    batch: int = 8
    length: int = 128  # tokens of a window; of an example, at most
    warmup: int = 10
    seed: int = 0
    eval_every: int = 50
    eval_tokens: int = 4096  # of held-out text, spread evenly over it

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {short(self.method)}; {nearest(str(self.method), METHODS)}")
        if self.bits is not None and (type(self.bits) is not int or self.bits != 4):
            raise ConfigError(f"bits is {short(self.bits)}; expected 4, or None for the base as it is")
        if self.bits and self.method == "full":
            raise ConfigError("a base in 4 bits cannot be trained in full; expected method lora or dora")
        for name in ("steps", "batch", "length", "eval_every", "eval_tokens"):
            check_int(name, getattr(self, name), 1)
        for name in ("warmup", "seed"):
            check_int(name, getattr(self, name), 0)
        if self.lr is not None:
            check_float("lr", self.lr, 0, 1e3, open_low=True)
        self.lora()

    def lora(self) -> LoraConfig:
        """The adapter's config; DoRA's norm is a constant in the backward, as in PEFT."""
        dora = self.method == "dora"
        return LoraConfig(r=self.r, alpha=self.alpha, targets=self.targets, dora=dora, detach=dora)


@report
@dataclass(frozen=True)
class Outcome:
    """The result of `run`; prints as a few lines."""

    out: str
    before: float  # held-out loss of the base, nats per token
    after: float
    characters: float  # per token of the held-out text
    parameters: int
    tokens_per_second: float
    peak: int  # the most memory of this process, in bytes; 0 if unknown
    evals: tuple[tuple[int, float], ...]

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> list[str]:
        before, after = self.before / self.characters, self.after / self.characters
        speed = f"{self.tokens_per_second:,.0f} tokens per second"
        memory = f", peak memory {self.peak / 1e9:.2f} GB" if self.peak else ""
        return [
            f"{self.out}: held-out loss {self.before:.4f} -> {self.after:.4f} nats per token, "
            f"{before:.4f} -> {after:.4f} per character",
            f"{self.parameters:,} parameters trained, {speed}{memory}",
        ]


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int, float], None] | None = None,
    told: Callable[[int, float], None] | None = None,
) -> Outcome:
    """Train, and write the adapter's folder (with method "full", the model's) at `out`.

    `progress(step, loss)` is called after every step, `told(step, loss)` after every evaluation. While it
    runs, a folder next to `out` holds its checkpoint. StorageError if `out` exists, unless `overwrite`; also
    every error of loading the base and the data.
    """
    out = begin(out, "train", overwrite)
    source = checkpoint(recipe.base)
    words = tokenizer_of(source)
    length = min(recipe.length, source.config.max_position_embeddings)
    rng = np.random.default_rng([recipe.seed, 1])
    rows = max(1, min(8, LOGITS // (length * source.config.vocab_size)))
    text = prepare(recipe, words, length, rng, rows)
    model = assemble(source)
    quantized_from = None
    if recipe.bits:
        quantized_from = base_print(model)
        quantize(model)
    if recipe.method == "full":
        unfreeze(model)
    else:
        inject(model, recipe.lora(), rng=np.random.default_rng(recipe.seed))
    count = size(trained(model))
    optimizer = AdamW(recipe.lr or RATES[recipe.method], betas=(0.9, 0.99))

    def measure() -> float:
        loss = evaluate(model, text.held_out)
        if told:
            told(optimizer.t, loss)
        return loss

    with workshop(out, "train") as saved:
        history, speed = fit(
            model, text.batches, optimizer, recipe, length=length, text=text.digest, rng=rng, saved=saved,
            every=recipe.eval_every, measure=measure, progress=progress, threads=threads,
        )  # fmt: skip
        if recipe.method == "full":
            freeze(model)
            card = plain(f"{source.where.name}, trained in full by minilora on {Path(recipe.data).name}.")
            save_model(
                model, out, card + "\n", token_ids(source.where), None, beside(source.where), overwrite
            )
        else:
            save_adapter(model, out, base=recipe.base, quantized_from=quantized_from, overwrite=overwrite)
    (_, before), (_, after) = history.evals[0], history.evals[-1]
    return Outcome(str(out), before, after, text.characters, count, speed, peak(), tuple(history.evals))


def peak() -> int:
    """The most bytes of memory that this process has held; 0 where the system does not say."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # a browser
        return 0
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- text and examples


@dataclass(frozen=True)
class Text:
    """The batches to train on and to measure on."""

    batches: Iterator[Batch]
    held_out: Sequence[Batch]
    characters: float  # per held-out token
    digest: str


def prepare(recipe: Recipe, words: Tokenizer, length: int, rng: np.random.Generator, rows: int) -> Text:
    """The batches of the recipe's data, in the tokens of its base; a held-out batch has `rows` rows."""
    if recipe.data not in CORPORA:
        if not exists(recipe.data):
            near = nearest(recipe.data, CORPORA)
            raise InputError(f"data is {short(recipe.data)}; expected a path or a name; {near}")
        if user_files.source(Path(recipe.data))[0]:
            return of_examples(recipe, words, length, rng, rows)
    ids, held_ids = (encoded(recipe.data, text, words) for text in texts(recipe.data))
    batches = batching.eval_batches(held_ids, rows, length, recipe.eval_tokens)
    digest = of_bytes(ids.tobytes() + held_ids.tobytes())
    return Text(batching.batches(ids, rng, recipe.batch, length), batches, per_token(batches, words), digest)


def of_examples(recipe: Recipe, words: Tokenizer, length: int, rng: np.random.Generator, rows: int) -> Text:
    """As `prepare`, for examples: the last ones are held out."""
    pairs = examples(Path(recipe.data), words, length)
    if len(pairs) < 2:
        raise InputError(
            f"{recipe.data}: has fewer than 2 examples; expected one to train and one to test on"
        )
    n = max(1, int(len(pairs) * HELD_OUT))
    held = pairs[-n:][: max(1, recipe.eval_tokens // length)]
    batches = [padded(held[i : i + rows]) for i in range(0, len(held), rows)]
    digest = of_json([[ids.tolist(), start] for ids, start in pairs])
    return Text(draws(pairs[:-n], rng, recipe.batch), batches, per_token(batches, words), digest)


def encoded(where: str, text: str, words: Tokenizer) -> np.ndarray:
    """The ids (T,) of a whole text as one sequence; InputError if the tokenizer loses too much of it."""
    parts = [words.learn(piece) for piece in pieces(text)]
    ids = words.begun(np.concatenate([ids for ids, _ in parts]))
    user_files.check_lost(where, sum(lost for _, lost in parts), len(ids))
    return ids


def pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """A text in pieces, cut at line ends where possible: a tokenizer takes some 400 bytes per character."""
    while len(text) > size:
        cut = text.rfind("\n", 0, size) + 1 or size
        yield text[:cut]
        text = text[cut:]
    yield text


def per_token(batches: Sequence[Batch], words: Tokenizer) -> float:
    """Characters per token among the labels."""
    labels = np.concatenate([labels[labels >= 0] for _, labels in batches])
    return len(words.decode(labels)) / len(labels)


def texts(spec: str) -> tuple[str, str]:
    """The training text and the held-out text: a built-in corpus's, or the user's text cut near its end."""
    if spec in CORPORA:
        corpus = corpora.corpus(spec)
        return tokenizer.decode(corpus.train), tokenizer.decode(corpus.test)
    text = user_files.own_text(Path(spec))
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]
