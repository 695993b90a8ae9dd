"""Every option of every command reaches the function that the command calls.

The parser is walked, so an option that is added without a line in the table below turns this red; so does one
that is parsed and dropped, one that changes something else, and a default that is not the function's own.
"""

import contextlib
import functools
import inspect
import io
import itertools
import math
import os
import re
from argparse import SUPPRESS
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from pathlib import Path
from threading import Event
from unittest import mock

import numpy as np
import pytest

from minilora import cli, console, decoding, finetune, flags, lora
from minilora.analysis import count
from minilora.analysis import inspect as microscope
from minilora.analysis.tables import SORTS
from minilora.claims import ledger
from minilora.compose import combine, extract, truncate
from minilora.compose import quantize as compose_quantize
from minilora.course import lessons, lite
from minilora.data import corpora
from minilora.experiments import (
    adding_adapters,
    adding_figures,
    merge_equivalence,
    pretrain,
    rank_figures,
    rank_report,
    rank_sweep,
)
from minilora.formats import huggingface, tokenizer
from minilora.formats.huggingface import save_model
from minilora.lab import site
from minilora.merging import merge as merging
from minilora.methods import bitsandbytes
from minilora.model import Config, llama
from minilora.peft import convert, loading
from minilora.serve import bank, bench, engine, http, service

CORES = 3
PARSER = cli.parser()
COMMANDS = next(action.choices for action in PARSER._actions if action.dest != "version" and action.choices)
TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=300)  # fmt: skip


class Found:
    """In the place of any result."""

    test = speed = characters = failed = 0
    url, private, ended = "http://h", True, Event()
    ended.set()

    def data(self):
        return {"found": math.inf}

    def __str__(self):
        return "a table"

    def save(self, folder, name):
        (folder / name).write_text("a picture")

    def names(self):
        return ["a", "b"]

    def stop(self):
        return True


def flat(name, value):
    """The plain values in an argument: a recipe's fields, a generator's first number, a text's letters."""
    if is_dataclass(value) and value.__dataclass_params__.frozen:
        for f in fields(value):
            yield from flat(f"{name}.{f.name}", getattr(value, f.name))
    elif isinstance(value, np.random.Generator):
        yield name, int(np.random.default_rng(value).integers(1 << 60))
    elif isinstance(value, np.ndarray):
        yield name, tokenizer.decode(value.ravel())
    elif isinstance(value, bool | int | float | str | Path | tuple | list | None):
        yield name, value


class Spies(ExitStack):
    """Functions that note what they are given and do nothing."""

    def __init__(self):
        super().__init__()
        self.given, self.defaults = {}, {}

    def put(self, where, name, result=None):
        """Note the arguments of where.name, which returns `result`, or what it returns if that is ..."""
        real = getattr(where, name)
        signature = inspect.signature(real)

        @functools.wraps(real)
        def spy(*given, **how):
            bound = signature.bind(*given, **how)
            bound.apply_defaults()
            self.given[name] = True
            for argument, value in bound.arguments.items():
                self.given |= dict(flat(f"{name}.{argument}", value))
                if (default := signature.parameters[argument].default) is not inspect.Parameter.empty:
                    self.defaults |= dict(flat(f"{name}.{argument}", default))
                elif is_dataclass(value):
                    self.defaults |= {f"{name}.{argument}.{f.name}": f.default for f in fields(value)}
            return real(*given, **how) if result is ... else result

        self.enter_context(mock.patch.object(where, name, spy))


