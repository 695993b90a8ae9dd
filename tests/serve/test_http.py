"""OpenAI's client, and worse ones, against a server on this machine: each gets its text or a clear error.

The base here has one character a token; its server runs in this process, or, where it is killed, in its own.
"""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_metrics import samples

from minilora.data.chat import compiled
from minilora.decoding import generate
from minilora.errors import ConfigError, InputError
from minilora.formats.huggingface import save_model
from minilora.formats.tokenizer import ALPHABET, Tokenizer, stream
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.peft.loading import save_adapter
from minilora.serve import http as transport
from minilora.serve.bank import Bank
from minilora.serve.engine import Engine
from minilora.serve.http import Server, listen
from minilora.serve.service import BODY, PER_TOKEN, Service

TINY = Config(
    hidden_size=12,
    intermediate_size=15,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=200,
)
NAMES = ("a", "b", "c")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
HI = [{"role": "user", "content": "Hi"}]
ROOT = Path(__file__).parents[2]
# every id can be seen
WORDS = Tokenizer(ALPHABET.encode, lambda ids: "".join(chr(0x100 + int(i)) for i in ids))


def model_of(name, dtype=np.float64):
    """The base, with one adapter of these tests if a name is given, as a model of its own."""
    model = llama(TINY, np.random.default_rng(0), dtype)
    if name in NAMES:
        rank = 1 + NAMES.index(name)
        inject(model, LoraConfig(r=rank, alpha=9, init="both"), rng=np.random.default_rng(rank))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of adapters; beside it lies one that no client may reach."""
    place = tmp_path_factory.mktemp("place")
    for name in NAMES:
        save_adapter(model_of(name), place / "adapters" / name, dtype="float64")
    save_adapter(model_of("a"), place / "secret", dtype="float64")
    return place / "adapters"


class Gate:
    """Holds the engine up before each step until it is open; so a test says what happens while texts run."""

    def __init__(self, engine):
        self.open, step = threading.Event(), engine.step
        self.open.set()
        engine.step = lambda: (self.open.wait(), step())

    def __enter__(self):
        self.open.clear()

    def __exit__(self, *_):
        self.open.set()


@contextlib.contextmanager
def served(folder, words=WORDS, template=True, grace=20.0, host="127.0.0.1", **limits):
    """A server at a free port of this machine, with what a test needs of it."""
    model = model_of(None)
    engine = Engine(model, Bank(model, folder), **{"slots": 8, "invariant": True} | limits)
    gate = Gate(engine)
    prompt = compiled(folder, TEMPLATE, {}) if template else None
    service = Service(engine, words, "base", prompt, rng=np.random.default_rng(0))
    server = Server(service, host, 0, grace)
    server.service, server.gate = service, gate
    with httpx.Client(base_url=server.url, verify=False, timeout=60) as server.http:
        try:
            yield server
        finally:
            gate.open.set()
            server.stop()


@pytest.fixture(scope="module")
def server(folder):
    with served(folder) as server:
        yield server


def client_of(server, asynchronous=False):
    """OpenAI's client, which tries once."""
    kinds = (openai.AsyncOpenAI, httpx.AsyncClient) if asynchronous else (openai.OpenAI, httpx.Client)
    return client_at(f"{server.url}/v1", *kinds)


def client_at(url, kind=openai.OpenAI, transport=httpx.Client):
    limits = httpx.Limits(max_connections=300)
    return kind(
        base_url=url,
        api_key="none",
        max_retries=0,
        http_client=transport(verify=False, limits=limits, timeout=60),
    )


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def alone(name, prompt, n, seed=0, **how):
    """The text that a model of its own writes; the base's end is not known, so it has n tokens."""
    rng = np.random.default_rng(seed)
    tokens = generate(model_of(name), ALPHABET.encode(prompt)[None], n, rng=rng, **how)
    return WORDS.decode([int(token[0]) for token in tokens])


def settled(server):
    """Wait until the engine has nothing to do."""
    engine = server.engine
    assert until(lambda: not engine.busy()), "the engine still has something to do"


def until(true, seconds=20):
    """Whether something becomes true."""
    end = time.monotonic() + seconds
    while not (now := true()) and time.monotonic() < end:
        time.sleep(0.005)
    return now


# ---- texts


@pytest.mark.parametrize("name", ["base", *NAMES])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 0.7, "seed": 5, "top_p": 0.9}], ids=str)
def test_a_completion_is_what_the_adapter_alone_writes(client, name, how):
    found = client.completions.create(model=name, prompt="To be", max_tokens=12, **how)
    (choice,) = found.choices
    assert choice.text == alone(name, "To be", 12, **how)
    assert (choice.finish_reason, choice.index, found.model) == ("length", 0, name)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (5, 12, 17)


