"""Fuzz the readers of adapters, starting from those that PEFT wrote.

    python tests/fuzz.py --seconds 300        coverage-guided where atheris is installed, else blind

An input is a config and a file of tensors. It must be loaded beside its tiny base and merged, or be refused
with one printable line; anything else, or more than two seconds, ends the program with the input in hex. The
last line counts.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from copy import deepcopy
from pathlib import Path

from helpers import TooLong, says, within
from peft_cases import FIXED, FIXTURES, slug

from minilora import adapter_config, adapters, errors, files, storage, tensors
from minilora.adapters import CONFIG, WEIGHTS
from minilora.errors import MiniloraError, NonFiniteError
from minilora.lora import Adapted, merge, remove, sites, unmerge

BASES = [slug(base) for base in dict.fromkeys(base for base, _ in FIXED)]
NUMBERS = (0, 1, -1, 2, 3, 7, 8, 12, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf)
WORDS = (
    "", "q_proj", "lm_head", "embed_tokens", "norm", "all-linear", "all", "lora_only", ".*", "(a+)+", "(",
    r"(.)\1", "(?:(?=(a|b)*c).)*", r"model.layers\.\d.*",
    "x" * 999, "model.layers.1.self_attn.q_proj", "F32", "BF16", "F8_E4M3", "\0", "\x1b[2J", "\ud800", "é",
)  # fmt: skip
VALUES = (None, True, False, *NUMBERS, *WORDS, [], {}, [0], [3, 12], ["q_proj"], {"q_proj": 2}, [[]])


def join(base, config, weights):
    """An input: which base, length of the config, config, tensors."""
    return bytes([base]) + len(config).to_bytes(4, "little") + config + weights


def split(data):
    size = int.from_bytes(data[1:5], "little")
    return data[0] % len(BASES) if data else 0, data[5 : 5 + size], data[5 + size :]


def corpus():
    """The fixtures as inputs."""
    for base, adapter in FIXED:
        folder = FIXTURES / "adapters" / f"{slug(base)}--{slug(adapter)}"
        parts = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
        yield join(BASES.index(slug(base)), *parts)


# ---- the readers


class Readers:
    """Calls every reader with an input, and counts."""

    def __init__(self, folder):
        self.folder, self.inputs, self.accepted, self.start = Path(folder), 0, 0, time.monotonic()
        self.models = [files.load(FIXTURES / "bases" / base) for base in BASES]
        self.prints = [adapters.base_print(model) for model in self.models]

    def __call__(self, data):
        self.inputs += 1
        base, config, weights = split(data)
        (self.folder / CONFIG).write_bytes(config)
        (self.folder / WEIGHTS).write_bytes(weights)
        try:
            with within(2):
                self.done(self.tensors)
                self.done(adapter_config.read_settings, self.folder / CONFIG)
                if self.done(adapters.open_adapter, self.folder):
                    self.accepted += self.done(self.beside, base)
        except (Exception, TooLong):
            print(f"input: {data.hex()}", flush=True)
            raise

    def done(self, call, *args):
        """Whether the call is done, and not refused as it should be."""
        try:
            call(*args)
        except MiniloraError as e:
            says(e, self.folder)
            return False
        return True

    def tensors(self):
        """Every tensor of the file is what its header says."""
        found = tensors.open_tensors(self.folder / WEIGHTS)
        for name in found:
            assert found[name].shape == found.shapes[name]

    def beside(self, base):
        """Load beside a base, of which no bit and no adapter is left after it or after a refusal."""
        model = deepcopy(self.models[base])
        try:
            said = str(adapters.load_adapter(model, self.folder))
            assert all(line.isprintable() for line in said.splitlines()), ascii(said)
            with contextlib.suppress(NonFiniteError):
                merge(model)
                unmerge(model)
            remove(model, "default")
        finally:
            assert not any(isinstance(layer, Adapted) for _, layer in sites(model))
            assert adapters.base_print(model) == self.prints[base]

    def line(self, engine):
        """The counts."""
        refused, seconds = self.inputs - self.accepted, time.monotonic() - self.start
        counts = f"{self.inputs} inputs, {refused} refused, {self.accepted} accepted"
        return f"{counts}, {seconds:.0f} seconds, {engine}"


# ---- mutations that know the format


def somewhere(rng, tree, change):
    """A JSON value with one part of it changed, at any depth."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree))
        return {k: somewhere(rng, v, change) if k == key else v for k, v in tree.items()}
    if isinstance(tree, list) and tree and rng.random() < 0.7:
        at = rng.randrange(len(tree))
        return [somewhere(rng, v, change) if i == at else v for i, v in enumerate(tree)]
    return change(tree)


