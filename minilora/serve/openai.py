"""The JSON of OpenAI's completions: a body -> what it asks for; a text, its pieces and errors -> JSON.

Names and defaults are those of OpenAI's reference; `top_k` is vLLM's. Stands in for vLLM's protocol files.
Leaves out several choices, log probabilities, penalties, tools and images: each is refused by its name,
unless its value asks for nothing. Knows neither sockets nor engines.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, nearest, short
from ..formats.safetensors import json_object
from ..table import plain

Json = dict[str, Any]
Messages = tuple[dict[str, str], ...]  # each with a role and a content
MAX_SEED = 1 << 63
GREEDY = 1e-5  # a temperature below it means 0, as in vLLM
MAX_STOPS, MAX_STOP = 4, 256  # stop strings, and characters of one: what may become one is held back
ROLES = ("system", "developer", "user", "assistant")
# about accounts, which are not here: any value is taken
IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key", "store", "service_tier"}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what asks for nothing; so does null, for every field
    "n": (1,), "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "logit_bias": ({},),
}  # fmt: skip
NEUTRAL_COMPLETION = NEUTRAL | {"best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ()}
NEUTRAL_CHAT = NEUTRAL | {
    "logprobs": (False,), "top_logprobs": (0,), "response_format": ({"type": "text"},), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "modalities": (["text"],),
    "functions": ([],), "function_call": ("none",), "audio": (), "prediction": (),
    "reasoning_effort": ("none",), "web_search_options": (), "verbosity": (),
}  # fmt: skip
READ = {"model", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "max_tokens"}


class Refused(InputError):
    """A request that gets an error for an answer: HTTP status, and the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.param = param and plain(param[:200])


@dataclass(frozen=True)
class Asked:
    """What a body asks for. `prompt` is a text or token ids, or there are `messages`."""

    model: str
    prompt: str | list[int] | None = None
    messages: Messages = ()
    max_tokens: int | None = None  # None: what there is room for
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False  # in a stream


def wrong(param: str, value: object, expected: str) -> Refused:
    """The error for a field."""
    return Refused(400, f"{param} is {short(value)}; expected {expected}", param)


# ---- a body -> what it asks for


def asked(raw: bytes, chat: bool) -> Asked:
    """What the body of a completion, or a chat's, asks for; InputError or FormatError if it is not valid."""
    body = json_object("the body", raw)
    neutral, own = (
        (NEUTRAL_CHAT, {"messages", "max_completion_tokens"}) if chat else (NEUTRAL_COMPLETION, {"prompt"})
    )
    known = READ | own | IGNORED | neutral.keys()
    for name, value in body.items():
        if name not in known:
            raise Refused(400, f"unrecognized field {short(name)}; {nearest(name, known)}", name)
        if name in neutral and value is not None and not same(value, neutral[name]):
            accepted = " or ".join(map(repr, (*neutral[name], None)))
            raise wrong(name, value, f"{accepted}: nothing else is supported")
    given = {name: value for name, value in body.items() if value is not None}  # null is an omitted field
    model = given.get("model")
    if not isinstance(model, str):
        raise wrong("model", model, "the name of the base or an adapter")
    limit = check_count(given, "max_tokens")
    if chat:
        more = check_count(given, "max_completion_tokens")
        if None not in (limit, more) and limit != more:
            raise wrong("max_tokens", limit, f"{more}, as max_completion_tokens, or only one of the two")
        limit = limit or more
    return Asked(
        model,
        None if chat else check_prompt(given.get("prompt")),
        check_messages(given.get("messages")) if chat else (),
        limit or (None if chat else 16),
        0.0 if 0 < (t := check_number(given, "temperature")) < GREEDY else t,
        check_number(given, "top_p"),
        check_count(given, "top_k"),
        check_seed(given.get("seed")),
        check_stop(given.get("stop", [])),
        *check_stream(given),
    )


def same(value: object, accepted: tuple[object, ...]) -> bool:
    """Whether a value is one of the accepted ones, of the same type: true is not 1."""
    return any(type(value) is type(one) and value == one for one in accepted)


def check_count(given: Json, name: str) -> int | None:
    """An optional int of at least 1."""
    value = given.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise wrong(name, value, "an int, at least 1")
    return value


def check_number(given: Json, name: str) -> float:
    """A number, 1 if it is not given; whether it has a meaning is for the engine to say."""
    value = given.get(name, 1.0)
    if type(value) not in (int, float):
        raise wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise wrong(name, value, "a number of the size of a float") from None


