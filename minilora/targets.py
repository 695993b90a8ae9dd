"""Which modules a name means: targets, exclusions and saved modules -> the paths of a model.

A name means the module whose path is that name, or ends with "." and that name. A name that matches
nothing is an error, which lists the nearest names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ConfigError, MismatchError, nearest, short
from .layers import Embedding, Layer, Linear

LAYER = re.compile(r"(?:.*?\.)?[^.]+\.([0-9]+)\.")  # the number in model.layers.3.self_attn.q_proj


def names(what: str, value: object) -> list[str]:
    """A name or a list of names as a list, or ConfigError."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple | set | frozenset):
        raise ConfigError(f"{what} is {value!r}; expected a name or a list of names")
    for name in listed:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{what} has the entry {name!r}; expected a name")
    return list(listed)


def matches(entry: str, path: str) -> bool:
    """Whether a name means the module at `path`."""
    return path == entry or path.endswith("." + entry)


def resolve(what: str, entries: Sequence[str], among: Sequence[str]) -> list[str]:
    """The paths that the entries mean, in the model's order; MismatchError for one that matches nothing."""
    for entry in entries:
        if not any(matches(entry, path) for path in among):
            known = {path.rpartition(".")[2] for path in among} | (set(among) if "." in entry else set())
            raise MismatchError(f"{what}: {entry!r} matches no module; {nearest(entry, known)}")
    return [path for path in among if any(matches(entry, path) for entry in entries)]


def pick(path: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern entry that means this path, else `default`."""
    return next((value for entry, value in pattern.items() if matches(entry, path)), default)


def check_targets(targets: str | re.Pattern[str] | Sequence[str]) -> None:
    """ConfigError unless they are names, at least one, or a compiled regex."""
    if not isinstance(targets, re.Pattern):
        names("targets", targets)
        if not targets:
            raise ConfigError(f"targets is {targets!r}; expected at least one name")


def find_targets(
    layers: Mapping[str, Layer],
    targets: str | re.Pattern[str] | Sequence[str],
    *,
    exclude: Sequence[str] = (),
    numbers: Sequence[int] | None = None,
    saved: Sequence[str] = (),
) -> list[str]:
    """The paths, in `layers` (path -> base layer), of the linear maps and embeddings that `targets` means.

    "all-linear" means every Linear except lm_head and those `saved`; a compiled regex matches whole paths.
    `exclude` wins over `targets`; of the rest, only modules in the layers `numbers` count (None: in any).
    MismatchError for a name that matches nothing, ConfigError if no module is left.
    """
    check_targets(targets)
    adaptable = [path for path, layer in layers.items() if isinstance(layer, Linear | Embedding)]
    if isinstance(targets, re.Pattern):
        paths = [path for path in adaptable if targets.fullmatch(path)]
        if not paths:
            some = ", ".join(adaptable[:3])
            raise MismatchError(f"targets: {targets.pattern!r} matches no module; there are {some}, ...")
    elif targets == "all-linear":
        linear = [path for path in adaptable if isinstance(layers[path], Linear)]
        paths = [path for path in linear if not any(matches(name, path) for name in ("lm_head", *saved))]
    else:
        paths = resolve("targets", names("targets", targets), adaptable)
    excluded = set(resolve("exclude_modules", exclude, list(layers)))
    if numbers is not None and paths:
        paths = in_layers(numbers, paths)
    targeted = [path for path in paths if path not in excluded]
    if not targeted:
        raise ConfigError("exclude_modules and layers_to_transform leave none of the targets")
    return targeted


def find_linears(layers: Mapping[str, Layer], targets: str | re.Pattern[str] | Sequence[str]) -> list[str]:
    """The paths that `targets` means, as `find_targets`; ConfigError for an embedding."""
    paths = find_targets(layers, targets)
    for path in paths:
        if not isinstance(layers[path], Linear):
            raise ConfigError(f"targets: {path} is an embedding; expected linear maps")
    return paths


def in_layers(numbers: Sequence[int], paths: Sequence[str]) -> list[str]:
    """The paths that lie in the layers of these numbers; ConfigError for a number that none lies in."""
    layer = {path: int(match[1]) for path in paths if (match := LAYER.match(path))}
    if missing := sorted(set(numbers) - set(layer.values())):
        expected = short(sorted(set(layer.values())))
        raise ConfigError(f"layers_to_transform has {short(missing[0])}; expected some of {expected}")
    return [path for path in paths if layer.get(path) in numbers]


def with_head(model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers, and the one that a tied head becomes when it is adapted: a Linear on the table."""
    return {**layers, "lm_head": Linear(layers["model.embed_tokens"].weight)} if tied(model) else dict(layers)


def tied(model: Any) -> bool:
    """Whether the model is a language model whose head is its embedding."""
    return getattr(model, "lm_head", model) is None
