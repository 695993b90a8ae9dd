"""What the experiment with sets of matrices found: rows -> tables, and two figures.

A figure has its question as its title and the answer, computed from the rows, below it.
"""

from collections.abc import Sequence

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, Picture, axes, styled
from ..errors import InputError
from ..table import Table
from .harness import Row
from .rank_figures import NATS
from .rank_reading import final, seeds, select, targets
from .reading import median_of, spread, title
from .which_matrices import SETS

Found = dict[str, list[Row]]  # set of matrices -> its finished rows, one for each seed
LOOKS = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", ":"))  # of a budget, or of a text


def texts(rows: Sequence[Row]) -> list[str]:
    """The texts that have rows of all kinds; InputError if there is none."""
    if not (names := targets(rows)):
        raise InputError("no text has finished runs of the base, LoRA and full fine-tuning; expected one")
    return names


def budgets(rows: Sequence[Row], text: str) -> list[Found]:
    """For each budget, from small to large, the rows of every set; InputError for a set without any."""
    runs = [row["config"] for row in rows if row["config"]["kind"] == "final"]
    ranks = []
    for modules in map(list, SETS.values()):
        ranks.append(sorted({c["rank"] for c in runs if (c["target"], c["modules"]) == (text, modules)}))
    found = [
        {
            name: select(rows, kind="final", target=text, modules=list(SETS[name]), rank=rank)
            for name, rank in zip(SETS, each, strict=True)
        }
        for each in zip(*ranks, strict=False)
    ]
    if not found or not all(done for one in found for done in one.values()):
        raise InputError(f"a set of matrices has no finished run on {text}; expected {', '.join(SETS)}")
    return found


def losses(rows: Sequence[Row]) -> np.ndarray:
    """The test loss of each seed."""
    return np.array([row["test"] for row in rows])


def medians(found: Found) -> dict[str, float]:
    """Set -> its median test loss, the best first."""
    some = {name: float(np.median(losses(rows))) for name, rows in found.items()}
    return dict(sorted(some.items(), key=lambda item: item[1]))


def gains(found: Found) -> np.ndarray:
    """By how much all linear maps have a lower test loss than Q and V, for each seed that both finished."""
    all_, qv = ({row["config"]["seed"]: row["test"] for row in found[name]} for name in ("all", "QV"))
    return np.array([qv[seed] - loss for seed, loss in all_.items() if seed in qv])


def grown(found: Sequence[Found]) -> str:
    """The median gain at each budget."""
    return ", then ".join(f"{np.median(gains(one)):+.3f}" for one in found)


def spent(found: Found) -> str:
    """How many parameters the sets have."""
    counts = [row["parameters"] for rows in found.values() for row in rows]
    return f"{min(counts):,} to {max(counts):,} parameters"


