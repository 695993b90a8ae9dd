"""What the experiment with costs found: rows -> tables, sentences, and three figures."""

from collections.abc import Mapping, Sequence

from ..analysis.count import human
from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, PINK, Axes, Picture, axes, styled
from ..errors import ConfigError
from ..table import Table, drawn
from .cost import MATRICES, MIXED, RANKS, STATES, WAYS
from .harness import Row

SEVEN, GPT = "llama-2-7b", "gpt-3"  # what is said is said of these
TRAINED = (SEVEN, "llama-65b", GPT)  # whose memory is shown
ARMS = {  # matrices and rank -> how they are drawn
    ("QV", 1): (BLUE, "o"),
    ("QV", 8): (ORANGE, "s"),
    ("QKVO", 16): (GREEN, "^"),
    ("all", 64): (PINK, "D"),
}
FILES = {  # matrices and dtype of a file at r = 16
    ("QKVO", "bfloat16"): (BLUE, "o"),
    ("QKVO", "float32"): (ORANGE, "s"),
    ("all", "bfloat16"): (GREEN, "^"),
    ("all", "float32"): (PINK, "D"),
}
PARTS = {"weights": (GREY, ""), "gradients": (ORANGE, "//"), "optimizer": (BLUE, "..")}
FEW, MANY, SAID_MB = (500, 1000), 10_000, (10, 50)  # times fewer, and MB, as they are said


def cell(rows: Sequence[Row], model: str, matrices: str, rank: int, kind: str = "counted") -> Row:
    """The row of one cell; ConfigError if it is not there."""
    config = {"kind": kind, "model": model, "matrices": matrices, "rank": rank}
    for row in rows:
        if row["config"] == config and row["status"] == "done":
            return row
    raise ConfigError(f"nothing was {kind} of {model}, {matrices}, r = {rank}; expected a whole grid")


def total(rows: Sequence[Row], model: str) -> int:
    """The parameters of a model."""
    return cell(rows, model, "QV", 1)["total"]


def models(rows: Sequence[Row], matrices: str = "QV") -> list[str]:
    """All models in which these matrices can be adapted, the smallest first."""
    there = {row["config"]["model"] for row in rows if row["config"]["matrices"] == matrices}
    return sorted(there, key=lambda model: (total(rows, model), model))


def times(rows: Sequence[Row], model: str, matrices: str, rank: int) -> float:
    """How many times fewer parameters are trained than the model has."""
    row = cell(rows, model, matrices, rank)
    return row["total"] / row["parameters"]


def needed(rows: Sequence[Row], model: str, matrices: str, rank: int, way: str) -> dict[str, int]:
    """Number formats -> bytes of training one way."""
    row = cell(rows, model, matrices, rank)
    return {state: sum(row["memory"][state][way]) for state in STATES}


def on_disk(rows: Sequence[Row], model: str) -> dict[tuple[str, str], int]:
    """Matrices and dtype -> bytes of the adapter's file at r = 16."""
    return {(matrices, dtype): cell(rows, model, matrices, 16)["file"][dtype] for matrices, dtype in FILES}


def saved(rows: Sequence[Row], model: str, matrices: str, rank: int) -> dict[str, float]:
    """Number formats -> by which factor LoRA needs less than full fine-tuning."""
    full, lora = (needed(rows, model, matrices, rank, way) for way in ("full", "LoRA"))
    return {state: full[state] / lora[state] for state in STATES}


def human_range(needed: Mapping[str, int]) -> str:
    """The range of some numbers of bytes, in words."""
    return f"{human(min(needed.values()))} to {human(max(needed.values()))}"


