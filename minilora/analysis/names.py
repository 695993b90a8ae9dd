"""A module's name -> its component, kind and block, by which tables and heat maps group modules.

    unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q  unet            attn1.to_q  down 0.1
    transformer.single_transformer_blocks.3.attn.to_q                transformer     attn.to_q   single 3
    text_encoder_2.text_model.encoder.layers.5.self_attn.q_proj      text_encoder_2  q_proj      5
    model.layers.3.mlp.down_proj                                                     down_proj   3

The names are those of diffusers, of Stability's and Black Forest Labs' own code, and of transformers. Any
other name has a place too: without dots it is a kind of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

COMPONENT = re.compile(
    r"(?P<denoiser>unet|prior|diffusion_model|"
    r"transformer(?!\.(?:h|wte|wpe|word_embeddings|encoder|layer)(?:\.|$))(?:_\d+)?)\.|"  # not a GPT-2's
    r"(?P<other>(?:text|image)_encoder(?:_\d+)?|vae|controlnet)\."
)
DENOISER = re.compile(  # of which no component is named
    r"(?:down|mid|up|input|middle|output|double|single|joint|transformer|single_transformer)_blocks?\."
)
LISTS = re.compile(  # of blocks, with the number in each
    r"(?<![^.])(?:mid_block\.|(?:(?:[a-z]+_)*(?:blocks?|refiner)|layers|attentions)\.(?:[0-9]+\.)+)"
)
MEMBER = re.compile(r"(resnets|downsamplers|upsamplers|motion_modules)\.[0-9]+\.")
LAST = re.compile(r"(?<![^.])[^.]+(?:\.[0-9]+)*$")
LABELS = {
    "down_blocks": "down", "input_blocks": "in", "mid_block": "mid", "middle_block": "mid",
    "up_blocks": "up", "output_blocks": "out", "single_blocks": "single",
    "single_transformer_blocks": "single",
}  # fmt: skip
USUAL = {  # words that say nothing but that a block follows
    "model", "language_model", "layers", "layer", "blocks", "block", "h", "encoder", "text_model",
    "transformer", "transformer_blocks", "double_blocks", "joint_blocks", "attentions", "resnets",
}  # fmt: skip
ORDER = {"down": 0, "in": 0, "": 1, "mid": 3, "up": 4, "out": 4, "single": 5}  # other labels: 2


class Place(NamedTuple):
    """Where a module stands."""

    component: str  # "unet", "text_encoder_2", ...; "" where the name begins with none
    kind: str  # of an image model, its name within the block; else the last part of its name
    block: str  # the block's label in its component, such as "3" or "down 0.1"; "" outside blocks


def place(name: str) -> Place:
    """The place of a module by its name alone, whatever the name."""
    match = COMPONENT.match(name)
    component, rest = (match[0][:-1], name[match.end() :]) if match else ("", name)
    if is_denoiser(name):
        ends = [found.end() for found in LISTS.finditer(rest)]
        kind = MEMBER.sub(r"\1.", rest[ends[-1] if ends else 0 :])
    else:
        kind = found[0] if (found := LAST.search(rest)) else rest
    return Place(component, kind or name, label(rest.split(".")))


def is_denoiser(name: str) -> bool:
    """Whether a module belongs to what draws, a U-Net or a transformer, and not to a text's."""
    match = COMPONENT.match(name)
    return bool(match and match["denoiser"]) or bool(DENOISER.match(name[match.end() if match else 0 :]))


def block_or_layer(names: Iterable[str]) -> str:
    """What the blocks of these modules are called, those that data passes one by one."""
    return "block" if any(map(is_denoiser, names)) else "layer"


def label(parts: list[str]) -> str:
    """The first number that stands within a name, with the last word before it that is not usual.

    In a U-Net's way down and up each block has several layers: there it is two numbers.
    """
    inside = range(1, len(parts) - 1)
    numbers = [i for i in inside if parts[i].isascii() and parts[i].isdigit()]
    if not numbers:
        return ""
    first = numbers[0]
    count = 2 if parts[first - 1] in ("down_blocks", "up_blocks") and first + 2 in numbers else 1
    words = [LABELS.get(part, part) for part in parts[:first] if part not in USUAL]
    return " ".join([*words[-1:], ".".join(parts[i] for i in numbers[:count])])


def order(at: Place) -> tuple[bool, str, bool, int, str, list[tuple[int, str]]]:
    """The sort key of a model's order: encoders last; of a component blocks as data passes, the rest last."""
    word, _, numbers = at.block.rpartition(" ")
    digits = [n.lstrip("0") for n in numbers.split(".")]  # int() refuses very long ones
    return (
        "encoder" in at.component, at.component, not at.block, ORDER.get(word, 2), word,
        [(len(n), n) for n in digits],
    )  # fmt: skip


def brief(name: str) -> str:
    """A module's name without usual words, for narrow tables: unet.down.0.1.0.attn1.to_q."""
    component, *parts = name.split(".")
    kept = [LABELS.get(part, part) for part in parts if part not in USUAL]
    return ".".join([component, *kept] if COMPONENT.match(name) or component not in USUAL else kept) or name
