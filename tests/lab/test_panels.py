"""The lab's Python side: what each panel answers, on this machine's Python."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.experiments.rank_sweep import true_delta
from minilora.formats.huggingface import load
from minilora.lab import learning, planted
from minilora.lab.events import change, matrix, noise_energy, numbers
from minilora.lab.lab import DO, Lab
from minilora.lora import active, adapted
from minilora.tree import digest, named_params, trained

FILES = Path(__file__).parents[1] / "fixtures/lora_files"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAIN = {"do": "train", "rank": 8, "alpha": 16, "targets": ALL, "text": "recipes", "own": "",
         "prompt": "My lord, "}  # fmt: skip


@pytest.fixture(scope="module")
def lab():
    return Lab()


def ask(lab, **request):
    """The events that answer a request; they are JSON that a browser reads, without NaN and infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    return [json.loads(event, parse_constant=refuse) for event in lab.answer(json.dumps(request))]


@pytest.fixture(scope="module")
def run(lab):
    """The whole training that the page offers first, and what it then says."""
    return ask(lab, **TRAIN), ask(lab, do="compare")[0], lab.learning


def named(events, name):
    return [event for event in events if event["event"] == name]


# ---- teach it something


def test_shakespeare_learns_to_cook(run):
    events, compared, _ = run
    losses = [event["loss"] for event in named(events, "learned")]
    assert len(losses) == learning.STEPS
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 2
    before, after = map(float, re.findall(r"from (\S+) to (\d+\.\d+)", compared["says"])[0])
    assert compared["says"].startswith("Done. On a sample of the last fifth of the text")
    assert after < 0.6 * before  # on recipes that it has not seen
    cooking = re.compile(r"\b(Add|Serve|Stir|Cook|cups?|minutes)\b")
    assert not cooking.search(events[0]["before"])
    assert cooking.search(compared["after"])


