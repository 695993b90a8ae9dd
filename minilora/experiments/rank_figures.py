"""The figures of a rank sweep: losses with their range over seeds, and spectra beside those of noise."""

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np

from ..analysis import plotting
from ..analysis.plotting import (
    BLUE,
    GOLD,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    WINE,
    Axes,
    Picture,
    axes,
    few,
    shades,
    styled,
)
from ..spectra import energy, noise_spectrum, rank_at
from ..table import drawn
from .harness import Row
from .rank_reading import (
    adapted,
    answer,
    by_rank,
    final,
    flattening,
    kinds,
    mean_curve,
    mean_rank,
    mean_spectrum,
    noise_ranks,
    over_seeds,
    ranks_of,
    select,
    shape_of,
    spectra_of,
    targets,
    title,
    used,
)

NATS = "nats per character"
POWERS = (1, 2, 4, 8, 16, 32, 64)
FULL: dict[str, Any] = {"color": ORANGE, "linestyle": "--", "linewidth": 2}  # how full fine-tuning is drawn


def band(
    ax: Axes, x: Sequence[float], y: np.ndarray, label: str, colour: str, marker: str, line: str = "-"
) -> None:
    """A mean line with the range over seeds behind it."""
    ax.fill_between(x, y[:, 1], y[:, 2], color=colour, alpha=0.2, linewidth=0)
    ax.plot(x, y[:, 0], color=colour, marker=marker, linestyle=line, label=label, markersize=5)


def curve(ax: Axes, y: np.ndarray, **look: Any) -> None:
    """Values against 1, 2, ..."""
    ax.plot(np.arange(1, len(y) + 1), y, **look)


