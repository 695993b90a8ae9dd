"""An engine behind HTTP, as OpenAI's clients expect it: models, completions, chats; streams, metrics, health.

    body -> what it asks for (openai.py) -> ids -> engine -> tokens -> text -> JSON, whole or as events

Three threads: the engine's does the arithmetic; the event loop's only waits, for sockets and tokens; the one
that made the server waits to stop it. What takes longer (JSON, tokenizers, folders) runs in a pool beside
them. All is bounded: bodies, connections, the queue, and how long a client may take to send or to read. A
client that hangs up cancels its text. Nothing is written. Stands in for vLLM's API server; leaves out keys, TLS
and several processes, which a proxy in front adds. Needs the extra `serve`: starlette and uvicorn.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import (
    BusyError,
    ConfigError,
    InputError,
    MiniloraError,
    StateError,
    StorageError,
    check_float,
    check_int,
)
from ..formats.tokenizer import Growing, Tokenizer
from ..table import plain
from .chat import Messages
from .engine import Engine, Request, Stream
from .metrics import CONTENT_TYPE, Metrics
from .openai import Answer, Asked, Refused, Until, Usage, asked, card, failure

PATIENCE = 30.0  # seconds for a client to send a request, or to read what is sent
KEEP_ALIVE = 15  # seconds between requests; more than the 5 of httpx, so that the client closes first
CONNECTIONS = 512  # more are closed at once
BODY, PER_TOKEN = 1 << 16, 32  # bytes of a body, and for each position of a slot
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]

Receive = Callable[[], Any]
Send = Callable[[Mapping[str, Any]], Any]


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
        """The answer to an error; what is nobody's fault but ours is told on stderr alone."""
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
        """The answer to an error of the server's: a bad adapter's, whose name is told without its folder."""
        print(plain(f"minilora: {type(e).__name__}: {e}"), file=sys.stderr)
        if not isinstance(e, MiniloraError) or not self.engine.bank:
            return Refused(500, "internal error")
        return Refused(500, str(e).replace(f"{self.engine.bank.folder}{os.sep}", ""))


# ---- one answer


@dataclass
class Reply:
    """The answer to a request: its text as it grows, for a client that may hang up at any time."""

    service: Service
    want: Asked
    stream: Stream
    changed: asyncio.Event
    chat: bool
    count: int = 0  # tokens read from the stream
    reason: str | None = field(default=None)  # as the client sees it

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer, or cancel the text if the client hangs up first."""
        answer = asyncio.create_task(self.answer(scope, receive, send))
        gone = asyncio.create_task(hung_up(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                await answer
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
            self.end()

    def end(self) -> None:
        """Nobody waits for the text any more."""
        if self.stream.finish_reason is None:  # a stop string, or nobody is there
            self.service.engine.cancel(self.stream)
        metrics, times = self.service.metrics, self.stream.times
        metrics.finished[self.reason or "cancelled"] += 1
        metrics.whole.add(time.perf_counter() - times[0])
        if len(times) > 1:
            metrics.first.add(times[1] - times[0])

    async def answer(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send the answer, whole or as events; an error before the first text has a status of its own."""
        form, parts = Answer(self.want.model, self.chat), self.parts()
        text, reason = await anext(parts)
        if not self.want.stream:
            async for piece, end in parts:
                text, reason = text + piece, end
            await JSONResponse(form.whole(text, str(reason), self.usage()))(scope, receive, send)
            return

        async def event(data: str, more: bool = True) -> None:
            await send(
                {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more}
            )

        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await event(json.dumps(form.chunk(text, reason, True)))
        try:
            async for piece, end in parts:
                await event(json.dumps(form.chunk(piece, end, False)))
            if self.want.include_usage:
                await event(json.dumps(form.usage(self.usage())))
        except Refused as e:
            await event(json.dumps(failure(e.status, str(e))))
        await event("[DONE]", False)

    async def parts(self) -> AsyncIterator[tuple[str, str | None]]:
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


