"""safetensors files: the header is checked whole before a number is read, and tensors are read one by one.

    8 bytes N, little-endian | N bytes of JSON: name -> dtype, shape, [begin, end) | the numbers, row-major

The package `safetensors` cannot give bfloat16 to NumPy, accepts a name that is given twice, and orders
two entries of metadata at random. So the container is read and written here: strictly, and with the same
bytes for the same tensors. The package's writer and reader are the oracle in the tests. Of integers only U8,
the bytes of a quantized weight, is read (`bytes_of`); for others, booleans and 8-bit floats the error names
the tensor and its dtype. No pickle is ever opened.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..digests import of_arrays
from ..errors import FormatError, MismatchError, UnsupportedError, short
from .atomic import Stamp, read_at, read_pieces, stamp_of

FLOATS = {"F64": "<f8", "F32": "<f4", "BF16": "<u2", "F16": "<f2"}  # in a file, and in this order
KNOWN = FLOATS | {"U8": "u1"}  # a quantized weight's codes
OTHERS = {"BOOL", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "C64"}
EIGHT_BIT = {"F8_E4M3": "u1"}
WHOLE = {"I32": "<i4", "I64": "<i8"}
OTHER_FLOATS = re.compile(r"F(8|6|4)_[A-Z0-9]{1,20}|F4|F8")
CALLED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NAMED = CALLED | {"uint8": "U8"}
LONGEST = 100_000_000  # bytes of header
MOST = 100_000  # tensors; factors of every expert of DeepSeek-V3 (58 layers, 256 experts) are 89,088
POINTER = b"version https://git-lfs."  # the beginning of a Git LFS pointer file
BRIEF = 1024  # bytes; a pointer has fewer
LONGEST_NAME = 500
PRINTABLE = re.compile(rf"[!-~]{{1,{LONGEST_NAME}}}")


def no_bytes(name: str) -> np.ndarray:
    """FormatError: none of these tensors is one of bytes."""
    raise FormatError(f"{name}: is stored in a format without tensors of bytes")


@dataclass(frozen=True, eq=False)
class Tensors(Mapping[str, np.ndarray]):
    """Name -> array, read on access: float64 as it is, all narrower dtypes as float32."""

    where: str  # the file or folder, for messages
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # F64, F32, F16, BF16, or a type of GGUF
    fetch: Callable[[str], np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # differences from the file
    bytes_of: Callable[[str], np.ndarray] = no_bytes  # of a U8 tensor, as uint8
    packed: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)  # 4-bit weights: dtype -> codes

    def renamed(self, names: Mapping[str, str], notes: tuple[str, ...] = ()) -> Tensors:
        """Some of the tensors under new names (new name -> old name), with notes on the change."""
        shapes = {new: self.shapes[old] for new, old in names.items()}
        dtypes = {new: self.dtypes[old] for new, old in names.items()}
        packed = {new: self.packed[old] for new, old in names.items() if old in self.packed}
        return replace(
            self, shapes=shapes, dtypes=dtypes, fetch=lambda new: self.fetch(names[new]), notes=notes,
            bytes_of=lambda new: self.bytes_of(names[new]), packed=packed,
        )  # fmt: skip

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self.fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes


def open_tensors(path: Path | str, *, adapter: bool = False) -> Tensors:
    """Open a safetensors file; only its header is read now.

    It may hold tensors of other dtypes (a base's positions or masks), which are refused on access. Of an
    `adapter` also 8-bit floats (E4M3) are read, and whole numbers if a tensor holds one: an alpha.
    StorageError, FormatError, UnsupportedError or MismatchError name the file and the tensor.
    """
    start, stamp, metadata, places = header_of(path)

    def fetch(name: str) -> np.ndarray:
        dtype, shape, begin, stop = places[name]
        if adapter and (kind := EIGHT_BIT.get(dtype) or (math.prod(shape) == 1 and WHOLE.get(dtype))):
            if stop - begin != (need := math.prod(shape) * np.dtype(kind).itemsize):
                what = f"has {stop - begin} bytes; expected {need}"
                raise FormatError(f"{path}: {name}: {what} for {dtype} {short(shape)}")
            held = np.frombuffer(read_at(path, start + begin, need, stamp), kind).reshape(shape)
            return e4m3(held) if dtype in EIGHT_BIT else held.astype(np.float64)
        if dtype not in FLOATS:
            raise UnsupportedError(f"{path}: {name}: dtype is {dtype}; expected one of {', '.join(FLOATS)}")
        raw = read_at(path, start + begin, stop - begin, stamp)
        return values(np.frombuffer(raw, FLOATS[dtype]).reshape(shape), dtype)

    def bytes_of(name: str) -> np.ndarray:
        dtype, shape, begin, stop = places[name]
        if dtype != "U8":
            raise FormatError(f"{path}: {name}: dtype is {dtype}; expected U8")
        if stop - begin != math.prod(shape):
            raise FormatError(f"{path}: {name}: has {stop - begin} bytes; expected {short(shape)} of U8")
        return np.frombuffer(read_at(path, start + begin, stop - begin, stamp), np.uint8).reshape(shape)

    shapes = {name: place.shape for name, place in places.items()}
    dtypes = {name: place.dtype for name, place in places.items()}
    return Tensors(str(path), shapes, dtypes, fetch, metadata, bytes_of=bytes_of)


class Place(NamedTuple):
    """What a header says of a tensor; its bytes are counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a file's header says: where the numbers start, of which file, its strings, its tensors."""

    start: int
    stamp: Stamp
    metadata: Mapping[str, str]
    places: Mapping[str, Place]


def header_of(path: Path | str) -> Header:
    """The header of a safetensors file, checked; errors as in `open_tensors`."""
    stamp = stamp_of(path)
    size = stamp.size
    if size < 8:
        raise FormatError(f"{path}: has {size} bytes; a safetensors file has at least 8")
    length = int.from_bytes(read_at(path, 0, 8, stamp), "little")
    if length > LONGEST or length > size - 8:
        refuse_pointer(path, read_at(path, 0, min(size, BRIEF), stamp))
        most = min(LONGEST, size - 8)
        raise FormatError(f"{path}: header length {length}; expected at most {most} in {size} bytes")
    raw = read_at(path, 8, length, stamp)
    if (count := raw.count(b'"data_offsets"')) > MOST:  # before an object is made for each
        raise FormatError(f"{path}: header has {count} tensors; expected at most {MOST}")
    if not raw.startswith(b"{"):  # a blank or a byte order mark before it
        raise FormatError(f"{path}: the header is not a JSON object: {short(raw[:40])}")
    header = json_object(f"{path}: the header", raw)
    metadata = {} if (given := header.pop("__metadata__", None)) is None else given  # null: MLX
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise FormatError(f"{path}: __metadata__ is {short(metadata)}; expected strings by name")
    places = {name: check_entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, begin, stop) in in_order(places):
        if begin != end:
            what = "overlap others" if begin < end else "leave a hole"
            raise FormatError(
                f"{path}: {name}: data_offsets [{begin}, {stop}] {what}; expected to begin at {end}"
            )
        end = stop
    if end != size - 8 - length:
        raise FormatError(f"{path}: has {size} bytes; its header says {8 + length + end}")
    return Header(8 + length, stamp, metadata, places)


def in_order(places: Mapping[str, Place]) -> list[tuple[str, Place]]:
    """The tensors in the order of their bytes."""
    return sorted(places.items(), key=lambda item: item[1][2:])


def refuse_pointer(path: Path | str, start: bytes) -> None:
    """FormatError if `start`, the first BRIEF bytes of a file, is a Git LFS pointer: it was never fetched."""
    if len(start) < BRIEF and start.startswith(POINTER):
        size = re.search(rb"^size (\d{1,18})$", start, re.MULTILINE)
        number = f" of {int(size[1]):,} bytes" if size else ""
        raise FormatError(
            f"{path}: is a pointer of Git LFS, not the file{number} itself; fetch it: git lfs pull, or "
            "download it from the hub"
        )


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object; ValueError if a key is given twice."""
    members = dict(pairs)
    if len(members) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {short(twice)} is given twice")
    return members


def json_object(what: str, raw: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys; FormatError, which begins with `what`, for anything else."""
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{what} is not a JSON object: {str(e)[:120]}") from e
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object: {short(value)}")
    return value


def check_name(path: Path | str, name: str) -> None:
    """MismatchError, or FormatError, unless a tensor's name can be printed and is not too long."""
    if not PRINTABLE.fullmatch(name):
        kind = FormatError if re.search("[\ud800-\udfff]", name) else MismatchError  # it fits no module
        expected = f"printable ASCII, at most {LONGEST_NAME} characters"
        raise kind(f"{path}: the tensor name {ascii(name)[:120]} is invalid; expected {expected}")


def check_entry(path: Path | str, name: str, entry: Any) -> Place:
    """One tensor's entry; errors as in `open_tensors`."""

    def wrong(what: str, value: object, expected: str) -> FormatError:
        return FormatError(f"{path}: {short(name)}: {what} is {short(value)}; expected {expected}")

    check_name(path, name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("entry", entry, "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not (dtype in {*KNOWN, *OTHERS} or OTHER_FLOATS.fullmatch(dtype)):
        raise wrong("dtype", dtype, f"one of {', '.join(FLOATS)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise wrong("shape", shape, "a list of at most 8 ints, at least 0")
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:  # NumPy refuses it, even an empty one
        raise wrong("shape", shape, "sides whose product is below 2**60, a 0 counted as 1")
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise wrong("data_offsets", offsets, "two ints")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise wrong("data_offsets", offsets, "0 <= begin <= end")
    if dtype in FLOATS and end - begin != (need := math.prod(shape) * np.dtype(FLOATS[dtype]).itemsize):
        raise wrong("data_offsets", offsets, f"{short(need)} bytes for {dtype} {short(shape)}")
    return Place(dtype, tuple(shape), begin, end)


def values(a: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of an array as it is in a file: of F64 in float64, of all narrower dtypes in float32."""
    if dtype == "BF16":
        return widened(a)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return a.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


def encoded(a: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as an array that is in a file, rounded to nearest; of bfloat16 by way of float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (narrowed(a) if dtype == "BF16" else a).astype(KNOWN[dtype], copy=False)


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 (as uint16) to float32, whose upper half it is. Exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def e4m3(bits: np.ndarray) -> np.ndarray:
    """8-bit floats (as uint8) to float32: a sign, 4 bits of exponent, 3 of fraction, no infinities. Exact."""
    sign, exponent, fraction = np.where(bits & 0x80, -1.0, 1.0), (bits >> 3 & 0xF).astype(int), bits & 7
    size = np.ldexp(np.where(exponent, 8.0 + fraction, 2.0 * fraction), np.where(exponent, exponent, 0) - 10)
    return np.where(bits & 0x7F == 0x7F, np.nan, sign * size).astype(np.float32)


def narrowed(a: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16 (as uint16), ties to even; NaN stays NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        u = np.ascontiguousarray(a, np.float32).view(np.uint32)
    upper = (u >> 16).astype(np.uint16)
    rounded = ((u + (0x7FFF + (upper & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(a), upper | np.uint16(0x40), rounded).reshape(np.shape(a))


def stored(a: np.ndarray, dtype: str) -> np.ndarray:
    """An array as it is when written as "float32", ... and read back: itself, if it is that already."""
    if dtype == "bfloat16":
        return widened(narrowed(a))
    with np.errstate(over="ignore", invalid="ignore"):
        wide = np.float64 if dtype == "float64" else np.float32
        return a.astype(dtype, copy=False).astype(wide, copy=False)


def joined(where: str, homes: Mapping[str, tuple[Tensors, str]]) -> Tensors:
    """The tensors of several files as one mapping: name -> its file and its name there."""

    def each(part: str) -> dict[str, Any]:
        return {name: getattr(file, part)[own] for name, (file, own) in homes.items()}

    def fetch(name: str) -> np.ndarray:
        file, own = homes[name]
        return file[own]

    def bytes_of(name: str) -> np.ndarray:
        file, own = homes[name]
        return file.bytes_of(own)

    packed = {name: file.packed[own] for name, (file, own) in homes.items() if own in file.packed}
    return Tensors(where, each("shapes"), each("dtypes"), fetch, bytes_of=bytes_of, packed=packed)


def layout(
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    kept: Container[str] = (),
) -> Iterator[bytes]:
    """The bytes of a safetensors file, piece by piece: each array as it is, or all but `kept` as `dtype`.

    The order is the package's: wider dtypes first, then by name; the metadata is sorted.
    """
    kinds = {
        name: NAMED[a.dtype.name if name in kept else dtype or a.dtype.name] for name, a in tensors.items()
    }
    shapes = {name: a.shape for name, a in tensors.items()}
    return streamed(shapes, kinds, tensors.__getitem__, metadata)


def streamed(
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, str],
    fetch: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[bytes]:
    """The same for tensors of these shapes and dtypes (F32, ...) that are fetched one at a time."""
    order = sorted(shapes, key=lambda name: (list(KNOWN).index(kinds[name]), name))
    sizes = {name: size_of(kinds[name], shapes[name]) for name in order}
    yield head(dict(sorted((metadata or {"format": "pt"}).items())), kinds, shapes, sizes)
    for name in order:
        yield encoded(fetch(name), kinds[name]).tobytes()


def rewritten(
    path: Path | str, kinds: Mapping[str, str], pieces: Callable[[str], Iterable[bytes]]
) -> Iterator[bytes]:
    """The bytes of a safetensors file with other numbers in some tensors: their dtypes and bytes by name.

    All else is copied, and so is the header if no dtype changes. StorageError if the file changes meanwhile.
    """
    start, stamp, metadata, places = header_of(path)
    order = in_order(places)
    if all(kinds.get(name, place.dtype) == place.dtype for name, place in order):
        yield from read_pieces(path, 0, start, stamp)
    else:
        dtypes = {name: kinds.get(name, place.dtype) for name, place in order}
        shapes = {name: place.shape for name, place in order}
        sizes = {
            name: size_of(kinds[name], place.shape) if name in kinds else place.end - place.begin
            for name, place in order
        }
        yield head(metadata, dtypes, shapes, sizes)
    for name, place in order:
        if name in kinds:
            yield from pieces(name)
        else:
            yield from read_pieces(path, start + place.begin, start + place.end, stamp)


def size_of(kind: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor of a dtype that can be written."""
    return math.prod(shape) * np.dtype(KNOWN[kind]).itemsize


def head(
    metadata: Mapping[str, str],
    kinds: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
) -> bytes:
    """The first bytes of a file, of tensors with these sizes in this order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name, size in sizes.items():
        offsets = [begin, begin := begin + size]
        header[name] = {"dtype": kinds[name], "shape": list(shapes[name]), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def sealed(tensors: Mapping[str, Any], dtype: Any = None) -> str:
    """sha256 over names, shapes and values, sorted by name; values as they are, or as `dtype`."""
    return of_arrays(((name, tensors[name]) for name in sorted(tensors)), dtype)