def log_axis(ax: Axes, ticks: Sequence[int], label: str = "rank r") -> None:
    """A log2 axis of x with a labelled tick at each of these numbers."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, list(map(str, ticks)))
    ax.minorticks_off()
    ax.set_xlabel(label)


def level(ax: Axes, y: float, text: str, colour: str, line: str, above: bool = True) -> None:
    """A horizontal line with its label on it."""
    ax.axhline(y, color=colour, linestyle=line, linewidth=1.5)
    offset = (-2, 3) if above else (-2, -3)
    ax.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=offset, textcoords="offset points",
        ha="right", va="bottom" if above else "top", color=colour, fontsize=10,
    )  # fmt: skip


def asked(figure: plotting.Figure, question: str, answer: str) -> None:
    """The question as the title of a figure, and below it the answer."""
    figure.suptitle(f"{question}\n{answer}", fontsize=12)


@styled
def loss_against_rank(rows: Sequence[Row], target: str) -> Picture:
    """(a) Test loss against rank, with the frozen base and full fine-tuning as lines."""
    lora, full, base = (final(rows, target, m) for m in ("lora", "full", "none"))
    figure, ((ax,),) = axes(size=(8.0, 5.0))
    ranks, y = by_rank(lora, "test")
    _, f = by_rank(full, "test")
    level(ax, base[0]["test"], "frozen base", GREY, ":", above=False)
    level(ax, f[0, 0], "full fine-tuning (all weights)", ORANGE, "--", above=y[-1, 0] < f[0, 0])
    ax.axhspan(f[0, 1], f[0, 2], color=ORANGE, alpha=0.2, linewidth=0)
    band(ax, ranks, y, f"LoRA on {adapted(lora)}\n({over_seeds(lora)})", BLUE, "o")
    log_axis(ax, ranks)
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.06 * (high - low), high)  # room for a label below the lowest line
    ax.set_ylabel(f"test loss ({NATS})")
    ax.legend(loc="center right")
    asked(figure, f"Which rank is enough? {drawn(title(target))}", answer(rows, target))
    says = (
        f"Test loss on {title(target)}: {base[0]['test']:.3f} nats for the frozen base, "
        + ", ".join(f"{v[0]:.3f} at rank {r}" for r, v in zip(ranks, y, strict=True))
        + f", {f[0, 0]:.3f} for full fine-tuning. LoRA adapts {adapted(lora)}."
    )
    return Picture(figure, says)


@styled
def gap_against_parameters(rows: Sequence[Row]) -> Picture:
    """(b) The share of the gap from base to full fine-tuning that LoRA closes, against trained parameters."""
    figure, ((ax,),) = axes(size=(8.0, 5.2))
    says: list[str] = []
    best: dict[str, float] = {}
    colours = cycle((BLUE, GREEN, PINK, SKY, GOLD, WINE))
    for target, colour, marker in zip(targets(rows), colours, cycle("osD^vPX"), strict=False):
        lora = [row for row in final(rows, target) if row.get("gap_closed") is not None]
        if not lora:
            says.append(f"{title(target)}: full fine-tuning is no better than the base")
            continue
        ranks, y = by_rank(lora, "gap_closed")
        _, p = by_rank(lora, "parameters")
        how = f"LoRA on {adapted(lora)}, r = {ranks[0]} to {ranks[-1]}" if ranks[1:] else f"r = {ranks[0]}"
        band(ax, p[:, 0].tolist(), 100 * y, f"{drawn(title(target))}\n({how})", colour, marker)
        best[title(target)] = float(y[:, 0].max())
        says.append(
            f"{title(target)}: {y[0, 0]:.0%} at {p[0, 0]:,.0f} parameters, {y[-1, 0]:.0%} at {p[-1, 0]:,.0f}"
        )
    whole = final(rows, targets(rows)[0], "full")[0]["parameters"]
    ax.axhline(100, color=ORANGE, linestyle="--", linewidth=1.5)
    label = f"full fine-tuning\n({whole:,} parameters)"
    ax.plot(whole, 100, color=ORANGE, marker="*", markersize=14, linestyle="none", label=label)
    ax.set(xscale="log", xlabel="trained parameters", ylabel="gap to full fine-tuning closed (%)")
    ax.margins(0.12)
    reached = "; ".join(f"{drawn(name)} {share:.0%}" for name, share in best.items())
    if len(best) > 2:
        reached = f"{min(best.values()):.0%} to {max(best.values()):.0%}"
    asked(figure, "How much of what full fine-tuning gains does LoRA reach?", f"at its best rank: {reached}")
    plotting.name_lines(ax)
    return Picture(figure, f"Gap closed against trained parameters. {'; '.join(says)}; full: {whole:,}.")


@styled
def spectra(rows: Sequence[Row], target: str) -> Picture:
    """(c) Singular values of ΔW for each kind of module and a few ranks, with full fine-tuning and noise."""
    lora, full = final(rows, target), final(rows, target, "full")
    ranks = few(ranks_of(lora))
    panels = kinds(lora)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = axes(columns, lines, (max(3.1 * columns, 8), max(3.1 * lines, 4.6)))
    shown = list(grid.flat[: len(panels)])
    for ax, kind in zip(shown, panels, strict=True):
        s = mean_spectrum(full, kind)
        noise = math.sqrt((s * s).sum()) * noise_spectrum(shape_of(kind, full), np.random.default_rng(0))
        curve(ax, s, **FULL, label="full")
        curve(ax, noise, color=GREY, linestyle=":", linewidth=2, label="noise")
        for r, colour in shades(ranks).items():
            v = mean_spectrum(select(lora, rank=r), kind)
            curve(ax, v, color=colour, marker="o" if r <= 8 else "", markersize=5, linewidth=2.5,
                  label=f"r = {r}")  # fmt: skip
        ax.set_yscale("log")
        log_axis(ax, [t for t in (1, 4, 16, 64) if t <= len(s)], "index")
        ax.set_title(drawn(kind), fontsize=12)
    low = min(ax.get_ylim()[0] for ax in shown)
    top = max(ax.get_ylim()[1] for ax in shown)
    for ax in shown:
        ax.set_ylim(max(low, top * 1e-4), top)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    for ax in grid[:, 0]:
        ax.set_ylabel("singular value of ΔW")
    high, every = (
        f"{np.mean([rank_at(v, 0.9) for v in spectra_of(some, panels)]):.0f}"
        for some in (select(lora, rank=ranks[-1]), full)
    )
    answer = f"90% of |ΔW|² lies in the first {high} with r = {ranks[-1]}, in {every} with full fine-tuning"
    asked(figure, f"How do the singular values of ΔW fall? {drawn(title(target))}", answer)
    plotting.name_lines(*shown)
    tops = ", ".join(f"{k} {mean_spectrum(select(lora, rank=ranks[-1]), k)[0]:.2g}" for k in panels)
    says = f"Singular values of ΔW on {title(target)}; the largest at rank {ranks[-1]}: {tops}."
    return Picture(figure, says)


@styled
def energy_and_effective_rank(rows: Sequence[Row], target: str) -> Picture:
    """(d) Cumulative energy of the spectra, and effective rank against r with its noise baseline."""
    lora, full = final(rows, target), final(rows, target, "full")
    ranks, there = ranks_of(lora), kinds(lora)
    figure, ((left, right),) = axes(2, 1, (11, 5))

    def percent(some: Sequence[Row]) -> np.ndarray:
        shares = [energy(s) for s in spectra_of(some, there)]
        return 100 * np.array([share[: min(map(len, shares))] for share in shares]).mean(0)

    curve(left, percent(full), **FULL, label="full fine-tuning")
    for r, colour in shades(few(ranks)).items():
        y = percent(select(lora, rank=r))
        curve(left, y, color=colour, marker="o" if r <= 8 else "", markersize=5, linewidth=2.5,
              label=f"r = {r}")  # fmt: skip
    left.axhline(90, color=GREY, linestyle=":", linewidth=1)
    log_axis(left, POWERS, "number of singular values k")
    left.set_ylabel("energy: share of |ΔW|² in the first k (%)")

    _, y = by_rank([{"config": row["config"], "effective": mean_rank([row], there)} for row in lora],
                   "effective")  # fmt: skip
    band(right, ranks, y, "LoRA", BLUE, "o")
    noise = noise_ranks(lora)
    right.plot(ranks, noise, color=GREY, linestyle=":", marker="x", label="noise")
    right.plot(ranks, ranks, color="black", linewidth=0.8, label="r itself")
    f = mean_rank(full, there)
    right.axhline(f, **FULL, label="full fine-tuning")
    log_axis(right, ranks)
    right.set_yscale("log", base=2)
    right.set_yticks(POWERS, list(map(str, POWERS)))
    right.minorticks_off()
    right.set_ylim(0.9, 1.4 * max(f, *ranks))
    right.margins(x=0.14)  # room for the names
    right.set_ylabel("effective rank of ΔW")
    asked(figure, f"How many directions does ΔW use? {drawn(title(target))}", used(rows, target))
    plotting.name_lines(left, right)
    most = np.mean([rank_at(s, 0.9) for s in spectra_of(select(lora, rank=ranks[-1]), there)])
    says = (
        f"Effective rank of ΔW on {title(target)}: "
        + ", ".join(f"{v[0]:.1f} at r = {r} (noise {n:.1f})" for r, v, n in zip(ranks, y, noise, strict=True))
        + f"; {f:.1f} for full fine-tuning. "
        + f"At r = {ranks[-1]}, 90 % of the energy lies in {most:.0f} directions."
    )
    return Picture(figure, says)


@styled
def known_rank(rows: Sequence[Row], target: str) -> Picture:
    """(e) Excess loss against rank, with the truncated true answer, and the spectrum of the learned ΔE."""
    lora, base = final(rows, target), final(rows, target, "none")[0]
    oracle = select(rows, kind="oracle", target=target)
    floor, truth = base["floor"], np.array(base["spectra"]["model.embed_tokens"])
    k = int((truth > 1e-6 * truth[0]).sum())
    figure, ((left, right),) = axes(2, 1, (11, 5))
    ranks, y = by_rank(lora, "test")
    rs, o = by_rank(oracle, "test")
    cut = "true ΔE, cut to rank r"
    left.plot(rs, o[:, 0] - floor, color=ORANGE, linestyle="--", marker="s", markersize=5, label=cut)
    band(left, ranks, y - floor, "LoRA", BLUE, "o")
    left.axvline(k, color=GREY, linestyle=":", label=f"{k} swaps")
    left.axhline(0, color=GREY, linewidth=0.8)
    log_axis(left, ranks)
    left.set_ylabel(f"loss above what is possible\n({NATS})")
    shown = min((r for r in ranks if r >= 2 * k), default=ranks[-1])
    s = np.array([row["spectra"]["model.embed_tokens"] for row in select(lora, rank=shown)])
    mean = s.mean(0)
    curve(right, truth[:k], color=ORANGE, marker="_", markersize=22, markeredgewidth=2.5, linestyle="none",
          label="true ΔE")  # fmt: skip
    learned = np.stack([mean, s.min(0), s.max(0)], 1)
    band(right, range(1, len(mean) + 1), learned, f"LoRA, r = {shown}", BLUE, "o")
    right.axvline(k + 0.5, color=GREY, linestyle=":")
    right.set_xticks(range(1, max(k, len(mean)) + 1))
    right.set_ylim(bottom=0)
    right.set(xlabel="index", ylabel="singular value of ΔE")
    excess = dict(zip(ranks, y[:, 0] - floor, strict=True))
    near = [r for r in (max((r for r in ranks if r < k), default=0), k) if r in excess]
    found = ", ".join(f"r = {r} leaves {excess[r]:.2f} nats" for r in near) or f"{k} swaps were not tried"
    question = f"Is the rank of a task the rank that LoRA needs? {drawn(title(target))}"
    asked(figure, question, f"{found} ({over_seeds(lora)})")
    plotting.name_lines(left, right)
    gap = f"; at r = {shown} the singular values are {', '.join(f'{x:.2f}' for x in mean)}"
    parts = ", ".join(f"{x:.3f} at rank {r}" for r, x in excess.items())
    return Picture(figure, f"Excess loss over the known floor: {parts}{gap}.")


@styled
def learning_curves(rows: Sequence[Row], target: str) -> Picture:
    """Validation loss against step, to see whether full fine-tuning has flattened."""
    lora, full = final(rows, target), final(rows, target, "full")
    figure, ((ax,),) = axes(size=(8.0, 5.0))
    lows = []
    for r, colour in shades(few(ranks_of(lora))).items():
        steps, losses = mean_curve(select(lora, rank=r))
        ax.plot(steps, losses, color=colour, marker="o", markersize=4, linewidth=2, label=f"r = {r}")
        lows.append(losses.min())
    steps, losses = mean_curve(full)
    ax.plot(steps, losses, **FULL, label="full fine-tuning")
    ax.set_ylim(min(losses.min(), *lows) - 0.02, losses[0] + 0.02)
    ax.set(xlabel="step", ylabel=f"validation loss ({NATS})")
    late = flattening(full).partition("; ")[2]
    asked(figure, f"Has full fine-tuning flattened? {drawn(title(target))}", late)
    plotting.name_lines(ax)
    return Picture(figure, f"Validation loss of full fine-tuning on {title(target)}: {flattening(full)}.")


@styled
def merge_equivalence(rows: Sequence[Row]) -> Picture:
    """(f) The largest difference between merged and unmerged outputs, beside the derived bound."""
    figure, ((ax,),) = axes(size=(8.0, 5.0))
    for dtype, colour, marker, dashes in (("float32", BLUE, "o", "--"), ("float64", GREEN, "s", ":")):
        some = [row for row in rows if row["dtype"] == dtype]
        n = [row["inputs"] for row in some]
        ax.plot(n, [row["bound"] for row in some], color=colour, linestyle=dashes, label=f"bound, {dtype}")
        ax.plot(n, [row["difference"] for row in some], color=colour, marker=marker, linestyle="none",
                markersize=6, label=f"observed, {dtype}")  # fmt: skip
    ax.set_yscale("log")
    log_axis(ax, sorted({row["inputs"] for row in rows}), "input width I")
    ax.set_ylabel("|merged - unmerged|, relative to |y|")
    worst = max(row["ratio"] for row in rows)
    asked(figure, "Does merging change the output?", f"at most by {worst:.3f} of what rounding allows")
    plotting.name_lines(ax)
    return Picture(figure, f"Merged and unmerged outputs differ by at most {worst:.3f} of the derived bound.")
