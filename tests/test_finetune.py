"""`minilora train`: the user's text or examples, a checkpoint that goes on to the bit, a PEFT folder."""

import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import minilora_, one_line

from minilora import cli, finetune, session
from minilora.compose.quantize import quantize_checkpoint
from minilora.data import batching
from minilora.data.examples import examples, padded
from minilora.decoding import generate
from minilora.errors import (
    ConfigError,
    FormatError,
    InputError,
    MiniloraError,
    MismatchError,
    StateError,
    StorageError,
)
from minilora.finetune import Recipe, texts
from minilora.formats import tokenizer
from minilora.formats.huggingface import BASE, load, read_json
from minilora.formats.tokenizer import Tokenizer, stream
from minilora.merging.merge import merge_checkpoint
from minilora.methods.lora_config import LoraConfig
from minilora.methods.quantize import quantize
from minilora.model import Config, llama
from minilora.peft.folder import open_adapter
from minilora.peft.loading import base_print, load_adapter
from minilora.training import evaluate
from minilora.tree import digest

TINY = Config(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=32)  # fmt: skip
LETTERS = Tokenizer(tokenizer.encode, tokenizer.decode, frozenset({10}), fold=True)
LINE = "the quality of mercy is not strained, it droppeth as the gentle rain.\n"
TEXT = "".join(f"{i}: {LINE}" for i in range(60))


@pytest.fixture
def base(tmp_path):
    """A small model of letters, saved."""
    from minilora.formats.huggingface import save_model

    save_model(llama(TINY, np.random.default_rng(0)), tmp_path / "base", "")
    return str(tmp_path / "base")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    return str(path)


def small(text, base, **how):
    """A recipe in which no two numbers are alike, and none is its default."""
    usual = {"steps": 7, "batch": 3, "length": 16, "eval_every": 4, "eval_tokens": 90, "lr": 1e-2, "r": 2,
             "alpha": 5.0, "warmup": 1, "seed": 6}  # fmt: skip
    return Recipe(text, base, **usual | how)


# ---- training


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_writes_an_adapter_and_leaves_the_base_unchanged(method, text, base, tmp_path):
    before = digest(load(base))
    told = []
    found = finetune.run(small(text, base, method=method), tmp_path / "a", told=lambda *x: told.append(x))
    assert digest(load(base)) == before
    assert [step for step, _ in told] == [0, 4, 7]
    assert tuple(told) == found.evals
    assert found.after < found.before
    assert sorted(os.listdir(tmp_path)) == ["a", "base", "own.txt"]
    assert open_adapter(tmp_path / "a").settings.flags == ({"use_dora"} if method == "dora" else set())
    model = load(base)
    load_adapter(model, tmp_path / "a")
    _, held = texts(text)
    batches = batching.eval_batches(tokenizer.encode(held), 8, 16, 90)
    # written in float32, as it was trained: the same numbers but for the path (beside W or through W + ΔW)
    assert abs(evaluate(model, batches) - found.after) < 1e-5
    labels = np.concatenate([y.ravel() for _, y in batches])
    assert found.characters == len(tokenizer.decode(labels)) / len(labels) == 1


def test_full_fine_tuning_writes_a_model(text, base, tmp_path):
    found = finetune.run(small(text, base, method="full", lr=1e-3), tmp_path / "m")
    model = load(tmp_path / "m")
    assert found.parameters == sum(p.size for p in arrays(model))
    assert digest(model) != digest(load(base))
    finetune.run(small(text, base, method="full", lr=1e-3, seed=1), tmp_path / "m", overwrite=True)
    assert digest(load(tmp_path / "m")) != digest(model)


def arrays(model):
    from minilora.tree import named_params

    return [p.data for p in named_params(model).values()]


class Stop(Exception):
    """A kill, as far as the training can tell."""


