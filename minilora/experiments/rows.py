"""One run of a sweep, and the form of its row.

A row's digest shows that it is as it was written. This file defines a row: the fields that a run of its kind
leaves, their types and sizes, what follows from its config, and what the rows of a target share. Every row
that passes can be tabled and drawn.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..data import corpora
from ..errors import FormatError, MismatchError, short
from ..formats import forms
from .harness import EVERY, LOSS, SIZE, Row, id_of


@dataclass(frozen=True)
class Run:
    """One cell of the grid, complete: the same Run gives the same row."""

    kind: str  # "base", "oracle", "search" or "final"
    target: str
    method: str  # "none", "lora" or "full"
    rank: int = 0
    modules: tuple[str, ...] = ()
    alpha: float = 0.0
    seed: int = 0
    lr: float = 0.0
    eps: float = 1e-8  # AdamW's
    steps: int = 0
    batch: int = 0
    base: str = "base"
    text: str = ""  # the digest of the target's corpus
    fallback: bool = False  # the text could not be fetched: the standard library's instead
    test_windows: int = 512
    valid_windows: int = 64

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return id_of(asdict(self))


def every(steps: int) -> int:
    """The number of steps between two evaluations."""
    return max(steps // 10, 1)


def measured(steps: int) -> list[int]:
    """The steps at which a learning curve is measured."""
    return [*range(0, steps, every(steps)), steps]


SIDES = 1 << 27  # O x I of the largest matrix for which noise is drawn
RANK = forms.whole(0, 1 << 20)
KINDS: dict[Any, forms.Form] = {
    str: forms.text,
    bool: forms.flag,
    int: forms.whole(),
    float: SIZE,
    tuple[str, ...]: forms.several(forms.text),
}
CONFIG = {f.name: KINDS[f.type] for f in fields(Run)} | {"rank": RANK}
METHODS = {"base": ("none",), "oracle": ("none",), "search": ("lora", "full"), "final": ("lora", "full")}
CONFIGS = {
    kind: forms.record(CONFIG | {"kind": forms.one(kind), "method": forms.one(*methods)})
    for kind, methods in METHODS.items()
}
SPECTRUM = forms.several(SIZE, least=1)
LOSSES = {"valid": LOSS, "test": LOSS, "parameters": forms.whole()}
RESULTS = {  # kind of run -> the results in its row
    "base": LOSSES | {"base_digest": forms.text},
    "oracle": LOSSES,
    "search": {"valid": LOSS, "parameters": forms.whole()},
    "final": LOSSES | {
        "curve": forms.several(forms.tuple_of(forms.whole(), LOSS)),
        "spectra": forms.named(SPECTRUM),
        "shapes": forms.named(forms.tuple_of(forms.whole(1), forms.whole(1))),
    },
}  # fmt: skip
TRUTH = {"floor": LOSS, "spectra": forms.record({"model.embed_tokens": SPECTRUM})}  # of a permutation's base
VARIES = {"kind", "method", "rank", "seed", "lr", "modules", "alpha", "eps"}  # may vary within a target
HEAD_OF_ROW = forms.has({
    "config": forms.has({"kind": forms.one(*METHODS), "target": forms.text}),
    "status": forms.one("done", "diverged"),
})  # fmt: skip


def form_of(row: Row) -> forms.Form:
    """The form that a row of this kind, target and status must have."""
    kind = row["config"]["kind"]
    parts = EVERY | {"config": CONFIGS[kind], "status": forms.text}
    if row["status"] == "diverged":
        return forms.record(parts | {"error": forms.text})
    known = kind == "base" and corpora.swaps_of(row["config"]["target"])
    gap = {"gap_closed": forms.maybe(forms.number())} if kind == "final" else {}
    return forms.record(parts | RESULTS[kind] | (TRUTH if known else {}), gap)


def check_row(where: str, row: Row) -> None:
    """FormatError, naming the field, unless a run could have left this row."""
    HEAD_OF_ROW(where, row)
    form_of(row)(where, row)
    config = row["config"]
    kind, rank = config["kind"], config["rank"]
    if (rank > 0) != (config["method"] == "lora" or kind == "oracle"):
        raise forms.wrong(f"{where}.config.rank", rank, "1 or more for LoRA and the oracle, 0 for all others")
    if kind != "final" or row["status"] != "done":
        return
    if [step for step, _ in row["curve"]] != measured(config["steps"]):
        raise forms.wrong(f"{where}.curve", row["curve"], f"the steps {measured(config['steps'])}")
    if row["spectra"].keys() != row["shapes"].keys() or not row["shapes"]:
        raise FormatError(f"{where}: shapes and spectra are of different modules, or there are none")
    for path, (O, I) in row["shapes"].items():  # noqa: E741
        if O * I > SIDES or len(row["spectra"][path]) != min(O, I, rank or O):
            raise FormatError(f"{where}.spectra[{short(path)}] does not fit a change of shape {O} x {I}")


def facts_of(row: Row) -> Iterator[tuple[str, Any]]:
    """(What, value) pairs that all final runs on one target must share."""
    config = row["config"]
    method = config["method"]
    yield from ((name, value) for name, value in config.items() if name not in VARIES)
    yield f"modules of {method}", config["modules"]
    if row["status"] == "done":
        yield f"spectra of {method}", sorted(row["shapes"])
        for path, shape in row["shapes"].items():
            yield f"shape of {short(path.rpartition('.')[2])}", shape


def check_together(path: str, rows: Iterable[Row]) -> None:
    """MismatchError if the rows of a target come from several sweeps, which cannot be compared."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["config"]["kind"] == "final":
            target = row["config"]["target"]
            known = first.setdefault(target, {})
            for what, value in facts_of(row):
                if known.setdefault(what, value) != value:
                    raise MismatchError(
                        f"{path}: run {row['id']} on {short(target)}: {what} is {short(value)}; "
                        f"expected {short(known[what])}, as in the rows above"
                    )
    for target, known in first.items():
        lora, full = (known.get(f"spectra of {method}") for method in ("lora", "full"))
        if lora and full and (alone := set(lora) - set(full)):
            raise MismatchError(
                f"{path}: full fine-tuning on {short(target)} has no spectrum of {short(min(alone))}; "
                "expected one of each module that LoRA adapts"
            )