CALLED = {  # by command: the functions that it calls, and what they return here
    "sweep": [(rank_sweep, "sweep", []), (cli, "draw"), (rank_report, "table", "a table")],
    "experiment": [(adding_adapters, "run", []), (adding_figures, "pictures", {"drawn": Found()}),
                   (adding_figures, "tables", ["a table"]), (adding_figures, "sentences", ["a", "b"])],
    "pretrain": [(pretrain, "run", Found())],
    "data": [(corpora, "fetch_texts", "texts"), (huggingface, "smollm2", "a model")],
    "train": [(finetune, "run", Found())],
    "generate": [(huggingface, "checkpoint", ...), (loading, "load_adapter", "loaded"), (lora, "merge"),
                 (decoding, "generate", [np.array([33])])],
    "serve": [(huggingface, "checkpoint", ...), (bank, "Bank", Found()), (engine, "Engine", Found()),
              (service, "Service", Found()), (http, "Server", Found())],
    "inspect": [(microscope, "inspect", Found()), (microscope, "view", ["a table"]),
                (microscope, "pictures", {"drawn": Found()}), (microscope, "report_page", "a page"),
                (microscope, "rows", [{"r": 1}]), (microscope, "survey", Found())],
    "compress": [(truncate, "compress", Found())],
    "extract": [(extract, "extract", Found())],
    "convert": [(convert, "convert", Found())],
    "combine": [(combine, "combine", Found())],
    "merge": [(merging, "merge_checkpoint", Found())],
    "quantize": [(compose_quantize, "quantize_checkpoint", Found())],
    "params": [(count, "count", Found())],
    "modules": [(count, "modules", Found())],
    "serve-bench": [(bench, "serve_bench", Found())],
    "claims": [(ledger, "claims", Found())],
    "lessons": [(lessons, "write", Found()), (lite, "write_site", Found())],
    "lab": [(site, "write", Found())],
    "figures": [(rank_sweep, "read_rows", [{}]), (cli, "draw"), (merge_equivalence, "run", []),
                (rank_figures, "merge_equivalence", Found())],
}  # fmt: skip
JSON = '{\n "found": null\n}\n'  # which has no infinity
SITE = {"write": None, "write.out": None, "write.overwrite": None,
        "write_site": True, "write_site.out": "lessons", "write_site.pyodide": site.PYODIDE}  # fmt: skip
FIGURES = ("MANIFEST.json", "merge_equivalence", "merge_equivalence.json", "rows.jsonl")


def smaller(function):
    """The options of compress and extract."""
    return {
        "rank": (["--rank", "3"], {f"{function}.rank": 3}),
        "energy": (["--energy", "0.7"], {f"{function}.energy": 0.7}),
        "per_module": (["--per-module"], {f"{function}.per_module": True}),
        "overwrite": (["--overwrite"], {f"{function}.overwrite": True}),
        "json": (["--json"], {"printed": JSON}),
    }