@pytest.mark.parametrize(("at", "bits"), [(1, None), (4, None), (4, 4), (5, None), (5, 4), (6, None)])
def test_a_killed_run_resumes_to_the_same_bytes(at, bits, text, base, tmp_path):
    def stop(step, loss):
        if step == at:
            raise Stop

    finetune.run(small(text, base, bits=bits), tmp_path / "whole")
    with pytest.raises(Stop):
        finetune.run(small(text, base, bits=bits), tmp_path / "a", progress=stop)
    assert not (tmp_path / "a").exists()
    finetune.run(small(text, base, bits=bits), tmp_path / "a")
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_trained_in_4_bits_loads_in_float_quantized_again_and_from_the_folder(
    method, text, base, tmp_path
):
    """It was trained beside the 4-bit base, and is refused beside a third one."""
    finetune.run(small(text, base, bits=4, method=method), tmp_path / "four")
    finetune.run(small(text, base, method=method), tmp_path / "float")
    quantize_checkpoint(base, tmp_path / "base4")
    again, other = load(base), load(base)
    quantize(again)
    quantize(other, kind="fp4")
    for model in (load(base), again, load(tmp_path / "base4"), load(tmp_path / "base4", np.float64)):
        load_adapter(model, tmp_path / "four")
    for where in (base, tmp_path / "base4"):
        merge_checkpoint(where, tmp_path / "four", tmp_path / f"merged-{Path(where).name}")
    with pytest.raises(MismatchError, match="another base"):
        load_adapter(other, tmp_path / "four")
    with pytest.raises(MismatchError, match="another base"):  # the bits are those it was trained in
        load_adapter(load(tmp_path / "base4"), tmp_path / "float")
    four, plain = (open_adapter(tmp_path / name) for name in ("four", "float"))
    assert four.made["base"].split() == [plain.made["base"], base_print(again)]
    name = next(iter(four.tensors))
    assert not np.array_equal(four.value(name), plain.value(name))
    with pytest.raises(StateError, match="quantized already"):
        finetune.run(small(text, tmp_path / "base4", bits=4), tmp_path / "twice")


