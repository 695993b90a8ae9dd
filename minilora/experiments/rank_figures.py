"""The figures of a rank sweep: losses with their range over seeds, and spectra beside those of noise."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, KINDS, ORANGE, PINK, Axes, Picture, axes, shades, styled
from ..data.corpora import swaps_of
from ..errors import InputError
from ..spectra import effective_rank, energy, noise_spectrum, rank_at
from ..table import counted, drawn
from .harness import Row

NATS = "nats per character"
POWERS = (1, 2, 4, 8, 16, 32, 64)
FULL: dict[str, Any] = {"color": ORANGE, "linestyle": "--", "linewidth": 2}  # how full fine-tuning is drawn
NAMES = {
    "folio": "First Folio",
    "kjv": "King James Bible",
    "code": "Python code",
    "shakespeare": "modern Shakespeare",
    "reversed": "reversed text",
}


def select(rows: Sequence[Row], **config: Any) -> list[Row]:
    """The finished rows whose config has these values."""
    return [row for row in rows if row["status"] == "done" and config.items() <= row["config"].items()]


def final(rows: Sequence[Row], target: str, method: str = "lora") -> list[Row]:
    """The measured runs of one method on one target; InputError if there is none."""
    runs = select(rows, kind="base" if method == "none" else "final", target=target, method=method)
    if not runs:
        raise InputError(f"no finished run of {method!r} on {target!r} among {len(rows)} rows")
    return runs


def ranks_of(rows: Sequence[Row]) -> list[int]:
    """The ranks in the rows, in order."""
    return sorted({row["config"]["rank"] for row in rows})


def by_rank(rows: Sequence[Row], key: str) -> tuple[list[int], np.ndarray]:
    """The ranks, and for each the (mean, least, greatest) of a value over the seeds: (ranks, 3)."""
    ranks = ranks_of(rows)
    values = [[row[key] for row in rows if row["config"]["rank"] == r] for r in ranks]
    return ranks, np.array([(math.fsum(v) / len(v), min(v), max(v)) for v in values]).reshape(-1, 3)


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


def title(target: str) -> str:
    """A target as a heading."""
    if swaps := swaps_of(target):
        return f"letter permutation, {swaps} swaps"
    return NAMES.get(target, Path(target).name or target)


def seeds(rows: Sequence[Row]) -> str:
    """How many seeds the rows hold, in words."""
    return counted(len({row["config"]["seed"] for row in rows}), "seed", "seeds")


@styled
def loss_against_rank(rows: Sequence[Row], target: str) -> Picture:
    """(a) Test loss against rank, with the frozen base and full fine-tuning as lines."""
    lora, full, base = (final(rows, target, m) for m in ("lora", "full", "none"))
    figure, ((ax,),) = axes()
    ranks, y = by_rank(lora, "test")
    _, f = by_rank(full, "test")
    level(ax, base[0]["test"], "frozen base", GREY, ":", above=False)
    level(ax, f[0, 0], "full fine-tuning", ORANGE, "--", above=False)
    ax.axhspan(f[0, 1], f[0, 2], color=ORANGE, alpha=0.2, linewidth=0)
    band(ax, ranks, y, f"LoRA, mean and range of {seeds(lora)}", BLUE, "o")
    log_axis(ax, ranks)
    ax.set(ylabel=f"test loss ({NATS})", title=drawn(title(target)))
    ax.legend(loc="center right")
    says = (
        f"Test loss on {title(target)}: {base[0]['test']:.3f} nats for the frozen base, "
        + ", ".join(f"{v[0]:.3f} at rank {r}" for r, v in zip(ranks, y, strict=True))
        + f", {f[0, 0]:.3f} for full fine-tuning."
    )
    return Picture(figure, says)


@styled
def gap_against_parameters(rows: Sequence[Row]) -> Picture:
    """(b) The share of the gap from base to full fine-tuning that LoRA closes, against trained parameters."""
    figure, ((ax,),) = axes()
    says = []
    looks = zip(cycle((BLUE, GREEN, PINK, ORANGE)), cycle("osD^vPX"), strict=False)
    for target, (colour, marker) in zip(targets(rows), looks, strict=False):
        lora = [row for row in final(rows, target) if row.get("gap_closed") is not None]
        if not lora:
            says.append(f"{title(target)}: full fine-tuning is no better than the base")
            continue
        ranks, y = by_rank(lora, "gap_closed")
        _, p = by_rank(lora, "parameters")
        band(ax, p[:, 0].tolist(), 100 * y, drawn(title(target)), colour, marker)
        for i, at in ((0, (6, -14)), (-1, (-10, -16))):
            ax.annotate(f"r = {ranks[i]}", (p[i, 0], 100 * y[i, 0]), xytext=at, textcoords="offset points")
        says.append(
            f"{title(target)}: {y[0, 0]:.0%} at {p[0, 0]:,.0f} parameters, {y[-1, 0]:.0%} at {p[-1, 0]:,.0f}"
        )
    whole = final(rows, targets(rows)[0], "full")[0]["parameters"]
    ax.axhline(100, color=ORANGE, linestyle="--", linewidth=1.5)
    ax.plot(whole, 100, color=ORANGE, marker="*", markersize=12, linestyle="none", label="full fine-tuning")
    ax.set(xscale="log", xlabel="trained parameters", ylabel="gap to full fine-tuning closed (%)")
    ax.legend(loc="lower right")
    return Picture(figure, f"Gap closed against trained parameters. {'; '.join(says)}; full: {whole:,}.")


def targets(rows: Sequence[Row]) -> list[str]:
    """The targets that have finished runs of the base, LoRA and full fine-tuning, in order."""
    names = dict.fromkeys(row["config"]["target"] for row in select(rows, kind="final", method="full"))
    others = ({"kind": "base"}, {"kind": "final", "method": "lora"})
    return [name for name in names if all(select(rows, target=name, **other) for other in others)]


def mean_spectrum(rows: Sequence[Row], kind: str) -> np.ndarray:
    """The mean over rows and layers of the spectra of one kind of module."""
    values = [s for row in rows for path, s in row["spectra"].items() if path.rpartition(".")[2] == kind]
    return np.array(values).mean(0) if values else np.zeros(0)


def kinds(rows: Sequence[Row]) -> list[str]:
    """The kinds of adapted modules in the rows."""
    ends = {path.rpartition(".")[2] for row in rows for path in row["spectra"]}
    usual = [kind for kind in (*KINDS, "embed_tokens") if kind in ends]
    return usual + sorted(ends - {*usual})


@styled
def spectra(rows: Sequence[Row], target: str) -> Picture:
    """(c) Singular values of ΔW for each kind of module and rank, with full fine-tuning and noise."""
    lora, full = final(rows, target), final(rows, target, "full")
    ranks = ranks_of(lora)
    panels = kinds(lora)
    columns = min(4, len(panels) + 1)
    lines = -(-(len(panels) + 1) // columns)
    figure, grid = axes(columns, lines, (max(3.0 * columns, 8), max(2.7 * lines, 3.5)))
    used, empty = grid.flat[: len(panels)], grid.flat[len(panels) :]
    for ax, kind in zip(used, panels, strict=True):
        s = mean_spectrum(full, kind)
        noise = math.sqrt((s * s).sum()) * noise_spectrum(shape_of(kind, full), np.random.default_rng(0))
        curve(ax, s, **FULL, label="full fine-tuning")
        curve(ax, noise, color=GREY, linestyle=":", linewidth=1.5, label="noise of that norm")
        for r, colour in shades(ranks).items():
            v = mean_spectrum(select(lora, rank=r), kind)
            curve(ax, v, color=colour, marker=".", markersize=4, linewidth=1, label=f"r = {r}")
        ax.set_yscale("log")
        log_axis(ax, [t for t in (1, 4, 16, 64) if t <= len(s)], "index")
        ax.set_title(drawn(kind), fontsize=11)
    low = min(ax.get_ylim()[0] for ax in used)
    high = max(ax.get_ylim()[1] for ax in used)
    for ax in used:
        ax.set_ylim(max(low, high * 1e-4), high)
    for ax in empty:
        ax.set_axis_off()
    for ax in grid[:, 0]:
        ax.set_ylabel("singular value of ΔW")
    handles, labels = used[0].get_legend_handles_labels()
    empty[0].legend(handles, labels, loc="center", fontsize=9, ncols=2 if len(labels) > 7 else 1)
    heading = f"{drawn(title(target))}: spectra of ΔW (mean over layers and {seeds(lora)})"
    figure.suptitle(heading, fontsize=12)
    tops = ", ".join(f"{k} {mean_spectrum(select(lora, rank=ranks[-1]), k)[0]:.2g}" for k in panels)
    says = f"Singular values of ΔW on {title(target)}; the largest at rank {ranks[-1]}: {tops}."
    return Picture(figure, says)


def shape_of(kind: str, rows: Sequence[Row]) -> tuple[int, int]:
    """The shape (O, I) of one kind of module."""
    shapes = (item for row in rows for item in row["shapes"].items())
    m, n = next(shape for path, shape in shapes if path.rpartition(".")[2] == kind)
    return m, n


@styled
def energy_and_effective_rank(rows: Sequence[Row], target: str) -> Picture:
    """(d) Cumulative energy of the spectra, and effective rank against r with its noise baseline."""
    lora, full = final(rows, target), final(rows, target, "full")
    ranks = ranks_of(lora)
    adapted = kinds(lora)
    figure, ((left, right),) = axes(2, 1, (10, 4))

    def spectra_of(some: Sequence[Row]) -> list[np.ndarray]:
        items = [item for row in some for item in row["spectra"].items()]
        return [np.array(s) for path, s in items if path.rpartition(".")[2] in adapted]

    def percent(some: Sequence[Row]) -> np.ndarray:
        shares = [energy(s) for s in spectra_of(some)]
        return 100 * np.array([share[: min(map(len, shares))] for share in shares]).mean(0)

    def mean_rank(some: Sequence[Row]) -> float:
        return float(np.mean([effective_rank(s) for s in spectra_of(some)]))

    curve(left, percent(full), **FULL, label="full")
    for r, colour in shades(ranks).items():
        curve(left, percent(select(lora, rank=r)), color=colour, marker=".", linewidth=1, label=f"r = {r}")
    left.axhline(90, color=GREY, linestyle=":", linewidth=1)
    log_axis(left, POWERS, "number of singular values k")
    left.set_ylabel("energy in the first k (%)")
    left.legend(fontsize=9, ncols=2, loc="lower right")

    _, y = by_rank([{"config": row["config"], "effective": mean_rank([row])} for row in lora], "effective")
    band(right, ranks, y, "LoRA", BLUE, "o")
    rng = np.random.default_rng(0)
    shapes = [shape_of(kind, lora) for kind in adapted]
    noise = [
        float(np.mean([effective_rank(noise_spectrum(shape, rng, rank=r, draws=4)) for shape in shapes]))
        for r in ranks
    ]
    right.plot(ranks, noise, color=GREY, linestyle=":", marker="x", label="product of two noise factors")
    right.plot(ranks, ranks, color=GREY, linewidth=0.8, label="r itself")
    f = mean_rank(full)
    level(right, f, "full fine-tuning", ORANGE, "--")
    log_axis(right, ranks)
    right.set_yscale("log", base=2)
    right.set_yticks(POWERS, list(map(str, POWERS)))
    right.minorticks_off()
    right.set_ylim(0.9, 1.4 * max(f, *ranks))
    right.set_ylabel("effective rank of ΔW")
    right.legend(fontsize=9, loc="lower right")
    figure.suptitle(f"{drawn(title(target))}: how many directions does ΔW use?", fontsize=12)
    most = np.mean([rank_at(s, 0.9) for s in spectra_of(select(lora, rank=ranks[-1]))])
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
    figure, ((left, right),) = axes(2, 1, (10, 4))
    ranks, y = by_rank(lora, "test")
    rs, o = by_rank(oracle, "test")
    cut = "true ΔE cut to rank r"
    left.plot(rs, o[:, 0] - floor, color=ORANGE, linestyle="--", marker="s", markersize=5, label=cut)
    band(left, ranks, y - floor, f"LoRA, {seeds(lora)}", BLUE, "o")
    left.axvline(k, color=GREY, linestyle=":")
    left.axhline(0, color=GREY, linewidth=0.8)
    log_axis(left, ranks)
    left.set_ylabel(f"excess loss ({NATS})")
    left.annotate(f"{k} swaps", (k, 0.3), xycoords=("data", "axes fraction"), xytext=(4, 0),
                  textcoords="offset points", va="top", color=GREY)  # fmt: skip
    left.legend()
    shown = min((r for r in ranks if r >= 2 * k), default=ranks[-1])
    s = np.array([row["spectra"]["model.embed_tokens"] for row in select(lora, rank=shown)])
    mean = s.mean(0)
    curve(right, truth[:k], color=ORANGE, marker="_", markersize=22, markeredgewidth=2.5, linestyle="none",
          label="true singular values")  # fmt: skip
    learned = np.stack([mean, s.min(0), s.max(0)], 1)
    band(right, range(1, len(mean) + 1), learned, f"learned at r = {shown}", BLUE, "o")
    right.axvline(k + 0.5, color=GREY, linestyle=":")
    right.set_xticks(range(1, max(k, len(mean)) + 1))
    right.set_ylim(bottom=0)
    right.set(xlabel="index", ylabel="singular value of ΔE")
    right.legend()
    figure.suptitle(f"A task whose rank is known: {drawn(title(target))}", fontsize=12)
    gap = f"; at r = {shown} the singular values are {', '.join(f'{x:.2f}' for x in mean)}"
    excess = ", ".join(f"{v[0] - floor:.3f} at rank {r}" for r, v in zip(ranks, y, strict=True))
    return Picture(figure, f"Excess loss over the known floor: {excess}{gap}.")


@styled
def learning_curves(rows: Sequence[Row], target: str) -> Picture:
    """Validation loss against step, to see whether full fine-tuning has flattened."""
    lora, full = final(rows, target), final(rows, target, "full")
    ranks = ranks_of(lora)
    figure, ((ax,),) = axes()

    lows = []
    for r, colour in shades(ranks).items():
        steps, losses = mean_curve(select(lora, rank=r))
        ax.plot(steps, losses, color=colour, marker=".", linewidth=1, label=f"r = {r}")
        lows.append(losses.min())
    steps, losses = mean_curve(full)
    ax.plot(steps, losses, **FULL, label="full")
    ax.set_ylim(min(losses.min(), *lows) - 0.02, losses[0] + 0.02)
    ax.set(xlabel="step", ylabel=f"validation loss ({NATS})", title=drawn(title(target)))
    ax.legend(fontsize=9, ncols=2)
    return Picture(figure, f"Validation loss of full fine-tuning on {title(target)}: {flattening(full)}.")


def mean_curve(rows: Sequence[Row]) -> np.ndarray:
    """The steps and the mean validation losses at them: (2, steps)."""
    return np.array([row["curve"] for row in rows]).mean(0).T


def flattening(full: Sequence[Row]) -> str:
    """Whether the curve has flattened, in words: how much the last quarter of the steps still gained."""
    steps, losses = mean_curve(full)
    late = losses[np.searchsorted(steps, 0.75 * steps[-1])]
    fall, last = losses[0] - losses[-1], late - losses[-1]
    return (
        f"{losses[0]:.3f} at the start, {losses[-1]:.3f} after {steps[-1]:.0f} steps; "
        f"the last quarter brought {last:.4f} nats, {last / fall if fall else 0:.1%} of the whole fall"
    )


@styled
def merge_equivalence(rows: Sequence[Row]) -> Picture:
    """(f) The largest difference between merged and unmerged outputs, beside the derived bound."""
    figure, ((ax,),) = axes()
    for dtype, colour, marker, dashes in (("float32", BLUE, "o", "--"), ("float64", GREEN, "s", ":")):
        some = [row for row in rows if row["dtype"] == dtype]
        n = [row["inputs"] for row in some]
        ax.plot(n, [row["bound"] for row in some], color=colour, linestyle=dashes, label=f"bound, {dtype}")
        ax.plot(n, [row["difference"] for row in some], color=colour, marker=marker, linestyle="none",
                markersize=5, label=f"observed, {dtype}")  # fmt: skip
    ax.set_yscale("log")
    log_axis(ax, sorted({row["inputs"] for row in rows}), "input width I")
    ax.set_ylabel("|merged - unmerged|, relative to |y|")
    ax.legend(fontsize=9)
    worst = max(row["ratio"] for row in rows)
    return Picture(figure, f"Merged and unmerged outputs differ by at most {worst:.3f} of the derived bound.")
