"""sha256 of bytes, JSON values and named arrays. The only file that hashes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from .backend import quiet_overflow, to_host


def of_bytes(data: bytes) -> str:
    """The sha256 of bytes, in hexadecimal."""
    import hashlib  # loads OpenSSL, which importing minilora does not need

    return hashlib.sha256(data).hexdigest()


def of_json(value: Any, *, sort: bool = False) -> str:
    """The sha256 of a value's JSON text, keys in their order or sorted."""
    return of_bytes(json.dumps(value, sort_keys=sort).encode())


def of_arrays(arrays: Iterable[tuple[str, Any]], dtype: Any = None, *, before: bytes = b"") -> str:
    """The sha256 of names, shapes, dtypes and numbers, in this order, each array as it is or as `dtype`.

    `before` is hashed first. Only one array is held at a time.
    """
    import hashlib

    h = hashlib.sha256(before)
    for name, array in arrays:
        with quiet_overflow():
            a = np.asarray(to_host(array), dtype, order="C")
        h.update(f"{name} {a.shape} {a.dtype.str}\n".encode())
        h.update(a.data)
    return h.hexdigest()
