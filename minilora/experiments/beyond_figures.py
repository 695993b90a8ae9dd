"""What the experiment beyond language found: rows -> tables, sentences, and three figures.

A figure has its question as its title and the answer, computed from the rows, below it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, Picture, axes, shades, styled
from ..data.digits import GREYS, SIDE
from ..spectra import effective_rank, noise_spectrum, rank_shown, relative
from ..table import Table, counted
from .beyond_language import SHOWN, Plan
from .beyond_tasks import CLASSIFIED, DRAWN, SHAPE, new, planted
from .harness import Row
from .known_figures import NOTHING
from .reading import finals, median_of, said, spread

LOOKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"))
NAMES = {"full": "all weights", "head": "the head alone", "": "the base"}
TITLES = dict(
    zip((*CLASSIFIED, DRAWN), ("digits 5 to 9", "inverted pixels", "rotated pixels", DRAWN), strict=True)
)
Key = tuple[str, str, int]  # task, method, rank


@dataclass
class Found:
    """The plan, what the bases can do before, and the seeds of every way to adapt them."""

    plan: Plan
    bases: dict[str, Row]
    arms: dict[Key, list[Row]]

    def ranks(self, task: str) -> list[int]:
        """The ranks of LoRA on a task."""
        return [r for name, method, r in self.arms if (name, method) == (task, "lora")]

    def of(self, task: str, method: str, rank: int = 0, what: str = "share") -> np.ndarray:
        """A number of each seed."""
        return np.array([row[what] for row in self.arms[task, method, rank]])

    def floor(self, task: str) -> float:
        """The share without LoRA: of the head alone, or of the base where it has none."""
        return float(np.median(self.of(task, "head"))) if task in CLASSIFIED else self.bases[task]["share"]

    def closed(self, task: str, rank: int) -> float:
        """How much of the way from there to all weights a rank goes, in medians."""
        low, high = self.floor(task), float(np.median(self.of(task, "full")))
        return (float(np.median(self.of(task, "lora", rank))) - low) / max(high - low, 1e-9)

    def excess(self, task: str, rank: int) -> np.ndarray:
        """The loss on permuted pixels over the base's."""
        return self.of(task, "lora", rank, "test") / self.bases[task]["test"]

    def elbow(self, task: str) -> int | None:
        """The smallest rank at which nothing is left to gain, in the median."""
        enough = [r for r in self.ranks(task) if np.median(self.excess(task, r)) <= NOTHING]
        return min(enough, default=None)

    def shown(self, task: str) -> list[int]:
        """The rank that the spectrum shows, where ΔW may have the largest, for each seed."""
        rows = self.arms[task, "lora", max(self.ranks(task))]
        return [rank_shown(np.array(row["spectrum"])) for row in rows]

    def spectrum(self, task: str, method: str, rank: int = 0) -> np.ndarray:
        """Singular values of ΔW over the largest, median of all seeds."""
        return np.median([row["spectrum"] for row in self.arms[task, method, rank]], 0)


def found(rows: Sequence[Row]) -> Found:
    """The rows of a whole grid, read; ConfigError if nothing was measured."""
    arms: dict[Key, list[Row]] = {}
    for row in finals(rows):
        c = row["config"]
        arms.setdefault((c["task"], c["method"], c["rank"]), []).append(row)
    bases = {row["config"]["task"]: row for row in rows if row["config"]["kind"] == "base"}
    plan: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in rows[0]["config"]["plan"].items()}
    return Found(Plan(**plan), bases, arms)


def permutations(f: Found) -> list[str]:
    """The tasks with a planted rank."""
    return [task for task in f.bases if planted(task)]


