"""The command line: flags -> one call. Results go to files first, then a table to the terminal.

Exit codes: 0 done; 1 some runs diverged, or some of several adapters could not be read; 2 bad input; 3 the
folder is in use; 4 the file system said no; 130 interrupted. Out of memory is 4, too.
"""

import argparse
import json
import os
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .backend import cores
from .console import drain, signals, streams
from .errors import ConfigError, MiniloraError, needed
from .experiments.questions import MODULES, question
from .flags import (
    Of,
    Options,
    Parser,
    as_typed,
    defaults,
    integers,
    renamed,
    show,
    target_spec,
    typed,
    unweighted,
    weighted,
    words,
)
from .session import bar
from .table import plain, printed


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error is one line on stderr, never a traceback."""
    with signals() as stop, streams():
        exits = False
        try:
            code, error = attempt(argv)
        except SystemExit as e:  # --help, or a bad command, which argparse has reported
            exits, code, error = True, int(e.code or 0), ""
        stop()
        failure = drain()
        if isinstance(failure, BrokenPipeError):  # the reader closed the pipe; the files are written
            code, error = (0, "") if error == str(failure) else (code, error)
        elif failure:
            code, error = code or 4, error or str(failure)
        if error:
            print(plain(f"minilora: {error}"), file=sys.stderr)
        if exits:
            raise SystemExit(code)
        return code


def attempt(argv: Sequence[str] | None) -> tuple[int, str]:
    """Run one command; return its exit code and the error in words, empty if there is none."""
    try:
        options = parser().parse_args(argv)
        note_shadowed(options)
        return options.run(options), ""
    except MiniloraError as e:
        return e.exit_code, str(e)
    except KeyboardInterrupt:
        return 130, "interrupted; no file is half-written; run the same command again"
    except MemoryError as e:
        return 4, f"there is not enough memory; no file is half-written{f': {e}' if str(e) else ''}"
    except OSError as e:
        return 4, str(e)


def note_shadowed(options: Options) -> None:
    """Note which names mean the built-in thing although the working folder has one of that name."""
    here = []
    for key in ("base", "tuned", "data", "model"):
        value = getattr(options, key, [])
        here += [(key, name) for name in ([value] if type(value) is str else value) if os.path.exists(name)]
    if not here:
        return
    from . import finetune
    from .analysis import count
    from .data import corpora
    from .formats import huggingface

    texts = (
        finetune.CORPORA
        if options.run is train
        else [n for key, n in here if key == "data" and corpora.built_in(n)]
    )
    models = (*count.LLAMAS, *count.PAPER)
    known = {"base": huggingface.NAMES, "tuned": huggingface.NAMES, "data": texts, "model": models}
    for name in sorted(name for key, name in here if name in known[key]):
        print(
            f"minilora: {name} is the built-in one; for the one in this folder type ./{name}", file=sys.stderr
        )


FILES = {"alpha": "the file's", "r": "the file's"}  # their defaults, in words


def usual_sweep() -> dict[str, Any]:
    """The defaults of a sweep; those that depend on the text, in words."""
    from .experiments.rank_sweep import RANKS, TABLE, TEXT, Plan

    return defaults(Plan) | {
        "data": Plan.targets,
        "ranks": RANKS,
        "modules": f"{as_typed(TEXT.modules)}; for a permutation {as_typed(TABLE.modules)}",
        "steps": f"{TEXT.steps}; for a permutation {TABLE.steps}",
        "jobs": "one per core",
        "out": "runs/sweep, or runs/quick",
    }


def usual_experiment() -> dict[str, Any]:
    """The defaults of an experiment."""
    return {"base": "base", "jobs": "one per core", "out": "runs, or runs/quick, and the name"}


def usual_train() -> dict[str, Any]:
    """The defaults of fine-tuning."""
    from .finetune import RATES, Recipe

    return defaults(Recipe) | {"lr": f"{RATES['lora']:g}; in full {RATES['full']:g}"}


def usual_serve() -> dict[str, Any]:
    """The defaults of a server, its engine and its bank."""
    from .serve.bank import Bank
    from .serve.engine import Engine

    here = {"host": "127.0.0.1", "port": 8000, "grace": 30.0}  # as in http.Server, which needs the extra
    return defaults(Bank) | defaults(Engine) | here


def usual_inspect() -> dict[str, Any]:
    """The defaults of an inspection and of what it shows."""
    from .analysis import inspect

    return defaults(inspect.inspect) | defaults(inspect.view) | FILES


FIRST = """minilora: LoRA from scratch in NumPy. What to do first:

  minilora sweep --quick                          which rank does a task need? half a minute, with figures
  minilora train --data FILE --out runs/mine      LoRA on your own text; the base model ships with the package
  minilora inspect runs/mine --base base          which rank that adapter really uses, module by module
  minilora generate "To be" --adapter runs/mine   what the model writes now

