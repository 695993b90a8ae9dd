"""What a rank sweep found: rows -> a table for the terminal, and one HTML page with all figures."""

import math
import re
from pathlib import Path

from ..analysis import plotting, report
from ..data import corpora
from ..table import Table, printed
from . import rank_figures
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
    complete = rank_figures.targets(rows)
    names = figure_names(rows)
    for target in complete:
        adapted = rank_figures.kinds(rank_figures.final(rows, target))
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
        rate, spread = (f"{lr:.2g}", f"{min(tests):.4f} to {max(tests):.4f}") if lr else ("", "")
        gap = f"{math.fsum(gaps) / len(gaps):.0%}" if gaps else ""
        loss = f"{math.fsum(tests) / len(tests):.4f}"
        cells.append((name, f"{done[0]['parameters']:,}", rate, loss, spread, gap))
    return cells


def table(rows: list[Row]) -> str:
    """The results as a table for the terminal."""
    out: list[str | Table] = []
    measured = (row["config"] for row in rows if row["config"]["kind"] in ("base", "final"))
    for target in dict.fromkeys(config["target"] for config in measured):
        fallback = any(r["config"]["fallback"] for r in rows if r["config"]["target"] == target)
        note = "; a fallback text, since the named one could not be fetched" if fallback else ""
        head = f"{target}  (test loss in nats per character{note})"
        out += [head, Table(HEAD, lines(rows, target)), ""]
    return printed(*out)


def report_page(rows: list[Row], pictures: dict[str, plotting.Picture]) -> str:
    """The whole sweep as one HTML page."""
    parts = []
    names = figure_names(rows)
    for target in names:
        some = [row for row in rows if row["config"]["target"] == target]
        parts.append(report.heading(rank_figures.title(target)))
        parts.append(report.paragraph(f"Text: {some[0]['source']}."))
        parts.append(Table(HEAD, lines(rows, target), "Test loss in nats per character").html())
        if full := rank_figures.select(some, kind="final", method="full"):
            flat = f"Has full fine-tuning flattened? {rank_figures.flattening(full)}. {CAVEAT}"
            parts.append(report.paragraph(flat))
        drawn = [f"{kind}_{names[target]}" for kind in FIGURES]
        parts += [report.drawing(name, pictures[name]) for name in drawn if name in pictures]
    if "gap_against_parameters" in pictures:
        parts.append(report.heading("What the parameters buy"))
        parts.append(report.drawing("gap", pictures["gap_against_parameters"]))
    made: Row = {}
    for target in names:
        last = next(row["config"] for row in reversed(rows) if row["config"]["target"] == target)
        made[target] = (
            f"{last['steps']} steps of {last['batch']} windows of {LENGTH} characters; LoRA on "
            f"{', '.join(last['modules'])} with alpha {last['alpha']:g}; AdamW eps {last['eps']:g}; "
            f"tested on at most {last['test_windows']} windows, evenly over the held-out text"
        )
    made["learning rate"] = "chosen on the validation split, by short runs with a separate seed"
    parts.append(report.facts(made | rows[0]["versions"]))
    return report.page("Which rank does a task need?", parts)
