"""What the experiment with added adapters found: rows -> tables, and three figures.

A figure has its question as its title and the answer, computed from the rows, below it.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, Picture, axes, styled
from ..table import Table, counted
from .adding_adapters import JOINT, METHODS, OWN, TIMES, mixtures
from .harness import Row
from .reading import finals, median_of, spread, title

COLOURS = (BLUE, ORANGE, GREEN)
MARKS = ("o", "s", "^")

CHANGE = "test loss less the base's (nats per character)"


def gains(rows: Sequence[Row], name: str, texts: Sequence[str]) -> np.ndarray:
    """Test loss less the base's (seeds, texts) of a combination or a method."""
    found = []
    for row in rows:
        losses = row["losses"].get(name) or row["methods"][name]["losses"]
        found.append([losses[text] - row["losses"]["base"][text] for text in texts])
    return np.array(found)


def tables(rows: Sequence[Row]) -> list[Table]:
    """The heat map as a table, and the methods: medians and ranges over the seeds."""
    done = finals(rows)
    targets = done[0]["config"]["plan"]["targets"]
    texts = [*targets, OWN]
    seeds = counted(len(done), "seed", "seeds")
    names = [name for name in done[0]["losses"] if name != "base"]
    names.append(names.pop(0))  # the joint one last
    changes = {name: [spread(g, "+.3f") for g in gains(done, name, texts).T] for name in (*names, *METHODS)}
    means = {name: spread(gains(done, name, targets).mean(1), "+.3f") for name in changes}
    lines = [(name, *changes[name]) for name in names]
    map_ = Table(("adapter", *texts), lines, f"test loss less the base's, {median_of(seeds)}")
    lines = []
    for name in METHODS:
        made = [row["methods"][name] for row in done]
        scales = sorted({f"{m['scale']:g}" for m in made}, key=float)
        lines.append((
            name, str(max(m["rank"] for m in made)), ", ".join(scales),
            f"{np.median([m['residual'] for m in made]):.2f}", *changes[name], means[name],
        ))  # fmt: skip
    lines += [(name, "", "", "", *changes[name], means[name]) for name in (JOINT, "mean of all")]
    head = ("method", "rank", "λ", "residual", *texts, "mean of the three" if len(targets) == 3 else "mean")
    return [map_, Table(head, lines, f"all adapters at the best λ, less the base's loss; {seeds}")]


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over the seeds."""
    done = finals(rows)
    targets = done[0]["config"]["plan"]["targets"]
    all_, mean = (np.median(gains(done, name, targets), 0) for name in (" + ".join(targets), "mean of all"))
    best = {name: float(np.median(gains(done, name, targets).mean(1))) for name in (*METHODS, JOINT)}
    joint, order = best.pop(JOINT), sorted(best, key=best.__getitem__)
    away = {t: np.median(gains(done, f"- {t}", [t, OWN]), 0) for t in targets}
    return [
        f"All adapters at weight 1 are worse than none on {(all_ > 0).sum()} of {len(targets)} texts; "
        f"their mean is better than none on {(mean < 0).sum()}.",
        f"Best to worst: {', '.join(f'{name} {best[name]:+.2f}' for name in order)}; "
        f"one adapter trained on all texts has {joint:+.2f}.",
        "An adapter taken away adds to the loss on its text and on the base's own: "
        + ", ".join(f"{t} {on:+.2f} and {own:+.2f}" for t, (on, own) in away.items()) + ".",
    ]  # fmt: skip


def along(done: Sequence[Row], one: str, other: str, text: str) -> np.ndarray:
    """Test loss less the base's (seeds, times) on one text at t = 0, TIMES, 1 between two adapters."""
    ways = []
    for row in done:
        path = [found[text] for _, found in row["paths"][f"{one} to {other}"]]
        way = [row["losses"][one][text], *path, row["losses"][other][text]]
        ways.append(np.array(way) - row["losses"]["base"][text])
    return np.array(ways)


def kept(done: Sequence[Row], one: str, other: str, text: str) -> float:
    """The share of the gain of the text's own adapter that is left halfway, the median over seeds."""
    half = along(done, one, other, text)[:, 1 + TIMES.index(0.5)]
    return float(np.median(half / gains(done, text, [text])[:, 0]))


