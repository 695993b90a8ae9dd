"""Time many adapters over one base: the engine beside the base alone, PEFT's mixed batches, and merging.

    python benchmarks/serving.py [--rounds N] [--draw] [--count]

A model of D = 128, L = 4 (SIZES[1] of common.py), adapters of rank 8 on all linear maps (or on q and v,
where it says so), written here and read by both libraries. A run serves REQUESTS requests of PROMPT + NEW
tokens, greedy, all there at the start; adapters are drawn by Zipf's law (exponent 1), or each request has its
own ("distinct"). Equal lengths are PEFT's best case: no padding, and nobody waits for a longer text.

  base      the engine, without adapters
  engine    the engine, all adapters in memory; "small memory": 100 at most, the others read when needed
  peft      generate of transformers with PEFT's `adapter_names`, in batches of SLOTS requests
  merge     one adapter after the other: merge, serve all of its requests as one batch, unmerge

Each contestant has a process of its own with one thread, the runs alternate (common.py), and ratios are
medians over the rounds. Times are the processor's: what other programs do meanwhile counts only as far as it
disturbs the caches. Then waiting times: requests arrive as a Poisson process at LOAD of the rate at which the
base alone serves them in that round (serve/bench.py). Writes results/serving.json; --draw only draws
results/serving.png and .svg from it, and prints the tables of docs/serving.md. --count prints what a 7B base
and 10,000 adapters need past one machine, from formulas alone.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import RESULTS, SIZES, Contestant, alternate, answer, in_torch, ratio, threads, write

import minilora as ml
from minilora.analysis.count import LLAMAS
from minilora.serve import bench
from minilora.serve.engine import Engine, Request
from minilora.table import Table

SIZE, RANK = SIZES[1], 8
REQUESTS, PROMPT, NEW, SLOTS = 96, 16, 24, 32
LOAD = 0.4
TARGETS = {"all-linear": "all-linear", "q,v": ("q_proj", "v_proj")}
RUNS = (  # kind, adapters, popularity, targets
    ("base", 0, "zipf", "all-linear"),
    ("base again", 0, "zipf", "all-linear"),
    *(("engine", n, "zipf", "all-linear") for n in (1, 5, 64, 1000, 2000)),
    ("engine", 64, "distinct", "all-linear"),
    ("small memory", 1000, "zipf", "all-linear"),
    *(("engine", n, "zipf", "q,v") for n in (5, 1000)),
    ("peft", 64, "zipf", "all-linear"),
    ("peft", 64, "distinct", "all-linear"),
    ("merge", 64, "zipf", "all-linear"),
)
WAITS = ((0, 0), (5, 5), (64, 64), (1000, 1000), (1000, 99))  # adapters, and how many of them memory holds


def fresh() -> ml.Llama:
    """The frozen base."""
    D, L, H, F, _, V, _ = SIZE
    model = ml.llama(ml.Config(V, D, F, L, H, H), np.random.default_rng(0))
    ml.freeze(model)
    return model


def work(adapters: int, popularity: str) -> list[Request]:
    """The requests of a run, the same for every contestant."""
    rng, chosen = np.random.default_rng(1), [None] * REQUESTS
    if popularity == "distinct":
        chosen = [bench.names(adapters)[i % adapters] for i in range(REQUESTS)]
    elif adapters:
        chosen = bench.drawn(rng, REQUESTS, adapters, 1.0)
    return [Request(rng.integers(0, SIZE[5], PROMPT), NEW, name, temperature=0) for name in chosen]


# ---- the contestants


def engine(folder: Path, requests: list[Request], adapters: int, most: int) -> Callable[[], Any]:
    """The engine, with `most` adapters in memory at most."""
    model = fresh()
    bank = None
    if adapters:
        size = one(folder)
        bank = bench.resident(model, folder, adapters, most * size, size)
    served = Engine(model, bank, slots=SLOTS, positions=PROMPT + NEW, queue=REQUESTS)
    return lambda: bench.play(served, [0.0] * REQUESTS, requests)


def one(folder: Path) -> int:
    """The bytes of one adapter in memory."""
    return int((folder / "bytes").read_text())


def merge(folder: Path, requests: list[Request], adapters: int) -> Callable[[], Any]:
    """Merge, serve all of an adapter's requests, unmerge; the adapters are loaded before."""
    model, of = fresh(), defaultdict(list)
    for request in requests:
        of[request.adapter].append(request.prompt)
    for name in of:
        ml.load_adapter(model, folder / name, name)
    rng = np.random.default_rng(0)

    def run() -> None:
        for name, prompts in of.items():
            ml.set_adapter(model, name)
            ml.merge(model)
            list(ml.generate(model, np.array(prompts), NEW, rng=rng, temperature=0))
            ml.unmerge(model)

    return run