@pytest.mark.parametrize("again", [False, True])
def test_leftovers_of_a_finished_run_are_removed(again, text, base, tmp_path, monkeypatch):
    """It died after `out` was written and before it had tidied up: the next run is not its continuation."""

    def dies(path, home):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(session, "discard", dies)
        with pytest.raises(Stop):
            finetune.run(small(text, base), tmp_path / "a")
    assert sorted(os.listdir(tmp_path / ".a.train")) == [".lock", "checkpoint.safetensors"]
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    if again:
        finetune.run(small(text, base, seed=1), tmp_path / "a", overwrite=True)
    else:
        with pytest.raises(StorageError, match="there already"):
            finetune.run(small(text, base), tmp_path / "a")
    assert ((tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before) is not again
    assert not list(tmp_path.glob(".*"))


def test_an_unfinished_run_is_kept_beside_an_older_output(text, base, tmp_path, monkeypatch):
    """All steps are done, but the folder at `out` is not theirs: it would be lost."""

    def dies(*args, **how):
        raise Stop

    finetune.run(small(text, base, seed=1), tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save_adapter", dies)
        with pytest.raises(Stop):
            finetune.run(small(text, base), tmp_path / "a", overwrite=True)
    with pytest.raises(StorageError, match="there already"):
        finetune.run(small(text, base), tmp_path / "a")
    steps = []
    finetune.run(small(text, base), tmp_path / "a", overwrite=True, progress=lambda *x: steps.append(x))
    assert steps == []  # it went on from the last one
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", [".lock", "checkpoint.safetensors", None])
def test_a_link_beside_the_output_is_not_followed(kind, text, base, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "own").write_text("mine")
    work = tmp_path / ".a.train"
    if kind:
        work.mkdir()
        (work / kind).symlink_to("../v/own")
    else:
        work.symlink_to("v")
    with pytest.raises(StorageError, match=rf"\.a\.train{f'/{re.escape(kind)}' if kind else ''}: "):
        finetune.run(small(text, base), tmp_path / "a")
    assert (tmp_path / "v" / "own").read_text() == "mine"
    assert os.listdir(tmp_path / "v") == ["own"]
    assert not (tmp_path / "a").exists()


def test_a_run_does_not_resume_another_runs_checkpoint(text, base, tmp_path):
    def stop(step, loss):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        finetune.run(small(text, base), tmp_path / "a", progress=stop)
    with pytest.raises(MismatchError, match="recipe"):
        finetune.run(small(text, base, r=2, seed=1), tmp_path / "a")
    (tmp_path / "own.txt").write_text(TEXT.upper())
    with pytest.raises(MismatchError, match="text"):
        finetune.run(small(text, base), tmp_path / "a")


def test_an_existing_output_is_refused_before_training(text, base, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="is there already"):
        finetune.run(small(text, base), tmp_path / "a", progress=lambda *_: pytest.fail("trained"))


def test_the_speed_counts_only_the_steps_of_this_run(text, base, tmp_path, monkeypatch):
    """A step takes 3 s on the test's clock, and a measurement 100 s, which do not count."""
    clock = [7.0]
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    measured = finetune.evaluate

    def evaluate(*given):
        clock[0] += 100
        return measured(*given)

    def step(number, loss):
        clock[0] += 3
        if number == stop:
            raise Stop

    monkeypatch.setattr(finetune, "evaluate", evaluate)
    recipe, stop = small(text, base, steps=7, eval_every=2), 5
    with pytest.raises(Stop):
        finetune.run(recipe, tmp_path / "a", progress=step)
    stop = None
    found = finetune.run(recipe, tmp_path / "a", progress=step)
    assert found.tokens_per_second == recipe.batch * recipe.length / 3


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"method": "qlora"}, ConfigError, "method is 'qlora'; nearest: .*lora"),
        ({"bits": 8}, ConfigError, "bits is 8; expected 4"),
        ({"bits": 4.0}, ConfigError, "bits is 4.0; expected 4"),
        ({"bits": 4, "method": "full"}, ConfigError, "cannot be trained in full"),
        ({"steps": 0}, ConfigError, "steps"),
        ({"batch": True}, ConfigError, "batch"),
        ({"length": 1.5}, ConfigError, "length"),
        ({"lr": float("nan")}, ConfigError, "lr"),
        ({"lr": -1.0}, ConfigError, "lr"),
        ({"r": 0}, ConfigError, "r is 0"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"targets": ("q_porj",)}, MismatchError, "q_porj.*q_proj"),
        ({"data": "foli"}, InputError, "'foli'; expected a path or a name; nearest: 'folio'"),
        ({"base": "none"}, StorageError, "none"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused_before_training(how, error, match, text, base, tmp_path):
    with pytest.raises(error, match=match) as e:
        finetune.run(small(how.pop("data", text), how.pop("base", base), **how), tmp_path / "a")
    assert isinstance(e.value, MiniloraError)
    assert sorted(os.listdir(tmp_path)) == ["base", "own.txt"]


# ---- examples


def lines(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_prompt_tokens_have_no_loss(tmp_path):
    path = lines(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": "cd"}, "", {"text": "xyz"}])
    rows = examples(path, LETTERS, 16)
    inputs, labels = padded(rows)
    assert tokenizer.decode(inputs[0][inputs[0] > 0]) == "abcd"
    assert labels.tolist() == [[-100, ord("c"), ord("d"), 10], [ord("y"), ord("z"), 10, -100]]


@settings(max_examples=30)
@given(seed=seeds, length=st.integers(4, 12))
def test_every_label_is_the_next_token_of_its_row(seed, length, tmp_path_factory):
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghij"))
    sizes = zip(rng.integers(1, 20, 5), rng.integers(0, length, 5), strict=True)
    rows = [{k: "".join(rng.choice(letters, n)) for k, n in zip(("prompt", "completion"), s, strict=True)}
            for s in sizes]  # fmt: skip
    found = examples(lines(tmp_path_factory.mktemp("e") / "d.jsonl", rows), LETTERS, length)
    inputs, labels = padded(found)
    assert inputs.shape == labels.shape == (5, max(len(ids) for ids, _ in found) - 1)
    assert inputs.shape[1] <= length
    for row, x, y in zip(rows, inputs, labels, strict=True):
        whole = row["prompt"] + row["completion"] + "\n"
        assert tokenizer.decode(y[y >= 0]) == row["completion"] + "\n"
        n = np.flatnonzero(y >= 0)[-1] + 1
        assert whole.endswith(tokenizer.decode(np.append(x[:n], 10)))  # of a long prompt, its end
        assert (y[: n - 1][y[: n - 1] >= 0] == x[1:n][y[: n - 1] >= 0]).all()


def test_training_on_examples_lowers_the_held_out_loss(base, tmp_path):
    rows = [{"prompt": f"{i} is ", "completion": "odd" if i % 2 else "even"} for i in range(40)]
    lines(tmp_path / "d.jsonl", rows)
    found = finetune.run(small(str(tmp_path / "d.jsonl"), base), tmp_path / "a")
    assert found.after < found.before


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        ("not JSON", FormatError, "line 2: is not JSON"),
        ("[" * 100_000, FormatError, "line 2: is not JSON"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', FormatError, "prompt.*given twice"),
        ([1], FormatError, "line 2: prompt is not a string"),
        ({"prompt": "a"}, FormatError, "line 2: completion is not a string"),
        ({"prompt": "a", "completion": 3}, FormatError, "line 2: completion"),
        ({"prompt": "", "completion": "b"}, InputError, "line 2: has no prompt"),
        ({"prompt": "a", "completion": "b" * 99}, InputError, "line 2: has too many .*: 100; .* at most 16"),
    ],
)  # fmt: skip
def test_an_invalid_example_is_named(row, error, match, tmp_path):
    path = lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(error, match=match) as e:
        examples(path, LETTERS, 16)
    assert str(path) in str(e.value)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("raw", [b"\xff\xfe", b'{"text": "a\0b"}'])
def test_a_file_that_is_not_text_is_refused(raw, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(raw)
    with pytest.raises(FormatError):
        examples(tmp_path / "d.jsonl", LETTERS, 16)


def test_one_example_is_too_few(base, tmp_path):
    lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match="fewer than 2 examples"):
        finetune.run(small(str(tmp_path / "d.jsonl"), base), tmp_path / "a")


def test_peak_memory_is_in_bytes():
    """Between what is resident now, which the kernel counts in batches, and all that the machine has."""
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    assert resident / 2 < finetune.peak() < os.sysconf("SC_PHYS_PAGES") * page


@given(text=st.text("ab\n", max_size=60), size=st.integers(1, 9))
def test_a_long_text_is_cut_at_line_ends(text, size):
    """A tokenizer sees whole lines; only a line longer than a piece is cut within."""
    parts = list(finetune.pieces(text, size))
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)
    for part, rest in itertools.pairwise(parts):
        assert part.endswith("\n") or "\n" not in part
        assert rest
        assert part.endswith("\n") or len(part) == size
        assert not rest[: size - len(part)].count("\n")  # there is no room for another line


@pytest.mark.parametrize("tokens", [1, 20, 33, 1000])
def test_at_least_one_and_at_most_the_requested_examples_are_held_out(tokens, tmp_path):
    """60 examples of at most 16 tokens: 3 are held out, and no more are measured than the tokens allow."""
    path = lines(tmp_path / "d.jsonl", [{"prompt": f"{i} is ", "completion": "odd"} for i in range(60)])
    recipe = small(str(path), "base", eval_tokens=tokens)
    text = finetune.prepare(recipe, LETTERS, 16, np.random.default_rng(0), 2)
    assert sum(len(inputs) for inputs, _ in text.held_out) == {1: 1, 20: 1, 33: 2, 1000: 3}[tokens]


def test_two_examples_are_enough_to_train_and_to_measure(base, tmp_path):
    lines(tmp_path / "d.jsonl", [{"prompt": "1 is ", "completion": "odd"}, {"text": "2 is even"}])
    finetune.run(small(str(tmp_path / "d.jsonl"), base, steps=1, warmup=0), tmp_path / "a")
    assert (tmp_path / "a").exists()


# ---- the streamed text


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20), st.integers(1, 3))
def test_streaming_yields_whole_characters(text, n):
    """Tokens of n bytes cut characters anywhere."""
    raw = text.replace("\ufffd", "").encode()
    pieces = [raw[i : i + n] for i in range(0, len(raw), n)]

    def decode(ids):
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    found = list(stream(Tokenizer(None, decode, frozenset({99})), [*range(len(pieces)), 99, 0]))
    assert "".join(found) == raw.decode()
    assert not any("\ufffd" in piece for piece in found)


