"""Requests of the page -> events: the one object that the page's worker calls."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from .. import __version__
from ..errors import MiniloraError, StateError
from ..formats.huggingface import load
from ..methods.lora_config import LoraConfig
from ..peft.loading import save_adapter
from . import learning, planted, reading
from .events import Event


class Lab:
    """The base, the model trained last, and the answers; a request is JSON, its "do" a key of `DO`."""

    def __init__(self) -> None:
        self.base = load()
        self.learning: learning.Learning | None = None

    @cached_property
    def text(self) -> np.ndarray:
        """What the base writes, for the panel of the letters."""
        return planted.write(self.base)

    def answer(self, request: str) -> Iterator[str]:
        """The events that answer a request, each as JSON; an error that the visitor can mend is one, too."""
        asked = json.loads(request)
        do = asked.pop("do")
        try:
            for event in DO[do](self, **asked):
                yield json.dumps(event, allow_nan=False)
        except MiniloraError as e:
            yield json.dumps({"event": "refused", "do": do, "says": str(e)})

    def trained(self) -> learning.Learning:
        """What was trained last; StateError if nothing was."""
        if self.learning is None:
            raise StateError("nothing is trained yet; press Train first")
        return self.learning


def greet(lab: Lab) -> Iterator[Event]:
    """What is here."""
    yield {"event": "ready", "says": f"Ready: minilora {__version__} in this page."}


def count(lab: Lab, rank: int, alpha: float, targets: list[str]) -> Iterator[Event]:
    """How many numbers such a LoRA has."""
    yield learning.counted(lab.base, LoraConfig(rank, alpha, targets))


def train(
    lab: Lab, rank: int, alpha: float, targets: list[str], text: str, own: str, prompt: str
) -> Iterator[Event]:
    """Train it, step by step."""
    ids = learning.ids_of(text, own)
    lab.learning = learning.Learning(lab.base, LoraConfig(rank, alpha, targets), ids, prompt)
    yield from lab.learning.events()


def look(lab: Lab, module: str) -> Iterator[Event]:
    """Look at another module, now and in the steps that follow."""
    yield lab.trained().seen(module)


def compare(lab: Lab) -> Iterator[Event]:
    """What the training has changed, merged and unmerged."""
    yield lab.trained().compared()


def find(lab: Lab, pairs: int) -> Iterator[Event]:
    """Swap letters, and look for their number in the spectrum."""
    yield from planted.search(lab.base, lab.text, pairs)


def read(lab: Lab, path: str, name: str) -> Iterator[Event]:
    """Open the adapter that the page has put at a path; its errors name what the visitor dropped."""
    try:
        yield reading.opened(path, name)
    except MiniloraError as e:
        raise type(e)(str(e).replace(path, name)) from e


def reuse(lab: Lab) -> Iterator[Event]:
    """Write the adapter that was trained here in PEFT's form, and open that."""
    model = lab.trained().model
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "adapter", base="base")
        yield reading.opened(Path(folder) / "adapter", "the adapter trained above")


DO: dict[str, Callable[..., Iterator[Event]]] = {
    function.__name__: function for function in (greet, count, train, look, compare, find, read, reuse)
}
