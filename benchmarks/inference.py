"""Time inference: merged and unmerged beside the base, and cached decoding beside transformers' generate.

    python benchmarks/inference.py [D ...] [--threads 1 2] [--draw]

Latency: a forward of N x T tokens, and one token of cached decoding at batch 1, for the base, the base
once more (what two processes of the same code differ by is the error of this clock), the same model
with a LoRA of rank 8 on all linear maps: merged (the plain layers stand behind the adapted ones), fused
(they stand in their place) and unmerged.

Decoding: greedy, 96 tokens after a prompt of 32, batches 1 and 32, float32, by `generate` here and by
`model.generate` of transformers on PyTorch (use_cache, inference_mode, no end token) with the same
weights; this part is left out where torch or transformers is missing. That both write the same text is
a law in tests/test_parity.py.

Each contestant has a process of its own, the runs alternate (common.py), ratios are medians over the
rounds. Writes results/inference.json; --draw only draws results/inference.png and .svg from it.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from common import RESULTS, SIZES, Contestant, alternate, answer, in_torch, named, ratio, threads, write

import minilora as ml
from minilora.backend import keep_memory

PROMPT, NEW = 32, 96
TOKENS = 64  # of one run that times a token
LATENCY_ROUNDS = {64: 24, 128: 10, 256: 6, 512: 3}  # in each of LAUNCHES: memory lies elsewhere every time
LAUNCHES = 5
DECODING_ROUNDS = {64: 25, 128: 15, 256: 9, 512: 5}

# ---- a contestant


def fresh(size: tuple[int, ...], kind: str = "base") -> tuple[ml.Llama, np.random.Generator]:
    """A frozen model, as it would be loaded, bare or with a LoRA that has learned something."""
    D, L, H, F, _, V, _ = size
    rng = np.random.default_rng(0)
    model = ml.llama(ml.Config(V, D, F, L, H, H), rng)
    ml.freeze(model)
    if kind in ("merged", "fused", "unmerged"):
        ml.inject(model, ml.LoraConfig(r=8, init="both"), rng=rng)
    if kind in ("merged", "fused"):
        (ml.merge if kind == "merged" else ml.fuse)(model)
    return model, rng


def text(model: ml.Llama, ids: np.ndarray, new: int) -> np.ndarray:
    """The `new` likeliest tokens (N, new)."""
    rng = np.random.default_rng(0)  # which nobody asks
    return np.stack(list(ml.generate(model, ids, new, rng=rng, temperature=0)), 1)


def latency(size: tuple[int, ...], job: str, kind: str) -> Callable[[], Any]:
    """A forward of N x T tokens, or TOKENS tokens of decoding."""
    model, rng = fresh(size, kind)
    *_, T, V, N = size
    if job == "forward":
        ids = rng.integers(0, V, (N, T))
        return lambda: model(ids)
    first = rng.integers(0, V, (1, 1))
    return lambda: text(model, first, TOKENS)


def decoding(size: tuple[int, ...], batch: int, library: str, cores: int) -> Callable[[], Any]:
    """A greedy continuation by this library or by transformers."""
    model, rng = fresh(size)
    ids = rng.integers(0, model.config.vocab_size, (batch, PROMPT))
    if library == "minilora":
        return lambda: text(model, ids, NEW)

    import torch

    torch.set_num_threads(cores)
    theirs = in_torch(model)
    prompt = torch.tensor(ids)
    seen = torch.ones_like(prompt)  # no token is padding

    def run() -> None:
        with torch.inference_mode():
            found = theirs.generate(
                prompt,
                attention_mask=seen,
                max_new_tokens=NEW,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        assert found.shape == (batch, PROMPT + NEW)

    return run


def contestant(cores: int, *what: Any) -> Contestant:
    """The same file once more, in the part of one contestant."""
    return Contestant([__file__, "--threads", str(cores), "--as", *map(str, what)], threads(cores))


def act(cores: int, part: str, i: str, what: str, kind: str) -> None:
    """The part: `latency i job kind` or `decoding i batch library`."""
    size = SIZES[int(i)]
    keep_memory()  # as train and generate do
    answer(latency(size, what, kind) if part == "latency" else decoding(size, int(what), kind, cores))


# ---- the race

KINDS = ("base", "base again", "merged", "fused", "unmerged")


def measure_latency(i: int, job: str, cores: int) -> dict[str, Any]:
    """One row: milliseconds of a forward or of a token, and the ratios to the base."""
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(LAUNCHES):
        runners = {kind: contestant(cores, "latency", i, job, kind) for kind in KINDS}
        for kind, t in alternate(runners, LATENCY_ROUNDS[SIZES[i][0]], cores).items():
            times[kind] += t
    unit = 1 if job == "forward" else TOKENS
    return {
        "part": "latency", "job": job, "threads": cores, "size": named(SIZES[i]),
        "ms": {kind: median(t) / unit for kind, t in times.items()},
        "to_base": {kind: ratio(t, times["base"]) for kind, t in times.items() if kind != "base"},
    }  # fmt: skip


def measure_decoding(i: int, batch: int, cores: int) -> dict[str, Any]:
    """One row: milliseconds of a continuation, tokens per second, and how many times faster ours is."""
    runners = {name: contestant(cores, "decoding", i, batch, name) for name in ("minilora", "transformers")}
    times = alternate(runners, DECODING_ROUNDS[SIZES[i][0]], cores)
    ms = {name: median(t) for name, t in times.items()}
    return {
        "part": "decoding", "batch": batch, "prompt": PROMPT, "new": NEW, "threads": cores,
        "size": named(SIZES[i]), "ms": ms,
        "tokens_per_second": {name: 1000 * batch * NEW / t for name, t in ms.items()},
        "times_faster": ratio(times["transformers"], times["minilora"]),
    }  # fmt: skip


def measure(chosen: list[int], cores: list[int]) -> list[dict[str, Any]]:
    """All rows of the chosen sizes, printed as they come."""
    rows = []
    print(f"{'D':>4} {'job':>8} {'base':>8} {'merged':>8} {'unmerged':>8}   ms   to the base: "
          f"{'again':>6} {'merged':>6} {'fused':>6} {'unmerged':>8}")  # fmt: skip
    for i in chosen:
        for job in ("forward", "token"):
            rows.append(row := measure_latency(i, job, 1))
            ms, r = row["ms"], row["to_base"]
            print(f"{row['size']['D']:4} {job:>8} {ms['base']:8.3f} {ms['merged']:8.3f} "
                  f"{ms['unmerged']:8.3f} {'':20} {r['base again']:6.3f} {r['merged']:6.3f} "
                  f"{r['fused']:6.3f} {r['unmerged']:8.3f}", flush=True)  # fmt: skip
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        print("torch and transformers are not both installed (the extra `parity`): no decoding beside them")
        return rows
    print(
        f"\n{'D':>4} {'batch':>5} {'threads':>7} {'minilora':>9} {'transformers':>12}  tokens/s  times faster"
    )
    for n in cores:
        for i in chosen:
            for batch in (1, 32):
                rows.append(row := measure_decoding(i, batch, n))
                ours, theirs = row["tokens_per_second"].values()
                print(f"{row['size']['D']:4} {batch:5} {n:7} {ours:9.0f} {theirs:12.0f} {'':9} "
                      f"{row['times_faster']:12.2f}", flush=True)  # fmt: skip
    return rows


# ---- the figure


def draw(rows: list[dict[str, Any]]) -> None:
    """results/inference.png and .svg."""
    from minilora.analysis.plotting import BLUE, GREEN, ORANGE, WINE, Picture, axes, styled

    @styled
    def picture() -> Picture:
        figure, ((left, right),) = axes(2, size=(12, 4.8))
        some = [row for row in rows if row["part"] == "latency"]
        D = sorted({row["size"]["D"] for row in some})
        places = np.arange(len(D))
        for job, shift, filled in (("forward", -0.12, True), ("token", 0.12, False)):
            of_job = {row["size"]["D"]: row["to_base"] for row in some if row["job"] == job}
            what = "N x T tokens" if filled else "one decoded token"
            for kind, colour, marker in (("unmerged", ORANGE, "^"), ("merged", BLUE, "o")):
                y = [of_job[d][kind] for d in D]
                left.plot(places + shift, y, marker, color=colour, markersize=9,
                          markerfacecolor=colour if filled else "white", markeredgewidth=1.8,
                          label=f"{kind}, {what}")  # fmt: skip
                other = [of_job[d]["merged" if kind == "unmerged" else "unmerged"] for d in D]
                for x, value, beside in zip(places + shift, y, other, strict=True):
                    below = value < beside
                    left.annotate(f"{value:.2f}", (x, value), (0, -18 if below else 8),
                                  textcoords="offset points", ha="center", fontsize=10,
                                  color=colour)  # fmt: skip
        left.set_xticks(places, [str(d) for d in D])
        left.set_ylim(bottom=0.9, top=left.get_ylim()[1] * 1.12)
        left.set_xlabel("width D")
        left.set_ylabel("latency / latency of the base")
        left.set_title("What an adapter costs at inference")
        left.legend(fontsize=10)

        some = [row for row in rows if row["part"] == "decoding" and row["threads"] == 1]
        for batch, dashes in ((32, "-"), (1, "--")):
            of_batch = {row["size"]["D"]: row for row in some if row["batch"] == batch}
            at = [i for i, d in enumerate(D) if d in of_batch]
            for name, colour, marker in (("minilora", WINE, "o"), ("transformers", GREEN, "s")):
                y = [of_batch[D[i]]["tokens_per_second"][name] for i in at]
                right.plot(at, y, marker=marker, linestyle=dashes, color=colour, markersize=8,
                           label=f"{name}, batch {batch}")  # fmt: skip
            for i in at:
                row = of_batch[D[i]]
                right.annotate(f"{row['times_faster']:.1f} x", (i, row["tokens_per_second"]["minilora"]),
                               (5, 6), textcoords="offset points", fontsize=11)  # fmt: skip
        right.set_yscale("log")
        right.set_xticks(places, [str(d) for d in D])
        right.margins(x=0.08, y=0.15)
        right.set_xlabel("width D")
        right.set_ylabel("decoded tokens per second")
        right.set_title(f"Cached decoding, {PROMPT} + {NEW} tokens, one thread")
        right.legend(fontsize=10)
        return Picture(figure, "Latency of merged and unmerged models, and tokens per second of decoding.")

    picture().save(RESULTS, "inference")


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("D", nargs="*", type=int, help="64, 128, 256, 512; all unless given")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="of the decoding contestants")
    parser.add_argument("--draw", action="store_true", help="only draw what is written")
    parser.add_argument("--as", nargs=4, dest="part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        act(args.threads[0], *args.part)
        return
    if not args.draw:
        chosen = [i for i, size in enumerate(SIZES) if not args.D or size[0] in args.D]
        rows = measure(chosen, args.threads)
        if len(chosen) < len(SIZES):
            return
        write("inference", rows)
    draw(json.loads((RESULTS / "inference.json").read_text())["rows"])


if __name__ == "__main__":
    sys.exit(main())
