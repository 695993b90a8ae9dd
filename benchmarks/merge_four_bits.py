"""Merging an adapter into a 4-bit base: which part of ΔW survives, and what the loss is then.

    python benchmarks/merge_four_bits.py           trains, writes results/merge_four_bits.json and draws it
    python benchmarks/merge_four_bits.py --draw    only draws from it

The shipped base learns the spelling of the First Folio, r = 8 on all linear maps, as in `minilora sweep`, in
three ways: LoRA beside the float base W; QLoRA beside its NF4 base Ŵ; and QLoRA that starts at the residual
of quantization, s B A = the best rank-8 part of W - Ŵ (LoftQ, Li et al. 2023, one round of it). Each is then
run unmerged, and merged by each route:

    W + ΔW        into the float base: what was lost by quantizing W comes back, but ΔW was made beside Ŵ
    Ŵ + ΔW        into the decoded base, in float32: the function that QLoRA trained, and 8 times the memory
    Q(W + ΔW)     the first, quantized
    Q(Ŵ + ΔW)     the second, quantized again

The part of ΔW that survives is its component in W' - W0, where W' is the merged weight and W0 the one that
ΔW was added to: kept = <W' - W0, ΔW> / |ΔW|², and noise = |W' - W0 - ΔW| / |ΔW|, over all maps together. To
see how both depend on the size of ΔW, QLoRA's is also merged after scaling it down.
"""

import argparse
import copy
import json
import sys
from statistics import mean
from typing import Any

import numpy as np
from common import RESULTS, write

import minilora as ml
from minilora.compose.truncate import split
from minilora.experiments.rank_sweep import TEXT
from minilora.experiments.recipe import LENGTH
from minilora.layers import Param
from minilora.lora import active, bases
from minilora.table import Table
from minilora.targets import find_targets
from minilora.tree import get

SEEDS, RANK, RATE = 3, 8, 1e-2  # the rate that the sweep chose for r = 8
ROUTES = ("W + ΔW", "Ŵ + ΔW", "Q(W + ΔW)", "Q(Ŵ + ΔW)")
WAYS = ("LoRA", "QLoRA", "QLoRA, residual start")
BLOCK = 64
SHRUNK = (1.0, 0.5, 0.25, 0.1, 0.05, 0.025, 0.01)  # factors of ΔW


def weights(model: Any) -> dict[str, np.ndarray]:
    """Path -> W in float64 of every map that is quantized."""
    layers = bases(model)
    paths = find_targets(layers, "all-linear")
    return {path: layers[path].weight.dense().astype(np.float64) for path in paths}


def start_at_residual(model: Any, base: Any) -> None:
    """s B A = the best rank-r part of W - Ŵ: the one line in which LoftQ's start differs."""
    for path, adapter in active(model).items():
        pair = adapter.low_rank
        residual = get(base, path).weight.dense() - get(model, path).base.weight.dense()
        U, S, Vt = np.linalg.svd(residual, full_matrices=False)
        B, pair.A.data = split(U, S, Vt, RANK)
        pair.B.data = B / np.float32(pair.scale)


