"""What does LoRA cost? Parameters, memory of training and bytes on disk, from the dimensions of real models.

    trained n = Σ r (O + I)      full (w + g + o) P      LoRA w P + (w + g + o) n      file = header + b n

Each of P parameters takes w bytes, its gradient g, and the optimizer o: AdamW's two moments, and in mixed
precision a float32 copy (Rajbhandari et al. 2020, section 3.1; Dettmers et al. 2023, section 1, without it).
QLoRA holds the maps of the blocks in 4 bits and the rest in 16 (section 3 there). The dimensions are those of
the released config.json, and of GPT-2 and GPT-3 those of Hu et al. 2021, who adapt only their attention.
A row is exact and made without an array; for the small base, adapters are also trained for a step and
written, and each byte is counted where it is. Leaves out activations and what an allocator adds.
"""

import copy
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.count import ATTENTION, LLAMAS, PAPER, QV, Counts, Tree, count, modules
from ..formats import forms
from ..formats.huggingface import located
from ..formats.safetensors import CALLED, FLOATS, layout
from ..lora import inject
from ..lora_files.recognise import WEIGHTS
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..optim import AdamW
from ..peft.folder import PREFIX, labels
from ..peft.loading import save_adapter
from ..tree import named_params, size, trained
from . import harness
from .harness import Inputs, Progress, Row

MODELS = (*LLAMAS, "gpt-2-medium", "gpt-2-large", "gpt-3")  # the base stands before them
MATRICES: dict[str, str | tuple[str, ...]] = {"QV": QV, "QKVO": ATTENTION, "all": "all-linear"}
RANKS = (1, 4, 8, 16, 64)
DTYPES = ("float32", "bfloat16")  # of a file
MIXED = "mixed precision"
STATES = {  # what a trained number takes: w, g and o
    "float32": (4, 4, 8),
    MIXED: (2, 2, 12),  # 16 bits, and a float32 copy in the optimizer
    "bfloat16": (2, 2, 8),  # with moments in float32
}
WAYS = ("full", "LoRA", "QLoRA")


@dataclass(frozen=True)
class Plan:
    """The base whose adapters are written; the models, matrices and ranks are the question itself."""

    base: str = "base"


QUICK: dict[str, Any] = {}  # the whole grid takes seconds


@dataclass(frozen=True)
class Run:
    """One model, set of matrices and rank."""

    kind: str  # "counted" or "written"
    model: str
    matrices: str
    rank: int

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    source = "Hu et al. 2021" if run.model in PAPER else "config.json"
    do = counted if run.kind == "counted" else written
    return harness.row_of(run, source, lambda: do(run, inputs))


def counted(run: Run, inputs: Inputs) -> Row:
    """Parameters of the model, of the adapted maps and of the adapter; bytes of training and of the file."""
    name = run.model if run.model in MODELS else str(located(inputs.path))
    found = count(name, run.rank, MATRICES[run.matrices])
    row = {
        "total": found.total,
        "maps": sum(math.prod(target.shape) * target.number for target in found.rows),
        "parameters": found.parameters,
        "memory": {state: memory(found, *widths) for state, widths in STATES.items()},
    }
    if run.model in PAPER:  # whose modules have other names
        return row | {"file": None}
    tree = modules(name, MATRICES[run.matrices])
    return row | {"file": {dtype: file_size(tree, run.rank, dtype) for dtype in DTYPES}}


def memory(found: Counts, w: int, g: int, o: int) -> dict[str, list[int]]:
    """Way to train -> bytes of weights, gradients and optimizer."""
    total, n = found.total or 0, found.parameters
    packed = (found.memory or {})["QLoRA"].weights - 2 * n  # the base in 4 bits
    frozen = {"full": 0, "LoRA": w * total, "QLoRA": packed}
    learned = {"full": total, "LoRA": n, "QLoRA": n}
    return {way: [frozen[way] + w * learned[way], g * learned[way], o * learned[way]] for way in WAYS}


def file_size(tree: Tree, rank: int, dtype: str) -> int:
    """Bytes of the file that `save_adapter` writes for these modules, header included; no array is made."""
    shapes: dict[str, tuple[int, int]] = {}
    for row in tree.rows:
        if row.adapted:
            O, I = row.shape  # noqa: E741
            name = f"{PREFIX}{row.module}.lora_"
            shapes |= {f"{name}A.weight": (rank, I), f"{name}B.weight": (O, rank)}
    blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    header = next(layout(blank, dtype, labels("0" * 64, "0" * 64)))
    return len(header) + sum(map(math.prod, shapes.values())) * np.dtype(FLOATS[CALLED[dtype]]).itemsize


def written(run: Run, inputs: Inputs) -> Row:
    """The same of an adapter of the base that is really there: trained for one step, and written."""
    model = copy.deepcopy(inputs.base)
    inject(model, LoraConfig(run.rank, run.rank, MATRICES[run.matrices]), rng=np.random.default_rng(0))
    row: Row = {"parameters": size(trained(model)), "held": held(model)}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            save_adapter(model, Path(folder, dtype), dtype=dtype)
        return row | {"file": {dtype: Path(folder, dtype, WEIGHTS).stat().st_size for dtype in DTYPES}}


def held(model: Llama) -> list[int]:
    """Bytes of weights, gradients and optimizer in one step of AdamW, as the arrays lie there."""
    ids, optimizer, params = np.zeros((1, 2), np.int64), AdamW(1e-3), named_params(model).values()
    _, back = model.loss(ids, ids, train=True)
    back()
    weights = sum(p.data.nbytes for p in params)
    gradients = sum(p.grad.nbytes for p in params if p.grad is not None)
    optimizer.step(trained(model))
    return [weights, gradients, sum(a.nbytes for a in optimizer.state().values())]


# ---- the whole


def run(
    plan: Plan,
    out: Path | str,
    *,
    jobs: int | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Do the runs that are missing in the folder `out`; return all rows in the plan's order.

    Errors as in `harness.open_store`; ConfigError for a base that has no room for these ranks.
    """
    inputs = harness.read_inputs(plan.base, ())
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        store.finish(
            Run(kind, model, matrices, rank)
            for kind, models in (("counted", (plan.base, *MODELS)), ("written", (plan.base,)))
            for model in models
            for matrices in MATRICES
            if matrices != "all" or model not in PAPER
            for rank in RANKS
        )
        return store.close()


BYTES = forms.tuple_of(*[forms.whole()] * 3)  # of weights, gradients and optimizer
FILE = forms.record(dict.fromkeys(DTYPES, forms.whole(1)))
FORM = harness.form_of({
    "counted": {
        "total": forms.whole(1),
        "maps": forms.whole(1),
        "parameters": forms.whole(1),
        "memory": forms.record(dict.fromkeys(STATES, forms.record(dict.fromkeys(WAYS, BYTES)))),
        "file": forms.maybe(FILE),
    },
    "written": {"parameters": forms.whole(1), "held": BYTES, "file": FILE},
})  # fmt: skip
