"""A LoRA of any tool -> a file of another tool, with the same ΔW: what was written is read and compared.

|ΔW' - ΔW| = 0 where the form can hold the factors as they are, else the rounding of s B in float32
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import on_cores
from ..errors import InputError, MismatchError, NonFiniteError, UnsupportedError, nearest
from ..formats.atomic import check_free, make_folder, refuse_same, write_atomic, write_folder
from ..formats.huggingface import heads_of, read_json
from ..formats.safetensors import streamed
from ..lora_files.contents import MAGNITUDE, Entry, gathered, inherited
from ..lora_files.names import of_sgm, whole
from ..lora_files.opening import read_single
from ..lora_files.recognise import CONFIG, WEIGHTS
from ..spectra import norm, quotient, thin_values
from ..table import counted, report
from .folder import FACTORS, OF_TABLE, PREFIX, Adapter, change_norm, of_contents, open_adapter
from .image_forms import Module, Written, diffusers, kohya, modules_of, split
from .language_forms import gguf, gguf_bytes, mlx

FORMS = ("peft", "kohya", "diffusers", "mlx", "gguf")
LARGEST = {  # numbers of each dtype
    "F64": float(np.finfo(np.float64).max), "F32": float(np.finfo(np.float32).max),
    "BF16": 3.3895313892515355e38, "F16": 65504.0,
}  # fmt: skip
ENDINGS = {
    "kohya": ".safetensors",
    "diffusers": ".safetensors",
    "gguf": ".gguf",
}  # of those that are one file
WRITERS = {"kohya": kohya, "diffusers": diffusers, "mlx": mlx}


@report
@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote; prints as lines."""

    out: str
    form: str
    modules: int
    norm: float  # |ΔW| over all modules
    difference: float  # |ΔW' - ΔW| over all modules, of what was written and read again
    notes: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> list[str]:
        what = counted(self.modules, "module", "modules")
        lines = [
            f"{self.out}: {what} in the form of {self.form}; read again, its ΔW differs by "
            f"{quotient(self.difference, self.norm):.1e} of |ΔW|"
        ]
        return [*lines, *(f"note: {note}" for note in self.notes)]


