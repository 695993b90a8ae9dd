"""The modules of an adapter -> tables: by kind and one by one, narrow for a terminal, wide for a page, CSV.

Chance's values stand in brackets.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import ConfigError, nearest
from ..table import Table, counted, plain, shortened
from .measures import BesideBase, BesideOther, Group, Module, group
from .names import brief

WIDTH = 80  # characters of a terminal's line
LEAST = 12  # of a name in it, however wide the numbers are
SORTS: dict[str, Callable[[Module], Any]] = {
    "model": lambda m: 0,  # as the modules come
    "name": lambda m: m.module,
    "norm": lambda m: -m.norm,
    "rank": lambda m: -m.ranks.effective,
    "at99": lambda m: -m.ranks.at99,
}
METADATA = (  # entries that are shown first, those of kohya's sd-scripts and of ai-toolkit
    "modelspec.title", "ss_output_name", "modelspec.date", "modelspec.architecture", "ss_base_model_version",
    "ss_sd_model_name", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    "ss_optimizer", "ss_learning_rate", "ss_steps", "software",
)  # fmt: skip
OURS = "format", "minilora"  # entries that say nothing of the training


def ordered(modules: Sequence[Module], sort: str) -> list[Module]:
    """The modules in another order, the largest first; ConfigError for an order that there is not."""
    if sort not in SORTS:
        raise ConfigError(f"sort is {sort!r}; expected one of {', '.join(SORTS)}; {nearest(sort, SORTS)}")
    return sorted(modules, key=SORTS[sort])


# ---- for a terminal


def fitted(names: Sequence[str], head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of at most 80 characters: names that are too long lose their usual words, then their middle."""
    widths = (max(map(len, column)) for column in zip(head[1:], *rows, strict=True))
    room = max(WIDTH - sum(width + 2 for width in widths), LEAST)
    names = [plain(name) for name in names]
    if any(len(name) > room for name in names):
        names = [brief(name) for name in names]
    return Table(head, [(shortened(name, room), *row) for name, row in zip(names, rows, strict=True)])


def wrapped(text: str) -> list[str]:
    """A text as lines of at most 80 characters, if its words allow that."""
    return textwrap.wrap(plain(text), WIDTH, break_long_words=False, break_on_hyphens=False)


def groups(modules: Sequence[Module]) -> dict[str, dict[str, list[Module]]]:
    """Component -> kind -> modules, in the order in which they come."""
    found: dict[str, dict[str, list[Module]]] = {}
    for m in modules:
        found.setdefault(m.component, {}).setdefault(m.kind, []).append(m)
    return found


LEGEND = (
    "count: modules. Ranks are medians over them, in brackets those of noise; 90 % and 99 %: what holds so "
    "much of a module's |ΔW|². keep: the least common rank that keeps 99 % of all."
)
KIND_HEAD = "kind", "count", "r", "|ΔW|", "eff. rank", "90 %", "99 %", "keep"


def by_kind(modules: Sequence[Module]) -> Table:
    """A line for each kind of module, below one for its component if components are named."""
    found, names, rows = groups(modules), [], []
    named = any(found)
    for component, kinds in found.items():
        if named:
            names.append(component or "-")
            rows.append(group_cells(group([m for some in kinds.values() for m in some])))
        for kind, some in kinds.items():
            names.append(f"  {kind}" if named else kind)
            rows.append(group_cells(group(some)))
    return fitted(names, KIND_HEAD, rows)


def group_cells(g: Group) -> Sequence[str]:
    """The cells of a group."""
    return (
        str(g.modules), span(g), f"{g.median_norm:.3g}", f"{g.effective:.1f} ({g.noise:.1f})", f"{g.at90:g}",
        f"{g.at99:g}", str(g.suggested_rank),
    )  # fmt: skip


SURVEY_HEAD = "adapter", "count", "r", "params", "|ΔW|", "eff. rank", "99 %", "keep"


def survey(names: Sequence[str], numbers: Sequence[Group | None]) -> Table:
    """A line for each adapter, empty where its numbers are not known."""
    rows: list[Sequence[str]] = []
    for g in numbers:
        if g is None:
            rows.append(("",) * (len(SURVEY_HEAD) - 1))
            continue
        count, r, _, effective, _, at99, keep = group_cells(g)
        rows.append((count, r, size(g.parameters), f"{g.norm:.3g}", effective, at99, keep))
    return fitted(names, SURVEY_HEAD, rows)


def size(parameters: int) -> str:
    """A number of parameters, such as 30.5k or 1.2M."""
    return f"{parameters / 1e6:.3g}M" if parameters >= 1e6 else f"{parameters / 1e3:.3g}k"


def span(g: Group) -> str:
    """The ranks of a group, such as 8 or 4-16."""
    return str(g.r_min) if g.r_min == g.r_max else f"{g.r_min}-{g.r_max}"


