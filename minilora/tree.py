"""A model is a tree: every layer is a dataclass; its fields, list indices and dict keys spell the names.

Walking, naming, freezing, replacing and digests are functions over that tree. Stands in for the methods of
torch.nn.Module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy, deepcopy
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from .backend import xp
from .digests import of_arrays
from .errors import MismatchError, StateError, nearest
from .layers import Dropout, Param
from .table import printed

T = TypeVar("T")


def children(node: Any) -> list[tuple[str, Any]]:
    """The named children of a layer, list or dict of layers, in order."""
    if isinstance(node, list):
        return [(str(i), part) for i, part in enumerate(node)]
    if isinstance(node, dict):
        return list(node.items())
    return [(f.name, getattr(node, f.name)) for f in fields(node)] if is_dataclass(node) else []


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every (path, layer or Param) of a tree, parents first."""
    yield path, node
    for name, part in children(node):
        if isinstance(part, (Param, list, dict)) or is_dataclass(part):
            yield from walk(part, f"{path}.{name}" if path else name)


def named_params(tree: Any) -> dict[str, Param]:
    """Path -> Param, each Param once, under the first of its names."""
    first: dict[int, tuple[str, Param]] = {}
    for path, node in walk(tree):
        if isinstance(node, Param):
            first.setdefault(id(node), (path, node))
    return dict(first.values())


def size(tree: Any) -> int:
    """The number of parameters in a tree."""
    return sum(p.size for p in named_params(tree).values())


def dtype_of(tree: Any) -> Any:
    """The dtype of a tree's parameters, which have one in common: that of the first."""
    return next(iter(named_params(tree).values())).dtype


def trained(tree: Any) -> dict[str, Param]:
    """Path -> Param of the trained parameters."""
    return {path: p for path, p in named_params(tree).items() if p.trainable}


def trains(tree: Any) -> bool:
    """Whether anything in the tree is trained."""
    return any(isinstance(node, Param) and node.trainable for _, node in walk(tree))


def freeze(tree: Any, keep: Callable[[str], bool] = lambda path: False) -> None:
    """Freeze the tree, except the parameters whose path `keep` accepts; those are trained.

    StateError if one of them is packed; nothing has changed by then.
    """
    params = named_params(tree)
    kept = {path: p for path, p in params.items() if keep(path)}
    check_trainable(kept)
    for path, p in params.items():
        p.trainable = path in kept
        p.grad = None


def unfreeze(tree: Any) -> None:
    """Train everything, in copies: the arrays that were loaded are never written.

    StateError, as in `freeze`, if a parameter is packed.
    """
    params = named_params(tree)
    check_trainable(params)
    for p in params.values():
        p.data, p.grad, p.trainable = p.data.copy(), None, True


def check_trainable(params: Mapping[str, Param]) -> None:
    """StateError, with its path, if one of the parameters is packed."""
    for path, p in params.items():
        if p.packed:
            raise StateError(f"{path} is quantized and cannot be trained; train an adapter beside it")


def unpack(tree: Any) -> None:
    """Put a dense, frozen weight in the place of every packed one."""
    for path, p in named_params(tree).items():
        if p.packed:
            replace(tree, path, Param(p.dense(), trainable=False))


def without_gradient(p: Param) -> Param:
    """A copy of a parameter that shares its data but has no gradient yet."""
    twin = copy(p)
    twin.grad = None
    return twin


def replica(tree: T) -> T:
    """A copy of a tree that shares every array and generator but not the gradients."""
    shared: dict[int, Any] = {id(p): without_gradient(p) for p in named_params(tree).values()}
    shared |= {id(node.rng): node.rng for _, node in walk(tree) if isinstance(node, Dropout)}
    shared |= {id(a): a for _, node in walk(tree) for _, a in children(node) if isinstance(a, xp.ndarray)}
    return deepcopy(tree, shared)


def settings(tree: Any) -> dict[str, Any]:
    """Path -> value of every plain number, flag and name in a tree: all of it except its parameters."""
    return {
        f"{path}.{name}": part
        for path, node in walk(tree)
        for name, part in children(node)
        if part is None or type(part) in (int, float, str, bool)
    }


def digest(tree: Any, dtype: Any = None) -> str:
    """sha256 over the names, shapes, dtypes and bytes of all parameters, in order of name.

    Each as it is, or as `dtype`; packed ones are decoded one at a time.
    """
    return of_arrays(((path, p.dense()) for path, p in sorted(named_params(tree).items())), dtype)


def outline(tree: Any) -> str:
    """A tree of shapes, one line per layer; * means trained, and equal neighbours in a list appear once."""
    title = f"{type(tree).__name__}: {size(tree):,} parameters, {size(trained(tree)):,} trained (*)"
    return printed(title, *branches(tree))


def branches(node: Any) -> list[str]:
    """The outline's lines for everything below a node."""
    groups: list[tuple[str, str, list[str]]] = []  # first name, last name, lines
    for name, part in children(node):
        if isinstance(part, Param) or not named_params(part):
            continue
        kind = "" if isinstance(part, list | dict) else f": {type(part).__name__}"
        shapes = [
            f"{own} {' x '.join(map(str, p.shape))}{' *' * p.trainable}"
            for own, p in children(part)
            if isinstance(p, Param)
        ]
        lines = [f"{kind}  {', '.join(shapes)}".rstrip(), *branches(part)]
        if isinstance(node, list) and groups and groups[-1][2] == lines:
            groups[-1] = (groups[-1][0], name, lines)
        else:
            groups.append((name, name, lines))
    return [
        f"  {line}"
        for first, last, (title, *below) in groups
        for line in ((first if first == last else f"{first} to {last}") + title, *below)
    ]


def get(tree: Any, path: str) -> Any:
    """The node at a path; MismatchError with the nearest names if there is none."""
    nodes = dict(walk(tree))
    if path not in nodes:
        raise MismatchError(f"{path!r} is not in this model; {nearest(path, nodes)}")
    return nodes[path]


def replace(tree: Any, path: str, new: Any) -> None:
    """Put `new` in the place of the node at `path`."""
    above, _, name = path.rpartition(".")
    put(get(tree, above), name, new)


def put(parent: Any, name: str, new: Any) -> None:
    """Make `new` the child of that name."""
    if isinstance(parent, list):
        parent[int(name)] = new
    elif isinstance(parent, dict):
        parent[name] = new
    else:
        setattr(parent, name, new)