def right(rows: Sequence[Row]) -> list[bool]:
    """Of each written adapter, whether parameters, bytes held and bytes on disk are as counted."""
    return [
        (row["parameters"], row["held"], row["file"])
        == (known["parameters"], known["memory"]["float32"]["LoRA"], known["file"])
        for row in rows
        if row["config"]["kind"] == "written"
        for c in [row["config"]]
        for known in [cell(rows, c["model"], c["matrices"], c["rank"])]
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Parameters and files of every model, and the memory that training takes."""
    lines = []
    for model in models(rows):
        there = [arm for arm in ARMS if model in models(rows, arm[0])]
        numbers = [f"{cell(rows, model, *a)['parameters']:,} ({times(rows, model, *a):,.0f})" for a in there]
        lines.append((model, f"{total(rows, model):,}", *numbers, *[""] * (len(ARMS) - len(there))))
    taken = [
        (f"{model}, {way}", *map(human, needed(rows, model, "QKVO", 16, way).values()))
        for model in TRAINED
        for way in WAYS
    ]
    files = [
        (model, human(2 * total(rows, model)), *(human(size) for size in on_disk(rows, model).values()))
        for model in models(rows, "all")
    ]
    head = ("model", "parameters", *(f"{matrices}, r = {r}" for matrices, r in ARMS))
    head_files = ("model", "itself, 16 bits", *(f"{matrices}, {dtype}" for matrices, dtype in FILES))
    return [
        Table(head, lines, "parameters that LoRA trains, and in brackets how many times more the model has"),
        Table(("training", *STATES), taken, "weights, gradients and optimizer, r = 16 on all of attention"),
        Table(head_files, files, "adapter_model.safetensors at r = 16"),
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words."""
    usual, file = cell(rows, SEVEN, "QKVO", 16), on_disk(rows, SEVEN)
    P, n = usual["total"], usual["parameters"]
    full, lora, packed = (needed(rows, SEVEN, "QKVO", 16, way)[MIXED] for way in WAYS)
    lowest, highest = (human(needed(rows, SEVEN, "QKVO", r, "LoRA")[MIXED]) for r in (RANKS[0], RANKS[-1]))
    many = [sum(times(rows, model, "QV", r) >= MANY for model in models(rows)) for r in RANKS[:2]]
    taken, left = (human_range(needed(rows, GPT, "QV", 4, way)) for way in ("full", "LoRA"))
    less = saved(rows, GPT, "QV", 4).values()
    as_counted = right(rows)
    return [
        f"{SEVEN} has {P:,} parameters: {human(4 * P)} in float32, {human(2 * P)} in 16 bits.",
        f"r = 16 on all of attention trains {n:,} of them, {P / n:.0f} times fewer; {FEW[0]} to {FEW[1]:,} "
        f"times fewer are {between(rows)}.",
        f"{MANY:,} times fewer or more: on Q and V with {many[0]} of {len(models(rows))} models at "
        f"r = {RANKS[0]}, with {many[1]} at r = {RANKS[1]} ({GPT}: {times(rows, GPT, 'QV', RANKS[1]):,.0f}).",
        f"Training all of {SEVEN} in mixed precision takes {human(full)} without activations, LoRA "
        f"{human(lora)}, beside 4 bits {human(packed)}. Of LoRA's, {2 * P / lora:.0%} is the frozen base: "
        f"r = {RANKS[0]} takes {lowest}, r = {RANKS[-1]} {highest}.",
        f"{GPT} takes {taken} in full and {left} with r = 4 on Q and V: {min(less):.1f} to {max(less):.1f} "
        "times less, by the number format.",
        f"On disk the adapter takes {human(file['QKVO', 'bfloat16'])} in 16 bits, "
        f"{(file['QKVO', 'bfloat16'] - 2 * n) / 1000:.0f} kB of it header, and "
        f"{human(file['QKVO', 'float32'])} in float32; on all maps {human(file['all', 'bfloat16'])} and "
        f"{human(file['all', 'float32'])}.",
        f"Parameters, bytes in memory and bytes on disk are as counted in {sum(as_counted)} of "
        f"{len(as_counted)} adapters of the base that were trained for a step and written.",
    ]  # fmt: skip


def between(rows: Sequence[Row]) -> str:
    """With which matrices and ranks models of 7 to 8 billion parameters train 500 to 1,000 times fewer."""
    return ", ".join(
        f"{model} {matrices} r = {r} ({x:.0f})"
        for model in models(rows)
        if 6e9 < total(rows, model) < 9e9
        for matrices in MATRICES
        for r in RANKS
        for x in [times(rows, model, matrices, r)]
        if FEW[0] <= x <= FEW[1]
    )


def named(ax: Axes, names: Sequence[str], rows: Sequence[Row]) -> None:
    """The models and their sizes below an axis, whose other one is in powers of ten."""
    units = {"B": 10**9, "M": 10**6, "k": 1}
    said = []
    for name in names:
        P = total(rows, name)
        unit = next(unit for unit, least in units.items() if least <= P)
        said.append(f"{drawn(name)}\n{P / max(units[unit], 1000):.3g} {unit}")
    ax.set_xticks(range(len(names)), said, rotation=40, ha="right", fontsize=10)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")


@styled
def parameters(rows: Sequence[Row]) -> Picture:
    """How many times fewer parameters are trained, for every model."""
    figure, ((ax,),) = axes(size=(10.4, 6.0))
    names = models(rows)
    ax.axhspan(*FEW, color=GREY, alpha=0.25, linewidth=0, label="said: 500 to 1,000")
    ax.axhline(MANY, color=GREY, linestyle="--", label="said: 10,000")
    for (matrices, r), (colour, mark) in ARMS.items():
        there = [(i, times(rows, name, matrices, r)) for i, name in enumerate(names)
                 if name in models(rows, matrices)]  # fmt: skip
        ax.plot(*zip(*there, strict=True), color=colour, marker=mark, markersize=8, linestyle=":",
                label=f"{matrices}, r = {r}")  # fmt: skip
    named(ax, names, rows)
    ax.set_ylabel("parameters of the model over trained ones")
    figure.legend(loc="outside right center")
    usual, most = times(rows, SEVEN, "QKVO", 16), times(rows, GPT, "QV", 1)
    answer = f"{SEVEN}, r = 16 on attention: {usual:.0f}; {GPT}, r = 1 on Q and V: {most:,.0f}"
    figure.suptitle(f"How many times fewer parameters does LoRA train?\n{answer}")
    return Picture(figure, f"The model's parameters over the trained ones. {' '.join(sentences(rows)[1:3])}")


@styled
def training(rows: Sequence[Row]) -> Picture:
    """The memory of training three models in full, with LoRA and with QLoRA, in its parts."""
    figure, (line,) = axes(columns=len(TRAINED), size=(4.0 * len(TRAINED), 4.6))
    for ax, model in zip(line, TRAINED, strict=True):
        taken = cell(rows, model, "QKVO", 16)["memory"][MIXED]
        left = [0.0] * len(WAYS)
        for i, (part, (colour, hatch)) in enumerate(PARTS.items()):
            width = [taken[way][i] / 1e9 for way in WAYS]
            ax.barh(WAYS, width, left=left, color=colour, hatch=hatch, edgecolor="white", label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
        for way, end in zip(WAYS, left, strict=True):
            ax.text(end, way, f" {end:,.0f} GB" if end >= 100 else f" {end:.1f} GB", va="center")
        ax.set(title=model, xlabel="GB", xlim=(0, 1.35 * max(left)))
        ax.invert_yaxis()
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS))
    full, lora, packed = (human(needed(rows, SEVEN, "QKVO", 16, way)[MIXED]) for way in WAYS)
    answer = f"{SEVEN}: {full} in full, {lora} with LoRA, {packed} in 4 bits: the frozen weights remain"
    figure.suptitle(f"How much memory does training take, without activations?\n{answer}")
    return Picture(figure, f"Mixed precision, r = 16 on all of attention. {sentences(rows)[3]}")