def test_a_character_cut_off_at_the_end_is_shown_as_a_replacement_character():
    decode = lambda ids: bytes(ids.tolist()).decode(errors="replace")  # noqa: E731
    assert list(stream(Tokenizer(None, decode), [0x61, 0xC3])) == ["a", "\ufffd"]


# ---- the commands


def test_the_commands_work_one_after_another(text, base, tmp_path, capsys):
    a, b, m, e = (tmp_path / name for name in ("a", "b", "m", "e"))
    how = ("--base", base, "--steps", "4", "--batch", "2", "--length", "16", "--lr", "1e-2")
    done = minilora_("train", "--data", text, "--out", a, *how, "--rank", "2", "--alpha", "4")
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert "step 0: held-out loss" in done.stderr
    seen = minilora_("inspect", a, "--base", base, "--json", "--out", tmp_path / "seen")
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["parameters"] == sum(
        2 * sum(w["shape"]) for w in json.loads(seen.stdout)["modules"]
    )
    assert {"report.html", "heat_map.png", "spectra.svg"} <= set(os.listdir(tmp_path / "seen"))
    assert cli.main(["compress", str(a), str(b), "--rank", "1"]) == 0
    merged = minilora_("merge", base, a, m)
    assert merged.returncode == 0, merged.stderr
    assert "rounding alone" in merged.stdout
    assert cli.main(["extract", base, str(m), str(e), "--rank", "2"]) == 0
    capsys.readouterr()
    ways = (("--base", base, "--adapter", a), ("--base", base, "--adapter", a, "--merged"), ("--base", m))
    said = []
    for how in ways:
        arguments = ("generate", "The qual", *how, "--temperature", "0", "--max-tokens", "9")
        assert cli.main([str(argument) for argument in arguments]) == 0
        said.append(capsys.readouterr())
    assert len({printed.out for printed in said}) == 1
    assert said[0].out.startswith("The qual")
    assert len(said[0].out) == len("The qual") + 9 + 1
    assert "7 of 8 modules" in said[0].err