def named(method: str, rank: int) -> str:
    """A way to adapt in words."""
    return f"LoRA, r = {rank}" if method == "lora" else NAMES[method]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Every way to adapt to each task, and the excess of every rank on permuted pixels."""
    f = found(rows)
    seeds = counted(f.plan.seeds, "seed", "seeds")
    lines = []
    for task in (*CLASSIFIED, DRAWN):
        base = f.bases[task]
        lines.append((TITLES[task], NAMES[""], "", "", f"{base['share']:.3f}", f"{base['test']:.3f}"))
        for (name, method, r), some in f.arms.items():
            if name == task:
                lines.append(
                    (TITLES[task], named(method, r), f"{some[0]['parameters']:,}",
                     f"{some[0]['config']['rate']:g}", spread(f.of(task, method, r)),
                     spread(f.of(task, method, r, "test")))
                )  # fmt: skip
    head = ("task", "trained", "parameters", "best rate", "share that is right", "test loss")
    caption = f"{median_of(seeds)}; the loss of drawings is the mean square of the noise's error"
    left = [
        (task, str(r), spread(f.excess(task, r), ".2g"), spread(f.of(task, "lora", r)),
         str(f.shown(task).count(planted(task))) if r == max(f.ranks(task)) else "")
        for task in permutations(f)
        for r in f.ranks(task)
    ]  # fmt: skip
    head_left = ("task", "rank", "loss over the base's", "as the base on plain pixels", "spectra that show k")
    return [Table(head, lines, caption), Table(head_left, left, f"{median_of(seeds)}")]


def ways(f: Found, task: str) -> str:
    """How far the smallest and the largest rank go towards all weights."""
    few, most = min(f.ranks(task)), max(f.ranks(task))
    return (
        f"{said(f.closed(task, few), '.0%')} at r = {few} and {said(f.closed(task, most), '.0%')} at {most}"
    )


def elbows(f: Found) -> str:
    """For how many permutations the elbow is at the planted rank."""
    some = permutations(f)
    return f"{sum(f.elbow(task) == planted(task) for task in some)} of {len(some)}"


def sizes(f: Found, task: str) -> tuple[float, float, float]:
    """The effective rank of ΔW's median spectrum over the largest possible: of the largest LoRA and of all
    weights; and that of noise in a square map.
    """
    width, top = SHAPE.hidden_size, max(f.ranks(task))
    noise = noise_spectrum((width, width), np.random.default_rng(0))
    return (
        effective_rank(f.spectrum(task, "lora", top)) / top,
        effective_rank(f.spectrum(task, "full")) / width,
        effective_rank(noise) / width,
    )


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over the seeds."""
    f = found(rows)
    some = [task for task in permutations(f) for n in f.shown(task) if n == planted(task)]
    total = sum(len(f.shown(task)) for task in permutations(f))
    known = max(
        row["test"] / f.bases[row["config"]["task"]]["test"]
        for row in rows
        if row["config"]["kind"] == "known"
    )
    full = ", ".join(f"{TITLES[task]} {sizes(f, task)[1]:.0%}" for task in (CLASSIFIED[0], DRAWN))
    return [
        "Of the way from the head alone to all weights LoRA goes "
        + "; ".join(f"{ways(f, task)} ({TITLES[task]})" for task in CLASSIFIED) + ".",
        f"Of the drawings {f.bases[DRAWN]['share']:.0%} show a digit from 5 to 9 before; after LoRA "
        + ", ".join(f"{np.median(f.of(DRAWN, 'lora', r)):.0%} at r = {r}" for r in f.ranks(DRAWN))
        + f"; with all weights {np.median(f.of(DRAWN, 'full')):.0%}.",
        f"Permuted pixels: nothing is left to gain from the planted rank on, not before, for {elbows(f)}; "
        f"the spectrum shows it in {len(some)} of {counted(total, 'run', 'runs')}. The known ΔW leaves "
        f"at most {known:.0e} of the loss.",
        f"The effective rank of the median spectrum of what full fine-tuning adds, of the largest possible: "
        f"{full}; noise in a square map has {sizes(f, DRAWN)[2]:.0%}.",
    ]  # fmt: skip


@styled
def ranks(rows: Sequence[Row]) -> Picture:
    """The share of test images that are classified right against the rank, for each task."""
    f = found(rows)
    figure, (line,) = axes(columns=len(CLASSIFIED), size=(11.4, 4.8))
    for ax, task in zip(line, CLASSIFIED, strict=True):
        y = np.array([f.of(task, "lora", r) for r in f.ranks(task)])
        at = range(len(y))
        ax.fill_between(at, y.min(1), y.max(1), color=BLUE, alpha=0.2, linewidth=0)
        ax.plot(at, np.median(y, 1), color=BLUE, marker="o", markersize=7, label="LoRA and head")
        for method, colour, style in (("full", "black", "-"), ("head", ORANGE, "--")):
            ax.axhline(np.median(f.of(task, method)), color=colour, linestyle=style, label=NAMES[method])
        ax.axhline(f.bases[task]["share"], color=GREY, linestyle=":", label=NAMES[""])
        ax.set_xticks(at, [str(r) for r in f.ranks(task)])
        ax.set(xlabel="rank r of LoRA", title=TITLES[task], ylim=(-0.03, 1.0))
    line[0].set_ylabel("test images classified right")
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    few = min(f.plan.ranks)
    part = ", ".join(said(f.closed(task, few), ".0%") for task in CLASSIFIED)
    figure.suptitle(
        f"Does LoRA work on images?\nof the way from the head alone to all weights, r = {few} goes {part}"
    )
    return Picture(figure, f"Share of test images classified right against rank. {sentences(rows)[0]}")