def test_the_steps_are_those_of_train(lab, monkeypatch):
    monkeypatch.setattr(learning, "STEPS", 4)
    config = {"rank": 3, "alpha": 5, "targets": ["v_proj", "up_proj"]}
    events = ask(lab, **TRAIN | config)
    model, text = load(), learning.ids_of("recipes", "")
    ml.inject(model, ml.LoraConfig(3, 5, config["targets"]), rng=np.random.default_rng(0))
    batches = ml.batches(text[: len(text) - len(text) // 5], np.random.default_rng(1), 4, 64)
    history = ml.train(
        model, batches, ml.AdamW(1e-2, betas=(0.9, 0.99)), steps=4, schedule=ml.Schedule(4), threads=1
    )
    assert [event["loss"] for event in named(events, "learned")] == numbers(history.loss)
    assert digest(model) == digest(lab.learning.model)


def test_the_last_fifth_of_the_text_is_held_out(lab):
    own = "".join(chr(97 + i // 200) for i in range(2000))  # its letters say where in the text they are
    held = learning.Learning(lab.base, ml.LoraConfig(1), learning.ids_of("own", own), "")
    assert len(held.text) == 1600
    assert held.text.max() < min(ids.min() for ids, _ in held.rest) == held.probe.min()


def test_a_step_shows_the_change_as_it_is(run):
    events, _, trained_here = run
    for event in named(events, "learned")[::13]:
        seen = event["seen"]
        assert seen["module"] == "model.layers.1.self_attn.o_proj"
        assert len(seen["values"]) == event["step"]
        assert all(values == sorted(values, reverse=True) for values in seen["values"])
        assert seen["energy"] == sorted(seen["energy"])
        assert seen["energy"][-1] == seen["noise"][-1] == 1
    for module in ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj"):
        seen = trained_here.seen(module)
        dense = change(trained_here.model, module)
        layer = adapted(trained_here.model)[module]
        merged = active(trained_here.model)[module].merged(layer.base).weight.data
        np.testing.assert_allclose(layer.base.weight.data + dense, merged, rtol=0, atol=1e-6)
        values = np.linalg.svd(dense.astype(float), compute_uv=False)[:8]
        np.testing.assert_allclose(seen["values"][-1], values, rtol=1e-3)  # four digits


def test_a_matrix_becomes_bytes_of_half_a_level():
    a = np.random.default_rng(0).standard_normal((5, 7))
    for scale in (1e-30, 1, 1e30):
        sent = matrix(scale * a)
        levels = np.frombuffer(base64.b64decode(sent["bytes"]), np.uint8).reshape(
            sent["rows"], sent["columns"]
        )
        back = (levels.astype(float) - 128) / 127 * abs(scale * a).max()
        assert abs(back - scale * a).max() <= abs(scale * a).max() / 254 * (1 + 1e-12)
        assert {levels.min(), levels.max()} & {1, 255}
    assert set(base64.b64decode(matrix(np.zeros((2, 3)))["bytes"])) == {128}


@pytest.mark.parametrize(("rank", "targets"), [(1, ["q_proj"]), (5, ["down_proj", "k_proj"]), (32, ALL)])
def test_the_numbers_trained_are_counted(lab, rank, targets):
    sides = {name: 96 + 256 if name in ALL[4:] else 96 + 96 for name in targets}
    said = ask(lab, do="count", rank=rank, alpha=16, targets=targets)[0]["says"]
    assert said.startswith(f"You train {3 * rank * sum(sides.values()):,} numbers beside 344,736 frozen ones")


def test_comparing_leaves_the_model_as_it_was(lab, run):
    _, compared, trained_here = run
    before = digest(trained_here.model)
    model = trained_here.model
    assert compared["after"] == compared["merged"] == trained_here.sample()
    assert digest(model) == before
    assert all(layer.merged is None for layer in adapted(model).values())
    assert 0 < compared["difference"] < 1e-4 * compared["logits"]
    assert all(0 < ms < 1000 for ms in compared["milliseconds"])


def test_the_base_is_never_changed(lab, run):
    assert digest(lab.base) == digest(load())
    assert not trained(lab.base)


def test_what_is_stopped_can_be_looked_at_and_compared(lab):
    events = lab.answer(json.dumps(TRAIN))
    for _ in range(3):
        next(events)
    events.close()
    assert len(lab.learning.seconds) == 2
    assert len(ask(lab, do="look", module=lab.learning.shown)[0]["values"]) == 2
    assert ask(lab, do="compare")[0]["event"] == "compared"
    assert all(p.grad is None for p in named_params(lab.learning.model).values())


def test_looking_before_the_first_step_shows_no_change(lab):
    events = lab.answer(json.dumps(TRAIN))
    next(events)
    seen = ask(lab, do="look", module="model.layers.0.mlp.up_proj")[0]
    assert (seen["values"], seen["energy"], seen["delta"]["largest"]) == ([], [0.0] * 8, 0)
    assert json.loads(next(events))["seen"]["module"] == "model.layers.0.mlp.up_proj"
    events.close()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (TRAIN | {"text": "own", "own": "too short"}, "your text has 9 characters; expected at least 600"),
        (TRAIN | {"text": "own", "own": "字" * 900}, "your text: 100.0% of it is not in the base's alphabet"),
        (TRAIN | {"targets": []}, "targets"),
        (TRAIN | {"rank": 200}, "r is 200"),
        ({"do": "find", "pairs": 6}, "the number of pairs is 6; expected 1 to 5"),
        ({"do": "find", "pairs": 0}, "the number of pairs is 0"),
        ({"do": "read", "path": "/nowhere/x.safetensors", "name": "mine"}, "mine: is missing"),
        ({"do": "look", "module": "o_proj"}, "'o_proj' is not adapted"),
    ],
)  # fmt: skip
def test_what_a_visitor_can_mend_is_said_and_not_raised(lab, run, request_, said):
    (event,) = ask(lab, **request_)
    assert event.keys() == {"event", "do", "says"}
    assert (event["event"], event["do"]) == ("refused", request_["do"])
    assert said in event["says"]


def test_a_prompt_may_be_empty_or_in_another_alphabet(lab, monkeypatch):
    monkeypatch.setattr(learning, "STEPS", 1)
    assert ask(lab, **TRAIN | {"prompt": ""})[0]["prompt"] == "\n"
    assert ask(lab, **TRAIN | {"prompt": "“Grüß” "})[0]["prompt"] == '"Gruss" '


def test_a_loss_that_is_lost_says_what_to_try(lab, monkeypatch):
    monkeypatch.setattr(learning, "RATE", 1e30)
    event = ask(lab, **TRAIN)[-1]
    assert event["event"] == "refused"
    assert "try a smaller alpha" in event["says"]


@pytest.mark.parametrize("do", ["look", "compare", "reuse"])
def test_nothing_is_compared_before_it_is_trained(do):
    fresh = Lab.__new__(Lab)
    fresh.learning = None
    (event,) = ask(fresh, do=do, **({"module": "m"} if do == "look" else {}))
    assert event["says"] == "nothing is trained yet; press Train first"


# ---- find a hidden rank


@pytest.mark.parametrize("k", range(1, planted.MOST + 1))
def test_the_spectrum_finds_the_number_of_pairs(lab, k):
    first, *steps, answer = ask(lab, do="find", pairs=k)
    assert len(first["pairs"]) == k
    true = np.linalg.svd(true_delta(lab.base, k).astype(float), compute_uv=False)
    np.testing.assert_allclose(first["true"], true[:k], rtol=1e-3)
    assert true[k] < 1e-5 < true[k - 1]
    assert [step["step"] for step in steps] == list(range(1, planted.STEPS + 1))
    assert steps[-1]["found"] == k
    assert steps[-1]["loss"] < 0.1 * steps[0]["loss"]
    assert f"after the first {k}, and {k} pair" in answer["says"]


def test_letters_are_swapped_in_what_the_model_wrote(lab):
    first = next(planted.search(lab.base, lab.text, 3))
    swap = {a + b for a, b in first["pairs"]}
    table = str.maketrans({x: y for a, b in first["pairs"] for x, y in ((a, b), (b, a))})
    assert len(swap) == 3
    assert first["plain"].translate(table) == first["swapped"] != first["plain"]
    assert len(lab.text) == planted.TEXTS * planted.WRITTEN
    assert lab.text is lab.text


def test_rows_of_swapped_letters_change_most(lab):
    *_, last, _ = ask(lab, do="find", pairs=2)
    levels = np.frombuffer(base64.b64decode(last["delta"]["bytes"]), np.uint8).astype(float) - 128
    norms = np.linalg.norm(levels.reshape(26, 96), axis=1)
    assert {chr(97 + i) for i in np.argsort(norms)[-4:]} == set("eato")


# ---- open an adapter


@pytest.mark.parametrize("name", ["kohya_sdscripts/sd15_linear/sd15_linear.safetensors", "peft/plain",
                                  "mlx/lora_default", "gguf/llama_gqa/llama_gqa.f32.gguf"])  # fmt: skip
def test_an_adapter_of_any_tool_is_opened(lab, name):
    (event,) = ask(lab, do="read", path=f"{FILES}/{name}", name="mine")
    seen = ml.inspect(f"{FILES}/{name}")
    assert event["says"].startswith("mine: LoRA of rank ")
    assert f"{seen.parameters:,} numbers" in event["says"]
    assert [m["module"] for m in event["modules"]] == [m.module for m in seen.modules]
    for shown, m in zip(event["modules"], seen.modules, strict=True):
        assert shown["values"] == numbers(m.singular_values)
        assert shown["noise"] == noise_energy(m.shape, m.r)
        assert f"{m.ranks.at90} directions hold 90 %" in shown["says"]
    assert len(event["table"]["head"]) == len(event["table"]["rows"][0])
    assert event["notes"] == list(seen.notes)


def test_the_adapter_that_was_trained_is_opened_as_a_file(lab):
    ask(lab, **TRAIN | {"targets": ["o_proj"]})
    (event,) = ask(lab, do="reuse")
    values = {m["module"]: m["values"] for m in event["modules"]}
    assert values == {path: numbers(s) for path, s in ml.spectrum(lab.learning.model).items()}


def test_every_request_is_documented():
    assert all(function.__doc__ for function in DO.values())
