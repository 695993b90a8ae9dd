"""Every command that writes, injured at every call of the system that changes a file.

    python tests/walks.py            walks everything and writes benchmarks/results/walks.md
    python tests/walks.py --every 5  the like at every fifth call
    python tests/walks.py --serve    the other side of it: reads jobs, one JSON object a line, and does each

A job is one command in a child that is forked from a process which has imported everything, so it costs
no more than its work. The child counts the calls by wrapping them in `os`, and is hurt at the one asked for.
"""

import argparse
import collections
import contextlib
import errno
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += map(str, Path(__file__).parent.glob("*/"))  # for what is imported from tests
CHANGES = ("rename", "replace", "link", "symlink", "unlink", "rmdir", "mkdir", "fsync", "ftruncate", "write")
TEXT = "It is a truth, universally acknowledged; now is the winter of our discontent.\n" * 90
SECRET = "a secret that nobody publishes\n"
TRACEBACK = 99  # the exit code of a child that ended in one


# ---- the side that is hurt


def serve():
    """Do the jobs of stdin, each in a child, and answer with its exit code (negative: the signal)."""
    for name in ("OPENBLAS", "OMP", "MKL"):
        os.environ[f"{name}_NUM_THREADS"] = "1"
    prepare()
    print("ready", flush=True)
    for line in sys.stdin:
        job, (back, there) = json.loads(line), os.pipe()
        if not (pid := os.fork()):
            os.close(back)
            child(job, there)
        os.close(there)
        with open(back) as counts:
            seen = counts.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "calls": json.loads(seen or "{}")}), flush=True)


def prepare():
    """Import all, and make small what would only take long: texts, figures, the model that is trained."""
    import numpy as np
    from safetensors import numpy  # noqa: F401

    from minilora.analysis import inspect, plotting
    from minilora.data import corpora
    from minilora.digests import of_bytes
    from minilora.experiments import (
        adding_adapters,
        adding_figures,
        merge_equivalence,
        pretrain,
        rank_figures,
        rank_report,
        rank_sweep,
    )
    from minilora.lab import site
    from minilora.model import Config

    drawn = merge_equivalence.run(draws=1)
    pictures = {name: plotting.Picture(None, name) for name in ("a", "b")}
    text = TEXT.encode()
    cuts = len(text) * 8 // 10, len(text) * 9 // 10
    known = corpora.Known(cuts, of_bytes(text), "a text of the test's")
    corpora.MANIFEST = dict.fromkeys(corpora.MANIFEST, known)
    corpora.unpack = lambda tree: dict.fromkeys(corpora.MANIFEST, TEXT)
    merge_equivalence.run = lambda: drawn
    plotting.Picture.encoded = lambda self, kind: f"<svg>{kind} {len(self.says)}</svg>\n".encode() * 40
    rank_figures.merge_equivalence = lambda rows: pictures["a"]
    rank_report.pictures = lambda rows: pictures
    inspect.pictures = lambda seen: pictures
    rank_sweep.LENGTH = adding_adapters.LENGTH = 32
    adding_adapters.QUICK |= dict.fromkeys(("steps", "search_steps", "test_windows", "valid_windows"), 1)
    adding_adapters.QUICK |= {"rank": 2, "targets": ("folio", "kjv")}
    adding_adapters.METHODS, adding_adapters.SCALES = {"linear": {"method": "linear"}}, (1.0,)
    adding_figures.METHODS = adding_adapters.METHODS
    adding_figures.pictures = lambda rows: pictures
    site.package = dict
    pretrain.Config = lambda: Config(**TINY)
    pretrain.LENGTH = 32
    np.random.default_rng(0)
    gc.collect()
    gc.freeze()  # what a child does not touch it does not copy


TINY = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128, "vocab_size": 128,
        "tie_word_embeddings": True}  # fmt: skip


def child(job, pipe):
    """Run the job's command with its streams and its injury, and end with its exit code."""
    code = TRACEBACK
    try:
        write = os.write  # before it is wrapped
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        streams(job["streams"], job["said"])
        counts = collections.Counter()
        injure(job["injury"], job["at"], counts)
        from minilora import cli
        from minilora.formats import atomic

        if not job["exchange"]:
            atomic.exchanged = lambda a, b: False
        try:
            code = cli.main(job["argv"])
        except SystemExit as e:
            code = e.code
        except BaseException:
            traceback.print_exc(file=open(job["said"], "a"))  # noqa: SIM115
        write(pipe, json.dumps(counts).encode())
    finally:
        os._exit(code)


