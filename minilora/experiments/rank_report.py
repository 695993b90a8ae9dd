"""What a rank sweep found: rows -> a table for the terminal, and one HTML page with all figures."""

import math
import re
from pathlib import Path

from ..analysis import plotting, report
from ..data import corpora
from ..table import Table, printed
from . import rank_figures, rank_reading
from .harness import Row
from .rank_sweep import TABLE
from .recipe import LENGTH

FIGURES = {  # of one target: what the file's name begins with, and who draws it
    "loss_against_rank": rank_figures.loss_against_rank,
    "known_rank": rank_figures.known_rank,
    "spectra": rank_figures.spectra,
    "energy": rank_figures.energy_and_effective_rank,
    "curves": rank_figures.learning_curves,
}
HEAD = ("method", "parameters", "learning rate", "test loss", "range over seeds", "gap closed")
RANGE = HEAD.index("range over seeds")
ASKED = (
    "What was asked: a base model is frozen, and LoRA adapts it to another text. Which rank r is enough for "
    "that text, beside training all weights? And of the directions that it allows, how many does ΔW use?"
)
FIRST = ("ΔW and rank r", "gain", "full fine-tuning", "gap closed", "effective rank", "noise")
TABLED = ("nats", "range over seeds")
DRAWN = ("singular values", "energy")
CAVEAT = (
    "The learning rate falls to zero over a run, so part of this is due to the schedule; "
    "a sweep with twice the --steps shows how much."
)


def figure_names(rows: list[Row]) -> dict[str, str]:
    """Target -> the suffix of its figures' file names, different for each target."""
    names: dict[str, str] = {}
    for target in dict.fromkeys(row["config"]["target"] for row in rows):
        stem = name = re.sub(r"[^A-Za-z0-9]+", "_", Path(target).stem)[:100]  # file names have a length limit
        while name in names.values():
            name = f"{stem}_{len(names) + 1}"
        names[target] = name
    return names


def pictures(rows: list[Row]) -> dict[str, plotting.Picture]:
    """All figures whose runs are in the rows, by file name."""
    drawn = {}
    complete = rank_reading.targets(rows)
    names = figure_names(rows)
    for target in complete:
        adapted = rank_reading.kinds(rank_reading.final(rows, target))
        known = corpora.swaps_of(target) and TABLE.modules[0] in adapted
        for kind, draw in FIGURES.items():
            if kind != "known_rank" or known:
                drawn[f"{kind}_{names[target]}"] = draw(rows, target)
    if complete:
        drawn["gap_against_parameters"] = rank_figures.gap_against_parameters(rows)
    return drawn


def lines(rows: list[Row], target: str) -> list[tuple[str, ...]]:
    """One target's table as text, a line for each method with the mean and range of its loss over seeds."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        c = row["config"]
        if c["target"] == target and c["kind"] in ("base", "final"):
            groups.setdefault((c["method"], c["rank"]), []).append(row)
    cells: list[tuple[str, ...]] = []
    for (method, rank), group in groups.items():
        done = [row for row in group if row["status"] == "done"]
        name = {"none": "frozen base", "full": "full fine-tuning", "lora": f"LoRA r = {rank}"}[method]
        if len(done) < len(group):
            name += f" ({len(group) - len(done)} diverged)"
        lr = group[0]["config"]["lr"]
        if not done:
            cells.append((name, "", f"{lr:.2g}", "diverged", "", ""))
            continue
        tests = [row["test"] for row in done]
        gaps = [row["gap_closed"] for row in done if row.get("gap_closed") is not None]
        rate = f"{lr:.2g}" if lr else ""
        spread = f"{min(tests):.4f} to {max(tests):.4f}" if lr and len(tests) > 1 else ""
        gap = f"{math.fsum(gaps) / len(gaps):.0%}" if gaps else ""
        loss = f"{math.fsum(tests) / len(tests):.4f}"
        cells.append((name, f"{done[0]['parameters']:,}", rate, loss, spread, gap))
    return cells


def finals(rows: list[Row]) -> list[Row]:
    """The measured runs with a seed."""
    return [row for row in rows if row["config"]["kind"] == "final"]


def table(rows: list[Row]) -> str:
    """The results as a table for the terminal."""
    out: list[str | Table] = []
    measured = (row["config"] for row in rows if row["config"]["kind"] in ("base", "final"))
    for target in dict.fromkeys(config["target"] for config in measured):
        fallback = any(r["config"]["fallback"] for r in rows if r["config"]["target"] == target)
        note = "; a fallback text, since the named one could not be fetched" if fallback else ""
        head = f"{target}  (test loss in nats per character{note})"
        out += [head, results(rows, target), ""]
    return printed(*out)


def results(rows: list[Row], target: str, caption: str = "") -> Table:
    """One target's table; without ranges where every method has a single seed."""
    found = Table(HEAD, lines(rows, target), caption)
    if any(line[RANGE] for line in found.rows):
        return found
    head, *cut = ((*line[:RANGE], *line[RANGE + 1 :]) for line in (found.head, *found.rows))
    return Table(head, cut, caption)