@styled
def interpolation(rows: Sequence[Row]) -> Picture:
    """The loss on every text on the way from one adapter to another."""
    done = finals(rows)
    targets = done[0]["config"]["plan"]["targets"]
    pairs = list(combinations(targets, 2))
    figure, (line,) = axes(columns=len(pairs), size=(4.0 * len(pairs), 4.6))
    for ax, (one, other) in zip(line, pairs, strict=True):
        for text, colour, mark in zip(targets, COLOURS, MARKS, strict=False):
            y = along(done, one, other, text)
            ax.fill_between((0, *TIMES, 1), y.min(0), y.max(0), color=colour, alpha=0.2, linewidth=0)
            own = text in (one, other)
            ax.plot((0, *TIMES, 1), np.median(y, 0), color=colour, marker=mark, markersize=5,
                    linestyle="-" if own else ":", label=title(text))  # fmt: skip
        ax.axhline(0, color=GREY, linewidth=1)
        ax.set_xlabel(f"t: from {title(one)}\nto {title(other)}")
    line[0].set_ylabel(CHANGE)
    for handle in line[-1].legend(loc="best").get_lines():
        handle.set_linestyle("-")
    left = {(text, pair): kept(done, *pair, text) for pair in pairs for text in pair}
    low, high = min(left.values()), max(left.values())
    answer = f"{low:.0%} to {high:.0%} of what its own adapter gains (dotted: a text of neither)"
    figure.suptitle(f"Halfway between two adapters, how much is left of each?\n{answer}")
    says = (
        "Test loss less the base's on the way from one adapter to another, medians with the range of "
        f"{counted(len(done), 'seed', 'seeds')}; 0 is the base. Of a text's own gain is left halfway: "
        + ", ".join(
            f"{title(text)} {share:.0%} ({one} to {other})" for (text, (one, other)), share in left.items()
        )
        + "."
    )
    return Picture(figure, says)


SHOWN = 0.5  # nats at which the colours of the heat map end


@styled
def heat_map(rows: Sequence[Row]) -> Picture:
    """Who helps whom: what each combination does to the loss on each text."""
    done = finals(rows)
    texts = [*done[0]["config"]["plan"]["targets"], OWN]
    names = [*mixtures(texts[:-1]), JOINT]
    median = np.array([np.median(gains(done, name, texts), 0) for name in names])
    figure, ((ax,),) = axes(size=(7.2, 0.42 * len(names) + 1.6))
    ax.grid(False)
    image = ax.imshow(median, cmap="PuOr_r", vmin=-SHOWN, vmax=SHOWN, aspect="auto")
    for (i, j), value in np.ndenumerate(median):
        ax.text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=10,
                color="black" if -0.5 * SHOWN < value < 0.8 * SHOWN else "white")  # fmt: skip
    ax.set_xticks(range(len(texts)), [title(text).replace(" ", "\n") for text in texts])
    ax.set_yticks(range(len(names)), names)
    others = np.array([median[i, j] for i in range(len(texts) - 1) for j in range(len(texts)) if i != j])
    answer = f"alone, an adapter is worse than none on {int((others > 0).sum())} of {others.size} other texts"
    ax.set(xlabel="measured on", ylabel="adapters added to the base", title=f"Who helps whom?\n{answer}")
    figure.colorbar(image, label="test loss less the base's (nats)", extend="both")
    best = {text: names[int(median[:, j].argmin())] for j, text in enumerate(texts)}
    says = (
        f"Change of the test loss, medians of {counted(len(done), 'seed', 'seeds')}: below 0 a combination "
        "helps. Best on "
        + ", ".join(
            f"{title(t)}: {name} ({median[:, j].min():+.2f})" for j, (t, name) in enumerate(best.items())
        )
        + "."
    )
    return Picture(figure, says)


@styled
def methods(rows: Sequence[Row]) -> Picture:
    """Every way of combining all adapters, beside the best single one and the joint one."""
    done = finals(rows)
    targets = done[0]["config"]["plan"]["targets"]
    means = {name: gains(done, name, targets).mean(1) for name in (*METHODS, "mean of all", *targets, JOINT)}
    order = sorted(means, key=lambda name: -float(np.median(means[name])))
    figure, ((ax,),) = axes(size=(7.2, 0.36 * len(order) + 1.4))
    for i, name in enumerate(order):
        colour, mark = (BLUE, "o") if name in METHODS else (GREEN, "^") if name == JOINT else (ORANGE, "s")
        ax.plot(means[name], [i] * len(done), mark, color=colour, alpha=0.5, markersize=5, linestyle="")
        ax.plot(np.median(means[name]), i, "|", color="black", markersize=14)
    ax.axvline(0, color=GREY, linewidth=1)
    first, *_ = (name for name in reversed(order) if name in METHODS)
    best, joint = (float(np.median(means[name])) for name in (first, JOINT))
    answer = f"{first}, {best:+.2f}; training on all texts gives {joint:+.2f}"
    ax.set_yticks(range(len(order)), [f"{name} alone" if name in targets else name for name in order])
    ax.set(
        xlabel=f"mean over {len(targets)} texts of the {CHANGE}",
        title=f"Which way of combining is best?\n{answer}",
    )
    says = (
        f"Mean change of the test loss over {len(targets)} texts, each method at its best scale; points are "
        f"{counted(len(done), 'seed', 'seeds')}, bars medians: "
        + ", ".join(f"{name} {np.median(means[name]):+.3f}" for name in reversed(order))
        + "."
    )
    return Picture(figure, says)


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"interpolation": interpolation(rows), "heat_map": heat_map(rows), "methods": methods(rows)}