def streams(kind, said):
    """stdout and stderr: both into the file `said`, but for what the kind says of them."""
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), 2)
    os.dup2(2, 1)
    which, _, what = kind.partition(" ")
    for name, fd in (("stdout", 1), ("stderr", 2)):
        how = {"buffering": 1, "closefd": False}
        if which not in (name, "both"):
            setattr(sys, name, open(fd, "w", encoding="utf-8", **how))  # noqa: SIM115
        elif what == "closed":
            os.close(fd)
            setattr(sys, name, None)
        else:
            if what == "full":
                os.dup2(os.open("/dev/full", os.O_WRONLY), fd)
            elif what == "gone":
                read, write = os.pipe()
                os.close(read)
                os.dup2(write, fd)
            encoding = "ascii" if what == "ascii" else "utf-8"
            setattr(sys, name, open(fd, "w", encoding=encoding, **how))  # noqa: SIM115


def injure(kind, at, counts):
    """Count the calls that change files, and do at number `at` what the kind says.

    Of writes in a row two count, to an empty file and to one that is half there.
    """
    full, row = False, 0

    def hurt(name, half):
        """`half()` does half of a write."""
        nonlocal full, row
        row = row + 1 if name == "write" else 0
        if row > 2:
            return
        counts["write" if name == "write" else "other"] += 1
        counts["all"] += 1
        if kind in ("kill", "term") and counts["all"] == at:
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        now = name == "write" and counts["write"] == at
        if now and kind == "torn":
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        if now and kind == "full":
            half()
        full = full or now
        if now and kind == "memory":
            raise MemoryError
        if full and name in ("write", "fsync") and kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def wrap(owner, name):
        real = getattr(owner, name)

        def call(*args, **how):
            if name != "write" or args[0] > 2:
                hurt(name, lambda: real(args[0], args[1][: len(args[1]) // 2]))
            return real(*args, **how)

        setattr(owner, name, call)

    from minilora.formats import atomic

    for name in CHANGES:
        wrap(os, name)
    wrap(atomic, "exchanged")


# ---- the side that hurts


class Runner:
    """The serving process, and one job after the other."""

    def __init__(self):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=env,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, place, root, injury="none", at=0, streams="plain", exchange=True):
        """Exit code, what was said, and how many calls there were."""
        said = root.with_name("said")
        said.write_text("")
        job = {"argv": place.argv, "cwd": str(root), "env": dict(place.env), "streams": streams,
               "said": str(said), "injury": injury, "at": at, "exchange": exchange}  # fmt: skip
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        text = said.read_text(errors="replace")
        assert found["code"] != TRACEBACK, text
        assert "Traceback" not in text, text
        return found["code"], text, found["calls"]


@dataclass(frozen=True)
class Place:
    """A command that writes: how it is called, in a world of its own."""

    name: str
    argv: list
    whole: bool = True  # the folder work/out appears as one; else its files do, each as one
    old: bool = False  # there is one already, which it replaces
    env: tuple = ()
    inputs: tuple = ()  # folders that the user names, of which it reads every file
    exchange: bool = True
    every: int = 1  # injured at each so-many-th call, as its many files are written alike


CACHE = (("MINILORA_CACHE", "in/cache"),)
TRAIN = ["train", "--data", "in/own.txt", "--base", "in/base", "--steps", "2", "--batch", "2", "--length",
         "16", "--rank", "2", "--eval-every", "1", "--out", "work/out"]  # fmt: skip
COMPRESS = ["compress", "in/adapter", "work/out", "--rank", "1"]
COMBINE = ["combine", "in/adapter:0.7", "in/other:-0.3", "work/out", "--method", "ties", "--density", "0.5",
           "--rank", "2"]  # fmt: skip
EXTRACT = ["extract", "in/base", "in/tuned", "work/out", "--rank", "2"]
BASE, ADAPTER = ("in/base",), ("in/adapter",)
PLACES = (
    Place("compress", COMPRESS, inputs=ADAPTER),
    Place("compress --overwrite", [*COMPRESS, "--overwrite"], old=True, inputs=ADAPTER),
    Place("compress --overwrite, no exchange", [*COMPRESS, "--overwrite"], old=True, exchange=False),
    Place("extract", EXTRACT, inputs=("in/base", "in/tuned")),
    Place("extract --overwrite", [*EXTRACT, "--overwrite"], old=True),
    Place("combine", COMBINE, inputs=("in/adapter", "in/other")),
    Place("combine --overwrite", [*COMBINE, "--overwrite"], old=True),
    Place("convert", ["convert", "in/adapter", "work/out", "--to", "mlx"], inputs=ADAPTER),
    Place("merge", ["merge", "in/base", "in/adapter", "work/out"], inputs=("in/base", "in/adapter")),
    Place("merge by names", ["merge", "in/named", "in/adapter", "work/out"], inputs=("in/named", *ADAPTER)),
    Place("merge of a file", ["merge", "in/named.safetensors", "in/adapter", "work/out/new.safetensors"],
          whole=False, inputs=ADAPTER),
    Place("quantize", ["quantize", "in/base", "work/out"], inputs=BASE),
    Place("quantize --overwrite", ["quantize", "in/base", "work/out", "--overwrite"], old=True),
    Place("train", TRAIN, inputs=BASE),
    Place("train --overwrite", [*TRAIN, "--overwrite"], old=True),
    Place("train in full, no exchange", [*TRAIN, "--method", "full", "--overwrite"], old=True,
          exchange=False),
    Place("pretrain", ["pretrain", "--steps", "2", "--out", "work/out"], env=CACHE),
    Place("data", ["data"], whole=False,
          env=(("MINILORA_CACHE", "work/out"), ("MINILORA_TEXTS", "in/texts"))),
    Place("lessons", ["lessons", "work/out"], every=10),
    Place("lab", ["lab", "--out", "work/out", "--pyodide", "in/pyodide"], inputs=("in/pyodide",)),
    Place("inspect --out", ["inspect", "in/adapter", "--out", "work/out"], whole=False, inputs=ADAPTER),
    Place("figures", ["figures", "--rows", "in/rows.jsonl", "--out", "work/out"], whole=False),
    Place("sweep", ["sweep", "--data", "in/own.txt", "--base", "in/base", "--ranks", "1", "--seeds", "1",
                    "--steps", "2", "--jobs", "1", "--out", "work/out"], whole=False, inputs=BASE),
    Place("experiment", ["experiment", "adding-adapters", "--quick", "--base", "in/base", "--jobs", "1",
                         "--out", "work/out"], whole=False, env=CACHE, inputs=BASE),
)  # fmt: skip
QUIET = {  # commands that write nothing, and how they are called to show it
    "generate": ["generate", "Now", "--base", "in/base", "--adapter", "in/adapter", "--max-tokens", "3"],
    "params": ["params", "in/base", "--rank", "2"],
    "modules": ["modules", "in/base"],
    "claims": ["claims"],
    "inspect": ["inspect", "in/adapter", "--base", "in/base"],
    "serve": ["serve", "in/base", "--adapters", "in", "--host", "256.1.1.1"],  # ends when it cannot listen
    "serve-bench": [
        "serve-bench",
        "in/base",
        "--adapters",
        "2",
        "--rank",
        "2",
        "--requests",
        "3",
        "--rounds",
        "1",
    ],
}
TEMPORARY = {"serve-bench"}  # of these, those that fill a temporary folder meanwhile


def commands():
    """The names of all commands, from the parser."""
    from minilora import cli

    (choices,) = (a.choices for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return sorted(choices)


def make_world(root):
    """What the commands read, what must stay as it is, and an empty place for what they write."""
    import numpy as np

    from minilora.data import corpora
    from minilora.experiments.harness import sealed
    from minilora.formats.huggingface import save_model
    from minilora.lora import inject
    from minilora.methods.lora_config import LoraConfig
    from minilora.model import Config, llama
    from minilora.peft.loading import save_adapter
    from minilora.tree import freeze, named_params, trained

    for name in ("in/texts", "work", "home"):
        (root / name).mkdir(parents=True)
    (root / "home" / "secret").write_text(SECRET)
    (root / "in" / "own.txt").write_text(TEXT)
    model = llama(Config(**TINY), np.random.default_rng(1))
    spoken = {"tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    save_model(model, root / "in" / "base", "", {"eos_token_id": 10}, beside=spoken)
    shutil.copytree(root / "in" / "base", root / "in" / "named")  # of a kind that is merged by names
    config = json.loads((root / "in/named/config.json").read_text()) | {"model_type": "qwen2"}
    (root / "in/named/config.json").write_text(json.dumps(config))
    shutil.copy(root / "in/named/model.safetensors", root / "in/named.safetensors")
    for p in named_params(model).values():
        p.data += 0.25 if p.data.ndim == 1 else np.float32(0.5) * p.data[::-1]
    save_model(model, root / "in" / "tuned", "")
    model = llama(Config(**TINY), np.random.default_rng(1))
    freeze(model)
    inject(model, LoraConfig(r=3, alpha=5, init="both"), rng=np.random.default_rng(2))
    save_adapter(model, root / "in" / "adapter", base="in/base")
    for p in trained(model).values():
        p.data = -p.data[::-1]
    save_adapter(model, root / "in" / "other", base="in/base")
    from pages import stand_in
    from test_plotting import make_rows

    stand_in(root / "in" / "pyodide")
    rows = b"".join(map(sealed, make_rows(ranks=(), seeds=1)))
    (root / "in" / "rows.jsonl").write_bytes(rows)
    cache = corpora.texts_folder(root / "in" / "cache")
    cache.mkdir(parents=True)
    for name in corpora.MANIFEST:
        (cache / f"{name}.txt").write_text(TEXT)


def old_one(place, root):
    """What was at work/out before: a folder that the command may overwrite."""
    if place.old:
        shutil.copytree(root / "in" / "tuned", root / "work" / "out")


def look(folder):
    """Path -> content of all below a folder; of a link where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "a folder"
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = "" if path.name == ".lock" else digest  # which says who held it
    return found


def sealed_rows(path, torn=False):
    """Id -> row, less its seal, checked, and its share of the gap, which waits for the run in full.

    If a write was `torn`, the last line may be half there.
    """
    from minilora.experiments.harness import sealed

    lines = path.read_bytes().splitlines(keepends=True)
    if torn and lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = [json.loads(line) for line in lines]
    assert list(map(sealed, rows)) == lines
    return {row["id"]: row | {"sha256": "", "gap_closed": 0} for row in rows}


def below(seen, folder):
    """What `look` saw below one folder."""
    return {name: what for name, what in seen.items() if name.startswith(folder + "/")}


class Walk:
    """One place: what it makes when nothing goes wrong, and every injury against that."""

    def __init__(self, runner, place, template, temp):
        self.runner, self.place, self.template, self.root = runner, place, template, temp / "world"
        shutil.rmtree(self.root, ignore_errors=True)
        self.before = self.fresh(True)
        code, said, self.calls = runner.run(place, self.root, exchange=place.exchange)
        assert code == 0, said
        self.after = look(self.root)
        assert below(self.before, "work/out") != below(self.after, "work/out")
        self.check_outside()

    def fresh(self, whole=False):
        """A new world, or the like of one whose inputs have not changed."""
        for name in ("in", "home", "work") if whole else ("work",):
            shutil.rmtree(self.root / name, ignore_errors=True)
            shutil.copytree(self.template / name, self.root / name)
        old_one(self.place, self.root)
        return look(self.root) if whole else self.before

    def run(self, *how, **more):
        return self.runner.run(self.place, self.root, *how, exchange=self.place.exchange, **more)

    def check_outside(self):
        """Nothing but work/ has changed."""
        seen = look(self.root)
        for name in ("in", "home"):
            assert below(seen, name) == below(self.before, name), name

    def state(self, torn=False):
        """What is at work/out: "old", "new" or "absent"; AssertionError if it is a mixture."""
        out = below(look(self.root), "work/out")
        old, new = (below(seen, "work/out") for seen in (self.before, self.after))
        there = (self.root / "work" / "out").exists()
        if self.place.whole:
            assert not there or out in (old, new), f"a mixture: {sorted(out)}"
            return "absent" if not there else "new" if out == new else "old"
        for name, what in out.items():
            path = self.root / name
            temporary = any(re.fullmatch(r"\..+\.tmp", part) for part in path.parts)
            if temporary or what in (old.get(name), new.get(name)):
                continue
            assert path.name == "rows.jsonl", f"{name} is neither the old nor the new one"
            rows, known = (
                sealed_rows(path, torn),
                sealed_rows(self.template.parent / "rows" / self.place.name),
            )
            assert rows.items() <= known.items(), "a row that the sweep has not"
        return "absent" if not there else "new" if out == new else "old" if out == old else "a part of it"

    def hidden(self):
        """What is there and hidden, apart from what a finished run leaves, too."""
        names = {name for name in look(self.root / "work") if re.search(r"(^|/)\.", name)}
        return sorted(names - {name.removeprefix("work/") for name in self.after})

    def hurt(self, injury, at):
        """One injury, and the same command again: what was found in between."""
        self.fresh()
        code, said, _ = self.run(injury, at)
        killed = injury in ("kill", "torn")
        expected = {"term": 130, "full": 4, "memory": 4}.get(injury, -signal.SIGKILL)
        state = self.state(torn=injury == "torn")
        assert code == expected or (code == 0 and not killed and state == "new"), (code, said)
        assert killed or len(said.strip().splitlines()) >= 1
        self.check_outside()
        if not killed:
            going_on = [name for name in self.hidden() if re.match(r"\.out\.(train|pretrain)(/|$)", name)]
            assert self.hidden() in ([], going_on), self.hidden()
            assert not going_on or any("checkpoint" in name for name in going_on)
        self.again(state)
        return state

    def again(self, state):
        """The same command finishes, to the same bytes, and hides nothing."""
        code, said, _ = self.run()
        there = state == "new" and code == 4 and "is there already" in said
        assert code == 0 or there, (code, said)
        assert look(self.root) == self.after
        self.check_outside()

    def points(self, injury):
        """At which calls this injury is possible."""
        last = self.calls["write" if injury in ("torn", "full", "memory") else "all"]
        return range(last, 0, -self.place.every)[::-1]


INJURIES = ("kill", "torn", "term", "full", "memory")
STREAMS = tuple(f"{which} {what}" for what in ("closed", "full", "gone", "ascii")
                for which in ("stdout", "stderr", "both"))  # fmt: skip


def walk_streams(walk, kind):
    """The command with such streams: what it writes is complete."""
    walk.fresh()
    code, said, _ = walk.run(streams=kind)
    assert code == (4 if kind in ("stdout full", "both full") else 0), (code, said)
    assert look(walk.root) == walk.after
    return "new"


def walk_links(walk):
    """Each file that the command reads or writes is a link, or a second name, in turn: (file, outcome)."""
    for name in [n for folder in walk.place.inputs for n in below(walk.before, folder)]:
        walk.fresh(True)
        (walk.root / name).unlink()
        (walk.root / name).symlink_to(walk.root / "home" / "secret")
        walk.before = look(walk.root)
        code, said, _ = walk.run()
        out = below(look(walk.root), "work/out")
        refused = code == 4 and "is a link" in said and out == below(walk.before, "work/out")
        assert refused or (code == 0 and out == below(walk.after, "work/out")), (name, code, said)
        walk.check_outside()
        yield name, "refused" if refused else "not read"
    for name, what in below(walk.after, "work/out").items():
        for kind in ("link", "second name") if what != "a folder" else ():
            if walk.place.whole and not walk.place.old:
                continue  # what is there stays in any case
            walk.fresh(True)
            place, secret = walk.root / name, walk.root / "home" / "secret"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to("../" * name.count("/") + "home/secret") if kind == "link" else os.link(
                secret, place
            )
            walk.before = look(walk.root)
            code, said, _ = walk.run()
            walk.check_outside()
            assert secret.read_text() == SECRET
            made = code == 0 and below(look(walk.root), "work/out") == below(walk.after, "work/out")
            assert made or (code in (2, 4) and not walk.place.whole), (name, kind, code, said)
            yield f"{name} ({kind})", "replaced" if made else "refused"
    for name in [n for n in (".out.train", ".out.pretrain") if n.endswith(f".{walk.place.name.split()[0]}")]:
        walk.fresh(True)
        (walk.root / "work" / name).symlink_to("../home")
        walk.before = look(walk.root)
        code, said, _ = walk.run()
        walk.check_outside()
        assert code == 4, (name, code, said)
        yield f"work/{name} (link)", "refused"
        for kind in (".lock", "checkpoint.safetensors"):
            walk.fresh(True)
            (walk.root / "work" / name).mkdir()
            (walk.root / "work" / name / kind).symlink_to("../../home/secret")
            walk.before = look(walk.root)
            code, said, _ = walk.run()
            walk.check_outside()
            assert code == 4, (name, code, said)
            yield f"work/{name}/{kind} (link)", "refused"
    walk.before = walk.fresh(True)


@contextlib.contextmanager
def walker():
    """`open(place)` is the Walk of a place."""
    with tempfile.TemporaryDirectory() as temp:
        runner = Runner()
        try:
            template = Path(temp, "template")
            make_world(template)
            (Path(temp) / "rows").mkdir()

            def start(place):
                walk = Walk(runner, place, template, Path(temp))
                if (walk.root / "work/out/rows.jsonl").exists():
                    shutil.copy(walk.root / "work/out/rows.jsonl", Path(temp) / "rows" / place.name)
                return walk

            yield start
        finally:
            runner.close()


def main():
    """Walk everything and write the table."""
    from minilora.table import Table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only at every N-th call")
    every, start = parser.parse_args().every, time.monotonic()
    command = "python tests/walks.py" + (f" --every {every}" if every > 1 else "")
    lines, points = [], 0
    with walker() as open_walk:
        for place in PLACES:
            walk = open_walk(place)
            cells = []
            for injury in INJURIES:
                found = collections.Counter(walk.hurt(injury, at) for at in walk.points(injury)[::-every])
                cells.append(", ".join(f"{count} {state}" for state, count in sorted(found.items())))
                points += sum(found.values())
            found = [walk_streams(walk, kind) for kind in STREAMS]
            cells.append(f"{len(found)} new")
            linked = collections.Counter(outcome for _, outcome in walk_links(walk))
            cells.append(", ".join(f"{count} {state}" for state, count in sorted(linked.items())) or "-")
            points += len(found) + sum(linked.values())
            lines.append((place.name, *cells))
            print(*lines[-1], sep=" | ", flush=True)
    head = (
        "# Every command, injured at every call that changes a file\n\n"
        f"`{command}`: each cell says how often `OUT` was the old one, the new one, absent, or "
        "(where a command writes several files, each of them old, new or absent) a part of it, when the "
        "injury was over. After each, the same command was given again: it finished with the same bytes as "
        "without injury (or said that `OUT`, complete, is there already), left nothing hidden behind, and "
        "nothing outside `OUT` had changed.\n\n"
        "Kill: SIGKILL before every rename, exchange, unlink, mkdir, rmdir, fsync, truncation and write. "
        "Torn: SIGKILL when half of the N-th write is done. SIGTERM: at the same calls as kill. Full disk: "
        "every write and fsync fails from the N-th write on, half of which is done. No "
        "memory: the N-th write is a MemoryError. Streams: stdout, stderr or both closed, full, without a "
        "reader, or ASCII. Links: each file that is read or written, in turn, is a symbolic link or has a "
        "second name.\n\n"
        + "".join(
            f"`{place.name}`: at every {place.every}th call.\n\n" for place in PLACES if place.every > 1
        )
    )
    table = Table(
        ("command", "kill -9", "torn", "SIGTERM", "full disk", "no memory", "streams", "links"), lines
    )
    (ROOT / "benchmarks/results/walks.md").write_text(
        head + table.markdown("l" * 8) + f"\n\n{points:,} injuries.\n", encoding="utf-8"
    )
    print(f"{points:,} injuries, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve() if "--serve" in sys.argv else main()