# command -> what must be given, and for each option: what is typed, and all that is then another
OPTIONS = {
    "sweep": ({}, {
        "data": (["--data", "kjv", "--data", "y/z"], {"sweep.plan.targets": ("kjv", "y/z")}),
        "base": (["--base", "b"], {"sweep.plan.base": "b"}),
        "ranks": (["--ranks", "3,5"], {"sweep.plan.ranks": (3, 5)}),
        "modules": (["--targets", "q_proj, v_proj"], {"sweep.plan.modules": ("q_proj", "v_proj")}),
        "seeds": (["--seeds", "7"], {"sweep.plan.seeds": 7}),
        "steps": (["--steps", "11"], {"sweep.plan.steps": 11}),
        "jobs": (["--jobs", "2"], {"sweep.jobs": 2}),
        "dask": (["--dask", "tcp://h:1"], {"sweep.dask": "tcp://h:1"}),
        "out": (["--out", "o"], {"sweep.out": Path("o"), "draw.out": Path("o"),
                                 "printed": "a table\nfigures and report: o/report.html\n"}),
        "quick": (["--quick"], {
            "sweep.plan.ranks": (1, 4, 16), "sweep.plan.seeds": 1, "sweep.plan.steps": 40,
            "sweep.plan.search_steps": 10, "sweep.plan.test_windows": 64, "sweep.plan.valid_windows": 16,
            "sweep.out": Path("runs/quick"), "draw.out": Path("runs/quick"),
            "printed": "a table\nfigures and report: runs/quick/report.html\n",
        }),
    }),
    "experiment": ({"name": ["adding-adapters"]}, {
        "name": (["adding-adapters"], {}),
        "base": (["--base", "b"], {"run.plan.base": "b"}),
        "jobs": (["--jobs", "2"], {"run.jobs": 2}),
        "dask": (["--dask", "tcp://h:1"], {"run.dask": "tcp://h:1"}),
        "out": (["--out", "o"], {
            "run.out": Path("o"), "runs/adding-adapters/drawn": None, "o/drawn": "written",
            "printed": "a table\n\na\nb\nfigures: o\n",
        }),
        "quick": (["--quick"], {
            "run.out": Path("runs/quick/adding-adapters"), "runs/adding-adapters/drawn": None,
            "runs/quick/adding-adapters/drawn": "written",
            "printed": "a table\n\na\nb\nfigures: runs/quick/adding-adapters\n",
        }
                  | {f"run.plan.{name}": value for name, value in adding_adapters.QUICK.items()}),
    }),
    "pretrain": ({}, {
        "out": (["--out", "o"], {"run.out": Path("o"),
                                 "printed": "o: 0.0000 nats per character on the held-out plays, "
                                            "0 characters at 0 per second\n"}),
        "steps": (["--steps", "11"], {"run.recipe.steps": 11}),
        "seed": (["--seed", "7"], {"run.recipe.seed": 7}),
    }),
    "data": ({}, {"what": (["smollm2"], {"fetch_texts": None, "smollm2": True, "printed": "a model\n"})}),
    "train": ({"data": ["--data", "d"], "out": ["--out", "o"]}, {
        "data": (["--data", "d2"], {"run.recipe.data": "d2"}),
        "out": (["--out", "o2"], {"run.out": Path("o2")}),
        "base": (["--base", "b"], {"run.recipe.base": "b"}),
        "method": (["--method", "dora"], {"run.recipe.method": "dora"}),
        "bits": (["--bits", "4"], {"run.recipe.bits": 4}),
        "r": (["--rank", "3"], {"run.recipe.r": 3}),
        "alpha": (["--alpha", "2.5"], {"run.recipe.alpha": 2.5}),
        "targets": (["--targets", "q_proj, v_proj"], {"run.recipe.targets": ("q_proj", "v_proj")}),
        "lr": (["--lr", "0.07"], {"run.recipe.lr": 0.07}),
        "steps": (["--steps", "11"], {"run.recipe.steps": 11}),
        "batch": (["--batch", "9"], {"run.recipe.batch": 9}),
        "length": (["--length", "13"], {"run.recipe.length": 13}),
        "seed": (["--seed", "7"], {"run.recipe.seed": 7}),
        "eval_every": (["--eval-every", "17"], {"run.recipe.eval_every": 17}),
        "overwrite": (["--overwrite"], {"run.overwrite": True}),
    }),
    "generate": ({"prompt": ["To be"], "base": ["--base", "../one"], "adapter": ["--adapter", "a"]}, {
        "prompt": (["Not"], {"generate.ids": "Not", "printed": "Not!\n"}),
        "base": (["--base", "../two"], {"checkpoint.spec": "../two"}),
        "adapter": (["--adapter", "a2"], {"load_adapter.source": "a2"}),
        "merged": (["--merged"], {"merge": True}),
        "max_tokens": (["--max-tokens", "11"], {"generate.max_new_tokens": 11}),
        "temperature": (["--temperature", "0.3"], {"generate.temperature": 0.3}),
        "top_k": (["--top-k", "4"], {"generate.top_k": 4}),
        "top_p": (["--top-p", "0.6"], {"generate.top_p": 0.6}),
        "seed": (["--seed", "7"], {"generate.rng": int(np.random.default_rng(7).integers(1 << 60))}),
    }),
    "serve": ({"base": ["../one"], "folder": ["--adapters", "a"]}, {
        "base": (["../two"], {"checkpoint.spec": "../two", "Service.name": "two",
                              "printed": "two and 2 adapters: http://h/v1\n"}),
        "folder": (["--adapters", "a2"], {"Bank.folder": Path("a2")}),
        "host": (["--host", "::1"], {"Server.host": "::1"}),
        "port": (["--port", "0"], {"Server.port": 0}),
        "slots": (["--slots", "3"], {"Engine.slots": 3}),
        "positions": (["--positions", "5"], {"Engine.positions": 5}),
        "queue": (["--queue", "7"], {"Engine.queue": 7}),
        "budget": (["--budget", "11"], {"Bank.budget": 11}),
        "grace": (["--grace", "1.5"], {"Server.grace": 1.5}),
        "invariant": (["--invariant"], {"Engine.invariant": True}),
    }),
    "inspect": ({"adapter": ["a"]}, {
        "adapter": (["a2"], {"inspect.adapter": "a2"}),
        "base": (["--base", "b"], {"inspect.base": "b"}),
        "against": (["--against", "c"], {"inspect.against": "c"}),
        "modules": (["--modules", "*.x"], {"inspect.modules": "*.x"}),
        "alpha": (["--alpha", "8"], {"inspect.alpha": 8.0}),
        "r": (["--r", "4"], {"inspect.r": 4}),
        "sort": (["--sort", "norm"], {"view.sort": "norm"}),
        "limit": (["--limit", "3"], {"view.limit": 3}),
        "metadata": (["--metadata"], {"view.metadata": True}),
        "csv": (["--csv"], {"rows": True, "printed": "r\n1\n"}),
        "json": (["--json"], {"printed": JSON}),
        "out": (["--out", "o"], {
            "pictures": True, "report_page": True, "o/drawn": "written", "o/report.html": "written",
            "printed": "a table\nfigures and report: o/report.html\n",
        }),
    }),
    "compress": ({"adapter": ["a"], "out": ["o"]}, {
        "adapter": (["a2"], {"compress.adapter": "a2"}), "out": (["o2"], {"compress.out": "o2"}),
        **smaller("compress"),
        "conv_rank": (["--conv-rank", "2"], {"compress.conv_rank": 2}),
        "dynamic": (["--dynamic", "sv_fro"], {"compress.dynamic": "sv_fro"}),
        "param": (["--param", "0.9"], {"compress.param": 0.9}),
        "minimum": (["--minimum"], {"compress.minimum": True}),
        "base": (["--base", "b"], {"compress.base": "b"}),
        "alpha": (["--alpha", "8"], {"compress.alpha": 8.0}),
        "r": (["--r", "4"], {"compress.r": 4}),
    }),
    "extract": ({"base": ["b"], "tuned": ["t"], "out": ["o"]}, {
        "base": (["b2"], {"extract.base": "b2"}), "tuned": (["t2"], {"extract.tuned": "t2"}),
        "out": (["o2"], {"extract.out": "o2"}), **smaller("extract"),
        "min_diff": (["--min-diff", "0.01"], {"extract.min_diff": 0.01}),
        "clamp_quantile": (["--clamp-quantile", "0.99"], {"extract.clamp_quantile": 0.99}),
    }),
    "convert": ({"source": ["a"], "out": ["o"], "to": ["--to", "mlx"]}, {
        "source": (["a2"], {"convert.source": "a2"}), "out": (["o2"], {"convert.out": "o2"}),
        "to": (["--to", "gguf"], {"convert.to": "gguf"}),
        "base": (["--base", "b"], {"convert.base": "b"}),
        "alpha": (["--alpha", "8"], {"convert.alpha": 8.0}),
        "r": (["--r", "4"], {"convert.r": 4}),
        "overwrite": (["--overwrite"], {"convert.overwrite": True}),
        "json": (["--json"], {"printed": JSON}),
    }),
    "combine": ({"adapters": ["a:0.7", "b/c:-1"], "out": ["o"]}, {
        "adapters": (["C:a2:0.5"], {"combine.adapters": [("C:a2", 0.5)]}),
        "out": (["o2"], {"combine.out": "o2"}),
        "method": (["--method", "svd"], {"combine.method": "svd"}),
        "rank": (["--rank", "3"], {"combine.rank": 3}),
        "density": (["--density", "0.2"], {"combine.density": 0.2}),
        "seed": (["--seed", "7"], {"combine.seed": 7}),
        "overwrite": (["--overwrite"], {"combine.overwrite": True}),
        "json": (["--json"], {"printed": JSON}),
    }),
    "merge": ({"base": ["b"], "adapter": ["a"], "out": ["o"]}, {
        "base": (["b2"], {"merge_checkpoint.base": "b2"}),
        "adapter": (["a2"], {"merge_checkpoint.adapter": "a2"}),
        "out": (["o2"], {"merge_checkpoint.out": "o2"}),
        "dtype": (["--dtype", "float16"], {"merge_checkpoint.dtype": "float16"}),
        "force": (["--force"], {"merge_checkpoint.force": True}),
        "json": (["--json"], {"printed": JSON}),
    }),
    "quantize": ({"base": ["b"], "out": ["o"]}, {
        "base": (["b2"], {"quantize_checkpoint.base": "b2"}),
        "out": (["o2"], {"quantize_checkpoint.out": "o2"}),
        "kind": (["--kind", "fp4"], {"quantize_checkpoint.kind": "fp4"}),
        "block": (["--block", "128"], {"quantize_checkpoint.block": 128}),
        "double": (["--single"], {"quantize_checkpoint.double": False}),
        "overwrite": (["--overwrite"], {"quantize_checkpoint.overwrite": True}),
        "json": (["--json"], {"printed": JSON}),
    }),
    "claims": ({}, {
        "root": (["--root", "r"], {"claims.root": Path("r")}),
        "json": (["--json"], {"printed": JSON}),
    }),
    "params": ({"model": ["m"]}, {
        "model": (["m2"], {"count.model": "m2"}),
        "rank": (["--rank", "3"], {"count.rank": 3}),
        "targets": (["--targets", "k_proj,o_proj"], {"count.targets": ("k_proj", "o_proj")}),
        "dora": (["--dora"], {"count.dora": True}),
        "json": (["--json"], {"printed": JSON}),
    }),
    "modules": ({}, {
        "base": (["b2"], {"modules.base": "b2"}),
        "targets": (["--targets", "k_proj,o_proj"], {"modules.targets": ("k_proj", "o_proj")}),
        "json": (["--json"], {"printed": JSON}),
    }),
    "serve-bench": ({}, {
        "base": (["b2"], {"serve_bench.base": "b2"}),
        "adapters": (["--adapters", "3,4"], {"serve_bench.adapters": (3, 4)}),
        "rank": (["--rank", "3"], {"serve_bench.rank": 3}),
        "targets": (["--targets", "k_proj,o_proj"], {"serve_bench.targets": ("k_proj", "o_proj")}),
        "budget": (["--budget", "11"], {"serve_bench.budget": 11}),
        "slots": (["--slots", "11"], {"serve_bench.slots": 11}),
        "requests": (["--requests", "11"], {"serve_bench.requests": 11}),
        "load": (["--load", "0.3"], {"serve_bench.load": 0.3}),
        "zipf": (["--zipf", "0.3"], {"serve_bench.zipf": 0.3}),
        "rounds": (["--rounds", "11"], {"serve_bench.rounds": 11}),
        "seed": (["--seed", "7"], {"serve_bench.seed": 7}),
        "json": (["--json"], {"printed": JSON}),
    }),
    "lessons": ({}, {
        "out": (["o"], {"write.out": "o"}),
        "overwrite": (["--overwrite"], {"write.overwrite": True}),
        "lite": (["--lite"], SITE),
        "pyodide": (["--lite", "--pyodide", "d"], SITE | {"write_site.pyodide": "d"}),
    }),
    "lab": ({"out": ["--out", "o"]}, {
        "out": (["--out", "p"], {"write.out": "p"}),
        "pyodide": (["--pyodide", "d"], {"write.pyodide": "d"}),
        "json": (["--json"], {"printed": JSON}),
    }),
    "figures": ({}, {
        "rows": (["--rows", "r"], {"read_rows.path": Path("r")}),
        "out": (["--out", "o"], {
            "draw.out": Path("o"), "printed": "figures: o\n",
            **{f"figures/{name}": None for name in FIGURES}, **{f"o/{name}": "written" for name in FIGURES},
        }),
    }),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder to work in, with two bases that `generate` reads."""
    folder = tmp_path_factory.mktemp("flags")
    for i, name in enumerate(("one", "two")):
        save_model(llama(TINY, np.random.default_rng(i)), folder / name, "")
    quick = mock.patch.object(os, "fsync")  # no law here is about a power cut
    with contextlib.chdir(folder), quick, mock.patch.object(cli, "cores", return_value=CORES):
        yield folder


places = (Path(f"place{i}") for i in itertools.count())


def received(command, typed):
    """What reaches a function, a file or the terminal when this is typed; and the functions' defaults."""
    place = next(places)
    place.mkdir()
    out = io.StringIO()
    quiet = mock.patch.object(console.signal, "signal")
    with contextlib.chdir(place), quiet, Spies() as spies, contextlib.redirect_stdout(out):
        for call in CALLED[command]:
            spies.put(*call)
        assert cli.main([command, *(word for words in typed.values() for word in words)]) == 0
        written = {str(path): "written" for path in Path().rglob("*") if path.is_file()}
    spies.given.pop("Service.rng", None)  # which no option sets
    return spies.given | written | {"printed": out.getvalue()}, spies.defaults


@functools.cache
def usual(command):
    """The same when nothing is typed but what must be."""
    return received(command, OPTIONS[command][0])


OF_ALL = [(command, option) for command, (_, options) in OPTIONS.items() for option in options]


def test_every_option_of_every_command_is_tried():
    actions = {
        name: [a.dest for a in command._actions if a.help != SUPPRESS] for name, command in COMMANDS.items()
    }
    assert actions == {name: ["help", *options] for name, (_, options) in OPTIONS.items()}
    assert {a.dest for a in PARSER._actions if a.choices is not COMMANDS} == {"help", "version"}


@pytest.mark.parametrize(("command", "option"), OF_ALL)
def test_an_option_sets_its_argument_and_nothing_else(command, option):
    needed, options = OPTIONS[command]
    typed, expected = options[option]
    (before, _), (after, _) = usual(command), received(command, needed | {option: typed})
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name: after.get(name) for name in changed} == expected