def peft(folder: Path, requests: list[Request], adapters: int) -> Callable[[], Any]:
    """transformers' generate with PEFT's mixed batches."""
    import torch
    import transformers
    from peft import PeftModel

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    first, *others = bench.names(adapters)
    theirs = in_torch(fresh())
    mixed = PeftModel.from_pretrained(theirs, folder / first, adapter_name=first).eval()
    for name in others:
        mixed.load_adapter(folder / name, adapter_name=name)
    ids = torch.tensor(np.array([request.prompt for request in requests]))
    who = [request.adapter for request in requests]

    def run() -> np.ndarray:
        written = []
        with torch.inference_mode():
            for i in range(0, REQUESTS, SLOTS):
                batch = ids[i : i + SLOTS]
                text = mixed.generate(
                    input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW,
                    do_sample=False, use_cache=True, pad_token_id=0, adapter_names=who[i : i + SLOTS],
                )  # fmt: skip
                written.append(text[:, PROMPT:].numpy())
        return np.concatenate(written)

    return run


def act(folder: str, kind: str, adapters: str, popularity: str, targets: str, check: bool = False) -> Any:
    """The part of one contestant."""
    where, n = Path(folder) / targets.replace(",", ""), int(adapters)
    requests = work(n, popularity)
    if kind == "peft":
        run = peft(where, requests, n)
    elif kind == "merge":
        run = merge(where, requests, n)
    else:
        run = engine(where, requests, n, 100 if kind == "small memory" else max(n, 1))
    return run() if check else answer(run, 1, time.process_time)


class Clock:
    """The processor's seconds, and those that were slept: what else runs on the machine does not count."""

    def __init__(self) -> None:
        self.slept = 0.0

    def __call__(self) -> float:
        return time.process_time() + self.slept

    def sleep(self, seconds: float) -> None:
        """Nothing happens until then."""
        self.slept += seconds


# ---- the race