def test_the_adapters_here_write_different_texts(client):
    assert len({alone(name, "To be", 12, temperature=0) for name in ("base", *NAMES)}) == 4


@pytest.mark.parametrize("name", ["base", "b"])
def test_a_stream_is_the_same_text_in_pieces(server, client, name, monkeypatch):
    whole, engine = alone(name, "To be", 15, seed=3), server.engine
    step, before, read = engine.step, engine.counters.new_tokens, threading.Event()

    def wait_after_the_first_token():
        if engine.counters.new_tokens == before + 1:
            read.wait(20)
        step()

    monkeypatch.setattr(engine, "step", wait_after_the_first_token)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    try:
        stream = client.completions.create(model=name, prompt="To be", max_tokens=15, seed=3, **options)
        chunks = [next(stream)]
    finally:
        read.set()
    assert chunks[0].choices[0].text == whole[0]
    chunks += stream
    *texts, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == whole
    assert [chunk.choices[0].finish_reason for chunk in texts] == [None] * (len(texts) - 1) + ["length"]
    assert usage.choices == []
    assert usage.usage.completion_tokens == 15
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_is_events_that_no_cache_keeps_and_says_that_it_is_done(server):
    reply = post(server, {"model": "a", "prompt": "x", "max_tokens": 3, "stream": True})
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert {json.loads(event.removeprefix("data: "))["object"] for event in events} == {"text_completion"}
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-store"


