"""The command line: flags -> one call. Results go to files first, then a table to the terminal.

Exit codes: 0 done; 1 some runs diverged; 2 bad input; 3 the folder is in use; 4 the file system said no;
130 interrupted. No memory is 4, too.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .backend import cores
from .errors import ConfigError, MiniloraError
from .table import plain

Options = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what goes wrong is one line on stderr, never a traceback."""
    with signals() as stop, streams():
        asked: SystemExit | None = None
        try:
            code, said = attempt(argv)
        except SystemExit as e:  # --help, or what is no command, which argparse has said
            asked, code, said = e, int(e.code or 0), ""
        stop()
        lost = drain()
        if isinstance(lost, BrokenPipeError):  # its reader has seen enough; the files are written
            code, said = (0, "") if said == str(lost) else (code, said)
        elif lost:
            code, said = code or 4, said or str(lost)
        if said:
            print(plain(f"minilora: {said}"), file=sys.stderr)
        if asked:
            raise SystemExit(code)
        return code


def attempt(argv: Sequence[str] | None) -> tuple[int, str]:
    """Run one command: its exit code, and in words what went wrong, if anything did."""
    try:
        options = parser().parse_args(argv)
        told_apart(options)
        return options.run(options), ""
    except MiniloraError as e:
        return e.exit_code, str(e)
    except KeyboardInterrupt:
        return 130, "interrupted; the same command goes on from here"
    except MemoryError as e:
        return 4, f"there is not enough memory; no file is half-written{f': {e}' if str(e) else ''}"
    except OSError as e:
        return 4, str(e)


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], None]]:
    """Let Ctrl-C, SIGTERM and SIGHUP be one KeyboardInterrupt; a second one ends the process at once.

    So does one after the call of what this gives. Signals that are ignored (nohup) stay so.
    """
    which = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in which}
    heard = [number for number in which if before[number] not in (signal.SIG_IGN, None)]

    def stop() -> None:
        listen(lambda number, frame: os._exit(130))

    def interrupt(number: int, frame: Any) -> NoReturn:
        stop()
        raise KeyboardInterrupt

    def listen(handler: Any) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in heard:
                signal.signal(number, handler)

    listen(interrupt)
    try:
        yield stop
    finally:
        with contextlib.suppress(ValueError):
            for number in heard:
                signal.signal(number, before[number])


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Let stdout and stderr take whatever is printed, closed or not, in any encoding.

    What an encoding lacks is escaped. What stderr does not take is lost, for a message on the way must not
    end the work; what stdout does not take is an error (`drain`).
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:  # or a file of ours would be stdout for a library
        pass
    os.close(fd)
    with open(os.devnull, "w") as nowhere:
        out, err = sys.stdout or nowhere, sys.stderr or nowhere
        for stream in (out, err):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        lossy: Any = Lossy(err)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(lossy):
            yield


class Lossy:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, if that can be."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that can be."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def drain() -> OSError | None:
    """Flush stdout; if that fails, the error, and what it still holds is dropped."""
    try:
        sys.stdout.flush()
    except OSError as e:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return e
    return None