OWN = {"generate.temperature": 0.8}  # where the command has a default of its own


@pytest.mark.parametrize("command", OPTIONS)
def test_an_omitted_option_has_the_functions_default_and_help_shows_it(command):
    needed, options = OPTIONS[command]
    given, defaults = usual(command)
    compared = 0
    COMMANDS[command].format_help()  # which asks the function
    for action in [a for a in COMMANDS[command]._actions[1:] if a.help != SUPPRESS]:
        said = re.search(r"\(default: (.+)\)$", action.help)
        assert bool(said) is (action.nargs != 0 and not action.required), action.dest
        for name in [n for n in options[action.dest][1] if n in defaults and action.dest not in needed]:
            assert given[name] == OWN.get(name, defaults[name]), name
            if said and given[name] is not None and given[name] is not False and not name.endswith(".out"):
                assert said[1] == flags.as_typed(given[name]), name
                compared += 1
    assert compared == {"sweep": 3, "train": 10, "generate": 2, "pretrain": 2, "params": 2, "modules": 2,
                        "combine": 2, "extract": 2, "experiment": 1, "inspect": 3,
                        "quantize": 2, "lab": 1,
                        "serve": 7,
                        "serve-bench": 11}.get(command, 0)  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_help_shows_each_default_once(command):
    first, again = COMMANDS[command].format_help(), COMMANDS[command].format_help()
    assert first == again
    assert "==" not in first
    assert first.count("(default") == sum("(default" in (a.help or "") for a in COMMANDS[command]._actions)


