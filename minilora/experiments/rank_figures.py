"""The figures of a rank sweep: rows -> pictures, with nothing computed but means and ranges."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.plotting import (
    BLUE,
    GREEN,
    GREY,
    KINDS,
    ORANGE,
    PINK,
    Axes,
    Picture,
    Row,
    axes,
    shades,
    styled,
)
from ..data.corpora import swaps_of
from ..errors import InputError
from ..spectra import effective_rank, energy, noise_spectrum, rank_at
from ..table import drawn

NATS = "nats per character"


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The finished rows whose config has these values."""
    return [
        row for row in rows
        if row["status"] == "done" and all(row["config"][k] == v for k, v in wanted.items())
    ]  # fmt: skip


def final(rows: Sequence[Row], target: str, method: str = "lora") -> list[Row]:
    """The measured runs of one method on one target; InputError if there is none."""
    found = select(rows, kind="base" if method == "none" else "final", target=target, method=method)
    if not found:
        raise InputError(f"no finished run of {method!r} on {target!r} among {len(rows)} rows")
    return found


def by_rank(rows: Sequence[Row], key: str) -> tuple[list[int], np.ndarray]:
    """The ranks, and for each the (mean, least, greatest) of a value over the seeds: (ranks, 3)."""
    ranks = sorted({row["config"]["rank"] for row in rows})
    values = [[row[key] for row in rows if row["config"]["rank"] == r] for r in ranks]
    return ranks, np.array([(math.fsum(v) / len(v), min(v), max(v)) for v in values]).reshape(-1, 3)


def band(
    ax: Axes, x: Sequence[float], y: np.ndarray, label: str, colour: str, marker: str, line: str = "-"
) -> None:
    """A mean line with the range over seeds behind it."""
    ax.fill_between(x, y[:, 1], y[:, 2], color=colour, alpha=0.2, linewidth=0)
    ax.plot(x, y[:, 0], color=colour, marker=marker, linestyle=line, label=label, markersize=5)