def swapped(rng, text):
    """JSON text with a value, key or entry changed; other text as it is."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text
    how = rng.randrange(4)
    if how == 0 and isinstance(tree, dict) and tree:
        gone = rng.choice(list(tree))
        tree = {k: v for k, v in tree.items() if k != gone}
    elif how == 1 and isinstance(tree, dict) and tree:
        old = rng.choice(list(tree))
        new = rng.choice([*WORDS, *tree, old.replace("0", "1"), old.replace("_A", "_B")])
        tree = {new if k == old else k: v for k, v in tree.items()}
    else:
        tree = somewhere(rng, tree, lambda old: near(rng, old))
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def near(rng, old):
    """Another value in the place of one, not always of its type."""
    if type(old) is int and rng.random() < 0.7:
        return old + rng.choice([-1, 1, old, -old, 12, 144])
    return rng.choice(VALUES)


def flipped(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'{}[]",:019e-'])
    return bytes(data)


def cut(rng, data):
    """A piece less, or twice."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:a], data[:a] + data[b:], data[:b] + data[a:]])


def stated(rng, weights):
    """Another length of the header."""
    size = int.from_bytes(weights[:8], "little")
    size = rng.choice([size - 1, size + 1, 0, 2**63, len(weights), len(weights) - 8, rng.randrange(2**64)])
    return (size % 2**64).to_bytes(8, "little") + weights[8:]


def headed(rng, weights):
    """Another header."""
    end = 8 + int.from_bytes(weights[:8], "little")
    new = swapped(rng, weights[8:end])
    return len(new).to_bytes(8, "little") + new + weights[end:]


def mutated(rng, data, others):
    """An input near this one."""
    base, config, weights = split(data)
    _, other_config, other_weights = split(rng.choice(others))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        how = rng.randrange(10)
        if how < 3:
            config = swapped(rng, config)
        elif how < 6:
            weights = headed(rng, weights)
        else:
            base, config, weights = (
                (base, flipped(rng, config), weights) if how == 6 else
                (base, config, rng.choice([flipped, cut, stated])(rng, weights)) if how == 7 else
                (base, cut(rng, config), weights) if how == 8 else
                rng.choice([(rng.randrange(len(BASES)), config, weights), (base, other_config, weights),
                            (base, config, other_weights)])
            )  # fmt: skip
    return join(base, config, weights)


# ---- the engines


def guided(atheris, readers, seeds, seconds):
    """libFuzzer keeps the inputs that reach new code; half of the mutations are its own. Does not return."""

    def one(data):
        try:
            readers(data)
        except (Exception, TooLong):
            traceback.print_exc()
            stop(1)
        if time.monotonic() - readers.start > seconds:
            print(readers.line("atheris"), flush=True)
            stop(0)

    def stop(code):
        shutil.rmtree(readers.folder.parent)
        os._exit(code)  # libFuzzer has no other end

    def mutator(data, most, seed):
        rng = random.Random(seed)
        new = mutated(rng, data, seeds) if rng.random() < 0.5 else atheris.Mutate(data, most)
        return new[:most]

    for module in (adapter_config, adapters, errors, files, storage, tensors):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not hasattr(function, "__wrapped__"):
                atheris.instrument_func(function)
    start = readers.folder.parent / "corpus"
    start.mkdir()
    for i, seed in enumerate(seeds):
        (start / str(i)).write_bytes(seed)
    how = ["-max_len=30000", "-timeout=0", "-rss_limit_mb=1024", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *how, str(start)], one, custom_mutator=mutator)
    atheris.Fuzz()


def blind(readers, seeds, seconds, seed):
    """Mutations of the seeds and of what was accepted."""
    rng, pool = random.Random(seed), list(seeds)
    while time.monotonic() - readers.start < seconds:
        data, before = mutated(rng, rng.choice(pool), seeds), readers.accepted
        readers(data)
        if readers.accepted > before and len(pool) < 1000:
            pool.append(data)
    print(readers.line("random"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the random engine")
    parser.add_argument("--engine", choices=["atheris", "random"])
    args = parser.parse_args()
    seeds = list(corpus())
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        (Path(folder) / "adapter").mkdir()
        readers = Readers(Path(folder) / "adapter")
        try:
            import atheris
        except ImportError:
            atheris = None
        if atheris and args.engine != "random":
            guided(atheris, readers, seeds, args.seconds)
        blind(readers, seeds, args.seconds, args.seed)


if __name__ == "__main__":
    main()