@styled
def disk(rows: Sequence[Row]) -> Picture:
    """The file of an adapter of rank 16, counted for every model and written for the base."""
    figure, ((ax,),) = axes(size=(10.4, 6.0))
    names, (low, high) = models(rows, "all"), SAID_MB
    ax.axhspan(low, high, color=GREY, alpha=0.25, linewidth=0, label=f"said: {low} to {high} MB")
    written = [row for row in rows if row["config"]["kind"] == "written" and row["config"]["rank"] == 16]
    for (matrices, dtype), (colour, mark) in FILES.items():
        y = [on_disk(rows, name)[matrices, dtype] / 1e6 for name in names]
        ax.plot(y, color=colour, marker=mark, markersize=8, linestyle=":", label=f"{matrices}, {dtype}")
        for row in written:
            if (c := row["config"])["matrices"] == matrices:
                at, size = names.index(c["model"]), row["file"][dtype] / 1e6
                ax.plot(at, size, color="black", marker="x", markersize=12, linestyle="")
    named(ax, names, rows)
    ax.set_ylabel("adapter_model.safetensors, r = 16 (MB)")
    figure.legend(loc="outside right center", title="×: written")
    half, single, _, largest = map(human, on_disk(rows, SEVEN).values())
    answer = f"{SEVEN}: {half} in 16 bits, {single} in float32; on all maps up to {largest}"
    figure.suptitle(f"How large is an adapter on disk?\n{answer}")
    return Picture(figure, f"The size of an adapter's file. {' '.join(sentences(rows)[5:])}")


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"parameters": parameters(rows), "training": training(rows), "disk": disk(rows)}