minilora --help lists all commands, minilora COMMAND --help the options of one.
"""


def first(options: Options) -> int:
    """Print what to do first."""
    print(FIRST, end="")
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their options.

    An omitted option is absent from the namespace, so the function's own default applies; the help asks
    the function for it.
    """
    top = Parser(prog="minilora", description="LoRA from scratch in NumPy.")
    top.add_argument("--version", action="version", version=f"minilora {__version__}")
    top.set_defaults(run=first)
    commands = top.add_subparsers(metavar="COMMAND")

    def command(
        name: str, run: Callable[[Options], int], usual: Callable[[], Mapping[str, Any]], text: str
    ) -> Callable[..., argparse.Action]:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.usual = usual

        def add(flag: str, text: str, **how: Any) -> argparse.Action:
            absent = {"default": SUPPRESS} if flag[0] == "-" and how.get("action") != "store_true" else {}
            return sub.add_argument(flag, help=text, **absent | how)

        return add

    number: dict[str, Any] = {"type": int, "metavar": "N"}
    names: dict[str, Any] = {"metavar": "NAME,..."}
    switch: dict[str, Any] = {"action": "store_true"}
    base: dict[str, Any] = {"default": "base", "metavar": "BASE"}
    bases = "base (ships), smollm2 (fetched), a Hugging Face folder or a .gguf file"
    table = "print JSON instead of the table"
    again = "replace what is there"
    pyodide = "where Pyodide is: an address that ends with a slash, or a folder, which is copied"

    add = command(
        "sweep", sweep, usual_sweep, "the main job: LoRA at every rank against full fine-tuning, with figures"
    )
    add("--data", "a text: permuted:K, folio, kjv, code, reversed, stdlib, or your own file or folder; "
        "repeat it for several texts", action="append", metavar="TEXT")  # fmt: skip
    add("--base", "the model to start from: base (ships) or a folder", **base)
    add("--ranks", "ranks of LoRA", type=integers, metavar="R,R,...")
    add("--targets", "the linear maps that LoRA adapts", dest="modules", type=words, **names)
    add("--seeds", "number of seeds", **number)
    add("--steps", "training steps per run", **number)
    add("--jobs", "number of processes", **number)
    add("--dask", "run on the workers of this dask scheduler; anyone who reaches its port can run code "
        "there, so keep it on a private address or use tls://", metavar="tcp://HOST:PORT")  # fmt: skip
    add("--out", "where rows, figures and report go", type=Path, metavar="DIR")
    add("--quick", "a small grid, done in half a minute", **switch)
    add("--target", SUPPRESS, **renamed("--target", "--data; --targets are the linear maps that LoRA adapts"))
    add("--modules", SUPPRESS, **renamed("--modules", "--targets"))

    add = command(
        "experiment", experiment, usual_experiment, "one question about LoRA: rows, figures, answer"
    )
    add("name", ", ".join([*MODULES, "or all"]), choices=(*MODULES, "all"), metavar="NAME")
    add("--base", "the model to start from: base (ships) or a folder", **base)
    add("--jobs", "number of processes (default: one per core)", **number)
    add("--dask", "address of a dask scheduler: do the runs on its workers", metavar="tcp://HOST:PORT")
    add("--out", "where rows and figures go, for `all` a folder for each name", type=Path, metavar="DIR")
    add("--quick", "a small grid, done in half a minute", **switch)

    of = Of("experiments.pretrain", "Recipe")
    add = command("pretrain", pretrain, of.usual, "train the base model from its seed")
    add("--out", "the model's folder", type=Path, default=Path("runs/base"), metavar="DIR")
    add("--steps", "training steps", **number)
    add("--seed", "seed of weights and batches", **number)

    add = command("data", fetch, dict, "fetch the built-in texts, or SmolLM2-135M, once, verified by digest")
    add("what", "texts or smollm2", nargs="?", default="texts", choices=("texts", "smollm2"))

    add = command("train", train, usual_train, "LoRA, DoRA or full fine-tuning on your text or examples")
    add("--data", "text, or .jsonl or .json with prompt and completion, file or folder, or folio, kjv, ...",
        required=True, metavar="TEXT")  # fmt: skip
    add("--out", "the adapter's folder (in full: the model's)", required=True, type=Path, metavar="DIR")
    add("--base", bases, **base)
    add("--method", "lora, dora or full", metavar="NAME")
    add("--bits", "4: quantize the base to NF4 first (QLoRA)", **number)
    add("--rank", "rank of A and B", dest="r", type=int, metavar="R")
    add("--alpha", "B A is scaled by alpha / rank", type=float, metavar="A")
    add("--targets", "the linear maps that are adapted", type=target_spec, **names)
    add("--lr", "learning rate", type=float, metavar="RATE")
    add("--steps", "training steps", **number)
    add("--batch", "texts or examples per step", **number)
    add("--length", "tokens of each, at most", **number)
    add("--seed", "seed of A and of the batches", **number)
    add("--eval-every", "steps between measurements and checkpoints", **number)
    add("--overwrite", again, **switch)

    of = Of("completion", "complete")
    add = command("generate", generate, of.usual, "continue a prompt, with the base, an adapter, or merged")
    add("prompt", "exactly what the model sees, with its special tokens, such as <|im_start|>")
    add("--base", bases, **base)
    add("--adapter", "a LoRA: PEFT's folder, or another tool's file", metavar="DIR")
    add("--merged", "merge the adapter first", **switch)
    add("--max-tokens", "tokens to write, at most", **number)
    add("--temperature", "sampling temperature; 0 is greedy", type=float, metavar="T")
    add("--top-k", "sample from the K likeliest tokens", type=int, metavar="K")
    add(
        "--top-p",
        "sample from the fewest tokens that hold this share of the probability",
        type=float,
        metavar="P",
    )
    add("--seed", "seed of the sampling", default=0, **number)

    add = command("serve", serve, usual_serve, "answer OpenAI's clients over HTTP: a base and many adapters")
    add("base", bases, metavar="BASE")
    add("--adapters", "a folder of PEFT folders; each is served as a model of its name",
        dest="folder", type=Path, required=True, metavar="DIR")  # fmt: skip
    add("--host", "the address to listen at; the default is reached from this machine alone", metavar="HOST")
    add("--port", "its port; 0 is any free one", **number)
    add("--slots", "texts that are written at the same time, at most", **number)
    add("--positions", "tokens of a prompt and its text, at most", **number)
    add("--queue", "requests that wait, at most; more are refused", **number)
    add("--budget", "bytes of adapters in memory, at most", **number)
    add("--grace", "seconds that texts may still take when the server is stopped", type=float, metavar="S")
    add("--invariant", "the same text to the bit, whatever is served beside it; slower", **switch)

    def heads(add: Callable[..., argparse.Action]) -> None:
        add("--base", "a folder with the base's config.json, on which llama.cpp's and torchtune's files "
            "depend", metavar="BASE")  # fmt: skip

    def missing(add: Callable[..., argparse.Action]) -> None:
        add("--alpha", "for a file that does not have it, or whose config is lost", type=float, metavar="A")
        add("--r", "for loralib's files, which do not have it", type=int, metavar="R")

    add = command("inspect", inspect, usual_inspect, "which rank an adapter really uses, module by module")
    add("adapter", "a LoRA: PEFT's folder, or another tool's file; several, or a folder of them, are told "
        "in a line each", nargs="+", metavar="ADAPTER")  # fmt: skip
    add("--base", "compare with the weights that it changes", metavar="BASE")
    add("--against", "compare with another adapter", metavar="ADAPTER")
    add("--modules", "only the modules whose names match this pattern", metavar="PATTERN")
    missing(add)
    add("--sort", "order of the modules: model, name, norm, rank or at99", metavar="NAME",
        choices=("model", "name", "norm", "rank", "at99"))  # fmt: skip
    add("--limit", "modules to show, at most", **number)
    add("--metadata", "show all metadata of the file", **switch)
    add("--csv", "print a line of exact numbers for each module instead of the table", **switch)
    add("--json", table, **switch)
    add("--out", "write figures and report.html there too", type=Path, metavar="DIR")

    def choice(add: Callable[..., argparse.Action]) -> None:
        add("--rank", "rank of the LoRA", type=int, metavar="R")
        add("--energy", "the smallest rank that keeps this share of |ΔW|²", type=float, metavar="E")
        add("--per-module", "choose the rank of each module separately", **switch)
        add("--overwrite", again, **switch)
        add("--json", table, **switch)

    of = Of("compose.truncate", "compress", FILES)
    add = command("compress", of.report, of.usual, "an adapter of smaller rank with the nearest ΔW")
    add("adapter", "a LoRA: PEFT's folder, or another tool's file", metavar="ADAPTER")
    add("out", "the new adapter's folder", metavar="OUT")
    choice(add)
    add("--conv-rank", "rank of convolutions, instead of --rank", **number)
    add("--dynamic", "kohya's rule for each module's rank: sv_ratio, sv_fro or sv_cumulative; --rank and "
        "--conv-rank are then bounds", metavar="NAME")  # fmt: skip
    add("--param", "the share of |ΔW| (sv_fro) or of the sum of singular values (sv_cumulative) to keep, or "
        "the largest ratio of two that are kept (sv_ratio)", type=float, metavar="P")  # fmt: skip
    add("--minimum", "leave out the one singular value that kohya keeps beyond what its rule needs", **switch)
    heads(add)
    missing(add)
    of = Of("compose.extract", "extract")
    add = command("extract", of.report, of.usual, "the LoRA nearest to the difference of two checkpoints")
    add("base", "a checkpoint", metavar="BASE")
    add("tuned", "the same checkpoint after training", metavar="TUNED")
    add("out", "the adapter's folder", metavar="OUT")
    choice(add)
    add("--min-diff", "leave out maps of which no entry differs by more", type=float, metavar="D")
    add("--clamp-quantile", "clamp a map's two factors at this quantile of their entries; kohya's is 0.99, "
        "and 1 leaves the nearest", type=float, metavar="Q")  # fmt: skip
    of = Of("peft.convert", "convert", FILES)
    add = command("convert", of.report, of.usual, "a LoRA in another tool's form, with the same ΔW")
    add("source", "a LoRA of any tool, file or folder", metavar="ADAPTER")
    add("out", "the new file or folder", metavar="OUT")
    add("--to", "peft, kohya, diffusers, mlx or gguf", required=True, metavar="FORM")
    heads(add)
    missing(add)
    add("--overwrite", again, **switch)
    add("--json", table, **switch)
    of = Of("compose.combine", "combine", {"rank": "all that the method gives"})
    add = command("combine", of.report, of.usual, "the weighted sum of adapters, or TIES, DARE and the like")
    add("adapters", "LoRAs and their weights, such as A:0.7 B:0.3; A:-1 takes A away", nargs="+",
        type=weighted, metavar="ADAPTER:WEIGHT")  # fmt: skip
    add("out", "the new adapter's folder", type=unweighted, metavar="OUT")
    add(
        "--method",
        "linear, cat, svd, magnitude, ties, dare, dare_ties, peft_linear or kohya_linear",
        metavar="NAME",
    )
    add("--rank", "rank of the result", type=int, metavar="R")
    add("--density", "the share of entries that pruning keeps", type=float, metavar="D")
    add("--seed", "seed of the entries that dare drops", **number)
    add("--overwrite", again, **switch)
    add("--json", table, **switch)
    of = Of("merging.merge", "merge_checkpoint", {"dtype": "the base's"})
    add = command(
        "merge",
        of.report,
        of.usual,
        "merge an adapter into a base, and measure what changes and what is lost",
    )
    add("base", f"{bases}; or any base in safetensors: a file, a model's folder or a diffusers pipeline's",
        metavar="BASE")  # fmt: skip
    add("adapter", "a LoRA: PEFT's folder, or another tool's file", metavar="ADAPTER")
    add("out", "the merged base: a folder, or of a file a .safetensors", metavar="OUT")
    add("--dtype", "float32, bfloat16, ...", metavar="NAME")
    add("--force", "merge even if the adapter was trained on another base", **switch)
    add("--json", table, **switch)

    of = Of("compose.quantize", "quantize_checkpoint")
    add = command("quantize", of.report, of.usual, "a base with 4-bit linear maps, in bitsandbytes' form")
    add("base", bases, metavar="BASE")
    add("out", "the new base's folder", metavar="OUT")
    add("--kind", "nf4 or fp4", metavar="NAME")
    add("--block", "weights that share a scale", **number)
    add("--single", "keep the scales in float32, not in 8 bits", dest="double", action="store_false")
    add("--overwrite", again, **switch)
    add("--json", table, **switch)

    of = Of("analysis.count", "count")
    add = command("params", of.report, of.usual, "how many parameters LoRA trains, and the memory that takes")
    add("model", "llama-3-8b and the like, a config.json, or d=4096,layers=32,...", metavar="MODEL")
    add("--rank", "rank of A and B", type=int, metavar="R")
    add("--targets", "the modules that are adapted", type=target_spec, **names)
    add("--dora", "count the magnitudes of DoRA too", **switch)
    add("--json", table, **switch)
    of = Of("analysis.count", "modules")
    add = command("modules", of.report, of.usual, "the modules of a base, and which of them a target selects")
    add("base", bases, nargs="?", **base)
    add("--targets", "mark the modules that these select", type=target_spec, **names)
    add("--json", table, **switch)

    of = Of("serve.bench", "serve_bench")
    add = command("serve-bench", of.report, of.usual, "how fast a base serves many adapters at once")
    add("base", bases, nargs="?", **base)
    add("--adapters", "numbers of adapters", type=integers, metavar="K,K,...")
    add("--rank", "rank of A and B", type=int, metavar="R")
    add("--targets", "the linear maps that have adapters", type=target_spec, **names)
    add("--budget", "bytes of adapters in memory, at most", **number)
    add("--slots", "texts that are written at the same time, at most", **number)
    add("--requests", "requests in a round", **number)
    add("--load", "arrivals, as a share of the rate of the base alone", type=float, metavar="SHARE")
    add("--zipf", "popularity of the k-th adapter is k to the power -Z", type=float, metavar="Z")
    add("--rounds", "rounds, of which medians are taken", **number)
    add("--seed", "seed of adapters and requests", **number)
    add("--json", table, **switch)

    of = Of("claims.ledger", "claims")
    add = command("claims", of.report, of.usual, "what is said about LoRA, and what was found here")
    add("--root", "decide anew by the rows in this checkout of the repository", type=Path, metavar="DIR")
    add("--json", table, **switch)

    of = Of("course.lite", "write_site")
    add = command("lessons", lessons, of.usual, "write the lessons, with exercises, to open in JupyterLab")
    add("out", "the new folder", nargs="?", default=SUPPRESS, metavar="DIR")
    add("--overwrite", "replace the lessons that are there, with the answers in them", **switch)
    add("--lite", "a JupyterLite site instead, with which they run in a browser", **switch)
    add("--pyodide", pyodide, metavar="URL")
    of = Of("lab.site", "write")
    add = command(
        "lab", of.report, of.usual, "a web page on which LoRA trains in the browser, in this package"
    )
    add("--out", "the page's folder, to be served by any web server", required=True, metavar="DIR")
    add("--pyodide", pyodide, metavar="URL")
    add("--json", table, **switch)

    add = command("figures", figures, dict, "draw the figures again from the rows of a sweep")
    add("--rows", "the rows of the sweep", type=Path, default=Path("runs/sweep/rows.jsonl"), metavar="FILE")
    add("--out", "where the figures go", type=Path, default=Path("figures"), metavar="DIR")
    return top