def convert(
    source: Path | str,
    out: Path | str,
    to: str,
    *,
    base: Path | str | None = None,
    alpha: float | None = None,
    r: int | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write a LoRA of any tool in the form of another: "peft", "kohya", "diffusers", "mlx" or "gguf".

    ΔW stays. A factor changes only where the form has no place for its scale or rank, and then it is float32.
    Strings of the header are kept; Flux is split for diffusers and fused for kohya. `base`, a folder with
    config.json, tells the heads and the architecture on which llama.cpp's and torchtune's files depend;
    `alpha` and `r` are as in `open_adapter`. UnsupportedError names what the form cannot hold, StorageError
    an output that exists, unless `overwrite`; nothing is written then.
    """
    if to not in FORMS:
        raise InputError(f"to is {to!r}; {nearest(str(to), FORMS)}")
    out = Path(out)
    ending = ENDINGS.get(to, "")
    if ending != out.suffix and (ending or out.suffix in ENDINGS.values()):
        what = f"a name that ends in {ending}" if ending else "the name of a folder"
        raise InputError(f"{out}: expected {what} for the form of {to}")
    if not (ending and overwrite):  # a file is replaced by a file, whatever it is
        check_free(out, overwrite)
    config = None if base is None else read_json(Path(base) / "config.json")
    heads = heads_of(config or {})
    given = open_adapter(source, alpha=alpha, r=r, heads=heads)
    refuse_same(out, given.where)
    if given.by_inputs and to != "kohya":
        what = f"{given.by_inputs[0]} has a magnitude of each input"
        raise UnsupportedError(f"{given.where}: {what}, which the form of {to} cannot hold")
    modules = modules_of(given, f"the form of {to}")
    header, notes = given.tensors.metadata, given.notes
    if to == "gguf":
        data: Any = gguf_bytes(*gguf(modules, config, heads))
    else:
        written = peft(given, modules, header) if to == "peft" else WRITERS[to](modules, header)
        data = container(written.tensors, written.header)
        notes += written.notes
        if ending:  # whether its names can be read again, before anything is replaced
            preview = read_single(gathered(str(out), written.tensors, written.header))
            paired(modules, modules_of(of_contents(out, preview), to), str(out))
    if copies := [pair.copy for pair in given.pairs.values() if pair.copy]:
        notes += (f"{counted(len(copies), 'copy', 'copies')} of the base's weights left out, as {copies[0]}",)
    if ending:
        make_folder(out.parent)
        write_atomic(out, data)
    else:

        def fill(folder: Path) -> None:
            text = json.dumps(dict(written.config or {}), indent=2, sort_keys=True) + "\n"
            write_atomic(folder / CONFIG, text.encode())
            write_atomic(folder / ("adapters.safetensors" if to == "mlx" else WEIGHTS), data)

        write_folder(out, fill, overwrite)
    again = open_adapter(out, heads=heads)
    off, size = compared(paired(modules, modules_of(again, to), str(out)))
    return Conversion(str(out), to, len(again.pairs), size, off, notes)


def peft(given: Adapter, modules: Mapping[str, Module], header: Mapping[str, str]) -> Written:
    """PEFT's tensors, as they are, and config."""
    tensors: dict[str, Entry] = {}
    for path, module in modules.items():
        at = PREFIX + path
        ends = OF_TABLE if module.table else FACTORS
        tensors |= {f"{at}.{ends[0]}": module.A, f"{at}.{ends[1]}": module.B}
        if module.magnitude:
            tensors[f"{at}.{MAGNITUDE}"] = module.magnitude
    return Written(tensors, {**inherited(header, (), ()), "format": "pt"}, given.settings.fields)


def container(tensors: Mapping[str, Entry], header: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file; NonFiniteError for a value that its dtype cannot hold."""

    def fetch(name: str) -> np.ndarray:
        a = np.asarray(tensors[name].read())
        if not abs(a).max(initial=0.0) <= LARGEST[tensors[name].dtype]:
            raise NonFiniteError(f"{name} is too large for {tensors[name].dtype}; nothing was written")
        return a

    shapes = {name: entry.shape for name, entry in tensors.items()}
    return streamed(shapes, {name: entry.dtype for name, entry in tensors.items()}, fetch, header)


def paired(
    before: Mapping[str, Module], after: Mapping[str, Module], where: str
) -> list[tuple[Module | None, Module]]:
    """The modules before and after, matched whatever their names' dots; Flux's maps are split if need be.

    MismatchError if one is missing, if two have one name, or if only one of a pair has a magnitude.
    """
    old, new = known(before, where), known(after, where)
    if old.keys() != new.keys():
        old, new = known(split(before), where), known(split(after), where)
    if missing := old.keys() - new.keys():
        raise MismatchError(f"{where}: {min(missing)} would not be found again in this form")
    for name, module in old.items():
        if (module.magnitude is None) != (new[name].magnitude is None) or module.axis != new[name].axis:
            raise MismatchError(f"{where}: the magnitude of {name} would not be found again in this form")
    return [(old.get(name), module) for name, module in new.items()]


def known(modules: Mapping[str, Module], where: str) -> dict[str, Module]:
    """The modules by names without dots, a U-Net's in diffusers' form; MismatchError if two are the same."""
    made: dict[str, Module] = {}
    for path, module in modules.items():
        name = of_sgm(whole(path)).replace(".", "_")
        if name in made:
            raise MismatchError(f"{where}: {path} and another module would have the same name")
        made[name] = module
    return made


def compared(pairs: Iterable[tuple[Module | None, Module]]) -> tuple[float, float]:
    """|ΔW' - ΔW| and |ΔW| over all modules; MismatchError if a magnitude is another one."""
    off, size = zip(*on_cores(lambda pair: apart(*pair), pairs), strict=True)
    return math.hypot(*off), math.hypot(*size)


def apart(before: Module | None, after: Module) -> tuple[float, float]:
    """|ΔW' - ΔW| and |ΔW| of a module; where A stayed, as mostly, it is the difference of s B times A."""
    A, B = matrices(after)
    A0, B0 = matrices(before) if before else (A, 0 * B)
    s, s0 = after.scale, before.scale if before else 0.0
    vectors = [m.read().ravel() for x in (before, after) if x and (m := x.magnitude)]
    if len(vectors) == 2 and not np.array_equal(vectors[0], vectors[1]):
        raise MismatchError("what was written has another magnitude than before")
    if not np.array_equal(A, A0):
        off = norm(thin_values(np.hstack([np.float64(s) * B, -np.float64(s0) * B0]), np.vstack([A, A0])))
    elif s != s0 or not np.array_equal(B, B0):
        off = change_norm(A, np.float64(s) * B - np.float64(s0) * B0, 1.0)
    else:
        off = 0.0
    return off, change_norm(A0, B0, s0)


def matrices(module: Module) -> tuple[np.ndarray, np.ndarray]:
    """A and B, a convolution's as matrices."""
    return module.A.read().reshape(module.r, -1), module.B.read().reshape(-1, module.r)