async def hung_up(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Incoming, largest: int) -> bytes:
    """The body of a request; Refused for one that is too large, too slow or no JSON."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":  # a page of another site cannot send it
        raise Refused(415, f"content-type is {kind[:100]!r}; expected application/json")
    raw = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                raw += part
                if len(raw) > largest:
                    raise Refused(413, f"the body has more than {largest:,} bytes")
    except TimeoutError:
        raise Refused(408, f"the body did not come within {PATIENCE:g} s") from None
    return bytes(raw)


def application(service: Service) -> Starlette:
    """The routes, and errors as JSON."""

    async def complete(request: Incoming, chat: bool = False) -> Reply:
        raw = await read_body(request, service.largest)
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def told() -> None:
            loop.call_soon_threadsafe(changed.set)

        want, stream = await asyncio.to_thread(service.submit, raw, chat, told)
        return Reply(service, want, stream, changed, chat)

    async def converse(request: Incoming) -> Reply:
        return await complete(request, chat=True)

    async def models(request: Incoming) -> Response:
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(service.models)})

    async def model(request: Incoming) -> Response:
        name = request.path_params["name"]
        await asyncio.to_thread(service.adapter, name)
        return JSONResponse(card(name, service.created, service.name))

    async def metrics(request: Incoming) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    async def health(request: Incoming) -> Response:
        ready = service.ready()
        return JSONResponse({"status": "ok" if ready else "stopping"}, 200 if ready else 503)

    async def refused(request: Incoming, e: Exception) -> Response:
        if isinstance(e, ClientDisconnect):
            return Response(status_code=400)  # nobody reads it
        error = Refused(e.status_code, e.detail) if isinstance(e, HTTPException) else service.error(e)
        headers = {"retry-after": "1"} if error.status in (429, 503) else {}
        if isinstance(e, HTTPException):
            headers |= e.headers or {}
        service.metrics.refused[error.status] += 1
        form = failure(error.status, str(error), error.param, error.code)
        return JSONResponse(form, error.status, headers)

    return Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", converse, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name}", model),
            Route("/metrics", metrics),
            Route("/health", health),
        ],
        exception_handlers=dict.fromkeys(
            (MiniloraError, HTTPException, ClientDisconnect, Exception), refused
        ),
    )


# ---- sockets


class Connection(H11Protocol):  # type: ignore[misc]
    """uvicorn's, cut off when its client takes too long to send a request or to read the answer."""

    clock: asyncio.TimerHandle | None = None

    def settle(self) -> None:
        """Start the clock when it becomes the client's turn, and stop it when it no longer is."""
        turn = self.cycle is None or self.cycle.response_complete or self.flow.write_paused
        if turn and not self.clock:
            self.clock = self.loop.call_later(PATIENCE, self.transport.abort)
        elif not turn and self.clock:
            self.clock.cancel()
            self.clock = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client is there."""
        super().connection_made(transport)
        self.settle()
        if len(self.connections) > CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        super().connection_lost(exc)
        if self.clock:
            self.clock.cancel()

    def data_received(self, data: bytes) -> None:
        """It has sent something, perhaps the end of a request's head."""
        super().data_received(data)
        self.settle()

    def on_response_complete(self) -> None:
        """It may send the next request."""
        super().on_response_complete()
        self.settle()

    def pause_writing(self) -> None:
        """It does not read as fast as it is written to."""
        super().pause_writing()
        self.settle()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self.settle()


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any free one. ConfigError if there can be none."""
    check_int("port", port, 0)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)
    except (OSError, OverflowError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise ConfigError(
            f"cannot listen at {host}:{port}: {why}; expected a free address of this machine"
        ) from e


class Server:
    """A service at an address, from now on until `stop`, which gives texts at hand `grace` seconds to end.

    ConfigError if the address is not free.
    """

    def __init__(
        self, service: Service, host: str = "127.0.0.1", port: int = 8000, grace: float = 30.0
    ) -> None:
        self.engine, self.grace = service.engine, check_float("grace", grace, 0, 1e6)
        self.socket = listen(host, port)
        address, self.port = self.socket.getsockname()[:2]
        self.url = f"http://{f'[{address}]' if ':' in address else address}:{self.port}"
        self.private = ipaddress.ip_address(address).is_loopback
        config = uvicorn.Config(
            application(service), http=Connection, ws="none", loop="asyncio", lifespan="off", log_config=None,
            log_level="critical", access_log=False, proxy_headers=False, server_header=False,
            timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=math.ceil(grace + PATIENCE),
        )  # fmt: skip
        self.uvicorn, self.ended = uvicorn.Server(config), threading.Event()
        self.engine.start()
        threading.Thread(target=self.run, name="minilora-http", daemon=True).start()

    def run(self) -> None:
        """In a thread of its own; in the main one uvicorn would take the signals."""
        try:
            self.uvicorn.run([self.socket])
        finally:
            self.ended.set()

    def stop(self) -> bool:
        """Take no more requests, and return whether those at hand ended in time; others are cut off, and told so."""
        finishing = threading.Thread(target=self.engine.stop, daemon=True)
        finishing.start()
        self.uvicorn.should_exit = True
        finishing.join(self.grace)
        if cut := finishing.is_alive():
            self.engine.stop(finish=False)
        self.ended.wait()
        return not cut
