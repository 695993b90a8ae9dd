"""Panel 1: LoRA teaches the base a text, and after every step the visitor can look at any ΔW.

The text's end is held out, to say what was learnt before and after. The loop is `ml.train`'s in one thread:
the same losses, to the bit. Stands in for `minilora train`; leaves out examples, checkpoints, other bases.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .. import spectra
from ..adapters import disabled, pairs
from ..completion import complete
from ..data.batching import batches, eval_batches
from ..data.user_files import check_lost
from ..errors import InputError, MismatchError, NonFiniteError, nearest, short
from ..fast.parallel import on_threads
from ..formats import tokenizer
from ..formats.atomic import read
from ..lora import active, inject, merge, unmerge
from ..merging.llama import largest, logits
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..optim import AdamW, Schedule
from ..training import evaluate
from ..tree import replica, trained
from .events import Event, change, matrix, noise_energy, numbers

STEPS, BATCH, LENGTH, RATE = 40, 4, 64, 1e-2
HELD_OUT = 5  # the last of so many parts of the text
SHORTEST = 600  # characters of a text: a window must fit into the part that is held out
WRITTEN, TEMPERATURE = 140, 0.6  # characters of a sample, and how they are drawn
PROBE, ROUNDS = (
    24,
    4,
)  # characters of the held-out text, on which merged and unmerged are compared, and timed in turn
HERE = Path(__file__).parent


def code() -> str:
    """The code of LoRA in this package."""
    return "".join(read(HERE.parent / name).decode() for name in ("lora.py", "layers.py", "ops.py"))


TEXTS: dict[str, Callable[[], str]] = {
    "recipes": lambda: read(HERE / "recipes.txt").decode(),
    "code": code,
}


def ids_of(text: str, own: str) -> np.ndarray:
    """The ids (T,) of one of TEXTS, or of `own`; InputError if that is too short or in another alphabet."""
    written = TEXTS[text]() if text in TEXTS else own
    plain = tokenizer.fold(written)
    check_lost("your text", tokenizer.lost(written, plain), len(plain))
    if len(plain) < SHORTEST:
        raise InputError(f"your text has {len(plain)} characters; expected at least {SHORTEST}")
    return tokenizer.encode(plain)


def counted(base: Llama, config: LoraConfig) -> Event:
    """How many numbers LoRA would train; errors as in `inject`."""
    report = inject(replica(base), config, rng=np.random.default_rng(0))
    return {
        "event": "counted",
        "says": f"You train {report.parameters:,} numbers beside {report.base_parameters:,} frozen ones: "
        f"{report.share:.1%}.",
    }  # fmt: skip


@contextlib.contextmanager
def merged(model: Llama) -> Iterator[None]:
    """Within the context the adapter is merged."""
    merge(model)
    try:
        yield
    finally:
        unmerge(model)


class Learning:
    """A training: the model, the text, and the singular values of every ΔW after each step."""

    def __init__(self, base: Llama, config: LoraConfig, ids: np.ndarray, prompt: str) -> None:
        self.model, self.prompt = replica(base), tokenizer.fold(prompt) or "\n"
        inject(self.model, config, rng=np.random.default_rng(0))
        cut = len(ids) - len(ids) // HELD_OUT
        self.text, self.probe = ids[:cut], ids[None, cut : cut + PROBE].astype(np.int64)
        self.rest = eval_batches(ids[cut:], 8, LENGTH, limit=8 * LENGTH)
        self.history: dict[str, list[np.ndarray]] = {path: [] for path in active(self.model)}
        self.shown = list(self.history)[len(self.history) // 2]
        self.seconds: list[float] = []
        self.before, self.start = self.sample(), evaluate(self.model, self.rest)

    def sample(self) -> str:
        """What the model writes after the prompt; always from the same seed."""
        rng = np.random.default_rng(0)
        return complete(self.model, self.prompt, WRITTEN, rng=rng, temperature=TEMPERATURE)

    def events(self) -> Iterator[Event]:
        """Train: what stands before the first step, then each step. NonFiniteError if the loss is lost."""
        yield {
            "event": "began", "modules": list(self.history), "steps": STEPS, "prompt": self.prompt,
            "before": self.before,
        }  # fmt: skip
        params, optimizer = trained(self.model), AdamW(RATE, betas=(0.9, 0.99))
        schedule = Schedule(STEPS, warmup=STEPS // 20)
        drawn = batches(self.text, np.random.default_rng(1), BATCH, LENGTH)
        with on_threads(self.model, threads=1) as gradient:
            for step, batch in zip(range(STEPS), drawn, strict=False):
                start = time.perf_counter()
                loss = float(gradient([batch]))
                if not math.isfinite(loss):
                    raise NonFiniteError(f"step {step + 1}: the loss is {loss}; try a smaller alpha")
                optimizer.step(params, optimizer.lr * schedule(step))
                self.seconds.append(time.perf_counter() - start)
                for path, values in spectra.spectrum(self.model).items():
                    self.history[path].append(values)
                yield {
                    "event": "learned", "step": step + 1, "steps": STEPS, "loss": numbers(loss),
                    "seconds": numbers(self.seconds[-1]), "seen": self.seen(self.shown),
                }  # fmt: skip

    def seen(self, module: str) -> Event:
        """A module's ΔW as it is, its singular values after every step, its energy beside that of noise.

        MismatchError if it is not adapted.
        """
        if module not in self.history:
            raise MismatchError(f"{short(module)} is not adapted; {nearest(module, self.history)}")
        self.shown, values = module, self.history[module]
        delta, r = change(self.model, module), pairs(self.model)[module].A.shape[0]
        last, noise = values[-1] if values else np.zeros(r), noise_energy(delta.shape, r)
        return {
            "event": "seen", "module": module, "delta": matrix(delta), "values": numbers(values),
            "energy": numbers(spectra.energy(last)), "noise": noise,
            "says": f"{spectra.rank_at(last, 0.9)} of {r} directions hold 90 % of ΔW, by the sum of "
            f"squares of its numbers. In a random matrix {sum(x < 0.9 for x in noise) + 1} would (dashed).",
        }  # fmt: skip

    def compared(self) -> Event:
        """The text after training, unmerged and merged; how far their logits are apart; what each costs."""
        after, end = self.sample(), evaluate(self.model, self.rest)
        apart = logits(self.model, self.probe)
        with merged(self.model):
            difference, text = largest(logits(self.model, self.probe) - apart), self.sample()
        return {
            "event": "compared", "after": after, "merged": text, "difference": numbers(difference),
            "logits": numbers(largest(apart)), "milliseconds": self.timed(), "pace": self.pace(),
            "says": "Done. On a sample of the last fifth of the text, from which it did not learn, the loss "
            f"went from {self.start:.2f} to {end:.2f}.",
        }  # fmt: skip

    def timed(self) -> list[float]:
        """Milliseconds for a character, the least of ROUNDS: the base alone, with its adapter, merged."""
        ways: tuple[Callable[[Llama], Any], ...] = (disabled, contextlib.nullcontext, merged)
        best = [math.inf] * len(ways)
        for _ in range(ROUNDS):
            for i, way in enumerate(ways):
                with way(self.model):
                    start = time.perf_counter()
                    logits(self.model, self.probe)
                    best[i] = min(best[i], time.perf_counter() - start)
        return numbers([1000 * seconds / self.probe.size for seconds in best])

    def pace(self) -> str:
        """How long a step took here, and on the machine of the benchmark."""
        known = json.loads(read(HERE / "speed.json"))
        here = f"{1000 * median(self.seconds):.0f} ms" if self.seconds else "no time"
        return (
            f"A step took {here} here; in the project's benchmark it took "
            f"{known['browser']:.0f} ms in Chromium and {known['native']:.0f} ms without a browser."
        )
