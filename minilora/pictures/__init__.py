"""Pictures of LoRA, one call each: sheets, a map, its adapter, blocks, merge, rounding, 4 bits, batches."""

from .batch import many_adapters
from .blocks import block
from .images import beyond_language
from .maps import flow, lora, merging, product, ranks
from .memory import four_bits, rounding
from .sheets import overlays
from .trained import adding, beside_base, factors, rank_one

__all__ = [
    "adding", "beside_base", "beyond_language", "block", "factors", "flow", "four_bits", "lora",
    "many_adapters", "merging", "overlays", "product", "rank_one", "ranks", "rounding",
]  # fmt: skip