@pytest.mark.parametrize(("command", "option", "known"), [
    ("train", "method", finetune.METHODS), ("combine", "method", combine.METHODS),
    ("quantize", "kind", bitsandbytes.KINDS), ("inspect", "sort", SORTS),
])  # fmt: skip
def test_help_names_every_choice(command, option, known):
    (action,) = (a for a in COMMANDS[command]._actions if a.dest == option)
    assert action.choices in (None, tuple(known))
    said = re.findall(r"\w+", action.help.partition(" (default")[0].rpartition(": ")[2])
    assert sorted(said) == sorted([*known, "or"])


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--target", "kjv"], "--target is now --data"),
        (["--modules", "q_proj"], "--modules is now --targets"),
    ],
)
def test_an_old_option_name_is_answered_with_the_new_one(typed, expected, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["sweep", *typed])
    assert e.value.code == 2
    assert expected in capsys.readouterr().err
    assert typed[0] not in COMMANDS["sweep"].format_help().replace("--targets", "")


def test_an_explicit_option_overrides_quick():
    options = OPTIONS["sweep"][1]
    both = [option for option in options if options[option][1].keys() & options["quick"][1].keys()]
    assert both == ["ranks", "seeds", "steps", "out", "quick"]
    given, _ = received("sweep", {option: options[option][0] for option in both})
    expected = dict(options["quick"][1])
    for option in both[:-1]:
        expected |= options[option][1]
    assert expected.items() <= given.items()


