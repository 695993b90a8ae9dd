"""What the tests of serve/ share: a folder of PEFT adapters over one tiny base, and each one's own model."""

import functools

from helpers import LINEARS, tiny
from library import np

from minilora.lora import active, inject
from minilora.methods.lora_config import LoraConfig
from minilora.peft.loading import save_adapter
from minilora.tree import size

RANKS = {"a": 1, "b": 2, "c": 3, "d": 2, "e": 4}  # name -> r
UNTIED = {"tie_word_embeddings": False}


def base(dtype=np.float64):
    """The base of all adapters here."""
    return tiny(3, dtype, **UNTIED)[0]


def adapted(name, dtype=np.float64):
    """The base with one adapter, which changes it much; None: the base alone."""
    model = base(dtype)
    if name is not None:
        rng = np.random.default_rng(ord(name))
        targets = ["q_proj", "v_proj", "down_proj"] if name == "d" else LINEARS
        inject(model, LoraConfig(r=RANKS[name], alpha=9, targets=targets, init="both"), rng=rng)
    return model


@functools.cache
def bytes_of(name):
    """Of an adapter's factors in float64."""
    return 8 * sum(size(adapter) for adapter in active(adapted(name)).values())


def write(folder, dtype=np.float64, names=tuple(RANKS)):
    """The folder, with these adapters in it."""
    for name in names:
        save_adapter(adapted(name, dtype), folder / name, dtype=np.dtype(dtype).name)
    return folder