def report_page(rows: list[Row], pictures: dict[str, plotting.Picture]) -> str:
    """The whole sweep as one HTML page: what was asked, the answer, and what it rests on."""
    names, complete = figure_names(rows), rank_reading.targets(rows)
    told = [f"{rank_reading.title(target)}. {found(rows, target)}" for target in complete]
    missing = [
        f"{rank_reading.title(target)}. No answer, since not all kinds of its runs are finished."
        for target in names
        if target not in complete
    ]
    sections = {
        "The answer": [report.paragraph(ASKED), report.points([*told, *missing]), report.terms(*FIRST)]
    }
    first, later = [report.terms(*TABLED)], [report.terms(*DRAWN)]
    for target in names:
        some = [row for row in rows if row["config"]["target"] == target]
        heading = rank_reading.title(target)
        caption = f"{heading}: test loss in nats per character, {rank_reading.over_seeds(finals(some))}"
        parts = [report.paragraph(f"Text: {some[0]['source']}."), *first]
        parts.append(report.boxed(results(rows, target, caption)))
        if target in complete:
            parts += [report.paragraph(text) for text in notes(some, target)]
        drawn = [f"{kind}_{names[target]}" for kind in FIGURES if f"{kind}_{names[target]}" in pictures]
        if drawn:
            parts += later
            first, later = [], []
        parts += [report.drawing(name, pictures[name]) for name in drawn]
        sections[heading if heading not in sections else f"{heading} ({target})"] = parts
    if "gap_against_parameters" in pictures:
        sections["What the parameters buy"] = [report.drawing("gap", pictures["gap_against_parameters"])]
    made: Row = {}
    for target in names:
        last = next(row["config"] for row in reversed(rows) if row["config"]["target"] == target)
        made[target] = (
            f"{last['steps']} steps of {last['batch']} windows of {LENGTH} characters; LoRA on "
            f"{', '.join(last['modules'])} with alpha {last['alpha']:g}; AdamW eps {last['eps']:g}; "
            f"tested on at most {last['test_windows']} windows, evenly over the held-out text"
        )
    made["learning rate"] = "chosen on the validation split, by short runs with a separate seed"
    sections["How this was made"] = [report.facts(made | rows[0]["versions"])]
    return report.page("Which rank does a task need?", sections)


def found(rows: list[Row], target: str) -> str:
    """The answer for a target, in a few sentences."""
    said = (rank_reading.answer(rows, target), reached(rows, target), rank_reading.used(rows, target))
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in said)


def reached(rows: list[Row], target: str) -> str:
    """How much of the gap to full fine-tuning LoRA closes."""
    lora = [row for row in rank_reading.final(rows, target) if row.get("gap_closed") is not None]
    if not lora:
        return "full fine-tuning is no better than the base, so there is no gap to close"
    ranks, y = rank_reading.by_rank(lora, "gap_closed")
    best = int(y[:, 0].argmax())
    return (
        f"LoRA closes {y[0, 0]:.0%} of the gap to full fine-tuning at r = {ranks[0]}, and at most "
        f"{y[best, 0]:.0%}, at r = {ranks[best]}"
    )


def notes(rows: list[Row], target: str) -> list[str]:
    """What must be known to read the numbers of a target."""
    lora, full = (rank_reading.final(rows, target, method) for method in ("lora", "full"))
    steps, weights = full[0]["config"]["steps"], full[0]["parameters"]
    told = [
        f"LoRA adapts {rank_reading.adapted(lora)}; full fine-tuning trains all {weights:,} weights. Both "
        f"take {steps} steps."
    ]
    if max(row.get("gap_closed") or 0 for row in lora) > 1:
        told.append(
            "Where LoRA closes more than 100 % of the gap, its test loss is below full fine-tuning's: 100 % "
            "is what training all weights reached in as many steps, not the best that is possible."
        )
    if len({row["config"]["seed"] for row in lora + full}) == 1:
        told.append("There is a single seed, so nothing here says how much the losses vary between seeds.")
    return [*told, f"Has full fine-tuning flattened? {rank_reading.flattening(full)}. {CAVEAT}"]
