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
    from .adapters import disabled, remove, scales, set_scale
    from .backend import use
    from .decoding import generate
    from .lora import fuse, inject, merge, set_adapter, unmerge
    from .methods.lora_config import LoraConfig
    from .model import Config, Llama, llama
    from .optim import AdamW, Schedule, lora_plus
    from .tree import digest, freeze, named_params, trained, unfreeze
except KeyboardInterrupt:  # Ctrl-C while the command line starts: no traceback
    if Path(sys.argv[0]).stem in ("minilora", "-m"):
        sys.exit(130)
    raise

if TYPE_CHECKING:
    from . import finetune, pictures
    from .analysis import plotting as plots
    from .analysis.count import count, modules
    from .analysis.inspect import inspect
    from .completion import complete
    from .compose.combine import add_weighted_adapter, combine
    from .compose.extract import extract
    from .compose.quantize import quantize_checkpoint
    from .compose.truncate import compress
    from .data.batching import batches, eval_batches
    from .data.corpora import corpus
    from .experiments.rank_sweep import Plan, sweep
    from .fast.mixed import mixed
    from .fast.packed import PackedRun, train_packed
    from .formats.huggingface import checkpoint, load, save_model
    from .formats.tokenizer import decode, encode
    from .merging.merge import merge_checkpoint
    from .methods.bottleneck import BottleneckConfig
    from .methods.intrinsic import subspace
    from .methods.prefixes import PrefixTuningConfig, PromptTuningConfig
    from .methods.quantize import quantize
    from .methods.starts import StartConfig, as_lora, lora_ga, olora, pissa, weight_gradients
    from .methods.vectors import IA3Config, VeraConfig
    from .peft.convert import convert
    from .peft.folder import open_adapter
    from .peft.loading import load_adapter, save_adapter
    from .serve.bank import Bank
    from .serve.bench import serve_bench
    from .serve.engine import Engine, Request
    from .spectra import effective_rank, participation_ratio, spectrum, spectrum_between, stable_rank
    from .training import evaluate, train

__version__ = "0.1.0"

LATER = {  # imported on first use
    "analysis.count": ("count", "modules"),
    "analysis.inspect": ("inspect",),
    "completion": ("complete",),
    "compose.combine": ("add_weighted_adapter", "combine"),
    "merging.merge": ("merge_checkpoint",),
    "compose.extract": ("extract",),
    "compose.quantize": ("quantize_checkpoint",),
    "compose.truncate": ("compress",),
    "data.batching": ("batches", "eval_batches"),
    "data.corpora": ("corpus",),
    "experiments.rank_sweep": ("Plan", "sweep"),
    "fast.mixed": ("mixed",),
    "fast.packed": ("PackedRun", "train_packed"),
    "formats.huggingface": ("checkpoint", "load", "save_model"),
    "formats.tokenizer": ("decode", "encode"),
    "methods.bottleneck": ("BottleneckConfig",),
    "methods.intrinsic": ("subspace",),
    "methods.prefixes": ("PrefixTuningConfig", "PromptTuningConfig"),
    "methods.quantize": ("quantize",),
    "methods.starts": ("StartConfig", "as_lora", "lora_ga", "olora", "pissa", "weight_gradients"),
    "methods.vectors": ("IA3Config", "VeraConfig"),
    "peft.convert": ("convert",),
    "peft.folder": ("open_adapter",),
    "peft.loading": ("load_adapter", "save_adapter"),
    "serve.bank": ("Bank",),
    "serve.bench": ("serve_bench",),
    "serve.engine": ("Engine", "Request"),
    "spectra": ("effective_rank", "participation_ratio", "spectrum", "spectrum_between", "stable_rank"),
    "training": ("evaluate", "train"),
}
MODULES = {"finetune": "finetune", "pictures": "pictures", "plots": "analysis.plotting"}
HOMES = {name: module for module, names in LATER.items() for name in names}

__all__ = [
    "AdamW", "Bank", "BottleneckConfig", "Config", "Engine", "IA3Config", "Llama", "LoraConfig", "PackedRun",
    "Plan", "PrefixTuningConfig", "PromptTuningConfig", "Request", "Schedule", "StartConfig", "VeraConfig",
    "add_weighted_adapter", "as_lora", "batches", "checkpoint", "combine", "complete", "compress", "convert",
    "corpus", "count", "decode", "digest", "disabled", "effective_rank", "encode", "eval_batches", "evaluate",
    "extract", "finetune", "freeze", "fuse", "generate", "inject", "inspect", "llama", "load", "load_adapter",
    "lora_ga", "lora_plus", "merge", "merge_checkpoint", "mixed", "modules", "named_params", "olora",
    "open_adapter", "participation_ratio", "pictures", "pissa", "plots", "quantize", "quantize_checkpoint",
    "remove", "save_adapter", "save_model", "scales", "serve_bench", "set_adapter", "set_scale", "spectrum",
    "spectrum_between", "stable_rank", "subspace", "sweep", "train", "train_packed", "trained", "unfreeze",
    "unmerge", "use", "weight_gradients",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f".{MODULES[name]}", __name__)
    if name in HOMES:
        return getattr(import_module(f".{HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'minilora' has no attribute {name!r}")