def test_the_generate_command_prints_what_generate_draws(base, capsys):
    cli.main(["generate", "mercy", "--base", base, "--max-tokens", "7", "--seed", "3", "--top-k", "5"])
    rng = np.random.default_rng(3)
    model = load(base)
    tokens = generate(model, tokenizer.encode("mercy")[None], 7, rng=rng, temperature=0.8, top_k=5)
    assert capsys.readouterr().out == "mercy" + tokenizer.decode(np.array([t[0] for t in tokens])) + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["generate", "a", "--merged"], 2, "--adapter DIR"),
        (["generate", "é"], 2, "character 0"),
        (["generate", ""], 2, "expected"),
        (["inspect", "none"], 4, "adapter_config.json"),
        (["compress", "none", "out"], 2, "exactly one of them"),
        (["compress", "none", "out", "--rank", "1"], 4, "none"),
        (["extract", "base", "none", "out", "--energy", "2"], 2, "energy"),
        (["merge", "base", "none", "out", "--dtype", "int8"], 2, "int8.*nearest"),
        (["params", "llama-3-8"], 2, "llama-3-8b"),
        (["params", "llama-3-8b", "--targets", "qproj"], 2, "q_proj"),
        (["modules", "--targets", "qproj"], 2, "q_proj"),
        (["train", "--data", "none", "--out", "out"], 2, "expected a path or a name"),
    ],
)  # fmt: skip
def test_bad_input_prints_one_line_and_writes_nothing(arguments, code, match, capsys, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == code
    assert re.search(match, one_line(capsys))
    assert os.listdir(tmp_path) == []


def test_params_and_modules_print_tables_and_json(capsys):
    assert cli.main(["params", "llama-2-7b", "--rank", "16", "--targets", "all-linear"]) == 0
    assert "39,976,960 of 6,738,415,616" in capsys.readouterr().out
    assert cli.main(["params", "d=768,layers=12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 294_912
    assert cli.main(["modules", "--targets", "q_proj,lm_heads", "--json"]) == 2
    capsys.readouterr()
    assert cli.main(["modules", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sum(row["adapted"] for row in rows) == 7 * read_json(BASE / "config.json")["num_hidden_layers"]


def test_alpha_has_one_default():
    """16, with which the figures of SmolLM2 in docs/fine_tuning.md were made."""
    assert Recipe("text").alpha == LoraConfig().alpha == 16