@styled
def sheets(images: Mapping[str, Any], question: str, says: str) -> Picture:
    """Drawings in greys from 0 to 16, SHOWN below each title, three in a row."""
    figure, (line,) = axes(columns=len(images), size=(2.9 * len(images), 5.4))
    for ax, (title, some) in zip(line, images.items(), strict=True):
        across = 3
        page = np.array(some).reshape(SHOWN // across, across, SIDE, SIDE)
        sheet = np.pad(page, ((0, 0), (0, 0), (1, 1), (1, 1))).swapaxes(1, 2).reshape(-1, across * (SIDE + 2))
        ax.imshow(sheet, cmap="gray_r", vmin=0, vmax=GREYS)
        ax.set_axis_off()
        ax.set_title(title)
    figure.suptitle(question)
    return Picture(figure, says)


def compared(drawn: Mapping[str, np.ndarray]) -> Picture:
    """Drawings (N, 64) by title, at least SHOWN of each, with the share of them that shows a new digit."""
    shares = {title: f"{new(some):.0%}" for title, some in drawn.items()}
    greys = {f"{title}: {shares[title]}": (some[:SHOWN] + 1) * (GREYS / 2) for title, some in drawn.items()}
    told = ", ".join(f"{title} {share}" for title, share in shares.items())
    return sheets(greys, "Which drawings show 5 to 9?", f"Drawings that show a digit from 5 to 9: {told}.")


def drawings(rows: Sequence[Row]) -> Picture:
    """Drawings of the base, of LoRA at its smallest and largest rank, and of all weights trained."""
    f = found(rows)
    few, most = min(f.ranks(DRAWN)), max(f.ranks(DRAWN))
    grids = {"before": [f.bases[DRAWN]]}
    for method, r in dict.fromkeys([("lora", few), ("lora", most), ("full", 0)]):
        grids[named(method, r)] = f.arms[DRAWN, method, r]
    images = {
        f"{title}\n{np.median([row['share'] for row in some]):.0%} are 5 to 9": some[0]["samples"]
        for title, some in grids.items()
    }
    question = (
        f"Can LoRA teach a model of the digits 0 to 4 to draw 5 to 9?\n{ways(f, DRAWN)} of all weights' gain"
    )
    return sheets(
        images, question, f"Drawings of a diffusion model of the digits 0 to 4. {sentences(rows)[1]}"
    )


@styled
def spectra(rows: Sequence[Row]) -> Picture:
    """The excess of each rank on permuted pixels; singular values of ΔW in both models."""
    f = found(rows)
    figure, (line,) = axes(columns=3, size=(12.6, 5.0))
    tasks = permutations(f)
    for (task, colour), (_, mark) in zip(shades(tasks).items(), LOOKS, strict=False):
        y = np.array([f.excess(task, r) for r in f.ranks(task)])
        line[0].fill_between(f.ranks(task), y.min(1), y.max(1), color=colour, alpha=0.2, linewidth=0)
        line[0].plot(f.ranks(task), np.median(y, 1), color=colour, marker=mark, markersize=7,
                     label=f"k = {planted(task)}")  # fmt: skip
    line[0].set(xlabel="rank r of LoRA", ylabel="loss over the base's", yscale="log", title="permuted pixels")
    line[0].set_xticks(f.ranks(permutations(f)[0]))
    line[0].set_ylim(top=1e3 * line[0].get_ylim()[1])  # room for the legend
    line[0].legend(title="planted", loc="upper right", ncols=len(tasks))
    width = SHAPE.hidden_size
    noise = relative(noise_spectrum((width, width), np.random.default_rng(0)))
    for ax, task in zip(line[1:], (CLASSIFIED[0], DRAWN), strict=True):
        top = max(f.ranks(task))
        for s, colour, style, label in (
            (f.spectrum(task, "lora", top), BLUE, "-", f"LoRA, r = {top}"),
            (f.spectrum(task, "full"), "black", "--", NAMES["full"]), (noise, GREY, ":", "noise"),
        ):  # fmt: skip
            ax.plot(range(1, len(s) + 1), s, color=colour, linestyle=style, label=label, linewidth=2.5)
        ax.set(xlabel="singular value of ΔW", title=TITLES[task], ylim=(0, 1.03))
    line[1].set_ylabel("over the largest (median map)")
    line[1].legend(loc="upper right")
    answer = f"the planted rank is the first that suffices for {elbows(f)} permutations"
    figure.suptitle(f"Which rank do images need, and which does ΔW have?\n{answer}")
    return Picture(figure, f"{answer[0].upper()}{answer[1:]}. {sentences(rows)[3]}")


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"ranks": ranks(rows), "drawings": drawings(rows), "spectra": spectra(rows)}
