"""A body is what it asks for or one error that names the field; a text ends before its first stop string."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora.errors import FormatError, InputError, MiniloraError
from minilora.serve.openai import (
    GREEDY,
    IGNORED,
    MAX_SEED,
    MAX_STOP,
    MAX_STOPS,
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    READ,
    Answer,
    Asked,
    Refused,
    Until,
    Usage,
    asked,
    card,
    failure,
)

PLAIN = {"model": "m", "prompt": "To be"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def read(chat=False, **fields):
    """What a body with these fields asks for."""
    return asked(json.dumps((CHAT if chat else PLAIN) | fields).encode(), chat)


def test_defaults_are_those_of_openai():
    assert read() == Asked("m", "To be", max_tokens=16)
    assert read(chat=True) == Asked("m", messages=({"role": "user", "content": "Hi"},))
    for name in ("temperature", "top_p"):
        assert getattr(read(), name) == 1


# ---- each field arrives


COUNTS = st.integers(1, 10**6)
FIELDS = {
    "temperature": st.floats(GREEDY, 1e300) | st.just(0.0),
    "top_p": st.floats(0, 1),
    "top_k": COUNTS,
    "seed": st.integers(0, MAX_SEED - 1),
    "max_tokens": COUNTS,
    "stop": st.lists(st.text(min_size=1, max_size=MAX_STOP), max_size=MAX_STOPS),
    "stream": st.booleans(),
}


@given(fields=st.fixed_dictionaries({}, optional=FIELDS), chat=st.booleans())
def test_every_field_arrives_where_it_belongs(fields, chat):
    found = vars(read(chat, **fields))
    expected = vars(read(chat)) | fields
    assert found == expected | {"stop": tuple(expected["stop"])}


@given(chat=st.booleans(), name=st.sampled_from([*FIELDS, "stream_options", "user"]))
def test_null_is_an_omitted_field(chat, name):
    assert read(chat, **{name: None}) == read(chat)


@pytest.mark.parametrize("number", [1, 0, 1e-4])
def test_numbers_may_be_ints(number):
    assert read(temperature=number).temperature == float(number)


def test_a_temperature_that_overflows_the_logits_means_greedy():
    """z / T of logits up to 1e300 stays finite down to GREEDY."""
    assert [read(temperature=t).temperature for t in (5e-324, GREEDY / 2, GREEDY)] == [0, 0, GREEDY]


def test_max_completion_tokens_is_the_new_name_of_max_tokens_in_a_chat():
    assert read(True, max_completion_tokens=7).max_tokens == read(True, max_tokens=7).max_tokens == 7
    assert read(True, max_completion_tokens=7, max_tokens=7).max_tokens == 7
    with pytest.raises(Refused, match="max_tokens is 6; expected 7, as max_completion_tokens"):
        read(True, max_completion_tokens=7, max_tokens=6)
    with pytest.raises(Refused, match="unrecognized field 'max_completion_tokens'"):
        read(max_completion_tokens=7)


@pytest.mark.parametrize("ids", [[3], [5, 0, 2]])
def test_a_prompt_is_a_text_or_ids_or_a_list_of_one_of_them(ids):
    assert read(prompt=ids).prompt == read(prompt=[ids]).prompt == ids
    assert read(prompt=["To be"]).prompt == read(prompt="To be").prompt == "To be"


def test_one_stop_string_needs_no_list_and_usage_is_asked_for_in_a_stream():
    assert read(stop="\n").stop == ("\n",)
    assert read(stream=True).include_usage is False
    assert read(stream=True, stream_options={"include_usage": True}).include_usage is True


def test_parts_of_a_content_are_lines():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    message = {"role": "user", "content": parts, "name": "me"}
    assert read(True, messages=[message]).messages == ({"role": "user", "content": "one\ntwo"},)


def test_an_answer_of_ours_can_be_sent_back_in_the_next_request():
    message = Answer("m", True).whole("yes", "stop", Usage(1, 1))["choices"][0]["message"]
    sent = [*CHAT["messages"], message | {"refusal": None, "tool_calls": None, "annotations": []}]
    assert read(True, messages=sent).messages[1] == {"role": "assistant", "content": "yes"}


# ---- what asks for nothing is taken, what asks for more is refused by its name


@pytest.mark.parametrize("chat", [False, True])
def test_a_field_that_asks_for_nothing_changes_nothing(chat):
    for name, values in (NEUTRAL_CHAT if chat else NEUTRAL_COMPLETION).items():
        for value in (*values, None):
            assert read(chat, **{name: value}) == read(chat)
    for name in IGNORED:
        assert read(chat, **{name: "someone"}) == read(chat)


@pytest.mark.parametrize(
    ("chat", "fields", "param", "said"),
    [
        (False, {"n": 2}, "n", "n is 2; expected 1 or None: nothing else is supported"),
        (False, {"n": True}, "n", "n is True; "),
        (True, {"n": 0}, "n", "n is 0; "),
        (False, {"logprobs": 5}, "logprobs", "logprobs is 5; expected None: "),
        (True, {"logprobs": True}, "logprobs", "expected False or None"),
        (False, {"echo": True}, "echo", "echo is True"),
        (False, {"suffix": "x"}, "suffix", "suffix is 'x'"),
        (False, {"best_of": 3}, "best_of", "best_of is 3"),
        (True, {"presence_penalty": 0.5}, "presence_penalty", "expected 0 or 0.0 or None"),
        (True, {"tools": [{"type": "function"}]}, "tools", "tools is"),
        (True, {"response_format": {"type": "json_object"}}, "response_format", "expected {'type': 'text'}"),
        (False, {"temprature": 1}, "temprature", "unrecognized field 'temprature'; nearest: 'temperature'"),
        (False, {"messages": []}, "messages", "unrecognized field 'messages'"),
        (True, {"prompt": "x"}, "prompt", "unrecognized field 'prompt'"),
        (False, {"model": None}, "model", "expected the name of the base or an adapter"),
        (False, {"model": 3}, "model", "model is 3"),
        (False, {"prompt": None}, "prompt", "expected one text, or the ids of one"),
        (False, {"prompt": ["a", "b"]}, "prompt", "prompt is ['a', 'b']"),
        (False, {"prompt": []}, "prompt", "prompt is []"),
        (False, {"prompt": [[]]}, "prompt", "prompt is []"),
        (False, {"prompt": [1.0]}, "prompt", "prompt is [1.0]"),
        (False, {"prompt": [True]}, "prompt", "True"),
        (False, {"prompt": [-1]}, "prompt", "[-1]"),
        (False, {"prompt": [1 << 31]}, "prompt", "[2147483648]"),
        (False, {"max_tokens": 0}, "max_tokens", "max_tokens is 0; expected an int, at least 1"),
        (False, {"max_tokens": 1.0}, "max_tokens", "1.0"),
        (False, {"max_tokens": True}, "max_tokens", "True"),
        (True, {"max_completion_tokens": -1}, "max_completion_tokens", "-1"),
        (False, {"top_k": 0}, "top_k", "top_k is 0"),
        (False, {"temperature": "1"}, "temperature", "temperature is '1'; expected a number"),
        (False, {"temperature": True}, "temperature", "True"),
        (False, {"top_p": [1]}, "top_p", "[1]"),
        (False, {"temperature": 10**400}, "temperature", "of the size of a float"),
        (False, {"seed": -1}, "seed", "an int from 0"),
        (False, {"seed": 1.5}, "seed", "1.5"),
        (False, {"seed": MAX_SEED}, "seed", str(MAX_SEED)),
        (False, {"stop": [""]}, "stop", "at most 4 texts of 1 to 256 characters"),
        (False, {"stop": ""}, "stop", "''"),
        (False, {"stop": [1]}, "stop", "[1]"),
        (False, {"stop": list("abcde")}, "stop", "'e'"),
        (False, {"stop": "x" * 257}, "stop", "xxx"),
        (False, {"stop": {}}, "stop", "{}"),
        (False, {"stream": 1}, "stream", "stream is 1; expected true or false"),
        (False, {"stream_options": {"include_usage": True}}, "stream_options", "with stream"),
        (False, {"stream": True, "stream_options": {"x": 1}}, "stream_options", "{'x': 1}"),
        (False, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "1"),
        (False, {"stream": True, "stream_options": []}, "stream_options", "[]"),
        (True, {"messages": None}, "messages", "a list of at least one message"),
        (True, {"messages": []}, "messages", "[]"),
        (True, {"messages": ["Hi"]}, "messages[0]", "'Hi'"),
        (
            True,
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role",
            "one of system, developer",
        ),
        (True, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "['user']"),
        (True, {"messages": [{"role": "user"}]}, "messages[0].content", "is None; expected a text"),
        (True, {"messages": [*CHAT["messages"], {"role": "user", "content": 3}]}, "messages[1].content", "3"),
        (
            True,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "text",
        ),
        (
            True,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "messages[0].content",
            "3",
        ),
        (True, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content", "x"),
        (
            True,
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(chat, fields, param, said):
    with pytest.raises(Refused) as e:
        read(chat, **fields)
    assert (e.value.status, e.value.param) == (400, param)
    assert said in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is not a JSON object"),
        (b"[]", "is not a JSON object: []"),
        (b"null", "None"),
        (b"{", "is not"),
        (b"\xff{}", "is not"),
        (b'{"model": "a", "model": "b"}', "given twice"),
        (b"[" * 100_000, "is not"),
        (b'{"a":' * 100_000, "is not"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "is not"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_what_is_no_json_object_is_refused(chat, raw, said):
    with pytest.raises(FormatError, match=r"^the body is not a JSON object") as e:
        asked(raw, chat)
    assert said in str(e.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted(READ | {"prompt", "messages", "max_completion_tokens"} | IGNORED | NEUTRAL_CHAT.keys())
bodies = st.dictionaries(
    st.sampled_from(NAMES) | st.text(max_size=8) | st.just("\ud800"), json_values, max_size=4
)


@example(body={"\ud800": 1}, chat=True)
@example(body={"messages": [{"role": "user", "content": "", "\ud800": 1}]}, chat=True)
@given(body=bodies, chat=st.booleans())
def test_any_body_is_understood_or_refused_in_one_line_that_can_be_sent(body, chat):
    try:
        assert isinstance(asked(json.dumps((CHAT if chat else PLAIN) | body).encode(), chat), Asked)
    except (InputError, FormatError) as e:
        form = failure(400, str(e), getattr(e, "param", None))
        json.dumps(form, ensure_ascii=False).encode()  # no half characters
        said = str(e), json.dumps(form)
        assert (len(said[0].splitlines()), len(said[1]) < 2000) == (1, True)


@given(raw=st.binary(max_size=60), chat=st.booleans())
def test_any_bytes_are_understood_or_refused(raw, chat):
    with pytest.raises(MiniloraError):
        asked(raw, chat)


# ---- a text up to a stop string

ab = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)


def ended(pieces, stops):
    """The text, read piece by piece, up to the first stop string in it; and whether there is one."""
    text = ""
    for piece in pieces:
        text += piece
        if found := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(found)], True
    return text, False


@example(pieces=["a", "b"], stops=("ab", "b"))
@given(pieces=st.lists(ab, max_size=5), stops=stops)
def test_a_text_ends_before_its_first_stop_string_wherever_it_is_cut(pieces, stops):
    until, shown = Until(stops), ""
    for piece in pieces:
        shown += until.add(piece)
        assert not any(stop in shown for stop in stops)
        if until.over:
            break
    if not until.over:
        shown += until.add("", last=True)
    assert (shown, until.over) == ended(pieces, stops)


@given(pieces=st.lists(ab, max_size=5), stops=stops)
def test_no_more_is_held_back_than_may_become_a_stop_string(pieces, stops):
    until, text, shown = Until(stops), "", ""
    for piece in pieces:
        text, shown = text + piece, shown + until.add(piece)
        if until.over:
            return
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stop_strings_nothing_is_held_back():
    assert [Until(()).add(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"]


# ---- answers


@pytest.mark.parametrize("chat", [False, True])
def test_chunks_together_are_the_whole_answer(chat):
    answer = Answer("m", chat)
    whole, usage = answer.whole("one two", "length", Usage(3, 2)), answer.usage(Usage(3, 2))
    chunks = [
        answer.chunk("one", None, True),
        answer.chunk(" two", None, False),
        answer.chunk("", "length", False),
    ]
    assert whole["usage"] == usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert usage["choices"] == []
    for chunk in (*chunks, usage):
        assert {name: chunk[name] for name in ("id", "created", "model")} == {
            name: whole[name] for name in ("id", "created", "model")
        }
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, "length"] == [*reasons[:2], whole["choices"][0]["finish_reason"]]
    if chat:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas == [{"role": "assistant", "content": "one"}, {"content": " two"}, {}]
        empty = answer.chunk("", "stop", True)["choices"][0]["delta"]  # which clients add to
        assert empty == {"role": "assistant", "content": ""}
        assert whole["choices"][0]["message"] == {"role": "assistant", "content": "one two"}
        assert (whole["object"], chunks[0]["object"]) == ("chat.completion", "chat.completion.chunk")
    else:
        assert (
            "".join(chunk["choices"][0]["text"] for chunk in chunks)
            == whole["choices"][0]["text"]
            == "one two"
        )
        assert {whole["object"], *(chunk["object"] for chunk in chunks)} == {"text_completion"}


def test_no_two_answers_have_the_same_id():
    assert len({Answer("m", False).id for _ in range(50)}) == 50


def test_an_adapter_names_its_base_and_an_error_its_kind():
    assert card("a", 7, "base") == {
        "id": "a",
        "object": "model",
        "created": 7,
        "owned_by": "minilora",
        "parent": "base",
    }
    assert card("base", 7, "base")["parent"] is None
    assert failure(404, "no", "model", "model_not_found") == {
        "error": {
            "message": "no",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert failure(429, "full")["error"]["type"] == "rate_limit_error"
    assert failure(500, "oh")["error"]["type"] == "server_error"