def check_seed(value: object) -> int | None:
    """An optional int from 0 to 2^63 - 1."""
    if value is not None and (type(value) is not int or not 0 <= value < MAX_SEED):
        raise wrong("seed", value, "an int from 0 to 2^63 - 1")
    return value


def check_stop(value: object) -> tuple[str, ...]:
    """One text or several, none of them empty."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(
        isinstance(stop, str) and 0 < len(stop) <= MAX_STOP for stop in stops
    ):  # fmt: skip
        raise wrong("stop", value, f"at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters")
    return tuple(stops)


def check_stream(given: Json) -> tuple[bool, bool]:
    """Whether the text is streamed, and whether its usage is."""
    stream, options = given.get("stream", False), given.get("stream_options")
    if type(stream) is not bool:
        raise wrong("stream", stream, "true or false")
    if options is None:
        return stream, False
    usage = options.get("include_usage", False) if isinstance(options, dict) else None
    if not stream or type(usage) is not bool or options.keys() - {"include_usage"}:
        raise wrong("stream_options", options, 'with stream, {"include_usage": true} or false')
    return stream, usage


def check_prompt(value: object) -> str | list[int]:
    """A text, or token ids; or a list of one of them."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        (value,) = value
    if isinstance(value, list) and value and all(type(id) is int and 0 <= id < 1 << 31 for id in value):
        return value
    if not isinstance(value, str):
        raise wrong("prompt", value, "one text, or the ids of one")
    return value


def check_messages(value: object) -> Messages:
    """Messages, each a role and a text, or a list of parts of one."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", value, "a list of at least one message")
    return tuple(check_message(f"messages[{i}]", message) for i, message in enumerate(value))


def check_message(param: str, message: object) -> dict[str, str]:
    """A role and a text; the parts of a text are lines, as in vLLM."""
    if not isinstance(message, dict):
        raise wrong(param, message, "an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise wrong(f"{param}.role", role, f"one of {', '.join(ROLES)}")
    for name, value in message.items():
        if name not in ("role", "content", "name") and value not in (None, []):  # as in the answers of others
            raise wrong(f"{param}.{name}", value, "role and content alone")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [text for part in parts if isinstance(text := part.get("text"), str)]
        content = "\n".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str):
        raise wrong(f"{param}.content", message.get("content"), "a text, or parts of type text")
    return {"role": role, "content": content}


# ---- answers


class Until:
    """A text piece by piece, up to the first of the strings `stops`; what may become one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.held = stops, ""
        self.over = False  # whether one of them has come

    def add(self, piece: str, last: bool = False) -> str:
        """The text that is certain now, with the next piece."""
        text = self.held + piece
        if found := [at for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.held, self.over = "", True
            return text[: min(found)]
        starts = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        kept = len(text) - (0 if last else max(starts, default=0))
        self.held = text[kept:]
        return text[:kept]


@dataclass(frozen=True)
class Usage:
    """The tokens of a prompt and of its answer."""

    prompt: int
    completion: int

    def data(self) -> Json:
        """The form that it has in every answer."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


class Answer:
    """The JSON of one answer: whole, or in chunks of one id."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat, self.model, self.created = chat, model, int(time.time())
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, text: str, reason: str | None, usage: Usage) -> Json:
        """All of it."""
        content: Json = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self.data(kind, [self.choice(content, reason)]) | {"usage": usage.data()}

    def chunk(self, text: str, reason: str | None, first: bool) -> Json:
        """The next piece; the last one has the reason."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if first or text else {})
        return self.data(
            self.chunks, [self.choice({"delta": delta} if self.chat else {"text": text}, reason)]
        )

    def usage(self, usage: Usage) -> Json:
        """The chunk after the last piece, if the usage is asked for."""
        return self.data(self.chunks, []) | {"usage": usage.data()}

    @property
    def chunks(self) -> str:
        """The kind of a chunk."""
        return "chat.completion.chunk" if self.chat else "text_completion"

    def choice(self, content: Json, reason: str | None) -> Json:
        """The only choice."""
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def data(self, kind: str, choices: list[Json]) -> Json:
        """What every answer has."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def card(name: str, created: int, base: str) -> Json:
    """One of the models; an adapter's parent is its base, as in vLLM."""
    parent = None if name == base else base
    return {"id": name, "object": "model", "created": created, "owned_by": "minilora", "parent": parent}


def failure(status: int, message: str, param: str | None = None, code: str | None = None) -> Json:
    """An error."""
    usual = "invalid_request_error" if status < 500 else "server_error"
    kind = "rate_limit_error" if status == 429 else usual
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
