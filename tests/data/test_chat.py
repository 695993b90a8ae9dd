"""Messages become the prompt that the base's template says; a template reaches nothing outside of them."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.chat import LARGEST, chat_template
from minilora.errors import FormatError, InputError, StorageError, UnsupportedError
from minilora.formats import gguf

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
)
HI = [{"role": "user", "content": "Hi"}]
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=9)}
    ),
    min_size=1,
    max_size=3,
)


def folder(where, template=None, file=None, **settings):
    """A base's folder, as far as templates go."""
    settings |= {} if template is None else {"chat_template": template}
    (where / "tokenizer_config.json").write_text(json.dumps(settings))
    if file is not None:
        (where / "chat_template.jinja").write_text(file)
    return where


def chatml(messages):
    """What the template above means."""
    turns = [f"<|im_start|>{m['role']}\n{m['content'].strip()}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


@given(messages=messages)
def test_messages_become_the_prompt_that_the_template_says(messages, tmp_path_factory):
    assert chat_template(folder(tmp_path_factory.getbasetemp(), CHATML))(messages) == chatml(messages)


def test_a_folder_without_a_template_has_none(tmp_path):
    assert chat_template(tmp_path) is None
    assert chat_template(folder(tmp_path)) is None
    assert chat_template(folder(tmp_path, [{"name": "tool_use", "template": "x"}])) is None


def test_the_file_comes_before_the_config_and_the_default_before_the_others(tmp_path):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    assert chat_template(folder(tmp_path, named))(HI) == "default"
    assert chat_template(folder(tmp_path, "config", "file"))(HI) == "file"
    (tmp_path / "tokenizer_config.json").unlink()
    assert chat_template(tmp_path)(HI) == "file"


def test_special_tokens_are_texts_or_objects_and_the_config_comes_first(tmp_path):
    where = folder(
        tmp_path,
        "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
        bos_token={"content": "<s>"},
        eos_token="</s>",
    )
    assert chat_template(where)(HI) == "<s>|</s>|"
    (where / "special_tokens_map.json").write_text('{"bos_token": "old", "pad_token": "<pad>"}')
    assert chat_template(where)(HI) == "<s>|</s>|<pad>"


def test_json_is_not_escaped_as_for_a_page_and_loops_can_be_left(tmp_path):
    source = "{{ messages[0] | tojson }}{% for m in messages %}{% break %}x{% endfor %}"
    assert (
        chat_template(folder(tmp_path, source))([{"role": "user", "content": "<é>"}])
        == '{"role": "user", "content": "<é>"}'
    )


def test_a_block_takes_its_line_with_it(tmp_path):
    source = "{% if true %}\n a\n  {% endif %}\nb"
    assert chat_template(folder(tmp_path, source))(HI) == " a\nb"


def test_tools_and_documents_are_none_and_so_not_there(tmp_path):
    source = "{% if tools is none and documents is none %}none{% endif %}"
    assert chat_template(folder(tmp_path, source))(HI) == "none"


def test_a_config_may_list_a_vocabulary_and_no_file_may_be_larger_than_that(tmp_path):
    tokens = {str(n): {"content": "<reserved>", "special": True} for n in range(1 << 15)}
    where = folder(tmp_path, "config", added_tokens_decoder=tokens)
    assert 1 << 20 < (where / "tokenizer_config.json").stat().st_size < LARGEST
    assert chat_template(where)(HI) == "config"
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        with open(where / name, "wb") as file:
            file.truncate(LARGEST + 1)
        with pytest.raises(StorageError, match=f"{name}: has {LARGEST + 1} bytes; at most {LARGEST}"):
            chat_template(where)


def test_what_a_template_refuses_is_an_input_error_with_its_words(tmp_path):
    prompt = chat_template(folder(tmp_path, "{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(InputError, match="chat template refuses these messages: 'roles must alternate'"):
        prompt(HI)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% include 1 2 %}", "{% nonsense %}"])
def test_a_damaged_template_is_refused_before_it_is_used(source, tmp_path):
    with pytest.raises(FormatError, match="its chat template cannot be read") as e:
        chat_template(folder(tmp_path, source))
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("template", [3, True, {"default": "x"}, [{"name": "default", "template": 3}]])
def test_a_template_that_is_no_text_is_refused(template, tmp_path):
    with pytest.raises(FormatError, match="expected a text"):
        chat_template(folder(tmp_path, template))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception.__closure__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__base__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ ('{0.__class__}').format(messages) }}",
        "{{ ''.format_map({}).__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages.clear() }}",
        "{% include 'tokenizer_config.json' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
        "{% extends 'tokenizer_config.json' %}",
        "{{ open('/etc/passwd').read() }}",
        "{{ cycler(1) }}",
        "{{ lipsum() }}",
        "{{ range(1000000) | list }}",
        "{{ strftime_now('%Y') }}",
    ],
)
def test_a_template_reaches_nothing_and_changes_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("a command was run"))
    monkeypatch.chdir(tmp_path)
    given = [dict(HI[0])]
    try:
        said = chat_template(folder(tmp_path, source))(given)
    except (InputError, FormatError):
        said = ""
    assert said == ""  # an attribute that is not allowed is undefined, which is no text
    assert given == HI


def test_a_gguf_file_brings_its_template_and_the_names_of_its_tokens(tmp_path, monkeypatch):
    values = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "tokenizer.ggml.tokens": ["<a>", "<b>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }
    monkeypatch.setattr(gguf, "opened", lambda path: SimpleNamespace(values=values))
    assert chat_template(tmp_path / "m.gguf")(HI) == "<b>Hi<a>"
    values["tokenizer.ggml.bos_token_id"] = 9  # which the vocabulary has not
    assert chat_template(tmp_path / "m.gguf")(HI) == "Hi<a>"
    del values["tokenizer.chat_template"]
    assert chat_template(tmp_path / "m.gguf") is None


def test_without_jinja_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert chat_template(folder(tmp_path)) is None  # where there is no template, it is not needed
    with pytest.raises(
        UnsupportedError, match=r'jinja2 is not installed; expected: pip install "minilora\[serve\]"'
    ):
        chat_template(folder(tmp_path, CHATML))


@pytest.mark.parity
@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{{ bos_token }}{% for m in messages %}\n    [{{ m.role }}]\n  {{ m.content }}\n{% endfor %}",
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{{ ns.n }}{{ m | tojson }}{% endfor %}",
    ],
)
@given(messages=messages)
def test_the_prompt_is_that_of_transformers(source, messages, tmp_path_factory):
    from transformers.utils.chat_template_utils import render_jinja_template

    where = folder(tmp_path_factory.getbasetemp(), source, bos_token="<s>")
    theirs, _ = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert chat_template(where)(messages) == theirs[0]
