"""minilora: LoRA from scratch in NumPy. Read lora.py first; README.md lists the files in reading order.

model = ml.load()                                        # the base that ships, frozen
ml.inject(model, ml.LoraConfig(r=8, alpha=16), rng=rng)  # A and B beside every linear map
ml.train(model, batches, ml.AdamW(lr=1e-2), steps=300)
ml.merge(model); ml.unmerge(model)
ml.spectrum(model)                                       # singular values of every ΔW
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from .backend import use
    from .layers import digest, freeze, named_params, trained, unfreeze
    from .lora import (
        LoraConfig,
        disabled,
        fuse,
        inject,
        merge,
        remove,
        scales,
        set_adapter,
        set_scale,
        unmerge,
    )
    from .model import Config, Llama, generate, llama
    from .optim import AdamW, Schedule, lora_plus
    from .training import evaluate, train
except KeyboardInterrupt:  # Ctrl-C while the command line starts: no traceback
    if Path(sys.argv[0]).stem in ("minilora", "-m"):
        sys.exit(130)
    raise

if TYPE_CHECKING:
    from .analysis.count import count, modules
    from .analysis.inspect import inspect
    from .compose.export import merge_checkpoint
    from .compose.truncate import compress, extract
    from .data.corpora import batches, corpus, decode, encode, eval_batches
    from .formats.huggingface import checkpoint, load, save_model
    from .peft.folder import load_adapter, open_adapter, save_adapter
    from .spectra import effective_rank, participation_ratio, spectrum, spectrum_between, stable_rank

__version__ = "0.1.0"

__all__ = [
    "AdamW", "Config", "Llama", "LoraConfig", "Schedule", "batches", "checkpoint", "compress",
    "corpus", "count", "decode", "digest", "disabled", "effective_rank", "encode", "eval_batches", "evaluate",
    "extract", "freeze", "fuse", "generate", "inject", "inspect", "llama", "load", "load_adapter",
    "lora_plus", "merge", "merge_checkpoint", "modules", "named_params", "open_adapter",
    "participation_ratio", "remove", "save_adapter", "save_model", "scales", "set_adapter", "set_scale",
    "spectrum", "spectrum_between", "stable_rank", "train", "trained", "unfreeze", "unmerge", "use",
]  # fmt: skip

LATER = {  # imported when first asked for
    "analysis.count": ("count", "modules"),
    "analysis.inspect": ("inspect",),
    "compose.export": ("merge_checkpoint",),
    "compose.truncate": ("compress", "extract"),
    "data.corpora": ("batches", "corpus", "decode", "encode", "eval_batches"),
    "finetune": (),
    "formats.huggingface": ("checkpoint", "load", "save_model"),
    "peft.folder": ("load_adapter", "open_adapter", "save_adapter"),
    "spectra": ("effective_rank", "participation_ratio", "spectrum", "spectrum_between", "stable_rank"),
}


def __getattr__(name: str) -> Any:
    if name in LATER:
        return import_module(f".{name}", __name__)
    for module, names in LATER.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module 'minilora' has no attribute {name!r}")