def rank_axis(ax: Axes, ranks: Sequence[int]) -> None:
    """Ranks on a log2 axis, a labelled tick at each."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ranks), [str(r) for r in ranks])
    ax.minorticks_off()
    ax.set_xlabel("rank r")


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
    names = {
        "folio": "First Folio",
        "kjv": "King James Bible",
        "code": "Python code",
        "reversed": "reversed text",
    }
    if swaps := swaps_of(target):
        return f"letter permutation, {swaps} swaps"
    return names.get(target, Path(target).name or target)


def seeds(rows: Sequence[Row]) -> str:
    """How many seeds the rows hold, in words."""
    count = len({row["config"]["seed"] for row in rows})
    return f"{count} seed{'s' * (count > 1)}"


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
    rank_axis(ax, ranks)
    ax.set_ylabel(f"test loss ({NATS})")
    ax.set_title(drawn(title(target)))
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
    ax.plot(
        [whole], [100], color=ORANGE, marker="*", markersize=12, linestyle="none", label="full fine-tuning"
    )
    ax.set_xscale("log")
    ax.set_xlabel("trained parameters")
    ax.set_ylabel("gap to full fine-tuning closed (%)")
    ax.legend(loc="lower right")
    return Picture(figure, f"Gap closed against trained parameters. {'; '.join(says)}; full: {whole:,}.")


def targets(rows: Sequence[Row]) -> list[str]:
    """The targets that have finished runs of the base, LoRA and full fine-tuning, in order."""
    names = dict.fromkeys(row["config"]["target"] for row in select(rows, kind="final", method="full"))
    others = ({"kind": "base"}, {"kind": "final", "method": "lora"})
    return [name for name in names if all(select(rows, target=name, **other) for other in others)]


def mean_spectrum(rows: Sequence[Row], kind: str) -> np.ndarray:
    """The mean over rows and layers of the spectra of one kind of module."""
    found = [s for row in rows for path, s in row["spectra"].items() if path.rpartition(".")[2] == kind]
    return np.array(found).mean(0) if found else np.zeros(0)


def kinds(rows: Sequence[Row]) -> list[str]:
    """The kinds of adapted modules in the rows."""
    ends = {path.rpartition(".")[2] for row in rows for path in row["spectra"]}
    usual = [kind for kind in (*KINDS, "embed_tokens") if kind in ends]
    return usual + sorted(ends - {*usual})


@styled
def spectra(rows: Sequence[Row], target: str) -> Picture:
    """(c) Singular values of ΔW for each kind of module and rank, with full fine-tuning and noise."""
    lora, full = final(rows, target), final(rows, target, "full")
    ranks = sorted({row["config"]["rank"] for row in lora})
    panels = kinds(lora)
    columns = min(4, len(panels) + 1)
    lines = -(-(len(panels) + 1) // columns)
    figure, grid = axes(columns, lines, (max(3.0 * columns, 8), max(2.7 * lines, 3.5)))
    flat = list(grid.flat)
    for ax, kind in zip(flat, panels, strict=False):
        s = mean_spectrum(full, kind)
        index = np.arange(1, len(s) + 1)
        noise = math.sqrt((s * s).sum()) * noise_spectrum(shape_of(kind, full), np.random.default_rng(0))
        ax.plot(index, s, color=ORANGE, linestyle="--", linewidth=2, label="full fine-tuning")
        ax.plot(index, noise, color=GREY, linestyle=":", linewidth=1.5, label="noise of that norm")
        for r, colour in shades(ranks).items():
            v = mean_spectrum(select(lora, rank=r), kind)
            ax.plot(
                np.arange(1, len(v) + 1),
                v,
                color=colour,
                marker=".",
                markersize=4,
                linewidth=1,
                label=f"r = {r}",
            )
        ax.set_yscale("log")
        ax.set_xscale("log", base=2)
        ticks = [t for t in (1, 4, 16, 64) if t <= len(s)]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set_title(drawn(kind), fontsize=11)
        ax.set_xlabel("index")
    low = min(ax.get_ylim()[0] for ax in flat[: len(panels)])
    high = max(ax.get_ylim()[1] for ax in flat[: len(panels)])
    for i, ax in enumerate(flat):
        if i < len(panels):
            ax.set_ylim(max(low, high * 1e-4), high)
        else:
            ax.set_axis_off()
        if i % columns == 0:
            ax.set_ylabel("singular value of ΔW")
    handles, labels = flat[0].get_legend_handles_labels()
    flat[len(panels)].legend(handles, labels, loc="center", fontsize=9, ncols=2 if len(labels) > 7 else 1)
    figure.suptitle(
        f"{drawn(title(target))}: spectra of ΔW (mean over layers and {seeds(lora)})", fontsize=12
    )
    tops = ", ".join(f"{k} {mean_spectrum(select(lora, rank=ranks[-1]), k)[0]:.2g}" for k in panels)
    return Picture(
        figure, f"Singular values of ΔW on {title(target)}; the largest at rank {ranks[-1]}: {tops}."
    )


def shape_of(kind: str, rows: Sequence[Row]) -> tuple[int, int]:
    """The shape (O, I) of one kind of module."""
    shapes = (item for row in rows for item in row["shapes"].items())
    m, n = next(shape for path, shape in shapes if path.rpartition(".")[2] == kind)
    return m, n


@styled
def energy_and_effective_rank(rows: Sequence[Row], target: str) -> Picture:
    """(d) Cumulative energy of the spectra, and effective rank against r with its noise baseline."""
    lora, full = final(rows, target), final(rows, target, "full")
    ranks = sorted({row["config"]["rank"] for row in lora})
    figure, ((left, right),) = axes(2, 1, (10, 4))

    def curves(some: Sequence[Row]) -> list[np.ndarray]:
        return [np.array(s) for row in some for path, s in row["spectra"].items()
                if path.rpartition(".")[2] in kinds(lora)]  # fmt: skip

    def mean_energy(some: Sequence[Row]) -> np.ndarray:
        found = [energy(s) for s in curves(some)]
        return np.array([f[: min(map(len, found))] for f in found]).mean(0)

    whole = mean_energy(full)
    left.plot(
        np.arange(1, len(whole) + 1), 100 * whole, color=ORANGE, linestyle="--", linewidth=2, label="full"
    )
    for r, colour in shades(ranks).items():
        e = 100 * mean_energy(select(lora, rank=r))
        left.plot(np.arange(1, len(e) + 1), e, color=colour, marker=".", linewidth=1, label=f"r = {r}")
    left.axhline(90, color=GREY, linestyle=":", linewidth=1)
    rank_axis(left, [1, 2, 4, 8, 16, 32, 64])
    left.set_xlabel("number of singular values k")
    left.set_ylabel("energy in the first k (%)")
    left.legend(fontsize=9, ncols=2, loc="lower right")

    effective = [
        {"config": row["config"], "v": float(np.mean([effective_rank(s) for s in curves([row])]))}
        for row in lora
    ]
    _, y = by_rank(effective, "v")
    band(right, ranks, y, "LoRA", BLUE, "o")
    rng = np.random.default_rng(0)
    shapes = [shape_of(kind, lora) for kind in kinds(lora)]
    noise = [
        float(np.mean([effective_rank(noise_spectrum(shape, rng, rank=r, draws=4)) for shape in shapes]))
        for r in ranks
    ]
    right.plot(ranks, noise, color=GREY, linestyle=":", marker="x", label="product of two noise factors")
    right.plot(ranks, ranks, color=GREY, linewidth=0.8, label="r itself")
    f = float(np.mean([effective_rank(s) for s in curves(full)]))
    level(right, f, "full fine-tuning", ORANGE, "--")
    rank_axis(right, ranks)
    right.set_yscale("log", base=2)
    right.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    right.minorticks_off()
    right.set_ylim(0.9, 1.4 * max(f, *ranks))
    right.set_ylabel("effective rank of ΔW")
    right.legend(fontsize=9, loc="lower right")
    figure.suptitle(f"{drawn(title(target))}: how many directions does ΔW use?", fontsize=12)
    most = np.mean([rank_at(s, 0.9) for s in curves(select(lora, rank=ranks[-1]))])
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
    left.plot(
        rs,
        o[:, 0] - floor,
        color=ORANGE,
        linestyle="--",
        marker="s",
        markersize=5,
        label="true ΔE cut to rank r",
    )
    band(left, ranks, y - floor, f"LoRA, {seeds(lora)}", BLUE, "o")
    left.axvline(k, color=GREY, linestyle=":")
    left.axhline(0, color=GREY, linewidth=0.8)
    rank_axis(left, ranks)
    left.set_ylabel(f"excess loss ({NATS})")
    left.annotate(f"{k} swaps", (k, 0.3), xycoords=("data", "axes fraction"), xytext=(4, 0),
                  textcoords="offset points", va="top", color=GREY)  # fmt: skip
    left.legend()
    shown = min((r for r in ranks if r >= 2 * k), default=ranks[-1])
    s = np.array([row["spectra"]["model.embed_tokens"] for row in select(lora, rank=shown)])
    index = np.arange(1, s.shape[1] + 1)
    right.plot(
        np.arange(1, k + 1), truth[:k], color=ORANGE, marker="_", markersize=22, markeredgewidth=2.5,
        linestyle="none", label="true singular values",
    )  # fmt: skip
    band(
        right,
        index.tolist(),
        np.stack([s.mean(0), s.min(0), s.max(0)], 1),
        f"learned at r = {shown}",
        BLUE,
        "o",
    )
    right.axvline(k + 0.5, color=GREY, linestyle=":")
    right.set_xticks(np.arange(1, max(k, len(index)) + 1))
    right.set_ylim(bottom=0)
    right.set_xlabel("index")
    right.set_ylabel("singular value of ΔE")
    right.legend()
    figure.suptitle(f"A task whose rank is known: {drawn(title(target))}", fontsize=12)
    m = s.mean(0)
    gap = f"; at r = {shown} the singular values are {', '.join(f'{x:.2f}' for x in m)}"
    excess = ", ".join(f"{v[0] - floor:.3f} at rank {r}" for r, v in zip(ranks, y, strict=True))
    return Picture(figure, f"Excess loss over the known floor: {excess}{gap}.")


@styled
def learning_curves(rows: Sequence[Row], target: str) -> Picture:
    """Validation loss against step, to see whether full fine-tuning has flattened."""
    lora, full = final(rows, target), final(rows, target, "full")
    ranks = sorted({row["config"]["rank"] for row in lora})
    figure, ((ax,),) = axes()

    def mean_curve(some: Sequence[Row]) -> np.ndarray:
        return np.array([row["curve"] for row in some]).mean(0)

    for r, colour in shades(ranks).items():
        c = mean_curve(select(lora, rank=r))
        ax.plot(c[:, 0], c[:, 1], color=colour, marker=".", linewidth=1, label=f"r = {r}")
    c = mean_curve(full)
    ax.plot(c[:, 0], c[:, 1], color=ORANGE, linestyle="--", linewidth=2, label="full")
    low = min(c[:, 1].min(), *(mean_curve(select(lora, rank=r))[:, 1].min() for r in ranks))
    ax.set_ylim(low - 0.02, c[0, 1] + 0.02)
    ax.set_xlabel("step")
    ax.set_ylabel(f"validation loss ({NATS})")
    ax.set_title(drawn(title(target)))
    ax.legend(fontsize=9, ncols=2)
    return Picture(figure, f"Validation loss of full fine-tuning on {title(target)}: {flattening(full)}.")


def flattening(full: Sequence[Row]) -> str:
    """Whether the curve has flattened, in words: how much the last quarter of the steps still gained."""
    c = np.array([row["curve"] for row in full]).mean(0)
    late = c[np.searchsorted(c[:, 0], 0.75 * c[-1, 0])]
    fall, last = c[0, 1] - c[-1, 1], late[1] - c[-1, 1]
    return (
        f"{c[0, 1]:.3f} at the start, {c[-1, 1]:.3f} after {c[-1, 0]:.0f} steps; "
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
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    n = sorted({row["inputs"] for row in rows})
    ax.set_xticks(n, [str(v) for v in n])
    ax.minorticks_off()
    ax.set_xlabel("input width I")
    ax.set_ylabel("|merged - unmerged|, relative to |y|")
    ax.legend(fontsize=9)
    worst = max(row["ratio"] for row in rows)
    return Picture(figure, f"Merged and unmerged outputs differ by at most {worst:.3f} of the derived bound.")