def line(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """A line of a table."""
    config, loss = rows[0]["config"], losses(rows)
    gaps = [row["gap_closed"] for row in rows if row.get("gap_closed") is not None]
    rank, rate = (f"{value:g}" if value else "" for value in (config["rank"], config["lr"]))
    return (
        name, rank, f"{rows[0]['parameters']:,}", rate,
        spread(loss),
        f"{np.median(gaps):.0%}" if gaps else "",
    )  # fmt: skip


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each text, every set at every budget between the frozen base and full fine-tuning."""
    made = []
    for text in texts(rows):
        lines = [line("frozen base", final(rows, text, "none"))]
        for found in budgets(rows, text):
            lines += [line(name, done) for name, done in found.items()]
        lines.append(line("full fine-tuning", final(rows, text, "full")))
        caption = f"{title(text)}: {NATS}, {median_of(seeds(final(rows, text)))}"
        head = ("matrices", "r", "parameters", "learning rate", "test loss", "gap closed")
        made.append(Table(head, lines, caption))
    return made


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over the seeds."""
    said = [f"{places(rows)}."]
    for text in texts(rows):
        found = budgets(rows, text)
        for one in found:
            order = medians(one)
            apart = [f"{name} {loss - min(order.values()):+.3f}" for name, loss in order.items()]
            said.append(f"{title(text)}, {spent(one)}, best to worst: {', '.join(apart)}.")
        said.append(f"{title(text)}: all linear maps gain {grown(found)} nats on QV as the budget grows.")
    return said


def places(rows: Sequence[Row]) -> str:
    """Which set is best on each text, and where Q and V come."""
    best, place = [], []
    for text in texts(rows):
        orders = [list(medians(found)) for found in budgets(rows, text)]
        best.append(f"{', then '.join(dict.fromkeys(order[0] for order in orders))} on {title(text)}")
        place += [1 + order.index("QV") for order in orders]
    where = " to ".join(map(str, sorted({min(place), max(place)})))
    return f"Best: {'; '.join(best)}. QV is number {where} of {len(SETS)}"


@styled
def which_set(rows: Sequence[Row]) -> Picture:
    """The test loss of every set at every budget, with the frozen base and full fine-tuning as lines."""
    names = texts(rows)
    figure, (panels,) = axes(columns=len(names), size=(4.8 * len(names), 5.4))
    for ax, text in zip(panels, names, strict=True):
        found = budgets(rows, text)
        for i, one in enumerate(found):
            colour, mark, _ = LOOKS[i % 3]
            for y, done in enumerate(one.values()):
                loss, at = losses(done), y + 0.3 * (i - (len(found) - 1) / 2)
                ax.plot(loss, [at] * len(loss), mark, color=colour, alpha=0.5, markersize=6)
                ax.plot(np.median(loss), at, "|", color="black", markersize=13, markeredgewidth=2)
            ax.plot([], [], mark, color=colour, label=spent(one))
        for method, label, style in (("none", "frozen base", ":"), ("full", "full fine-tuning", "--")):
            loss = losses(final(rows, text, method))
            ax.axvspan(loss.min(), loss.max(), color=GREY, alpha=0.2, linewidth=0)
            ax.axvline(np.median(loss), color=GREY, linestyle=style, linewidth=2, label=label)
        ax.set_yticks(range(len(SETS)), SETS)
        ax.invert_yaxis()
        ax.set(xlabel=f"test loss ({NATS})", title=title(text))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    answer = places(rows)
    figure.suptitle(f"Which matrices should get the parameters?\n{answer}")
    says = f"Test loss of LoRA on each of {', '.join(SETS)}; points are seeds, bars medians. {answer}."
    return Picture(figure, says)


@styled
def all_against_qv(rows: Sequence[Row]) -> Picture:
    """By how much all linear maps are better than Q and V, against the budget."""
    figure, ((ax,),) = axes(size=(7.2, 4.8))
    answers, ticks = [], {}
    for i, text in enumerate(texts(rows)):
        found, (colour, mark, style) = budgets(rows, text), LOOKS[i % 3]
        for one in found:
            first = one["all"][0]
            ticks[first["parameters"]] = f"{spent(one)}\nall: r = {first['config']['rank']}"
            gained = gains(one)
            ax.plot([first["parameters"]] * len(gained), gained, mark, color=colour, alpha=0.5, markersize=6)
        middle = [np.median(gains(one)) for one in found]
        sizes = [one["all"][0]["parameters"] for one in found]
        ax.plot(sizes, middle, mark, color=colour, linestyle=style, markersize=9, label=title(text))
        answers.append(f"{title(text)} {grown(found)}")
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set_xscale("log")
    ax.set_xticks(list(ticks), ticks.values())
    ax.minorticks_off()
    ax.margins(x=0.3)
    answer = f"{'; '.join(answers)} nats"
    ax.set_ylabel(f"loss with QV less loss with all\n({NATS})")
    ax.legend(loc="best")
    figure.suptitle(f"Do all linear maps beat Q and V, above all at low rank?\n{answer}")
    says = f"Test loss with QV less that with all maps, seed by seed; above 0 all are better: {answer}."
    return Picture(figure, says)


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"which_set": which_set(rows), "all_against_qv": all_against_qv(rows)}