def trained(way: str, seed: int, base: Any, text: Any) -> Any:
    """The adapted model after training."""
    model = copy.deepcopy(base)
    if way != "LoRA":
        ml.quantize(model, block=BLOCK)
    ml.inject(model, ml.LoraConfig(r=RANK, alpha=TEXT.alpha), rng=np.random.default_rng([seed, RANK]))
    if way == WAYS[2]:
        start_at_residual(model, base)
    batches = ml.batches(text.train, np.random.default_rng([seed, 0]), TEXT.batch, LENGTH)
    ml.train(model, batches, ml.AdamW(RATE, betas=(0.9, 0.99)), steps=TEXT.steps,
             schedule=ml.Schedule(TEXT.steps, warmup=TEXT.steps // 20), threads=1)  # fmt: skip
    return model


def changes(model: Any) -> dict[str, np.ndarray]:
    """Path -> ΔW in float64."""
    pairs = {path: adapter.low_rank for path, adapter in active(model).items()}
    return {path: (pair.scale * pair.B.data.astype(np.float64)) @ pair.A.data for path, pair in pairs.items()}


def merged(route: str, base: Any, four: Any, deltas: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
    """The merged model, and what became of ΔW."""
    start = four if "Ŵ" in route else base
    old, model = weights(start), copy.deepcopy(start)
    for path, change in deltas.items():
        bases(model)[path].weight = Param((old[path] + change).astype(np.float32), False)
    if route[0] == "Q":
        ml.quantize(model, block=BLOCK)
    kept = noise = size = whole = 0.0
    for path, W in weights(model).items():
        move, change = W - old[path], deltas[path]
        kept, noise = kept + np.vdot(move, change), noise + ((move - change) ** 2).sum()
        size, whole = size + (change**2).sum(), whole + (old[path] ** 2).sum()
    shares = {"size": size / whole, "noise": noise / size}
    return model, {"kept": float(kept / size)} | {name: float(x**0.5) for name, x in shares.items()}


def measured(way: str, seed: int, base: Any, four: Any, text: Any, held: Any) -> list[dict[str, Any]]:
    """A row unmerged, and one for each route."""
    model = trained(way, seed, base, text)
    print(way, seed, flush=True)
    rows = [{"way": way, "seed": seed, "route": "unmerged", "test": ml.evaluate(model, held)}]
    deltas = changes(model)
    for route in ROUTES:
        plain, became = merged(route, base, four, deltas)
        rows.append({"way": way, "seed": seed, "route": route, "test": ml.evaluate(plain, held)} | became)
    return rows


def scaled(seed: int, base: Any, four: Any, text: Any) -> list[dict[str, Any]]:
    """What becomes of t ΔW, the ΔW of QLoRA scaled down: a row for each t and route that quantizes."""
    deltas = changes(trained("QLoRA", seed, base, text))
    rows = []
    for t in SHRUNK:
        for route in ROUTES[2:]:
            _, became = merged(route, base, four, {path: t * change for path, change in deltas.items()})
            rows.append({"way": "scaled", "seed": seed, "route": route, "t": t} | became)
    return rows


def measure() -> list[dict[str, Any]]:
    """All rows: the two bases without an adapter, then every way, seed and route."""
    text = ml.corpus("folio")
    held = ml.eval_batches(text.test, 16, LENGTH, limit=512 * LENGTH)
    base = ml.load("base")
    four = copy.deepcopy(base)
    report = ml.quantize(four, block=BLOCK)
    rows = [{"way": "base", "route": "W", "test": ml.evaluate(base, held)},
            {"way": "base", "route": "Ŵ", "test": ml.evaluate(four, held), "error": report.error},
    ]  # fmt: skip
    for seed in range(SEEDS):
        for way in WAYS:
            rows += measured(way, seed, base, four, text, held)
        rows += scaled(seed, base, four, text)
    return rows


def of(rows: list[dict[str, Any]], way: str, route: str, what: str) -> list[float]:
    """One number of every seed."""
    return [row[what] for row in rows if (row["way"], row["route"]) == (way, route)]


def spread(values: list[float], form: str = ".4f") -> str:
    """Mean, and the range over seeds."""
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: mean and range over seeds."""
    lines = []
    for way in WAYS:
        lines.append((way, "unmerged", spread(of(rows, way, "unmerged", "test")), "", ""))
        for route in ROUTES:
            kept, noise = (spread(of(rows, way, route, what), ".2f") for what in ("kept", "noise"))
            lines.append((way, route, spread(of(rows, way, route, "test")), kept, noise))
    return Table(("trained", "merged", "test loss", "kept of ΔW", "noise / ΔW"), lines).markdown("llrrr")


def shares(rows: list[dict[str, Any]], route: str, t: float) -> tuple[float, float, float]:
    """|t ΔW| / |W|, and kept and noise of t ΔW, means over seeds."""
    some = [row for row in rows if (row["way"], row["route"], row.get("t")) == ("scaled", route, t)]
    size, kept, noise = (mean(row[what] for row in some) for what in ("size", "kept", "noise"))
    return size, kept, noise


def said(rows: list[dict[str, Any]]) -> list[str]:
    """What the page says of the bases and of small changes."""
    (plain,), (four,) = (of(rows, "base", W, "test") for W in ("W", "Ŵ"))
    (size, again, _), (_, once, noise) = (shares(rows, route, SHRUNK[-1]) for route in ROUTES[:1:-1])
    return [
        f"the base alone has {plain:.4f}, and {four:.4f} in NF4",
        f"with a norm of {size:.1e} of W's, Q(Ŵ + ΔW) keeps {again:.2f} of it; Q(W + ΔW) keeps {once:.2f}, "
        f"under noise {noise:.0f} times as large as ΔW",
    ]


def draw(rows: list[dict[str, Any]]) -> None:
    """results/merge_four_bits.png and .svg."""
    from minilora.analysis.plotting import BLUE, GOLD, GREEN, GREY, ORANGE, WINE, Picture, axes, styled

    @styled
    def picture() -> Picture:
        figure, ((left, right),) = axes(2, size=(12, 4.6))
        routes = ("unmerged", *ROUTES)
        looks = dict(zip(WAYS, ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^")), strict=True))
        for i, (way, (colour, marker)) in enumerate(looks.items()):
            values = [of(rows, way, route, "test") for route in routes]
            middle = [mean(v) for v in values]
            ends = [
                [m - min(v) for m, v in zip(middle, values, strict=True)],
                [max(v) - m for m, v in zip(middle, values, strict=True)],
            ]
            at = [j + 0.2 * (i - 1) for j in range(len(routes))]
            how = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 3, "label": way}
            left.errorbar(at, middle, ends, **how)
        (four,), (plain,) = (of(rows, "base", W, "test") for W in ("Ŵ", "W"))
        left.set_ylabel("test loss (nats per character)")
        left.set_title(f"Bases without an adapter: W {plain:.3f}, Ŵ {four:.3f}", fontsize=11)
        left.legend(fontsize=9)
        left.set_xticks(range(len(routes)), routes, va="baseline")
        left.tick_params(axis="x", pad=14)  # from the axis to the baseline, the same with and without a hat
        left.set_xlabel("route of merging (Q: quantized to NF4)")
        for route, colour, marker in ((ROUTES[2], WINE, "D"), (ROUTES[3], GOLD, "v")):
            sizes, kept, _ = zip(*(shares(rows, route, t) for t in SHRUNK), strict=True)
            right.plot(sizes, kept, color=colour, marker=marker, label=route)
        right.axhline(1, color=GREY, linewidth=1)
        right.set_xscale("log")
        right.set_ylim(0, 1.1)
        right.set_xlabel("|ΔW| / |W|, QLoRA's ΔW made smaller")
        right.set_ylabel("share of ΔW that survives")
        right.set_title("The merged change along ΔW, over |ΔW|; all maps together", fontsize=11)
        right.legend(loc="center left")
        last = {route: shares(rows, route, SHRUNK[-1])[1] for route in ROUTES[2:]}
        says = ", ".join(f"of {route} {share:.2f}" for route, share in last.items())
        return Picture(
            figure,
            "Test loss of three trainings by route of merging; and the share of ΔW that survives, against "
            f"its size: at a hundredth of QLoRA's ΔW {says}.",
        )

    picture().save(RESULTS, "merge_four_bits")


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="only draw what is written")
    if not parser.parse_args().draw:
        write("merge_four_bits", measure())
    rows = json.loads((RESULTS / "merge_four_bits.json").read_text())["rows"]
    print(table(rows), *said(rows), sep="\n")
    draw(rows)


if __name__ == "__main__":
    sys.exit(main())
