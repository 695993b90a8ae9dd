"""What the benchmarks share: sizes, contestants in processes of their own, the machine, the results.

Two libraries in one process share its threads and its allocator. So every contestant is a process that
gets ready, waits for a line on its standard input, does one run, answers its milliseconds, and waits
again; the parent lets them run in turn, and all see the same weather.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import minilora as ml

PAUSE = 0.25  # seconds: threads of BLAS and OpenMP go on spinning for a while, on the next one's core
RESULTS = Path(__file__).parent / "results"
COMMAND = "import sys; from minilora.cli import main; assert main(sys.argv[1:]) == 0"
PEAK = """
import re, sys
print(re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\\t", " "))[1], file=sys.stderr)
"""  # Linux's own count: getrusage's begins with the memory of the process that forked
SIZES = (
    # D, L, H, F, T, V, N
    (64, 2, 4, 176, 64, 96, 16),
    (128, 4, 4, 352, 128, 256, 16),
    (256, 6, 8, 704, 128, 256, 16),
    (512, 6, 8, 1376, 256, 1024, 8),
)


def threads(n: int) -> dict[str, str]:
    """The environment of a process whose libraries compute with n threads."""
    return {f"{library}_NUM_THREADS": str(n) for library in ("OPENBLAS", "OMP", "MKL")}


def answer(run: Callable[[], Any], warm: int = 2, clock: Callable[[], float] = time.perf_counter) -> None:
    """Be a contestant: warm up, then do one run for every line that comes, until none does."""
    for _ in range(warm):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = clock()
        run()
        print(1000 * (clock() - start), flush=True)


class Contestant:
    """A process that ends in `answer`: `python argv...` with `env` beside the environment."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.argv, pipe = [sys.executable, *argv], subprocess.PIPE
        env = os.environ | env
        self.process = subprocess.Popen(self.argv, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=env)

    def line(self) -> str:
        """What it says next; RuntimeError if it has ended."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.argv} ended with {self.process.wait()}")
        return line

    def run(self) -> float:
        """The milliseconds of one run."""
        self.process.stdin.write("go\n")
        return float(self.line())

    def close(self) -> None:
        """No more runs."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def alternate(contestants: Mapping[str, Contestant], rounds: int, cores: int) -> dict[str, list[float]]:
    """name -> the milliseconds of its run in each round; to and fro, so that nobody is always first."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    try:
        for contestant in contestants.values():
            while contestant.line() != "ready\n":
                pass
        for i in range(rounds):
            for name in list(contestants)[:: -1 if i % 2 else 1]:
                time.sleep(PAUSE * (cores > 1))
                times[name].append(contestants[name].run())
    finally:
        for contestant in contestants.values():
            contestant.close()
    return times


def fresh(program: str, *args: Any) -> tuple[float, float]:
    """Seconds, the interpreter's start included, and peak MB of a program in a process of its own."""
    argv = [sys.executable, "-c", program + PEAK, *map(str, args)]
    start = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr)
    return seconds, int(done.stderr.split()[-1]) * 1024 / 1e6


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a / b."""
    return median(x / y for x, y in zip(a, b, strict=True))


def named(size: Sequence[int]) -> dict[str, int]:
    """The letters of a size."""
    return dict(zip("DLHFTVN", size, strict=True))


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def brief(processor: str) -> str:
    """The name of a processor as one says it."""
    return processor.replace("(R)", "").removesuffix(" Processor")


def in_torch(model: ml.Llama) -> Any:
    """transformers' model with the same weights, and no token at which it stops."""
    import torch
    import transformers

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**asdict(model.config))).eval()
    state = {path: torch.tensor(p.data) for path, p in ml.named_params(model).items()}
    theirs.load_state_dict(state, strict=False)  # the tied head has a second name there
    theirs.generation_config.eos_token_id = None
    return theirs


def machine() -> dict[str, Any]:
    """On what and with what this was measured."""
    installed = {d.name.lower() for d in importlib.metadata.distributions()}
    versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft") if n in installed}
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
        **versions,
    }


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """results/<name>.json: the rows, and the machine."""
    write_each(name, rows, **machine())


def write_each(name: str, rows: Iterable[Mapping[str, Any]], **others: Any) -> None:
    """results/<name>.json: the rows, each of which names its own machine if `others` does not."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"rows": list(rows), **others}, indent=1) + "\n")