def sweep(options: Options) -> int:
    """Run the rank sweep, draw it, and print its table."""
    from .data.corpora import built_in
    from .experiments import rank_report, rank_sweep

    quick: dict[str, Any] = rank_sweep.QUICK if options.quick else {}
    chosen = quick | typed(options, rank_sweep.Plan)
    if "data" in options:
        chosen["targets"] = tuple(
            f"./{text}" if os.path.exists(text) and os.sep not in text and not built_in(text) else text
            for text in options.data
        )
    plan = rank_sweep.Plan(**chosen)
    out = getattr(options, "out", Path("runs/quick" if options.quick else "runs/sweep"))
    how = typed(options, rank_sweep.sweep) | {"out": out}
    if how.get("jobs", 1) > cores():
        print(f"minilora: {options.jobs} jobs on {cores()} cores; using {cores()}", file=sys.stderr)
        how["jobs"] = cores()
    with bar("runs") as show:
        rows = rank_sweep.sweep(plan, **how, progress=lambda done, known, row: show(done, known))
    draw(rows, out)
    print(rank_report.table(rows))
    print(plain(f"figures and report: {out / 'report.html'}"))
    return int(any(row["status"] != "done" for row in rows if row["config"]["kind"] == "final"))


def experiment(options: Options) -> int:
    """Run one experiment or all, draw each, and print its tables."""
    out = getattr(options, "out", None)
    if options.name != "all" and out:
        return int(answer(options.name, options, out) > 0)
    place = out or Path("runs/quick" if options.quick else "runs")
    names = list(MODULES) if options.name == "all" else [options.name]
    return int(sum(answer(name, options, place / name) for name in names) > 0)