def narrow(modules: Sequence[Module], base: bool, against: bool) -> Iterator[Table]:
    """The tables of modules for a terminal."""
    rows: list[Sequence[str]] = [
        (
            str(m.r), f"{m.norm:.3g}", f"{m.ranks.effective:.1f} ({m.noise.effective:.1f})",
            f"{m.ranks.at90} ({m.noise.at90})", f"{m.ranks.at99} ({m.noise.at99})",
        )
        for m in modules
    ]  # fmt: skip
    yield fitted([m.module for m in modules], ("module", "r", "|ΔW|", "eff. rank", "90 %", "99 %"), rows)
    if base and (some := [(m.module, m.base) for m in modules if m.base]):
        rows = [
            (
                f"{b.relative:.2e}", f"{b.amplification:.3g} ({b.random_amplification:.3g})",
                f"{b.overlap:.3f} ({b.random_overlap:.3f})", intruders(b),
            )
            for _, b in some
        ]  # fmt: skip
        head = "module", "|ΔW|/|W|", "amplifies", "overlap", "intruders"
        yield fitted([name for name, _ in some], head, rows)
    if against and (others := [(m.module, m.other) for m in modules if m.other]):
        rows = [
            (
                f"{o.cosine:.3f}", f"{o.inputs[0]:.3f} ({o.random_inputs[0]:.3f})",
                f"{o.inputs[-1]:.3f} ({o.random_inputs[-1]:.3f})",
                f"{o.outputs[-1]:.3f} ({o.random_outputs[-1]:.3f})",
            )
            for _, o in others
        ]  # fmt: skip
        head = "module", "cosine", "phi(1) in", "phi(r) in", "phi(r) out"
        yield fitted([name for name, _ in others], head, rows)


def metadata_lines(metadata: Mapping[str, str], every: bool) -> Iterator[str]:
    """What a file says of its training: the usual entries, or every one; long values lose their middle."""
    first = [key for key in METADATA if key in metadata]
    rest = sorted(metadata.keys() - {*first} - ({*OURS} if not every else set()))
    for key in [*first, *rest] if every else first:
        name = shortened(plain(key), WIDTH // 2)
        yield f"{name}: {shortened(plain(readable(metadata[key])), WIDTH - 2 - len(name))}"
    if rest and not every:
        what = counted(len(rest), "more entry", "more entries")
        yield f"{what} of metadata: --metadata shows all"


def readable(value: str) -> str:
    """A value of metadata; a JSON object as name=value, ..."""
    try:
        found = json.loads(value)
        if not isinstance(found, dict):
            return value
        return ", ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in found.items())
    except (ValueError, RecursionError):
        return value


# ---- for a page


def wide(modules: Sequence[Module], base: str | None, against: str | None) -> Iterator[Table]:
    """The tables of modules with all their numbers."""
    yield Table(HEAD, [cells(m) for m in modules], "Every module")
    if base:
        rows = [base_cells(m.module, m.base) for m in modules if m.base]
        yield Table(BASE_HEAD, rows, f"Against the base {base}")
    if against:
        rows = [other_cells(m.module, m.other) for m in modules if m.other]
        yield Table(OTHER_HEAD, rows, f"Against the adapter {against}")


HEAD = (
    "module", "O x I", "r", "scale", "|ΔW|", "s_1", "s_r", "eff. rank", "(noise)", "stable", "(noise)",
    "at 90 %", "(noise)", "at 99 %", "(noise)",
)  # fmt: skip
BASE_HEAD = (
    "module", "|ΔW|/|W|", "amplifies", "(random)", "overlap", "(random)", "intruders", "(below |cos|)",
)  # fmt: skip
OTHER_HEAD = (
    "module", "cosine", "phi(1) in", "(random)", "phi(r) in", "(random)", "phi(r) out", "(random)",
)  # fmt: skip


def cells(m: Module) -> Sequence[str]:
    """The row of a module."""
    S, w, n = m.singular_values, m.ranks, m.noise
    return (
        m.module, "{} x {}".format(*m.shape), str(m.r), f"{m.scale:.4g}", f"{m.norm:.3g}", f"{S[0]:.3g}",
        f"{S[-1]:.2g}", f"{w.effective:.1f}", f"({n.effective:.1f})", f"{w.stable:.1f}", f"({n.stable:.1f})",
        str(w.at90), f"({n.at90})", str(w.at99), f"({n.at99})",
    )  # fmt: skip


def base_cells(module: str, b: BesideBase) -> Sequence[str]:
    """The row that compares a module with its base."""
    return (
        module, f"{b.relative:.2e}", f"{b.amplification:.3g}", f"({b.random_amplification:.3g})",
        f"{b.overlap:.3f}", f"({b.random_overlap:.3f})", intruders(b), f"({b.threshold:.2f})",
    )  # fmt: skip


def intruders(b: BesideBase) -> str:
    """How many of the first vectors are intruders."""
    return "-" if b.intruders is None else f"{b.intruders} of {len(b.cosines)}"


def other_cells(module: str, o: BesideOther) -> Sequence[str]:
    """The row that compares a module with another adapter's."""
    return (
        module, f"{o.cosine:.3f}", f"{o.inputs[0]:.3f}", f"({o.random_inputs[0]:.3f})", f"{o.inputs[-1]:.3f}",
        f"({o.random_inputs[-1]:.3f})", f"{o.outputs[-1]:.3f}", f"({o.random_outputs[-1]:.3f})",
    )  # fmt: skip


# ---- for a program


def record(m: Module) -> dict[str, Any]:
    """A module's numbers under flat names, None where they are not known."""
    O, I = m.shape  # noqa: E741
    flat: dict[str, Any] = {
        "module": m.module, "component": m.component, "kind": m.kind, "block": m.block,
        "outputs": O, "inputs": I, "r": m.r, "alpha": m.alpha, "scale": m.scale, "norm": m.norm,
        "s_1": m.singular_values[0], "s_r": m.singular_values[-1],
    }  # fmt: skip
    flat |= asdict(m.ranks) | {f"noise_{name}": value for name, value in asdict(m.noise).items()}
    for name in ("relative", "amplification", "random_amplification", "overlap", "random_overlap",
                 "intruders", "threshold"):  # fmt: skip
        flat[name] = getattr(m.base, name, None)
    return flat | {"cosine": getattr(m.other, "cosine", None), "other_norm": getattr(m.other, "norm", None)}


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same names as CSV (RFC 4180, but lines end as the system's do), the names first; plain."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: plain(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows)
    return text.getvalue()