def test_data_is_a_name_or_a_path():
    """What lies here is a path unless it is a name, as everywhere; a path in a plan is never a name."""
    given, _ = received("sweep", {"data": ["--data", "../x.txt", "--data", "kjv", "--data", "none"]})
    assert given["sweep.plan.targets"] == ("../x.txt", "kjv", "none")
    with mock.patch.object(os.path, "exists", {"x.txt", "kjv"}.__contains__):
        given, _ = received("sweep", {"data": ["--data", "x.txt", "--data", "kjv"]})
    assert given["sweep.plan.targets"] == ("./x.txt", "kjv")


def test_jobs_and_tokens_are_capped_at_what_is_available():
    assert received("sweep", {"jobs": ["--jobs", "99"]})[0]["sweep.jobs"] == CORES
    long = received("generate", OPTIONS["generate"][0] | {"max_tokens": ["--max-tokens", "999"]})[0]
    assert long["generate.max_new_tokens"] == TINY.max_position_embeddings - len("To be")


def test_zero_is_not_taken_for_an_omitted_option():
    given, _ = received("generate", OPTIONS["generate"][0] | {"temperature": ["--temperature", "0"]})
    assert given["generate.temperature"] == 0
    assert received("pretrain", {"steps": ["--seed", "0"]})[0]["run.recipe.seed"] == 0


