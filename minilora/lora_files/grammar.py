"""A tensor's name in a LoRA file -> the module it changes, and which part of the change it is.

    lora_unet_mid_block_..._to_q.lora_down.weight -> "A"     transformer.proj_out.lora_B.weight -> "B"

Every name is judged by itself, because one file can mix styles: a script of diffusers writes half of its
modules as `.lora.down.weight` and half as `.lora_A.weight`, and a reader that goes by the first key loses
the others. What is no LoRA is recognised by name, so that it can be reported and is never dropped silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import MismatchError
from .names import is_flux, of_torchtune, path_of

STYLES = {  # how a name ends -> (part, the tools that write it); the first that fits counts
    r"\.lora_linear_layer\.down\.weight": ("A", "diffusers"),
    r"\.lora_linear_layer\.up\.weight": ("B", "diffusers"),
    r"\.lora\.down\.weight": ("A", "diffusers"),
    r"\.lora\.up\.weight": ("B", "diffusers"),
    r"(?<=_lora)\.down\.weight": ("A", "diffusers before PEFT"),
    r"(?<=_lora)\.up\.weight": ("B", "diffusers before PEFT"),
    r"(?<=_lora[12])\.down\.weight": ("A", "XLabs"),
    r"(?<=_lora[12])\.up\.weight": ("B", "XLabs"),
    r"\.lora_down\.weight": ("A", "kohya"),
    r"\.lora_up\.weight": ("B", "kohya"),
    r"\.lora_mid\.weight": ("mid", "kohya"),
    r"\.dora_scale": ("dora_scale", "kohya"),
    r"\.alpha": ("alpha", "kohya"),
    r"\.lora_A(\.(?!weight$)[^.]+)?\.weight": ("A", "PEFT"),
    r"\.lora_B(\.(?!weight$)[^.]+)?\.weight": ("B", "PEFT"),
    r"\.lora_embedding_A(\.[^.]+)?": ("table A", "PEFT"),
    r"\.lora_embedding_B(\.[^.]+)?": ("table B", "PEFT"),
    r"\.lora_magnitude_vector(\.(?!weight$)[^.]+)?(\.weight)?": ("magnitude", "PEFT"),
    r"\.lora_a\.weight": ("A", "torchtune"),
    r"\.lora_b\.weight": ("B", "torchtune"),
    r"\.magnitude": ("magnitude", "torchtune"),
    r"\.lora_a": ("a", "MLX"),
    r"\.lora_b": ("b", "MLX"),
    r"\.m": ("magnitude", "MLX"),
    r"\.lora_A": ("A", "loralib"),
    r"\.lora_B": ("B", "loralib"),
}
CONTROL = {r"\.down": ("A", "Control-LoRA"), r"\.up": ("B", "Control-LoRA")}  # marked by a key of their own
MARKER = "lora_controlnet"
OTHERS = {  # how the names of what is no LoRA end -> its name
    r"\.hada_(w[12]_[ab]|t[12])": "LoHa",
    r"\.lokr_(w[12](_[ab])?|t[12])": "LoKr",
    r"\.(a1|a2|b1|b2|bm)\.weight": "GLoRA",
    r"\.(oft_(blocks|diag|R(\.weight)?)|rescale)": "OFT",
    r"\.on_input": "(IA)³",
    r"\.(diff|set_weight|reshape_weight)": "full difference",
    r"\.(diff_b|b_norm)": "difference of a bias",
    r"\.w_norm": "difference of a norm",
    r"(bundle_emb\.|emb_params$|clip_[gl]$|string_to_param|<).*": "text inversion",
    r"\.base_layer\.(weight|bias)": "copy of the base",
    r"\.(weight|bias)": "full weight",
}
HALVES = {"A": "B", "B": "A", "a": "b", "b": "a", "table A": "table B", "table B": "table A"}
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def parsed(key: str, control: bool = False) -> tuple[str, str, str]:
    """(module, part, tool) of a tensor's name, the module as it stands there; part is "" for no LoRA.

    Then the tool is what it is instead, such as "LoHa", or "unknown".
    """
    key = WRAPPERS.sub("", key)
    for pattern, (part, tool) in (CONTROL | STYLES if control else STYLES).items():
        if match := re.search(f"{pattern}$", key):
            return key[: match.start()], part, tool
    for pattern, kind in OTHERS.items():
        if match := re.search(f"{pattern}$", key):
            return key[: match.start()] or key, "", kind
    return key, "", "unknown"


@dataclass
class Keys:
    """The names of a file's tensors, sorted by module; modules are called by their paths in the model."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)  # module -> part -> key
    tools: dict[str, str] = field(default_factory=dict)  # module -> the tool that writes such factors
    others: dict[str, list[str]] = field(default_factory=dict)  # what is no LoRA, by kind -> names there


def sort_out(where: str, keys: Iterable[str]) -> Keys:
    """Sort the names of tensors; MismatchError for the same part twice, or one factor without the other."""
    found, apart, names = Keys(), set(), {*keys}
    judged = {key: parsed(key, MARKER in names) for key in sorted(names - {MARKER})}
    flux = any(is_flux(name) for name, _, _ in judged.values())
    for key, (name, part, tool) in judged.items():
        if not part:
            found.others.setdefault(tool, []).append(name)
            apart.add(name)
            continue
        module = of_torchtune(name) if tool == "torchtune" else path_of(name, flux)
        own = found.parts.setdefault(module, {})
        if part in own:
            raise MismatchError(f"{where}: {own[part]} and {key} are the same part of {module}")
        own[part] = key
        if part in HALVES:
            found.tools[module] = tool
    for module, own in found.parts.items():
        for half, other in HALVES.items():
            if half in own and other not in own:
                raise MismatchError(f"{where}: {own[half]} is one factor of {module}; the other is missing")
    for module in [module for module in found.parts if module not in found.tools]:
        for key in found.parts.pop(module).values():
            if judged[key][0] not in apart:  # an alpha of what is no LoRA
                found.others.setdefault("a part of a LoRA without its factors", []).append(key)
    return found
