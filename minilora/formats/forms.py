"""Schemas of our own JSON files: forms, built from each other, that a value must match.

A form is a function of a value's name and the value. It raises FormatError, naming the exact element, if the
value does not match. A digest shows that a file is as it was written; a form, that its content makes sense.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import FormatError, short

Form = Callable[[str, Any], None]
LARGEST = sys.float_info.max


def wrong(name: str, value: Any, expected: str) -> FormatError:
    """The error that a form raises."""
    return FormatError(f"{name} is {short(value)}; expected {expected}")


def check(right: Callable[[Any], bool], expected: str) -> Form:
    """Values for which `right` is true."""

    def form(name: str, value: Any) -> None:
        if not right(value):
            raise wrong(name, value, expected)

    return form


text = check(lambda value: type(value) is str, "a string")
flag = check(lambda value: type(value) is bool, "true or false")
real = check(lambda value: type(value) is float, "a number with a decimal point")


def whole(low: int = 0, high: int = 1 << 53) -> Form:
    """Whole numbers from `low` to `high`; no bool."""
    return check(
        lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"
    )


def number(low: float = -LARGEST, high: float = LARGEST) -> Form:
    """Finite numbers from `low` to `high`, whole or not."""
    return check(
        lambda value: type(value) in (int, float) and low <= value <= high,
        f"a number from {low:g} to {high:g}",
    )


def one(*values: str | int | None) -> Form:
    """One of these values, of the same type."""
    return check(
        lambda value: any(type(value) is type(v) and value == v for v in values),
        " or ".join(map(repr, values)),
    )


def maybe(part: Form) -> Form:
    """Null, or a value of this form."""

    def form(name: str, value: Any) -> None:
        if value is not None:
            part(name, value)

    return form


def anything(name: str, value: Any) -> None:
    """Any value; it is compared elsewhere."""


def several(part: Form, least: int = 0) -> Form:
    """Lists of `least` or more values of one form."""

    def form(name: str, value: Any) -> None:
        if type(value) is not list or len(value) < least:
            raise wrong(name, value, f"a list of {least} or more values")
        for i, v in enumerate(value):
            part(f"{name}[{i}]", v)

    return form


def tuple_of(*parts: Form) -> Form:
    """Lists with one value for each form, in order."""

    def form(name: str, value: Any) -> None:
        if type(value) is not list or len(value) != len(parts):
            raise wrong(name, value, f"a list of {len(parts)} values")
        for i, (part, v) in enumerate(zip(parts, value, strict=True)):
            part(f"{name}[{i}]", v)

    return form


def named(part: Form) -> Form:
    """Objects with any keys and values of one form."""

    def form(name: str, value: Any) -> None:
        if type(value) is not dict:
            raise wrong(name, value, "an object")
        for key, v in value.items():
            part(f"{name}[{short(key)}]", v)

    return form


def has(parts: Mapping[str, Form]) -> Form:
    """Objects with at least these keys, each with its form."""

    def form(name: str, value: Any) -> None:
        if type(value) is not dict:
            raise wrong(name, value, "an object")
        for key, part in parts.items():
            if key not in value:
                raise FormatError(f"{name}.{key} is missing")
            part(f"{name}.{key}", value[key])

    return form


def record(parts: Mapping[str, Form], optional: Mapping[str, Form] | None = None) -> Form:
    """Objects with exactly these keys, and any of the optional ones, each with its form."""
    every = {**parts, **(optional or {})}

    def form(name: str, value: Any) -> None:
        has(parts)(name, value)
        for key in value:
            if key not in every:
                raise FormatError(f"{name}.{short(key)} is unknown; expected {', '.join(every)}")
            if key not in parts:
                every[key](f"{name}.{key}", value[key])

    return form