def answer(name: str, options: Options, out: Path) -> int:
    """Run one experiment, draw it, and print its tables; how many of its runs diverged."""
    from .formats.atomic import make_folder

    asks, reads = question(name)
    quick: dict[str, Any] = asks.QUICK if options.quick else {}
    plan = asks.Plan(**quick | typed(options, asks.Plan))
    with bar("runs") as show:
        how = typed(options, asks.run) | {"out": out}
        rows = asks.run(plan, **how, progress=lambda done, known, row: show(done, known))
    make_folder(out)
    for figure, picture in reads.pictures(rows).items():
        picture.save(out, figure)
    print(*reads.tables(rows), "\n".join(reads.sentences(rows)), sep="\n\n")
    print(plain(f"figures: {out}"))
    return sum(row["status"] != "done" for row in rows if row["config"]["kind"] == "final")


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Write all figures of a sweep, and the report."""
    from .experiments import rank_report
    from .formats.atomic import write_atomic

    pictures = rank_report.pictures(rows)
    for name, picture in pictures.items():
        picture.save(out, name)
    write_atomic(out / "report.html", rank_report.report_page(rows, pictures).encode())


def figures(options: Options) -> int:
    """Draw the results of a sweep, and of the merge experiment, into a folder."""
    from .analysis import plotting
    from .experiments import harness, merge_equivalence, rank_figures, rank_sweep
    from .formats.atomic import make_folder, named, write_atomic

    rows = rank_sweep.read_rows(named(options.rows))
    if not rows:
        raise ConfigError(f"{options.rows}: has no finished run; run minilora sweep first")
    make_folder(options.out)
    draw(rows, options.out)
    merged = merge_equivalence.run()
    rank_figures.merge_equivalence(merged).save(options.out, "merge_equivalence")
    write_atomic(options.out / "rows.jsonl", b"".join(harness.sealed(row) for row in rows))
    write_atomic(options.out / "merge_equivalence.json", (json.dumps(merged, indent=1) + "\n").encode())
    write_atomic(options.out / "MANIFEST.json", (json.dumps(plotting.made_with(), indent=1) + "\n").encode())
    print(plain(f"figures: {options.out}"))
    return 0


def pretrain(options: Options) -> int:
    """Train the base and report throughput and held-out loss."""
    from .experiments import pretrain as experiment

    recipe = experiment.Recipe(**typed(options, experiment.Recipe))
    with bar("steps") as show:
        outcome = experiment.run(recipe, options.out, progress=lambda step, loss: show(step, recipe.steps))
    loss = f"{outcome.test:.4f} nats per character on the held-out plays"
    speed = f"{outcome.characters:,} characters at {outcome.speed:,.0f} per second"
    print(plain(f"{options.out}: {loss}, {speed}"))
    return 0


def fetch(options: Options) -> int:
    """Fetch the texts or the model and say where they are."""
    from .data import corpora
    from .formats import huggingface

    print(plain(str(huggingface.smollm2() if options.what == "smollm2" else corpora.fetch_texts())))
    return 0


def train(options: Options) -> int:
    """Fine-tune, and print the held-out loss along the way."""
    from . import finetune

    recipe = finetune.Recipe(**typed(options, finetune.Recipe))

    def report(step: int, loss: float) -> None:
        print(f"step {step}: held-out loss {loss:.4f} nats per token", file=sys.stderr)

    with bar("steps") as line:
        outcome = finetune.run(
            recipe, options.out, overwrite=options.overwrite, told=report,
            progress=lambda step, loss: line(step, recipe.steps),
        )  # fmt: skip
    print(outcome)
    return 0


def generate(options: Options) -> int:
    """Print a continuation piece by piece."""
    import numpy as np

    from . import completion, lora
    from .formats import huggingface
    from .peft import loading

    adapter = getattr(options, "adapter", None)
    if options.merged and not adapter:
        raise ConfigError("--merged needs an adapter; expected --adapter DIR too")
    base = huggingface.checkpoint(options.base)
    tokenizer = huggingface.tokenizer_of(base)
    llama = huggingface.assemble(base)
    if adapter:
        print(loading.load_adapter(llama, adapter), file=sys.stderr)
        if options.merged:
            lora.merge(llama)
    how = defaults(completion.complete) | typed(options, completion.complete)
    del how["base"], how["prompt"]
    rng = np.random.default_rng(options.seed)
    pieces = completion.pieces(llama, tokenizer, options.prompt, **how, rng=rng)
    print(plain(options.prompt, keep="\n"), end="", flush=True)
    for piece in pieces:
        print(plain(piece, keep="\n"), end="", flush=True)
    print()
    return 0


def lessons(options: Options) -> int:
    """Write the lessons, as notebooks or as a site, and say how to open them."""
    from .course import lessons as course
    from .course import lite

    if options.lite and options.overwrite:
        raise ConfigError("--overwrite is for a folder of lessons; a site of --lite needs a new name")
    if not options.lite and "pyodide" in options:
        raise ConfigError("--pyodide is for a site; expected --lite too")
    write: Callable[..., object] = lite.write_site if options.lite else course.write
    print(plain(str(write(**typed(options, write))), keep="\n"))
    return 0


def serve(options: Options) -> int:
    """Serve until interrupted; 130 if texts were cut off then."""
    for package in ("starlette", "uvicorn"):
        needed(package, "serve")
    import numpy as np

    from .data import chat
    from .formats import huggingface
    from .serve import bank, engine, http, service

    base = huggingface.checkpoint(options.base)
    name = options.base if options.base in huggingface.NAMES else base.where.resolve().name
    words, template = huggingface.tokenizer_of(base), chat.chat_template(base.where)
    llama = huggingface.assemble(base)
    adapters = bank.Bank(llama, **typed(options, bank.Bank))
    runner = engine.Engine(llama, adapters, **typed(options, engine.Engine))
    answers = service.Service(runner, words, name, template, rng=np.random.default_rng())
    server = http.Server(answers, **typed(options, http.Server))
    try:
        if not server.private:
            print(f"minilora: whoever reaches {server.url} can use it; it asks for no key", file=sys.stderr)
        print(plain(f"{name} and {len(adapters.names())} adapters: {server.url}/v1"), flush=True)
        server.ended.wait()
    except KeyboardInterrupt:
        print("minilora: stopping; a second signal ends it at once", file=sys.stderr)
    return 0 if server.stop() else 130


def inspect(options: Options) -> int:
    """Print what an adapter does, with --out draw it, too; of several adapters a line each."""
    from .analysis import inspect
    from .analysis.tables import csv_text
    from .formats.atomic import make_folder, write_atomic
    from .lora_files.recognise import adapters_at

    if options.csv and options.json:
        raise ConfigError("--csv and --json are two forms of output; expected one of them")
    adapters = [path for given in options.adapter for path in adapters_at(given)]
    out = getattr(options, "out", None)
    if len(adapters) > 1:
        alone = [name for name in ("base", "against", "sort", "limit", "out") if name in options]
        if alone or options.metadata:
            flag = (*alone, "metadata")[0]
            raise ConfigError(f"--{flag} needs a single adapter; {len(adapters)} are given")
        with bar("adapters") as line:
            all_seen = inspect.survey(adapters, **typed(options, inspect.survey), progress=line)
        print(csv_text(all_seen.rows()), end="") if options.csv else show(options, all_seen)
        return int(all_seen.failed > 0)
    how = typed(options, inspect.inspect) | {"adapter": adapters[0]}
    with bar("modules") as line:
        seen = inspect.inspect(**how, progress=line)
    shown = inspect.view(seen, **typed(options, inspect.view))
    if out:
        make_folder(out)
        pictures = inspect.pictures(seen)
        for name, picture in pictures.items():
            picture.save(out, name)
        write_atomic(out / "report.html", inspect.report_page(seen, pictures).encode())
    if options.json:
        return show(options, seen)
    if options.csv:
        print(csv_text(inspect.rows(seen)), end="")
        return 0
    print(printed(*shown))
    if out:
        print(plain(f"figures and report: {out / 'report.html'}"))
    return 0
