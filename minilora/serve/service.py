"""What a body asks for -> ids for the engine; the engine's tokens -> text, piece by piece.

    body -> Asked (openai.py) -> ids -> engine -> tokens -> text up to a stop string

The names of models, the status of an error, and the text of an answer as it grows. Stands in for vLLM's
OpenAIServing; leaves out prompts in batches. Knows the engine and the JSON of openai.py, and no sockets.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BusyError, InputError, MiniloraError, StateError, StorageError
from ..formats.tokenizer import Growing, Tokenizer
from ..table import plain
from .engine import Engine, Request, Stream
from .metrics import Metrics
from .openai import Asked, Messages, Refused, Until, Usage, asked, card

BODY, PER_TOKEN = 1 << 16, 32  # the largest body in bytes, and what each position of a slot adds to it


class Service:
    """A base by its name, its adapters and its tokenizer: requests for the engine.

    `template` turns messages into a prompt; None if the base has none. `rng` draws the seeds of requests
    without one. InputError if an adapter has the base's name.
    """

    def __init__(
        self,
        engine: Engine,
        words: Tokenizer,
        name: str,
        template: Callable[[Messages], str] | None = None,
        *,
        rng: np.random.Generator,
    ) -> None:
        if engine.bank and name in engine.bank.names():
            raise InputError(f"{engine.bank.folder / name}: has the name of the base; expected another name")
        self.engine, self.words, self.name, self.template, self.rng = engine, words, name, template, rng
        self.metrics, self.created = Metrics(engine), int(time.time())
        self.largest = BODY + PER_TOKEN * engine.positions

    def submit(self, raw: bytes, chat: bool, told: Callable[[], None]) -> tuple[Asked, Stream]:
        """Put what a body asks for into the engine's queue; errors as in `asked` and `Engine.submit`."""
        if not self.ready():
            raise StateError("the server is stopping and takes no more requests")
        want = asked(raw, chat)
        adapter = self.adapter(want.model)
        ids = self.ids(want)
        new = want.max_tokens or max(self.engine.positions - len(ids), 1)
        seed = int(self.rng.integers(1 << 63)) if want.seed is None else want.seed
        request = Request(ids, new, adapter, want.temperature, want.top_k, want.top_p, seed, self.words.stops)
        return want, self.engine.submit(request, told)

    def ready(self) -> bool:
        """Whether the engine runs and takes requests."""
        thread = self.engine.thread
        return thread is not None and thread.is_alive() and not self.engine.stopping

    def adapter(self, model: str) -> str | None:
        """The adapter that a model's name means, None for the base; Refused if there is neither."""
        if model == self.name:
            return None
        try:
            if not self.engine.bank:
                raise InputError("there are no adapters")
            self.engine.bank.check(model)
        except InputError as e:
            raise Refused(404, f"{e}; the base is {self.name!r}", "model", "model_not_found") from e
        return model

    def ids(self, want: Asked) -> np.ndarray | list[int]:
        """The ids (T,) of a prompt or of messages; ids that are given are taken as they are."""
        if isinstance(want.prompt, list):
            return want.prompt
        if want.prompt is not None:
            return self.words.begun(self.words.encode(want.prompt))
        if not self.template:
            what = f"the base {self.name!r} has no chat template; expected one in its folder"
            raise Refused(400, f"{what}, or a prompt at /v1/completions", "messages")
        return self.words.encode(self.template(want.messages))  # which has its own BOS

    def models(self) -> list[dict[str, Any]]:
        """The base and the adapters."""
        names = self.engine.bank.names() if self.engine.bank else []
        return [card(name, self.created, self.name) for name in (self.name, *names)]

    def error(self, e: Exception) -> Refused:
        """The answer to an error; as in `failed`, if the client has not caused it."""
        if isinstance(e, Refused):
            return e
        if isinstance(e, BusyError):
            return Refused(429, str(e), code="queue_full")
        if isinstance(e, StateError):
            return Refused(503, str(e), code="stopping")
        if isinstance(e, MiniloraError) and not isinstance(e, StorageError):
            return Refused(400, str(e))
        return self.failed(e)

    def failed(self, e: Exception) -> Refused:
        """The answer to an error of the server's own: stderr has all of it, a client no path and no bug."""
        print(plain(f"minilora: {type(e).__name__}: {e}"), file=sys.stderr)
        if isinstance(e, StateError):  # the engine's, which has failed
            return Refused(503, str(e), code="stopping")
        if not isinstance(e, MiniloraError) or not self.engine.bank:
            return Refused(500, "internal error")
        folder = str(self.engine.bank.folder)
        return Refused(500, str(e).replace(folder + os.sep, "").replace(folder, "the adapters"))


@dataclass
class Text:
    """The text of a request as it grows; its tokens come from the engine's thread, which sets `changed`."""

    service: Service
    want: Asked
    stream: Stream
    changed: asyncio.Event
    count: int = 0  # tokens read from the stream
    reason: str | None = None  # why it ended, as its client sees it

    async def pieces(self) -> AsyncIterator[tuple[str, str | None]]:
        """The text piece by piece, the last one with its finish reason; Refused for an error."""
        text, until, stream = Growing(self.service.words), Until(self.want.stop), self.stream
        while self.reason is None:
            await self.changed.wait()
            self.changed.clear()
            reason = stream.finish_reason  # first: if it is there, so are all tokens
            new = ""
            for token in stream.tokens[self.count :]:
                self.count += 1
                new += until.add(text.add(token))
                if until.over:
                    break
            if reason and not until.over:
                new += until.add(text.rest(), last=True)
            self.reason = "stop" if until.over else reason
            if self.reason == "error" and stream.error:
                raise self.service.failed(stream.error)
            if self.reason == "cancelled":
                raise Refused(503, "the server is stopping; the text is cut off", code="stopping")
            if new or self.reason:
                yield new, self.reason

    def usage(self) -> Usage:
        """The tokens of the prompt and the text."""
        return Usage(len(self.stream.prompt), self.count)

    def end(self) -> None:
        """Nobody waits for the text any more."""
        if self.stream.finish_reason is None:  # a stop string, or nobody is there
            self.service.engine.cancel(self.stream)
        metrics, times = self.service.metrics, self.stream.times
        metrics.finished[self.reason or "cancelled"] += 1
        metrics.whole.add(self.service.engine.clock() - times[0])
        if len(times) > 1:
            metrics.first.add(times[1] - times[0])
