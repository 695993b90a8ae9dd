"""The command line: flags -> one call. Results go to files first, then a table to the terminal.

Exit codes: 0 done; 1 some runs diverged; 2 bad input; 3 the folder is in use; 4 the file system said no;
130 interrupted.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .backend import cores
from .errors import ConfigError, MiniloraError

Options = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; bad input is one line on stderr, never a traceback."""
    options = parser().parse_args(argv)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, interrupt)
    try:
        code: int = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except MiniloraError as e:
        print(f"minilora: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("minilora: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except OSError as e:  # stdout: its reader has gone, or it is full; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            return 0
        print(f"minilora: {e}", file=sys.stderr)
        return 4


def interrupt(number: int, frame: Any) -> NoReturn:
    """SIGTERM ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="minilora", description="LoRA from scratch in NumPy.")
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

    command("data", fetch, "fetch the built-in texts once, verified by digest")
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
    from .experiments import rank_sweep

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
    print(rank_sweep.table(rows))
    print(f"figures and report: {out / 'report.html'}")
    return 1 if any(row["status"] != "done" for row in rows if row["config"]["kind"] == "final") else 0


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Write all figures of a sweep, and the report."""
    from .experiments import rank_sweep
    from .storage import write_atomic

    pictures = rank_sweep.pictures(rows)
    for name, picture in pictures.items():
        picture.save(out, name)
    write_atomic(out / "report.html", rank_sweep.report_page(rows, pictures).encode())


def figures(options: Options) -> int:
    """Draw what a sweep found, and the merge experiment, into a folder."""
    from . import plots
    from .experiments import merge_equivalence, rank_sweep
    from .storage import make_folder, write_atomic

    rows = rank_sweep.read_rows(options.rows)
    if not rows:
        raise ConfigError(f"{options.rows}: holds no finished run; run minilora sweep first")
    make_folder(options.out)
    draw(rows, options.out)
    merged = merge_equivalence.run()
    plots.merge_equivalence(merged).save(options.out, "merge_equivalence")
    write_atomic(options.out / "rows.jsonl", b"".join(rank_sweep.sealed(row) for row in rows))
    write_atomic(options.out / "merge_equivalence.json", (json.dumps(merged, indent=1) + "\n").encode())
    write_atomic(options.out / "MANIFEST.json", (json.dumps(plots.made_with(), indent=1) + "\n").encode())
    print(f"figures: {options.out}")
    return 0


def pretrain(options: Options) -> int:
    """Train the base and report throughput and held-out loss."""
    from .experiments import pretrain as experiment

    given = {"steps": options.steps, "seed": options.seed}
    recipe = experiment.Recipe(**{name: value for name, value in given.items() if value is not None})
    with bar("steps") as show:
        outcome = experiment.run(recipe, options.out, progress=lambda step, loss: show(step, recipe.steps))
    print(
        f"{options.out}: {outcome.test:.4f} nats per character on the held-out plays, "
        f"{outcome.characters:,} characters at {outcome.speed:,.0f} per second"
    )
    return 0


def fetch(options: Options) -> int:
    """Fetch the texts and say where they are."""
    from . import data

    print(data.fetch())
    return 0


@contextlib.contextmanager
def bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", disable=None, dynamic_ncols=True) as line:

        def show(done: int, known: int) -> None:
            line.total = known
            line.update(done - line.n)

        yield show