def test_a_chat_is_the_completion_of_its_template(client):
    prompt = "user: Hi\nassistant: "
    whole = client.chat.completions.create(model="c", messages=HI, max_tokens=9, seed=1)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == alone("c", prompt, 9, seed=1)
    chunks = list(
        client.chat.completions.create(model="c", messages=HI, max_completion_tokens=9, seed=1, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_a_chat_without_a_limit_fills_the_slot_and_a_completion_has_16_tokens(client):
    prompt = len("user: Hi\nassistant: ")
    assert client.chat.completions.create(model="a", messages=HI).usage.completion_tokens == 200 - prompt
    long = [{"role": "user", "content": "Hi" + "!" * (199 - prompt)}]
    assert client.chat.completions.create(model="a", messages=long).usage.completion_tokens == 1
    assert client.completions.create(model="a", prompt="x").usage.completion_tokens == 16


def test_ids_are_a_prompt_too_and_nothing_is_put_before_them(folder):
    words = Tokenizer(ALPHABET.encode, WORDS.decode, start=(64,))
    with served(folder, words) as server, client_of(server) as client:

        def ask(prompt):
            return client.completions.create(model="a", prompt=prompt, max_tokens=8, temperature=0)

        text, ids = ask("hey"), ask(list(b"hey"))
        assert text.choices[0].text == ask(list(b"@hey")).choices[0].text == ask("@hey").choices[0].text
        assert (text.usage.prompt_tokens, ids.usage.prompt_tokens) == (4, 3)
        chat = client.chat.completions.create(model="a", messages=HI, max_tokens=1)
        assert chat.usage.prompt_tokens == len("user: Hi\nassistant: ")  # a template has its own


def test_a_text_ends_before_a_token_that_stops_it(folder):
    text = alone("a", "To be", 30, temperature=0)
    end = text[10]
    words = Tokenizer(ALPHABET.encode, WORDS.decode, stops=frozenset({ord(end) - 0x100}))
    with served(folder, words) as server, client_of(server) as client:
        found = client.completions.create(model="a", prompt="To be", max_tokens=30, temperature=0)
    assert found.choices[0].text == text[: text.index(end)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == text.index(end)


@pytest.mark.parametrize("streams", [False, True])
def test_a_text_ends_before_a_string_that_stops_it_and_leaves_its_slot(server, client, streams):
    text = alone("b", "To be", 100, temperature=0)
    stop = text[20:23]
    at = text.index(stop)
    how = {"model": "b", "prompt": "To be", "max_tokens": 100, "temperature": 0, "stop": ["nonsense", stop]}
    if streams:
        chunks = list(client.completions.create(**how, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[:at]
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        found = client.completions.create(**how)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (text[:at], "stop")
        assert found.usage.completion_tokens == at + 3
    settled(server)
    assert len(server.engine.free) == 8


def test_what_was_held_back_for_a_stop_string_that_does_not_come_is_shown(client):
    text = alone("b", "To be", 9, temperature=0)
    how = {"model": "b", "prompt": "To be", "max_tokens": 9, "temperature": 0, "stop": text[-2:] + "~"}
    assert client.completions.create(**how).choices[0].text == text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**how, stream=True)) == text


def test_without_a_seed_each_request_has_another_and_with_one_the_same(client):
    def ask(**how):
        return client.completions.create(model="base", prompt="x", max_tokens=20, **how).choices[0].text

    assert len({ask() for _ in range(4)}) == 4
    assert len({ask(seed=2) for _ in range(4)}) == 1


def test_top_k_is_passed_on(client):
    found = client.completions.create(model="a", prompt="x", max_tokens=9, extra_body={"top_k": 1}, seed=4)
    assert found.choices[0].text == alone("a", "x", 9, temperature=0)


def test_text_of_several_bytes_a_character_is_never_cut(folder):
    words = Tokenizer(
        lambda text: np.frombuffer(text.encode(), np.uint8) % 128,
        lambda ids: bytes(0xC3 if i % 2 else 0xA9 for i in range(len(ids))).decode(errors="replace"),
    )
    with served(folder, words) as server, client_of(server) as client:
        chunks = client.completions.create(model="a", prompt="x", max_tokens=5, stream=True)
        text = [chunk.choices[0].text for chunk in chunks]
    assert "".join(text) == "".join(stream(words, range(5))) == "\ufffdéé"


# ---- names


def test_models_are_the_base_and_the_adapters(client):
    cards = {model.id: model for model in client.models.list()}
    assert list(cards) == ["base", *NAMES]
    assert {model.owned_by for model in cards.values()} == {"minilora"}
    assert client.models.retrieve("b").id == "b"
    assert client.models.retrieve("b").parent == "base"


@pytest.mark.parametrize("call", ["completions", "chat", "models"])
def test_an_unknown_model_is_404_with_the_nearest_name(client, call):
    calls = {
        "completions": lambda: client.completions.create(model="bb", prompt="x"),
        "chat": lambda: client.chat.completions.create(model="bb", messages=HI),
        "models": lambda: client.models.retrieve("bb"),
    }
    with pytest.raises(openai.NotFoundError) as e:
        calls[call]()
    assert e.value.code == "model_not_found"
    assert "there is no adapter 'bb'; nearest: 'b'" in e.value.message
    assert "the base is 'base'" in e.value.message


PATHS = [
    "../a", "..", ".", "a/../b", "/etc/passwd", "a/", "./a", "a\0", "a\0/../b", "..\\a", "ａ", "a\u202e",
    "\u2025", "%2e%2e", "..%2f", "a" * 5000, "", " a", "a ", "A\u0301", "~", "$HOME", "*", "\ud800", "con:",
    "a\n", "../secret", "a/../../secret", "..%2fsecret",
]  # fmt: skip


@pytest.fixture
def touched(monkeypatch):
    """The paths outside of a place that the file system is asked for."""
    seen = []

    def spy(name):
        real = getattr(os, name)

        def call(path, *rest, **how):
            seen.append(str(path))
            return real(path, *rest, **how)

        monkeypatch.setattr(os, name, call)

    for name in ("open", "lstat", "stat", "scandir", "readlink"):
        spy(name)
    return seen


@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_no_name_reaches_outside_the_folder_of_adapters(server, name, touched):
    reply = post(server, {"model": name, "prompt": "x"})
    assert reply.status_code == 404, reply.text
    assert reply.json()["error"]["code"] == "model_not_found"
    assert len(reply.text) < 600
    outside = [path for path in touched if ".." in path or "\0" in path or "passwd" in path]
    assert not outside


@pytest.mark.parametrize(
    "path",
    ["%2e%2e", "..%2fa", "%2e%2e%2fa", "a%00", "%252e%252e", "a%2f..%2fb", "%ff", "a" * 5000, "%ed%a0%80",
     "....//a", "%c0%ae%c0%ae", "..%2fsecret", "%2e%2e%2fsecret", "a%2f..%2f..%2fsecret"],
)  # fmt: skip
def test_no_path_of_a_url_does_either(server, path, touched):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("GET", f"/v1/models/{path}")  # sent as it is
        reply = connection.getresponse()
        assert reply.status == 404
        assert "error" in json.load(reply)
    assert not [name for name in touched if ".." in name or "\0" in name]


def test_an_adapter_with_the_name_of_the_base_is_refused(tmp_path):
    save_adapter(model_of("a"), tmp_path / "base", dtype="float64")
    model = model_of(None)
    with pytest.raises(InputError, match="has the name of the base"):
        Service(Engine(model, Bank(model, tmp_path)), ALPHABET, "base", rng=np.random.default_rng(0))


# ---- errors


def post(server, body, path="/v1/completions", **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.http.post(path, content=raw, headers={"content-type": "application/json"} | headers)


def refused(reply, status, said, **fields):
    """An error in OpenAI's form, in one line."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert "Traceback" not in reply.text
    assert len(error["message"].splitlines()) == 1
    assert {name: error[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "said", "param"),
    [
        ({"n": 2}, "n is 2; expected 1", "n"),
        ({"temperature": -1}, "temperature is -1.0; expected", None),
        ({"top_p": 0}, "top_p is 0.0; expected a number in (0, 1]", None),
        ({"prompt": ""}, "expected (N, T)", None),
        ({"prompt": "é"}, "character 0 of the text is '\\xe9'", None),
        ({"prompt": [128]}, "expected 0 to 127", None),
        ({"max_tokens": 200}, "1 tokens and 200 new ones; a slot has 200 positions", None),
        ({"prompt": "x" * 300, "max_tokens": None}, "300 tokens", None),
        ({"nonsense": 1}, "unrecognized", "nonsense"),
    ],
)
def test_what_cannot_be_served_is_400_and_says_why(server, fields, said, param):
    refused(
        post(server, {"model": "a", "prompt": "x"} | fields),
        400,
        said,
        param=param,
        type="invalid_request_error",
    )


def test_a_chat_without_a_template_is_400(folder):
    said = pytest.raises(openai.BadRequestError, match="the base 'base' has no chat template")
    with served(folder, template=False) as server, client_of(server) as client, said:
        client.chat.completions.create(model="a", messages=HI)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_only_json_is_taken_so_no_page_of_another_site_can_ask(server, kind):
    refused(
        post(server, {"model": "a", "prompt": "x"}, **{"content-type": kind}),
        415,
        "expected application/json",
    )


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_may_name_its_charset(server, kind):
    assert post(server, {"model": "a", "prompt": "x"}, **{"content-type": kind}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nonsense", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/a", 405),
        ("POST", "/metrics", 405),
        ("PUT", "/v1/chat/completions", 405),
    ],
)
def test_other_routes_are_errors_in_json_too(server, method, path, status):
    reply = server.http.request(method, path)
    refused(reply, status, "")
    assert ("allow" in reply.headers) is (status == 405)


def test_a_body_that_is_too_large_is_413_at_the_limit_and_no_more_of_it_is_kept(server):
    limit = BODY + PER_TOKEN * 200
    assert server.service.largest == limit
    start = json.dumps({"model": "a", "prompt": "x"}).encode()
    assert post(server, start.ljust(limit)).status_code == 200
    refused(post(server, start.ljust(limit + 1)), 413, f"more than {limit:,} bytes")
    refused(post(server, start.ljust(5_000_000)), 413, f"more than {limit:,} bytes")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "stop", "stream", "seed",
    "n",
]  # fmt: skip
bodies = st.binary(max_size=40) | st.builds(
    lambda fields, more: json.dumps(fields | more).encode(),
    st.sampled_from([{}, {"model": "a", "prompt": "x", "max_tokens": 2}]),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), json_values, max_size=3),
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies, path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
def test_any_body_gets_an_answer_or_an_error_in_json(server, body, path):
    reply = post(server, body, path)
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        refused(reply, reply.status_code, "")
    elif "event-stream" not in reply.headers["content-type"]:
        assert reply.json()["choices"]


@pytest.mark.parametrize(
    "raw",
    [b"[" * 90_000, b'{"a":' * 15_000, b'{"seed": ' + b"9" * 60_000 + b"}"],
    ids=["lists", "objects", "digits"],
)
def test_depth_and_numbers_are_bounded(server, raw):
    refused(post(server, raw[: server.service.largest]), 400, "the body is not a JSON object")


def test_a_damaged_adapter_fails_its_own_request_and_says_no_path(folder, tmp_path, capfd):
    import shutil

    adapters = tmp_path / "adapters"
    shutil.copytree(folder, adapters)
    weights = adapters / "b/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with served(adapters) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError) as e:
            client.completions.create(model="b", prompt="x")
        assert "b/adapter_model.safetensors" in e.value.message
        assert str(tmp_path) not in e.value.message
        with pytest.raises(openai.InternalServerError):
            list(client.completions.create(model="b", prompt="x", stream=True))
        found = client.completions.create(model="a", prompt="x", max_tokens=4, temperature=0)
        assert found.choices[0].text == alone("a", "x", 4, temperature=0)
        shutil.rmtree(adapters)
        with pytest.raises(openai.InternalServerError) as e:
            client.models.list()
        assert str(tmp_path) not in e.value.message
    assert str(tmp_path) in capfd.readouterr().err  # which the server's owner may see


def test_a_bug_is_500_without_a_word_of_it(server, monkeypatch, capfd):
    def broken(*_):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(server.service, "submit", broken)
    reply = post(server, {"model": "a", "prompt": "x"})
    refused(reply, 500, "internal error", type="server_error")
    assert "secret" not in reply.text
    assert capfd.readouterr().err == "minilora: ZeroDivisionError: a secret\n"


def test_an_error_after_the_first_text_is_an_event_that_the_client_raises(folder):
    with served(folder) as server, client_of(server) as client:
        chunks = client.completions.create(model="a", prompt="x", max_tokens=150, stream=True)
        next(chunks)
        with server.gate:
            real = server.engine.logits
            server.engine.logits = lambda parts: real(parts) * np.nan
        with pytest.raises(openai.APIError, match="the logits are not finite"):
            list(chunks)
        server.engine.logits = real
        assert client.completions.create(model="a", prompt="x", max_tokens=3).choices


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_fails_all_who_wait_are_told_and_so_is_who_comes_later(folder):
    async def ask(client, streams):
        try:
            async for _ in await client.completions.create(**LONG, stream=streams):
                begun.set()
        except openai.APIError as e:
            return e

    async def all_of():
        async with client_of(server, asynchronous=True) as client:
            streams = [asyncio.create_task(ask(client, True)) for _ in range(2)]
            await asyncio.to_thread(until, lambda: len(server.engine.running) == 2)
            await asyncio.to_thread(begun.wait, 20)
            with server.gate:
                waiting = [asyncio.create_task(ask(client, False)) for _ in range(3)]
                await asyncio.to_thread(until, lambda: server.engine.queued() >= 3)
                server.engine.join = lambda: 1 / 0
            return await asyncio.gather(*streams), await asyncio.gather(*waiting)

    begun = threading.Event()
    with served(folder, slots=2) as server:
        events, errors = asyncio.run(all_of())
        assert all("the engine has failed" in e.message for e in (*events, *errors))
        assert not any(isinstance(e, openai.APIStatusError) for e in events)
        assert [e.status_code for e in errors] == [503] * 3
        later = post(server, LONG)
        refused(later, 503, "takes no more requests", code="stopping")
        assert later.headers["retry-after"] == "1"
        assert server.http.get("/health").status_code == 503


# ---- many at once


@pytest.mark.slow
def test_two_hundred_clients_at_once_each_get_their_own_text(folder):
    cases = [(("base", *NAMES)[i % 4], "To be"[: 1 + i % 5], 3 + i % 6, i) for i in range(200)]

    async def ask(client, name, prompt, n, seed, streams):
        how = {"model": name, "prompt": prompt, "max_tokens": n, "seed": seed}
        if not streams:
            return (await client.completions.create(**how)).choices[0].text
        chunks = await client.completions.create(**how, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_of(server):
        async with client_of(server, asynchronous=True) as client:
            return await asyncio.gather(*(ask(client, *case, i % 3 == 0) for i, case in enumerate(cases)))

    with served(folder, slots=16, queue=200) as server:
        found = asyncio.run(all_of(server))
        settled(server)
        done = server.engine.counters
        assert done.finished == {"stop": 0, "length": 200, "cancelled": 0, "error": 0}
        assert server.service.metrics.finished["length"] == 200
        assert done.new_tokens == sum(n for _, _, n, _ in cases)
    models = {name: model_of(name) for name in ("base", *NAMES)}
    for (name, prompt, n, seed), text in zip(cases, found, strict=True):
        tokens = generate(models[name], ALPHABET.encode(prompt)[None], n, rng=np.random.default_rng(seed))
        assert text == WORDS.decode([int(token[0]) for token in tokens])


def test_when_the_queue_is_full_the_next_is_429_and_nothing_is_lost(folder):
    async def ask(client):
        try:
            return (
                await client.completions.create(model="a", prompt="x", max_tokens=5)
            ).usage.completion_tokens
        except openai.RateLimitError as e:
            return e

    async def flood(server):
        async with client_of(server, asynchronous=True) as client:
            with server.gate:
                tasks = [asyncio.create_task(ask(client)) for _ in range(20)]
                await asyncio.to_thread(until, lambda: server.engine.counters.refused >= 15)
            return await asyncio.gather(*tasks)

    with served(folder, slots=2, queue=3) as server:
        found = asyncio.run(flood(server))
        answered, refusals = found.count(5), [e for e in found if isinstance(e, openai.RateLimitError)]
        assert answered + len(refusals) == 20
        for e in refusals:
            assert e.code == "queue_full"
            assert "requests are waiting; expected fewer than 3" in e.message
            assert e.response.headers["retry-after"] == "1"
        assert 3 <= answered <= 5
        settled(server)
        assert server.engine.counters.finished["length"] == answered
        assert server.service.metrics.refused == {429: 20 - answered}
        with client_of(server) as client:
            assert client.completions.create(model="a", prompt="x").choices


# ---- clients that go, or do not move


@contextlib.contextmanager
def connected(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        yield connection


def request(body, path="/v1/completions"):
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(raw)}"
    return "\r\n".join([*head, "", ""]).encode() + raw


LONG = {"model": "a", "prompt": "x", "max_tokens": 150}


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_hangs_up_cancels_its_text_wherever_that_is(folder, streams):
    with served(folder, slots=1) as server, client_of(server) as client:
        with server.gate, connected(server) as running, connected(server) as waiting:
            running.sendall(request(LONG | {"stream": streams}))
            assert until(lambda: server.engine.queued() == 1)
            waiting.sendall(request(LONG | {"stream": streams}))
            assert until(lambda: server.engine.queued() == 2)
            server.gate.open.set()
            assert until(lambda: server.engine.running)
            server.gate.open.clear()
        assert until(lambda: server.service.metrics.finished["cancelled"] == 2)
        settled(server)
        assert server.engine.counters.finished["cancelled"] == 2
        assert server.engine.counters.new_tokens < 150
        assert client.completions.create(model="a", prompt="x", max_tokens=3).usage.completion_tokens == 3


def test_a_client_that_leaves_a_stream_cancels_it(folder):
    with served(folder) as server, client_of(server) as client:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        with server.gate:
            stream.close()
            assert until(lambda: server.service.metrics.finished["cancelled"] == 1)
        settled(server)
        assert server.engine.counters.finished == {"stop": 0, "length": 0, "cancelled": 1, "error": 0}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(transport, "PATIENCE", 0.4)


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/comp", HEALTH[:-2], HEALTH, HEALTH + HEALTH[:7]],
    ids=["nothing", "line", "head", "idle", "second"],
)
def test_a_client_that_does_not_go_on_is_cut_off(folder, impatient, sent):
    """However slowly it sends, byte by byte: the clock starts with its turn."""
    with served(folder) as server, connected(server) as connection:
        connection.sendall(sent)
        start, answer = time.monotonic(), b""
        connection.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 10:
                with contextlib.suppress(TimeoutError):
                    if not (part := connection.recv(1000)):
                        break
                    answer += part
                if sent and not sent.endswith(b"\r\n\r\n"):
                    connection.sendall(b"a")
        assert time.monotonic() - start < 5
        assert answer.startswith(b"HTTP/1.1 200") is (HEALTH in sent)
        assert until(lambda: not server.uvicorn.server_state.connections)


@pytest.mark.slow
def test_a_client_may_wait_as_long_as_its_answer_takes(folder, impatient):
    with served(folder) as server, client_of(server) as client:
        threading.Timer(1.2, server.gate.open.set).start()
        with server.gate:
            found = client.completions.create(model="a", prompt="x", max_tokens=3)
        assert found.usage.completion_tokens == 3


def test_an_idle_connection_is_closed_by_the_client_first(server):
    """Else a request may meet a connection that is just being closed."""
    assert httpx.Limits().keepalive_expiry < server.uvicorn.config.timeout_keep_alive < transport.PATIENCE


def test_a_body_that_does_not_come_is_408(folder, impatient):
    with served(folder) as server, connected(server) as connection:
        connection.sendall(request(LONG)[:-5])
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_is_cut_off_and_its_text_keeps_no_slot(folder, impatient, monkeypatch):
    """Its stream is made of long events here, so that they fill what the system keeps for it."""
    monkeypatch.setattr(
        transport, "json", SimpleNamespace(dumps=lambda data: json.dumps(data) + " " * 200_000)
    )
    with served(folder) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request(LONG | {"stream": True}))
        assert until(lambda: server.service.metrics.finished.total() == 1)
        assert until(lambda: not server.uvicorn.server_state.connections)
        assert until(lambda: sum(server.engine.counters.finished.values()) == 1)
        settled(server)


def test_more_connections_than_there_may_be_are_closed_and_those_there_go_on(folder, monkeypatch):
    monkeypatch.setattr(transport, "CONNECTIONS", 3)
    with served(folder) as server, contextlib.ExitStack() as stack:
        kept = [stack.enter_context(connected(server)) for _ in range(3)]
        assert until(lambda: len(server.uvicorn.server_state.connections) == 3)
        more = stack.enter_context(connected(server))
        with contextlib.suppress(ConnectionResetError):
            assert more.recv(1) == b""
        for connection in kept:
            connection.sendall(HEALTH)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")


# ---- metrics and health


def test_metrics_are_what_the_clients_saw(folder):
    with served(folder) as server, client_of(server) as client:
        text = alone("a", "x", 20, temperature=0)
        client.completions.create(model="a", prompt="x", max_tokens=20, temperature=0)
        client.completions.create(model="a", prompt="x", max_tokens=20, temperature=0, stop=text[5:8])
        for model in ("nobody", "a"):
            with pytest.raises(openai.APIStatusError):
                client.completions.create(model=model, prompt="")
        settled(server)
        reply = server.http.get("/metrics")
        found = samples(reply.text)
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert found["minilora_requests_total"] == {"stop": 1, "length": 1, "cancelled": 0, "error": 0}
    assert found["minilora_refused_total"] == {"404": 1, "400": 1}
    assert found["minilora_adapter_misses_total"] == {"": 1}
    assert found["minilora_adapter_hits_total"] == {"": 1}
    assert found["minilora_request_seconds_count"] == found["minilora_first_token_seconds_count"] == {"": 2}
    assert 0 < found["minilora_first_token_seconds_sum"][""] < found["minilora_request_seconds_sum"][""]


def test_health_is_ok_until_the_engine_stops(folder):
    with served(folder) as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        server.engine.stop()
        reply = server.http.get("/health")
        assert (reply.status_code, reply.json()) == (503, {"status": "stopping"})


# ---- the end


def test_texts_at_hand_end_when_the_server_stops_and_new_ones_are_refused(folder):
    with served(folder) as server, client_of(server) as client:
        stream = client.completions.create(**LONG, seed=0, stream=True)
        text = next(stream).choices[0].text
        with server.gate:
            assert server.http.get("/health").status_code == 200
            stopped = []
            thread = threading.Thread(target=lambda: stopped.append(server.stop()))
            thread.start()
            assert until(lambda: server.engine.stopping)
            with contextlib.suppress(httpx.TransportError):  # if the port is closed already
                refused(post(server, LONG), 503, "takes no more requests", code="stopping")
            assert until(lambda: unreachable(server))
            assert not stopped
        text += "".join(chunk.choices[0].text for chunk in stream)
        thread.join()
        assert text == alone("a", "x", 150, seed=0)
        assert stopped == [True]


def unreachable(server):
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("streams", [False, True])
def test_what_does_not_end_in_time_is_cut_off_and_told_so(folder, streams):
    with served(folder, grace=0.2) as server, client_of(server) as client:
        server.engine.step = lambda real=server.engine.step: (time.sleep(0.05), real())
        caught, started = [], threading.Event()

        def ask():
            try:
                found = client.completions.create(**LONG, stream=streams)
                for _ in found if streams else ():
                    started.set()
            except openai.APIError as e:
                caught.append(e)

        thread = threading.Thread(target=ask)
        thread.start()
        assert started.wait(20) if streams else until(lambda: server.engine.running)
        assert server.stop() is False
        thread.join()
    assert "the server is stopping; the text is cut off" in caught[0].message
    assert isinstance(caught[0], openai.InternalServerError) is not streams  # 503, or an event


def test_an_address_that_is_taken_or_none_is_refused(server):
    for host, port in (
        ("127.0.0.1", server.port),
        ("256.1.1.1", 0),
        ("127.0.0.1", 70000),
        ("192.0.2.1", 0),
        ("127.0.0.1", -1),
        ("x" * 80, 0),
    ):
        with pytest.raises(ConfigError):
            listen(host, port).close()


def test_an_address_that_others_reach_is_not_private(folder):
    with served(folder) as server:
        assert server.private
    with served(folder, host="0.0.0.0") as server:
        assert not server.private


def test_grace_is_a_number_of_seconds(server):
    for grace in (-1, float("nan"), "3"):
        with pytest.raises(ConfigError, match="grace is"):
            Server(server.service, port=0, grace=grace)


# ---- the command


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base's folder, and one of adapters in float32."""
    place = tmp_path_factory.mktemp("base")
    save_model(model_of(None, np.float32), place / "tiny", "")
    (place / "tiny/chat_template.jinja").write_text(TEMPLATE)
    for name in NAMES:
        save_adapter(model_of(name, np.float32), place / "adapters" / name)
    return place


@contextlib.contextmanager
def command(base, *more):
    """The command in a process of its own; its process, and the line that it prints."""
    given = ["serve", str(base / "tiny"), "--adapters", str(base / "adapters"), "--port", "0", *more]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    process = subprocess.Popen(
        [sys.executable, "-m", "minilora", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        line = process.stdout.readline()
        yield process, line
    finally:
        process.kill()
        process.communicate()


def url_in(line):
    return re.fullmatch(r"tiny and 3 adapters: (http://127\.0\.0\.1:[0-9]+/v1)\n", line)[1]


def state(folder):
    return {
        path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_the_texts_at_hand_end(base, number):
    with command(base) as (process, line), client_at(url_in(line)) as client:
        stream = client.chat.completions.create(model="c", messages=HI, stream=True, seed=1)
        text = next(stream).choices[0].delta.content
        process.send_signal(number)
        text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        out, err = process.communicate(timeout=60)
    assert len(text) == 200 - len("user: Hi\nassistant: ")
    assert (process.returncode, out, err) == (0, "", "minilora: stopping; a second signal ends it at once\n")


@pytest.mark.slow
def test_a_text_that_is_cut_off_makes_the_exit_code_130(base):
    with command(base, "--grace", "0") as (process, line), client_at(url_in(line)) as client:
        stream = client.completions.create(model="a", prompt="x", max_tokens=190, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="cut off"):
            list(stream)
        process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.slow
def test_kill_9_leaves_no_lock_and_no_file_and_the_adapters_as_they_were(base, tmp_path):
    before = state(base)
    for _ in range(2):  # the second one finds nothing in its way
        with command(base) as (process, line), client_at(url_in(line)) as client:
            stream = client.completions.create(model="a", prompt="x", max_tokens=190, stream=True)
            next(stream)
            process.kill()
            with pytest.raises((openai.APIError, httpx.TransportError)):
                list(stream)
    assert state(base) == before


LOUD = r"minilora: whoever reaches http://0\.0\.0\.0:[0-9]+ can use it; it asks for no key\n"


@pytest.mark.slow
def test_an_address_that_others_reach_is_said_aloud(base):
    with command(base, "--host", "0.0.0.0") as (process, line):
        assert re.fullmatch(r"tiny and 3 adapters: http://0\.0\.0\.0:[0-9]+/v1\n", line)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert re.match(LOUD, err)


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_the_warning_comes_before_the_first_line_and_a_signal_there_stops_the_server(
    base, host, monkeypatch, capsys
):
    """So whoever waits for that line may send a signal as soon as it is there."""
    from minilora import cli

    def interrupted(text):
        assert re.fullmatch(r"tiny and 3 adapters: http://.+/v1", text)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "plain", interrupted)
    given = ["serve", str(base / "tiny"), "--adapters", str(base / "adapters"), "--host", host, "--port", "0"]
    assert cli.main(given) == 0
    warning = LOUD if host == "0.0.0.0" else ""
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(f"{warning}minilora: stopping; a second signal ends it at once\n", said.err)


def test_without_the_extra_the_command_says_what_is_missing(base, monkeypatch, capsys):
    from minilora import cli

    for package in ("starlette", "uvicorn"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert cli.main(["serve", str(base / "tiny"), "--adapters", str(base / "adapters")]) == 2
        assert capsys.readouterr() == (
            "",
            f'minilora: the package {package} is not installed; expected: pip install "minilora[serve]"\n',
        )


# ---- long ones


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_requests(folder):
    """Every kind of end: length, stop strings, refusals, and clients that hang up."""

    async def one(client, i):
        body = {
            "model": ("base", *NAMES, "nobody")[i % 5],
            "prompt": "x" * (1 + i % 30),
            "max_tokens": 4,
            "seed": i,
        }
        if i % 7 == 0:
            body |= {"stream": True}
        if i % 11 == 0:
            with contextlib.suppress(httpx.HTTPError, TimeoutError):
                await client.post("/v1/completions", json=body | {"max_tokens": 100}, timeout=0.01)
            return 0
        reply = await client.post("/v1/completions", json=body)
        assert reply.status_code == (404 if body["model"] == "nobody" else 200)
        return reply.status_code == 200

    async def many(server, numbers):
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            rest = iter(numbers)

            async def worker():
                return sum([await one(client, i) for i in rest])

            return sum(await asyncio.gather(*(worker() for _ in range(16))))

    with served(folder, queue=64) as server:
        asyncio.run(many(server, range(2000)))  # caches fill
        settled(server)
        before = resident()
        answered = asyncio.run(many(server, range(10_000)))
        settled(server)
        more = resident() - before
        print(f"{answered} answers, {more / 2**20:+.1f} MiB")
        assert len(server.engine.free) == 8
        assert not server.engine.waiting
        assert not server.uvicorn.server_state.tasks
    assert more < 10_000 * 400  # less than the tokens, times and text of a request