def told_apart(options: Options) -> None:
    """Say that a name means what is built in, where something in the working folder has that name, too."""
    given = vars(options)
    here = {name for name in ("base", "tuned", "data", "model") if os.path.exists(str(given.get(name)))}
    targets = [target for target in given.get("target") or () if os.path.exists(target)]
    if not here and not targets:
        return
    from . import finetune
    from .analysis import count
    from .data import corpora
    from .formats import huggingface

    known = {
        "base": huggingface.NAMES,
        "tuned": huggingface.NAMES,
        "data": finetune.CORPORA,
        "model": (*count.LLAMAS, *count.PAPER),
    }
    shadowed = [given[key] for key in here if given[key] in known[key]] + [
        t for t in targets if corpora.built_in(t)
    ]
    for name in sorted(shadowed):
        print(f"minilora: {name} is built in; what is called so in this folder is ./{name}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """One whose errors are plain, whatever a glob has put there, and whose help is never dropped."""

    def print_help(self, file: Any = None) -> None:
        """As argparse's, which takes a full disk for done."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """As argparse's."""
        super().error(plain(message))


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(prog="minilora", description="LoRA from scratch in NumPy.")
    top.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Options], int], text: str) -> Callable[..., argparse.Action]:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command("sweep", sweep, "the main job: LoRA at every rank against full fine-tuning, with figures")
    add("--target", action="append", metavar="NAME", help="permuted:K, folio, kjv, code, reversed or stdlib")
    add("--data", action="append", metavar="PATH", help="your own text file or folder as a target")
    add("--base", default="base", metavar="DIR", help="the model to start from (default: the one that ships)")
    add("--ranks", type=integers, metavar="R,R,...", help="default: 1,2,4,8,16,32,64")
    add("--modules", type=words, metavar="NAME,...", help="what LoRA adapts, or all-linear")
    add("--seeds", type=int, metavar="N", help="default: 3")
    add("--steps", type=int, metavar="N", help="of training per run")
    add("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    add("--dask", metavar="tcp://HOST:PORT", help="the runs go to the workers of this dask scheduler; who "
        "reaches its port can run code there: keep it on a private address, or use tls://")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="default: runs/sweep, or runs/quick")
    add("--quick", action="store_true", help="a small grid, done in half a minute")

    add = command("pretrain", pretrain, "train the base model from its seed")
    add("--out", type=Path, default=Path("runs/base"), metavar="DIR")
    add("--steps", type=int, metavar="N")
    add("--seed", type=int, metavar="N")

    add = command("data", fetch, "fetch the built-in texts, or SmolLM2-135M, once, verified by digest")
    add("what", nargs="?", default="texts", choices=("texts", "smollm2"))

    bases = "base (ships), smollm2 (fetched), a Hugging Face folder or a .gguf file"
    add = command("train", train, "LoRA, DoRA or full fine-tuning on your text or examples")
    add(
        "--data",
        required=True,
        metavar="PATH",
        help="text, or .jsonl or .json with prompt and completion, a file or a folder; or folio, kjv, ...",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the adapter's folder (in full: the model's)")
    add("--base", metavar="BASE", help=bases)
    add("--method", metavar="NAME", help="lora (default), dora or full")
    add("--rank", dest="r", type=int, metavar="R", help="default: 8")
    add("--alpha", type=float, metavar="A", help="default: 16")
    add("--targets", type=words, metavar="NAME,...", help="what is adapted (default: all-linear)")
    add("--lr", type=float, metavar="RATE", help="default: 1e-3, in full 1e-4")
    for name, text in (("steps", "200"), ("batch", "8 texts"), ("length", "128 tokens"), ("seed", "0")):
        add(f"--{name}", type=int, metavar="N", help=f"default: {text}")
    add("--eval-every", type=int, metavar="N", help="steps between measurements and checkpoints: 50")
    add("--overwrite", action="store_true")

    add = command("generate", generate, "continue a prompt, with the base, an adapter, or merged")
    add("prompt", help="as the model should see it, with <|im_start|> and the like where it has them")
    add("--base", default="base", metavar="BASE", help=bases)
    add("--adapter", metavar="DIR")
    add("--merged", action="store_true", help="merge the adapter first")
    add("--max-tokens", type=int, default=200, metavar="N")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, default=1.0, metavar="P")
    add("--seed", type=int, default=0, metavar="N")

    add = command("inspect", inspect, "which rank an adapter really uses, module by module")
    add("adapter", metavar="ADAPTER", help="a PEFT folder")
    add("--base", metavar="BASE", help="compare with the weights that it changes")
    add("--against", metavar="ADAPTER", help="compare with another adapter")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--out", type=Path, metavar="DIR", help="write figures and report.html there too")

    def choice(add: Callable[..., argparse.Action]) -> None:
        add("--rank", type=int, metavar="R")
        add("--energy", type=float, metavar="E", help="the least rank that keeps this share of |ΔW|²")
        add("--per-module", action="store_true", help="another rank for each module")
        add("--overwrite", action="store_true")
        add("--json", action="store_true")

    add = command("compress", compress, "an adapter of smaller rank with the nearest ΔW")
    add("adapter", metavar="ADAPTER")
    add("out", metavar="OUT")
    choice(add)
    add = command("extract", extract, "the LoRA nearest to the difference of two checkpoints")
    add("base", metavar="BASE")
    add("tuned", metavar="TUNED")
    add("out", metavar="OUT")
    choice(add)
    add = command("merge", merge, "a base with an adapter merged into it, and what that cost")
    add("base", metavar="BASE")
    add("adapter", metavar="ADAPTER")
    add("out", metavar="OUT")
    add("--dtype", metavar="NAME", help="float32, bfloat16, ... (default: the base's)")
    add("--force", action="store_true", help="though it was trained beside another base")
    add("--json", action="store_true")

    add = command("params", params, "how many parameters LoRA trains, and the memory that takes")
    add("model", metavar="MODEL", help="llama-3-8b and the like, a config.json, or d=4096,layers=32,...")
    add("--rank", type=int, default=8, metavar="R")
    add("--targets", type=words, default=("q_proj", "v_proj"), metavar="NAME,...")
    add("--dora", action="store_true")
    add("--json", action="store_true")
    add = command("modules", modules, "the modules of a base, and which of them a target means")
    add("base", nargs="?", default="base", metavar="BASE", help=bases)
    add("--targets", type=words, default=("all-linear",), metavar="NAME,...")
    add("--json", action="store_true")

    add = command("figures", figures, "draw the figures again from the rows of a sweep")
    add("--rows", type=Path, default=Path("runs/sweep/rows.jsonl"), metavar="FILE")
    add("--out", type=Path, default=Path("figures"), metavar="DIR")
    return top


def integers(text: str) -> tuple[int, ...]:
    """A list such as 1,2,4."""
    return tuple(int(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """A list such as q_proj,v_proj."""
    return tuple(part.strip() for part in text.split(","))


def sweep(options: Options) -> int:
    """Run the rank sweep, draw it, and print its table."""
    from .experiments import rank_report, rank_sweep

    chosen: dict[str, Any] = dict(rank_sweep.QUICK) if options.quick else {}
    given = {name: getattr(options, name) for name in ("ranks", "modules", "seeds", "steps")}
    chosen |= {name: value for name, value in given.items() if value is not None}
    if options.target or options.data:
        chosen["targets"] = (
            *(options.target or ()),
            *(path if os.sep in path else f"./{path}" for path in options.data or ()),  # never a name
        )
    plan = rank_sweep.Plan(base=options.base, **chosen)
    out = options.out or Path("runs/quick" if options.quick else "runs/sweep")
    jobs, most = options.jobs, cores()
    if jobs is not None and jobs > most:
        print(f"minilora: {jobs} jobs on {most} cores; using {most}", file=sys.stderr)
        jobs = most
    with bar("runs") as show:
        rows = rank_sweep.sweep(
            plan, out, jobs=jobs, dask=options.dask, progress=lambda done, known, row: show(done, known)
        )
    draw(rows, out)
    print(rank_report.table(rows))
    print(plain(f"figures and report: {out / 'report.html'}"))
    return 1 if any(row["status"] != "done" for row in rows if row["config"]["kind"] == "final") else 0


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Write all figures of a sweep, and the report."""
    from .experiments import rank_report
    from .formats.atomic import write_atomic

    pictures = rank_report.pictures(rows)
    for name, picture in pictures.items():
        picture.save(out, name)
    write_atomic(out / "report.html", rank_report.report_page(rows, pictures).encode())


def figures(options: Options) -> int:
    """Draw what a sweep found, and the merge experiment, into a folder."""
    from .analysis import plotting
    from .experiments import harness, merge_equivalence, rank_figures, rank_sweep
    from .formats.atomic import make_folder, named, write_atomic

    rows = rank_sweep.read_rows(named(options.rows))
    if not rows:
        raise ConfigError(f"{options.rows}: holds no finished run; run minilora sweep first")
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

    given = {"steps": options.steps, "seed": options.seed}
    recipe = experiment.Recipe(**{name: value for name, value in given.items() if value is not None})
    with bar("steps") as show:
        outcome = experiment.run(recipe, options.out, progress=lambda step, loss: show(step, recipe.steps))
    said = (
        f"{options.out}: {outcome.test:.4f} nats per character on the held-out plays, "
        f"{outcome.characters:,} characters at {outcome.speed:,.0f} per second"
    )
    print(plain(said))
    return 0


def fetch(options: Options) -> int:
    """Fetch the texts or the model and say where they are."""
    from .data import corpora
    from .formats import huggingface

    print(plain(str(huggingface.smollm2() if options.what == "smollm2" else corpora.fetch_texts())))
    return 0


def target_spec(names: Sequence[str]) -> str | tuple[str, ...]:
    """all-linear alone is a word of its own."""
    return names[0] if tuple(names) == ("all-linear",) else tuple(names)


def show(options: Options, found: Any) -> int:
    """Print what was found, as a table or as JSON, which has no infinity: null."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strict(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [strict(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(strict(found.data()), indent=1) if options.json else found)
    return 0


def train(options: Options) -> int:
    """Fine-tune, telling the held-out loss as it falls."""
    from . import finetune

    names = ("data", "base", "method", "r", "alpha", "lr", "steps", "batch", "length", "seed", "eval_every")
    given = {name: getattr(options, name) for name in names}
    given["targets"] = target_spec(options.targets) if options.targets else None
    recipe = finetune.Recipe(**{name: value for name, value in given.items() if value is not None})

    def told(step: int, loss: float) -> None:
        print(f"step {step}: held-out loss {loss:.4f} nats per token", file=sys.stderr)

    with bar("steps") as line:
        outcome = finetune.run(
            recipe, options.out, overwrite=options.overwrite,
            progress=lambda step, loss: line(step, recipe.steps),
            told=told,
        )  # fmt: skip
    print(outcome)
    return 0


def generate(options: Options) -> int:
    """Print a continuation as it comes."""
    import numpy as np

    from . import decoding, lora
    from .formats import huggingface, tokenizer
    from .peft import loading

    if options.merged and not options.adapter:
        raise ConfigError("--merged is for an adapter; expected --adapter DIR")
    given = huggingface.checkpoint(options.base)
    words = huggingface.tokenizer_of(given)
    ids = words.begun(words.encode(options.prompt))[None, :]
    llama = huggingface.assemble(given)
    if options.adapter:
        print(loading.load_adapter(llama, options.adapter), file=sys.stderr)
        if options.merged:
            lora.merge(llama)
    room = given.config.max_position_embeddings - ids.shape[1]
    tokens = decoding.generate(
        llama, ids, min(options.max_tokens, max(room, 1)), rng=np.random.default_rng(options.seed),
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
    )  # fmt: skip
    print(plain(options.prompt, keep="\n"), end="", flush=True)
    for piece in tokenizer.stream(words, (int(token[0]) for token in tokens)):
        print(plain(piece, keep="\n"), end="", flush=True)
    print()
    return 0


def inspect(options: Options) -> int:
    """Print what an adapter does; with --out draw it, too."""
    from .analysis import inspect
    from .formats.atomic import make_folder, write_atomic

    with bar("modules") as line:
        seen = inspect.inspect(options.adapter, options.base, options.against, progress=line)
    if options.out:
        make_folder(options.out)
        drawn = inspect.pictures(seen)
        for name, picture in drawn.items():
            picture.save(options.out, name)
        write_atomic(options.out / "report.html", inspect.report_page(seen, drawn).encode())
    show(options, seen)
    if options.out and not options.json:
        print(plain(f"figures and report: {options.out / 'report.html'}"))
    return 0


def compress(options: Options) -> int:
    """Write a smaller adapter."""
    from .compose import truncate

    how = {name: getattr(options, name) for name in ("rank", "energy", "per_module", "overwrite")}
    return show(options, truncate.compress(options.adapter, options.out, **how))


def extract(options: Options) -> int:
    """Write the LoRA between two checkpoints."""
    from .compose import extract

    how = {name: getattr(options, name) for name in ("rank", "energy", "per_module", "overwrite")}
    with bar("tensors") as line:
        found = extract.extract(options.base, options.tuned, options.out, **how, progress=line)
    return show(options, found)


def merge(options: Options) -> int:
    """Write a merged checkpoint."""
    from .compose import export

    how = {"dtype": options.dtype, "force": options.force}
    return show(options, export.merge_checkpoint(options.base, options.adapter, options.out, **how))


def params(options: Options) -> int:
    """Count."""
    from .analysis import count

    return show(options, count.count(options.model, options.rank, target_spec(options.targets), options.dora))


def modules(options: Options) -> int:
    """List the modules."""
    from .analysis import count

    return show(options, count.modules(options.base, target_spec(options.targets)))


@contextlib.contextmanager
def bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", disable=None, dynamic_ncols=True) as line:

        def show(done: int, known: int) -> None:
            line.total = known
            line.update(done - line.n)

        yield show