def test_several_adapters_are_told_in_a_line_each_and_options_for_one_are_refused(capsys):
    given, _ = received("inspect", {"all": ["a", "b", "--modules", "*.x", "a"]})
    assert given["survey.adapters"] == ["a", "b", "a"]
    assert (given["survey.modules"], given.get("inspect"), given["printed"]) == ("*.x", None, "a table\n")
    assert received("inspect", {"all": ["a", "b", "--json"]})[0]["printed"] == JSON
    for option in ("base", "against", "sort", "limit", "metadata", "out"):
        typed = OPTIONS["inspect"][1][option][0]
        assert cli.main(["inspect", "a", "b", *typed]) == 2
        assert f"--{option} needs a single adapter; 2 are given" in capsys.readouterr().err
    assert cli.main(["inspect", "a", "--csv", "--json"]) == 2
    assert "--csv and --json are two forms" in capsys.readouterr().err


def test_with_json_only_json_is_printed():
    both = {option: OPTIONS["inspect"][1][option][0] for option in ("json", "out")}
    given, _ = received("inspect", OPTIONS["inspect"][0] | both)
    assert given["printed"] == JSON
    assert given["o/report.html"] == "written"


@pytest.mark.parametrize("text", ["a", ":1", "a:", "C:\\b", "a:b:c"])
def test_an_adapter_without_a_weight_is_refused(text, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["combine", text, "out"])
    assert e.value.code == 2
    assert "has no weight; expected ADAPTER:WEIGHT" in capsys.readouterr().err


@pytest.mark.parametrize("command", OPTIONS)
def test_options_stand_before_between_or_after_what_has_no_name(command):
    needed, options = OPTIONS[command]
    typed = list(needed.values())
    names = [w for words in typed if words[0][0] != "-" for w in words]
    first = [w for words in typed if words[0][0] == "-" for w in words]
    first += next((words for words, _ in options.values() if words[0].startswith("--") and len(words) > 1
                   and words[0] not in first), [])  # fmt: skip
    orders = [first + names, names + first, *([*names[:i], *first, *names[i:]] for i in range(1, len(names)))]
    found = [received(command, {"all": order})[0] for order in orders]
    assert all(given == found[0] for given in found)


def test_a_parser_parses_a_line_more_than_once():
    typed = ["combine", "a:1", "--method", "svd", "b:1", "--rank", "2", "out"]
    assert PARSER.parse_args(typed) == PARSER.parse_args(typed)


def test_after_two_dashes_a_prompt_may_look_like_an_option():
    given, _ = received("generate", {"all": ["--base", "../one", "--adapter", "a", "--", "--seed"]})
    assert given["generate.ids"] == "--seed"


@pytest.mark.parametrize("text", ["C:\\out", "a:b", "out", ":1", "b:"])
def test_a_new_folder_may_have_a_colon(text):
    assert flags.unweighted(text) == text


@pytest.mark.parametrize("command", ["train", "params", "modules"])
def test_all_linear_is_passed_as_a_keyword(command):
    given, _ = received(command, OPTIONS[command][0] | {"targets": ["--targets", "all-linear"]})
    assert given[next(iter(OPTIONS[command][1]["targets"][1]))] == "all-linear"


@pytest.mark.parametrize(
    ("typed", "place"), [([], "runs"), (["--quick"], "runs/quick"), (["--out", "o"], "o")]
)
def test_all_experiments_have_a_folder_each(typed, place, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "MODULES", {"one": (), "two": ()})
    monkeypatch.setattr(
        cli, "answer", lambda name, options, out: asked.append((name, out)) or (name == "one")
    )
    assert cli.main(["experiment", "all", *typed]) == 1  # a run of one has diverged
    assert asked == [(name, Path(place, name)) for name in ("one", "two")]