def race(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant: tokens per second, and how many times as fast as base and PEFT."""
    texts = [stream.tokens for stream in act(str(folder), "engine", "64", "distinct", "all-linear", True)]
    theirs = act(str(folder), "peft", "64", "distinct", "all-linear", True)
    same = float(np.mean(np.array(texts) == theirs))
    print(f"tokens that engine and PEFT write alike: {same:.2%}", flush=True)
    runners = {run: Contestant([__file__, "--as", str(folder), *map(str, run)], threads(1)) for run in RUNS}
    times = alternate(runners, rounds, 1)
    base = times[RUNS[0]]
    rows = []
    for run, ms in times.items():
        kind, adapters, popularity, targets = run
        rows.append(row := {
            "part": "throughput", "kind": kind, "adapters": adapters, "popularity": popularity,
            "targets": targets, "threads": 1, "ms": median(ms),
            "tokens_per_second": 1000 * REQUESTS * NEW / median(ms), "to_base": ratio(base, ms),
        })  # fmt: skip
        twin = ("peft", *run[1:])
        if kind == "engine" and twin in times:
            row |= {"times_peft": ratio(times[twin], ms), "same_tokens": same}
        few = ("engine", 5, "zipf", targets)
        if kind in ("engine", "small memory") and popularity == "zipf":
            row["to_five"] = ratio(times[few], ms)
        if (merged := ("merge", *run[1:])) in times and kind == "engine":
            row["times_merge"] = ratio(times[merged], ms)
        print(f"{kind:13} {adapters:5} {popularity:9} {targets:10} {row['tokens_per_second']:8,.0f} tokens/s "
              f"{row['to_base']:6.3f} of base  {row.get('to_five', 0):6.3f} of five  "
              f"{row.get('times_peft', 0):6.1f} x PEFT  {row.get('times_merge', 0):5.1f} x merge",
              flush=True)  # fmt: skip
    return rows


def waiting(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each number of adapters: percentiles of waiting times, and who was in memory."""
    model, rng, rows, rates = fresh(), np.random.default_rng(2), [], []
    trials, where, size, clock = [], folder / "all-linear", one(folder / "all-linear"), Clock()
    for n, most in WAITS:
        bank = bench.resident(model, where, n, most * size, size) if n else None
        served = Engine(model, bank, slots=SLOTS, positions=sum(p[1] for p in (bench.PROMPT, bench.NEW)),
                        queue=REQUESTS, clock=clock)  # fmt: skip
        trials.append(bench.Trial(n, served))
        trials[-1].warm(bench.workload(rng, SLOTS, n, 1.0, SIZE[5]))
    base = trials[0]
    for _ in range(rounds):
        base.burst(bench.workload(rng, REQUESTS, 0, 1.0, SIZE[5]))
        rates.append(LOAD * base.throughput[-1] / (sum(bench.NEW) / 2))  # requests per second
        arrivals = np.cumsum(rng.exponential(1 / rates[-1], REQUESTS)).tolist()
        for trial in trials:
            trial.trickle(arrivals, bench.workload(rng, REQUESTS, trial.adapters, 1.0, SIZE[5]), clock.sleep)
    for (n, most), trial in zip(WAITS, trials, strict=True):
        trial.throughput = base.throughput  # of the base alone is it measured here
        seen = trial.row(base)
        rows.append({
            "part": "waiting", "adapters": n, "in_memory_at_most": most, "load": LOAD,
            "requests_per_second": median(rates), "first_token_ms": seen.first_token,
            "latency_ms": seen.latency, "in_memory": seen.in_memory, "evictions": seen.evictions,
        })  # fmt: skip
        print(f"{n:5} adapters, {most:5} in memory: first token {seen.first_token} ms, "
              f"last {seen.latency} ms, read for {1 - seen.in_memory:.1%}", flush=True)  # fmt: skip
    return rows


def measure(rounds: int) -> list[dict[str, Any]]:
    """All rows."""
    with tempfile.TemporaryDirectory() as temp:
        for name, targets in TARGETS.items():
            config = ml.LoraConfig(r=RANK, alpha=RANK, targets=targets, init="both")
            folder, rng = Path(temp, name.replace(",", "")), np.random.default_rng(3)
            folder.mkdir()
            model = bench.adapted(fresh(), config, rng)
            bench.write_adapters(model, folder, 2000 if name == "all-linear" else 1000)
            (folder / "bytes").write_text(str(bench.bytes_of(model)))
        return race(Path(temp), rounds) + waiting(Path(temp), rounds)


# ---- past one machine

GPU = {"memory": 80e9, "bandwidth": 2.04e12, "bus": 32e9}  # A100 80 GB; PCIe 4 x16; bytes, bytes per second
ADAPTERS, TEXT, WRITTEN, RATE = 10_000, 512, 256, 1 / 60  # tokens in the cache, new ones; requests/s of each


def count() -> dict[str, float]:
    """What Llama-2-7B in 16 bits with 10,000 adapters of rank 8 on q, k, v, o needs: formulas alone.

    Decoding reads every weight, every cached key and value and every adapter in use once per step, so a step
    takes at least their bytes over the bandwidth (products are hidden behind it: Punica, section 2).
    """
    c = LLAMAS["llama-2-7b"]
    D, L, F, V = c.hidden_size, c.num_hidden_layers, c.intermediate_size, c.vocab_size
    GE = c.num_key_value_heads * c.E
    base = 2 * (2 * V * D + L * (2 * D * D + 2 * GE * D + 3 * F * D + 2 * D) + D)
    adapter = 2 * L * RANK * (2 * (D + D) + 2 * (D + GE))
    text = TEXT * 2 * 2 * L * GE
    texts = int((GPU["memory"] - base) // (text + adapter))  # at once, each with an adapter of its own
    step = base + texts * (text + adapter)
    tokens = texts / (step / GPU["bandwidth"])
    held = np.cumsum(1 / np.arange(1, ADAPTERS + 1))
    needed = ADAPTERS * RATE * WRITTEN
    return {
        "base_bytes": base, "adapter_bytes": adapter, "all_adapters_bytes": ADAPTERS * adapter,
        "merged_copies_bytes": ADAPTERS * base, "cache_bytes_per_token": text / TEXT,
        "texts_at_once": texts, "bytes_per_step": step, "of_it_adapters": texts * adapter / step,
        "step_ms": 1000 * step / GPU["bandwidth"], "tokens_per_second": tokens,
        "fetch_ms": 1000 * adapter / GPU["bus"], "tokens_needed_per_second": needed,
        "replicas": int(-(-needed // tokens)), "replicas_of_merged_models": ADAPTERS,
        "share_of_the_first_thousand": float(held[999] / held[-1]),
    }  # fmt: skip


# ---- the tables of docs/serving.md


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Throughput, waiting times, and what a 7B base needs, in Markdown."""
    fast = [row for row in rows if row["part"] == "throughput"]
    waits = [row for row in rows if row["part"] == "waiting"]
    (need,) = (row for row in rows if row["part"] == "past one machine")

    def times(row: dict[str, Any], name: str, digits: int = 1) -> str:
        return f"{row[name]:.{digits}f}" if name in row else ""

    throughput = Table(
        ("who", "adapters", "popularity", "targets", "tokens/s", "of base", "of 5", "x PEFT", "x merge"),
        [
            (row["kind"], f"{row['adapters']:,}" if row["adapters"] else "none",
             row["popularity"] if row["adapters"] else "", row["targets"] if row["adapters"] else "",
             f"{row['tokens_per_second']:,.0f}", f"{row['to_base']:.2f}", times(row, "to_five", 2),
             times(row, "times_peft"), times(row, "times_merge"))
            for row in fast
        ],
    )  # fmt: skip
    waiting = Table(
        ("adapters", "first token, median", "95 %", "last token, median", "95 %", "in memory when it came"),
        [
            (f"{row['adapters']:,}" if row["in_memory_at_most"] >= row["adapters"] else
             f"{row['adapters']:,}, {row['in_memory_at_most']} in memory",
             *(f"{ms:.0f} ms" for name in ("first_token_ms", "latency_ms") for ms in row[name]),
             f"{row['in_memory']:.0%}")
            for row in waits
        ],
    )  # fmt: skip
    gb, ms = (lambda name: f"{need[name] / 1e9:,.1f} GB"), (lambda name: f"{need[name]:.1f} ms")
    count = Table(
        ("what", "how much"),
        [
            ("the base", gb("base_bytes")), ("one adapter", f"{need['adapter_bytes'] / 1e6:.1f} MB"),
            ("all adapters", gb("all_adapters_bytes")), ("a merged copy for each", gb("merged_copies_bytes")),
            ("keys and values of one token", f"{need['cache_bytes_per_token'] / 1e6:.2f} MB"),
            ("texts at once on one GPU", f"{need['texts_at_once']}"),
            ("bytes that a step of decoding reads", gb("bytes_per_step")),
            ("of these, adapters", f"{need['of_it_adapters']:.1%}"),
            ("a step takes at least", ms("step_ms")),
            ("new tokens per second and GPU, at most", f"{need['tokens_per_second']:,.0f}"),
            ("fetching one adapter takes", ms("fetch_ms")),
            ("new tokens per second that are asked for", f"{need['tokens_needed_per_second']:,.0f}"),
            ("replicas of the base", f"{need['replicas']}"),
            ("requests for the first thousand adapters", f"{need['share_of_the_first_thousand']:.0%}"),
        ],
    )  # fmt: skip
    return [table.markdown() for table in (throughput, waiting, count)]


def said(rows: list[dict[str, Any]]) -> list[str]:
    """What docs/serving.md says of the throughput."""

    def of(*run: Any) -> dict[str, Any]:
        names = ("kind", "adapters", "popularity", "targets")
        (row,) = (row for row in rows if tuple(map(row.get, names)) == run)
        return row

    again, everywhere, few = (of(*run) for run in (RUNS[1], *(("engine", 1000, "zipf", t) for t in TARGETS)))
    zipf, distinct = (of("engine", 64, who, "all-linear") for who in ("zipf", "distinct"))
    return [
        f"The base timed against itself differs by {100 * abs(again['to_base'] - 1):.0f} %",
        f"keep {few['to_base']:.2f} of the base's throughput, and {few['to_five']:.2f} of that with five",
        f"they keep {everywhere['to_base']:.2f} and {everywhere['to_five']:.2f}; the goal was 0.6 and 0.9",
        f"With 64 different adapters the engine is {distinct['times_peft']:.1f} times as fast",
        f"by Zipf's law a batch has fewer different ones, and it is {zipf['times_peft']:.1f} times as fast",
    ]


# ---- the figure


def draw(rows: list[dict[str, Any]]) -> None:
    """results/serving.png and .svg."""
    from minilora.analysis.plotting import BLUE, GOLD, GREEN, GREY, ORANGE, PINK, WINE, Picture, axes, styled

    @styled
    def picture() -> Picture:
        figure, ((left, right),) = axes(2, size=(12, 4.8))
        fast = [row for row in rows if row["part"] == "throughput" and row["popularity"] == "zipf"]
        base = next(row for row in fast if row["kind"] == "base")["tokens_per_second"]
        left.axhline(base, color=GREY, linewidth=1.5, linestyle=":", label="the base alone")
        for kind, targets, colour, marker, dashes, label in (
            ("engine", "all-linear", BLUE, "o", "-", "engine, all linear maps"),
            ("engine", "q,v", PINK, "D", "--", "engine, q and v"),
            ("small memory", "all-linear", BLUE, "P", "", "engine, 100 in memory"),
            ("merge", "all-linear", ORANGE, "^", "-", "merge per adapter"),
            ("peft", "all-linear", GREEN, "s", "-", "PEFT, mixed batches"),
        ):
            some = [row for row in fast if (row["kind"], row["targets"]) == (kind, targets)]
            left.plot([row["adapters"] for row in some], [row["tokens_per_second"] for row in some],
                      color=colour, marker=marker, linestyle=dashes or "none", markersize=8,
                      markerfacecolor="white" if not dashes else colour, label=label)  # fmt: skip
        left.set_xscale("log")
        left.set_yscale("log")
        speeds, counts = (300, 500, 1000, 2000, 3000, 5000), (1, 5, 64, 1000, 2000)
        left.set_yticks(speeds, [f"{speed:,}" for speed in speeds])
        left.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=9)
        left.minorticks_off()
        left.set_xlabel("adapters (Zipf's law)")
        left.set_ylabel("new tokens per second")
        left.set_title("Throughput of many adapters over one base")
        left.legend(fontsize=10)
        waits = [row for row in rows if row["part"] == "waiting"]
        places = np.arange(len(waits))
        for shift, name, colour, marker, label in (
            (-0.1, "first_token_ms", WINE, "o", "first token"),
            (0.1, "latency_ms", GOLD, "^", "last token"),
        ):
            low, high = zip(*(row[name] for row in waits), strict=True)
            right.vlines(places + shift, low, high, color=colour, linewidth=2)
            right.plot(places + shift, low, marker, color=colour, markersize=8, label=f"{label}, median")
            right.plot(places + shift, high, "_", color=colour, markersize=12, markeredgewidth=2,
                       label=f"{label}, 95th percentile")  # fmt: skip
        names = [f"{row['adapters']:,}" if row["adapters"] else "none" for row in waits]
        for i, row in enumerate(waits):
            if row["in_memory_at_most"] < row["adapters"]:
                names[i] += f"\n({row['in_memory_at_most']} in memory)"
        right.set_xticks(places, names)
        right.set_yscale("log")
        right.margins(x=0.12, y=0.15)
        right.set_ylim(top=6 * right.get_ylim()[1])  # room for the legend
        right.set_xlabel("adapters")
        right.set_ylabel("milliseconds after arrival")
        right.set_title(f"Waiting, at {LOAD:.0%} of the base's throughput")
        right.legend(fontsize=10)
        return Picture(figure, "Tokens per second against the number of adapters, and waiting times.")

    picture().save(RESULTS, "serving")


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--draw", action="store_true", help="only draw what is written")
    parser.add_argument("--count", action="store_true", help="only print what a 7B base needs")
    parser.add_argument("--as", nargs=5, dest="part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        act(*args.part)
        return
    if args.count:
        print(json.dumps(count(), indent=1))
        return
    if not args.draw:
        write("serving", [*measure(args.rounds), {"part": "past one machine", **count()}])
    rows = json.loads((RESULTS / "serving.json").read_text())["rows"]
    print(*tables(rows), "\n".join(said(rows)), sep="\n\n")
    draw(rows)


if __name__ == "__main__":
    sys.exit(main())
