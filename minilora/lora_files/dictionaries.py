"""The files of MLX, torchtune and loralib: factors by name, their scale elsewhere or nowhere.

    MLX        lora_a (I, r), lora_b (r, O): ΔW = scale (a b)ᵀ; of an embedding, a (V, r), b (r, D): scale a b
    torchtune  as PEFT's, but the rows of q and k are in the order of neighbouring pairs
    loralib    as PEFT's; a MergedLinear has n factors below each other, a convolution's are k times as large

None of them says in its tensors how ΔW is scaled: MLX has a config beside the file, the others nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ..errors import ConfigError, MismatchError
from ..formats.gguf import half_split
from ..formats.safetensors import Tensors
from .contents import (
    MAGNITUDE,
    TABLE_A,
    TABLE_B,
    A,
    B,
    Contents,
    Entry,
    computed,
    gathered,
    listed,
    plain,
    reordered,
    turned,
)
from .grammar import Keys

EXPERTS = re.compile(r"\.switch_mlp\.(\w+)$")
TABLES = ("embed_tokens", "wte", "tok_embeddings")  # the last names of embeddings
NO_SCALE = "a file of {} does not have the scale; give {}"


def read_mlx(tensors: Tensors, keys: Keys, scale: float, notes: tuple[str, ...] = ()) -> Contents:
    """The contents of an MLX file with this scale, which is a plain factor and not alpha.

    The experts of a SwitchLinear, a (E, r, I) and b (E, O, r), become modules of their own, with names as in
    Hugging Face's models.
    """
    entries: dict[str, Entry] = {}
    alphas: dict[str, float] = {}
    for module, part in keys.parts.items():
        a, b = (tensors.shapes[part[half]] for half in ("a", "b"))
        if len(a) == len(b) == 3 and a[0] == b[0] and 0 not in (*a, *b):
            for expert in range(a[0]):
                name = EXPERTS.sub(rf".experts.{expert}.\1", module)
                name = name if name != module else f"{module}.{expert}"
                entries[f"{name}.{A}"] = one_of(tensors, part["a"], expert)
                entries[f"{name}.{B}"] = one_of(tensors, part["b"], expert)
                alphas[name] = scale * a[1]
            continue
        if not len(a) == len(b) == 2:
            what = f"lora_a {a} and lora_b {b}"
            raise MismatchError(f"{tensors.where}: {module} has {what}; expected (I, r) and (r, O)")
        first, second = (TABLE_A, TABLE_B) if module.rpartition(".")[2] in TABLES else (A, B)
        entries[f"{module}.{first}"] = turned(plain(tensors, part["a"]))
        entries[f"{module}.{second}"] = turned(plain(tensors, part["b"]))
        alphas[module] = scale * a[1]
        if "magnitude" in part:
            entries[f"{module}.{MAGNITUDE}"] = plain(tensors, part["magnitude"])
    found = gathered(tensors.where, entries, tensors.metadata)
    return Contents("MLX", found, alphas, {}, notes, tuple(listed(keys.others)))


def one_of(tensors: Tensors, key: str, i: int) -> Entry:
    """One of the matrices in a tensor of three axes."""
    return Entry(tensors.shapes[key][1:], tensors.dtypes[key], lambda: tensors[key][i])


def read_torchtune(
    tensors: Tensors, keys: Keys, alpha: float | None, heads: tuple[int, int] | None
) -> Contents:
    """The contents of a torchtune file; `heads` of queries and keys bring rows into Hugging Face's order."""
    if alpha is None:
        raise ConfigError(f"{tensors.where}: {NO_SCALE.format('torchtune', 'alpha')}")
    entries = {}
    doubts = listed(keys.others)
    for module, part in keys.parts.items():
        order = rows_of(tensors.where, module, heads)
        for name, key in part.items():
            kind = {"A": A, "B": B, "magnitude": MAGNITUDE}[name]
            entry = plain(tensors, key)
            entries[f"{module}.{kind}"] = reordered(entry, order) if order and name != "A" else entry
    if heads is None:
        doubts.append(unturned("torchtune"))
    found = gathered(tensors.where, entries, tensors.metadata)
    return Contents("torchtune", found, dict.fromkeys(keys.parts, float(alpha)), {}, (), tuple(doubts))


def unturned(tool: str) -> str:
    """What to say of rows that stay in the order of neighbouring pairs."""
    return f"the rows of q_proj and k_proj are in {tool}'s order, since the heads of its base are not given"


def rows_of(
    where: str, module: str, heads: tuple[int, int] | None
) -> Callable[[np.ndarray], np.ndarray] | None:
    """What brings rows in pairs (2j, 2j+1) of each head into Hugging Face's order; None if they are not."""
    last = module.rpartition(".")[2]
    if heads is None or last not in ("q_proj", "k_proj"):
        return None
    count = heads[last == "k_proj"]

    def order(rows: np.ndarray) -> np.ndarray:
        if len(rows) % (2 * count):
            raise MismatchError(f"{where}: {module} has {len(rows)} rows; expected pairs for {count} heads")
        return half_split(rows, count)

    return order


def read_loralib(tensors: Tensors, keys: Keys, alpha: float | None, r: int | None) -> Contents:
    """The contents of a loralib file, which has neither alpha nor r nor which parts of a map are adapted.

    A (n r, I) and B (n O, r) are those of a MergedLinear with n parts: ΔW has their rows, block by block.
    A (k r, k I) and B (k O, k r) are those of a convolution: B A is its ΔW, (O, I, k, k), in loralib's order.
    """
    if alpha is None or r is None:
        raise ConfigError(f"{tensors.where}: {NO_SCALE.format('loralib', 'alpha and r')}")
    entries: dict[str, Entry] = {}
    alphas, merged, doubts = {}, [], listed(keys.others)
    for module, part in keys.parts.items():
        a, b = (tensors.shapes[part[name]] for name in ("A", "B"))
        rows, inner = (*a, 0)[0], (*b, 0, 0)[1]
        n = rows // inner if inner else 0  # parts of a MergedLinear, 1 of others
        if len(a) != 2 or len(b) != 2 or not n or rows != n * inner or inner % r or b[0] % n:
            what = f"lora_A {a} and lora_B {b}"
            raise MismatchError(f"{tensors.where}: {module} has {what}; expected multiples of r = {r}")
        entries[f"{module}.{A}"] = plain(tensors, part["A"])
        entries[f"{module}.{B}"] = plain(tensors, part["B"])
        if inner > r:
            doubts.append(f"{module} is a convolution, whose B A is not in the order of a weight")
        if n > 1:
            entries[f"{module}.{B}"] = on_the_diagonal(tensors, part["B"], n)
            merged.append(module)
        alphas[module] = alpha * rows / r  # s = alpha / r, whatever the rows
    notes = tuple(
        f"{module} is a MergedLinear; rows that it leaves out are left out here" for module in merged
    )
    found = gathered(tensors.where, entries, tensors.metadata)
    return Contents("loralib", found, alphas, {}, notes, tuple(doubts))


def on_the_diagonal(tensors: Tensors, key: str, n: int) -> Entry:
    """B (O, r) as n blocks of rows on the diagonal of a matrix (O, n r)."""
    O, r = tensors.shapes[key]  # noqa: E741

    def read() -> np.ndarray:
        whole = np.zeros((n, O // n, n, r), np.float32)
        whole[range(n), :, range(n)] = tensors[key].reshape(n, O // n, r)
        return whole.reshape(O, n * r)

    return computed(tensors, key, (O, n * r), read)
