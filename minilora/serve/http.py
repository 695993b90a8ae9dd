"""An engine behind HTTP, as OpenAI's clients expect it: models, completions, chats; streams, metrics, health.

    body -> what it asks for (openai.py) -> ids -> engine -> tokens -> text -> JSON, whole or as events

Three threads: the engine's does the arithmetic; the event loop's serves the sockets and decodes each token
as it comes; the one that made the server waits to stop it. Bodies are read, prompts encoded and folders
looked at in a pool beside them, since that takes longer. All is bounded: bodies, connections, the queue, and
how long a client may take to send or to read. A client that hangs up cancels its text. Nothing is written.
Stands in for vLLM's API server; leaves out keys, TLS and several processes, which a proxy in front adds.
Needs the extra `serve`: starlette and uvicorn.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ConfigError, MiniloraError, check_float, check_int, short
from .metrics import CONTENT_TYPE
from .openai import Answer, Json, Refused, card, failure
from .service import Service, Text

PATIENCE = 30.0  # seconds for a client to send a request, or to read what is sent
KEEP_ALIVE = 15  # seconds between requests; more than the 5 of httpx, so that the client closes first
MAX_PORT = (1 << 16) - 1
CONNECTIONS = 512  # more are closed at once
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]

Receive = Callable[[], Any]
Send = Callable[[Mapping[str, Any]], Any]


@dataclass
class Reply:
    """The answer to a request, for a client that may hang up at any time."""

    text: Text
    form: Answer

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
            self.text.end()

    async def answer(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send it, whole or as events; an error before the first text has a status of its own."""
        pieces, form, want = self.text.pieces(), self.form, self.text.want
        text, reason = await anext(pieces)
        if not want.stream:
            async for piece, end in pieces:
                text, reason = text + piece, end
            whole = form.whole(text, reason, self.text.usage())
            await JSONResponse(whole)(scope, receive, send)
            return

        async def event(data: Json | str, more: bool = True) -> None:
            line = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"
            await send({"type": "http.response.body", "body": line.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await event(form.chunk(text, reason, True))
        try:
            async for piece, end in pieces:
                await event(form.chunk(piece, end, False))
            if want.include_usage:
                await event(form.usage(self.text.usage()))
        except Refused as e:
            await event(failure(e.status, str(e)))
        await event("[DONE]", False)


async def hung_up(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, largest: int) -> bytes:
    """The body of a request; Refused if it is too large, too slow, or its content-type is not JSON's."""
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

    async def complete(request: Request, chat: bool = False) -> Reply:
        raw = await read_body(request, service.largest)
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def told() -> None:
            loop.call_soon_threadsafe(changed.set)

        want, stream = await asyncio.to_thread(service.submit, raw, chat, told)
        return Reply(Text(service, want, stream, changed), Answer(want.model, chat))

    async def converse(request: Request) -> Reply:
        return await complete(request, chat=True)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(service.models)})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        await asyncio.to_thread(service.adapter, name)
        return JSONResponse(card(name, service.created, service.name))

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    async def health(request: Request) -> Response:
        ready = service.ready()
        return JSONResponse({"status": "ok" if ready else "stopping"}, 200 if ready else 503)

    async def refused(request: Request, e: Exception) -> Response:
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
    if check_int("port", port, 0) > MAX_PORT:
        raise ConfigError(f"port is {short(port)}; expected at most {MAX_PORT}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)
    except (OSError, ValueError) as e:  # ValueError: a host that is no name
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
        """Take no more requests; return whether those at hand ended in time. The others are cut off."""
        finishing = threading.Thread(target=self.engine.stop, daemon=True)
        finishing.start()
        self.uvicorn.should_exit = True
        finishing.join(self.grace)
        if cut := finishing.is_alive():
            self.engine.stop(finish=False)
        self.ended.wait()
        return not cut
