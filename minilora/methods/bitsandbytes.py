"""A 4-bit weight in files, as bitsandbytes names and stores its parts.

    X.weight                                 codes, two in a byte      uint8 (ceil(O I / 2), 1)
    X.weight.absmax                          scales of blocks          float32, or uint8 if quantized twice
    X.weight.quant_map                       the 16 values             float32
    X.weight.nested_absmax                   scales of the scales      float32
    X.weight.nested_quant_map                the 256 values of those   float32
    X.weight.quant_state.bitsandbytes__nf4   JSON: type, sizes, dtype, shape, offset     uint8

transformers loads such a folder with bitsandbytes, and this package loads theirs. Its kernels
have the values of nf4 and fp4 built in, so a file with other values is refused, and int4 has no form. The map
of 256 values is taken from the file, since its last bit depends on the machine that computed it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..backend import to_device, to_host, xp
from ..errors import FormatError, NonFiniteError, UnsupportedError, short
from .four_bit import BLOCKS, SCALES, Blocks, Scales, U, book, dynamic_map, finite, scale_values, unwritten

STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__([a-z0-9]{1,8})")  # of a weight, and its kind
KINDS = ("nf4", "fp4")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MOST = 1 << 12  # bytes of JSON; real ones have some 150
FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
DTYPES = ("float32", "float16", "bfloat16", "float64")  # of the weight before; it is decoded in the model's
NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


def config_of(blocks: Blocks, dense: Iterable[str]) -> dict[str, Any]:
    """The entry quantization_config of config.json, from one of the weights and the names of dense maps."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": blocks.kind,
        "bnb_4bit_use_double_quant": isinstance(blocks.absmax, Scales),
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *sorted(set(dense) - {"lm_head"})],  # as in their files
    }


def is_four_bit(config: object) -> bool:
    """Whether an entry quantization_config means 4-bit weights of bitsandbytes."""
    if not isinstance(config, dict):
        return False
    return config.get("quant_method", "bitsandbytes") == "bitsandbytes" and config.get("load_in_4bit") is True


def parts_of(name: str, blocks: Blocks) -> dict[str, np.ndarray]:
    """The tensors of a weight, by name; UnsupportedError for a kind that bitsandbytes does not have."""
    if blocks.kind not in KINDS:
        raise UnsupportedError(
            f"{name} is {blocks.kind}; expected nf4 or fp4, which bitsandbytes' files can hold"
        )
    state: dict[str, Any] = {"quant_type": blocks.kind, "blocksize": blocks.block}
    state |= {"dtype": np.dtype(blocks.dtype).name, "shape": list(blocks.shape)}
    parts = {"quant_map": book(blocks.kind)}
    scales = blocks.absmax
    if isinstance(scales, Scales):
        offset = float(to_host(scales.offset))
        state |= {"nested_blocksize": SCALES, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"absmax": to_host(scales.codes), "nested_absmax": to_host(scales.absmax)}
        parts["nested_quant_map"] = to_host(scales.values)
    else:
        parts["absmax"] = to_host(scales)
    parts[f"quant_state.bitsandbytes__{blocks.kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {name: to_host(blocks.codes)[:, None]} | {f"{name}.{part}": a for part, a in parts.items()}


def shape_of(what: str, kind: str, state: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape in a weight's state, once all of it is checked.

    FormatError, or UnsupportedError for another kind; the message begins with `what`.
    """
    expected = FIELDS | (NESTED if "nested_offset" in state else set())
    if state.keys() != expected:
        odd = sorted(state.keys() ^ expected)[0]
        raise FormatError(f"{what}: the state {'has' if odd in state else 'lacks'} {short(odd)}")
    for field, values in (
        ("quant_type", (kind,)), ("blocksize", BLOCKS), ("dtype", DTYPES),
        ("nested_blocksize", (SCALES,)), ("nested_dtype", ("float32",)),
    ):  # fmt: skip
        if field in state and (state[field] not in values or type(state[field]) is not type(values[0])):
            raise FormatError(
                f"{what}: {field} is {short(state[field])}; expected {' or '.join(map(str, values))}"
            )
    if kind not in KINDS:
        raise UnsupportedError(f"{what}: quant_type is {short(kind)}; expected nf4 or fp4")
    shape, offset = state["shape"], state.get("nested_offset", 0.0)
    sides = shape if isinstance(shape, list) else []
    if len(sides) != 2 or not all(type(n) is int and 0 < n < 1 << 30 for n in sides):
        raise FormatError(f"{what}: shape is {short(shape)}; expected two ints, at least 1")
    if type(offset) is not float or not abs(offset) <= float(np.finfo(np.float32).max):
        raise FormatError(f"{what}: nested_offset is {short(offset)}; expected a finite number in float32")
    return tuple(sides)


def blocks_of(
    what: str, state: Mapping[str, Any], codes: np.ndarray, parts: Mapping[str, np.ndarray], dtype: Any
) -> Blocks:
    """The weight of a checked state, its codes and its other parts, to be decoded in `dtype`.

    FormatError, which begins with `what`, for parts of another length or type, for other values than the
    kind's, and for a scale below zero; NonFiniteError for a scale that is not finite in `dtype`.
    """
    kind, block, shape = state["quant_type"], state["blocksize"], tuple(state["shape"])
    size, double = math.prod(shape), "nested_offset" in state
    count = -(-size // block)
    forms = {"quant_map": ("float32", len(book(kind))), "absmax": ("uint8" if double else "float32", count)}
    if double:
        forms |= {"nested_absmax": ("float32", -(-count // SCALES)), "nested_quant_map": ("float32", 256)}
    if odd := sorted(parts.keys() ^ forms.keys()):
        raise FormatError(f"{what}.{odd[0]} is {'not expected' if odd[0] in parts else 'missing'}")
    forms["codes"] = "uint8", (size + 1) // 2
    for name, a in {"codes": codes.reshape(-1), **parts}.items():
        wanted, length = forms[name]
        if a.shape != (length,) or a.dtype != wanted:
            raise FormatError(f"{what}: {name} is {a.dtype} {a.shape}; expected {wanted} ({length},)")
    if not np.array_equal(parts["quant_map"], book(kind)):
        raise FormatError(f"{what}: quant_map has other values than those of {kind}")
    if double and not np.allclose(parts["nested_quant_map"], dynamic_map(), rtol=4 * U, atol=0):
        raise FormatError(f"{what}: nested_quant_map has other values than those of 8-bit dynamic numbers")
    top = parts["nested_absmax" if double else "absmax"]
    if (top < 0).any():
        raise FormatError(f"{what}: a scale is {top.min():.3g}; expected at least 0")

    def kept(a: Any) -> Any:
        return unwritten(to_device(np.array(a)))

    scales: Any = kept(parts["absmax"])
    if double:
        values, usual = parts["nested_quant_map"], scale_values(xp.ndarray)
        own = usual if values.tobytes() == to_host(usual).tobytes() else kept(values)
        scales = Scales(scales, kept(top), kept(np.float32(state["nested_offset"])), own)
    blocks = Blocks(kept(codes.reshape(-1)), scales, shape, np.dtype(dtype), kind, block)
    if not finite(blocks):
        raise NonFiniteError(f"{what}: the scales are not finite in {blocks.dtype}")
    return blocks
