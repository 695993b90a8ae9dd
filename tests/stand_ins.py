"""The adapters that people have, as tiny stand-ins: names, shapes and configs of real ones, other numbers.

    python tests/stand_ins.py        print what is said of each, as in benchmarks/results/adapters.md

Each is what a trainer or model leaves in public repositories; sizes are cut, and nothing else.
"""

import itertools
import json
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from by_hand import CONFIG, PREFIX, USUAL, WEIGHTS
from safetensors.numpy import save_file

LLAMA = [f"model.layers.{i}.self_attn.{k}_proj" for i in range(2) for k in "qv"]
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|embed|block|layer).*?(?:self_attn|attention|attn|mlp|feed_forward)"
    r".*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn)\.(?:(?:q_proj|v_proj))"
    r"|(?:model\.language_model\.layers\.[\d]{1,}\.(?:self_attn)\.(?:q_proj|v_proj)))"
)
SWIFT = r"^(model\.language_model(?=\.).*\.(q_proj|v_proj))$"
COLPALI = r"(.*(language_model).*(down_proj|gate_proj|q_proj).*$|.*(custom_text_proj).*$)"
OFF = {"fan_in_fan_out": None, "use_dora": None, "use_rslora": None, "modules_to_save": None}


@dataclass(frozen=True)
class StandIn:
    """An adapter: module -> (O, I) or a convolution's (O, I, kernel), its config, what else is there."""

    modules: dict
    config: dict
    more: dict = field(default_factory=dict)  # tensor -> shape
    says: tuple = ()  # what each note matches, in order
    r: int = 2
    called: object = None  # key of PEFT -> key in the file
    table: tuple = ()  # modules that are embeddings
    agrees: bool = True  # after compression config and file do, and whoever loads takes it


def maps(names, *shape):
    return dict.fromkeys(names, shape)


def add(name):
    """The adapter's own name in every key."""
    return lambda key: re.sub(r"(lora_[AB]|lora_magnitude_vector)", rf"\1.{name}", key)


EXPERTS = [
    f"model.layers.{i}.mlp.experts.{e}.{k}_proj"
    for i, e, k in itertools.product(range(40), range(64), ("gate", "up", "down"))
]
LORA = {"lora_alpha": 3}
STAND_INS = {
    "a classifier, PEFT's default list": StandIn(
        maps(LLAMA, 12, 10),
        LORA | {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
        {f"{PREFIX}score.weight": (3, 10)},
        ("no tensor for modules_to_save 'classifier'", "1 parameter is"),
    ),
    "a head that the config does not list": StandIn(
        maps(LLAMA, 12, 10),
        LORA,
        {f"{PREFIX}score.weight": (3, 10)},
        ("1 tensor is not of a LoRA with this config, the first score.weight", "1 parameter is"),
    ),
    "a resized vocabulary": StandIn(
        maps(LLAMA, 12, 10),
        LORA,
        {f"{PREFIX}{k}.weight": (21, 10) for k in ("model.embed_tokens", "lm_head")},
        ("whole tables, which PEFT saves if the vocabulary was resized", "2 parameters are"),
    ),
    "targets that the base has not": StandIn(
        maps(LLAMA, 12, 10),
        LORA | {"target_modules": ["q_proj", "v_proj", "query_key_value", "c_attn"]},
        {},
        ("no factors for target_modules 'query_key_value' and 1 more",),
    ),
    "DoRA, rsLoRA": StandIn(
        maps(LLAMA, 12, 10),
        LORA | {"use_dora": True, "use_rslora": True},
        {f"{PREFIX}{m}.lora_magnitude_vector.weight": (12,) for m in LLAMA},
        ("DoRA",),
    ),
    "15,360 tensors of a mixture of experts": StandIn(
        maps(EXPERTS, 7, 6), LORA | {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    ),
    "unsloth, a vision model": StandIn(
        maps(
            [f"model.language_model.layers.{i}.self_attn.{k}_proj" for i in range(2) for k in "qv"]
            + ["model.visual.blocks.0.attn.qkv"],
            12,
            10,
        ),
        LORA | OFF | {"target_modules": UNSLOTH, "auto_mapping": {"unsloth_fixed": True}},
    ),
    "ms-swift": StandIn(
        maps([f"model.language_model.layers.{i}.self_attn.{k}_proj" for i in range(2) for k in "qv"], 12, 10),
        LORA | {"target_modules": SWIFT, "ensure_weight_tying": True},
        {},
        ("ensure_weight_tying is True: acts beside",),
        agrees=False,
    ),
    "ColPali": StandIn(
        maps(["model.language_model.layers.0.mlp.down_proj"], 10, 14)
        | maps(["model.language_model.layers.0.self_attn.q_proj"], 12, 10)
        | maps(["custom_text_proj"], 5, 10),
        LORA | {"target_modules": COLPALI, "task_type": "FEATURE_EXTRACTION"},
    ),
    "Whisper": StandIn(
        maps(
            [
                f"model.{side}.layers.0.{kind}.{k}_proj"
                for side, kind in (
                    ("encoder", "self_attn"),
                    ("decoder", "self_attn"),
                    ("decoder", "encoder_attn"),
                )
                for k in "qv"
            ],
            9,
            9,
        ),
        LORA | {"task_type": None, "target_modules": ["q_proj", "v_proj"]},
    ),
    "GPT-2": StandIn(
        maps(["transformer.h.0.attn.c_attn"], 30, 10) | maps(["transformer.h.1.mlp.c_proj"], 10, 40),
        LORA | {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]},
    ),
    "T5": StandIn(
        maps(
            [
                f"{side}.block.0.layer.{n}.{kind}.{k}"
                for side, n, kind in (("encoder", 0, "SelfAttention"), ("decoder", 1, "EncDecAttention"))
                for k in "qv"
            ],
            8,
            10,
        ),
        LORA | {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]},
    ),
    "convolutions of a U-Net": StandIn(
        {
            "down_blocks.0.resnets.0.conv1": (8, 5, 3, 2),
            "mid_block.attn.to_q": (8, 7),
            "conv_in": (6, 4, 1, 1),
            "audio.conv": (6, 5, 3),
        },
        LORA | {"target_modules": ["conv1", "to_q", "conv_in", "conv"]},
    ),
    "axolotl, embedding and head saved": StandIn(
        maps(LLAMA, 12, 10),
        LORA | {"modules_to_save": ["embed_tokens", "lm_head"]},
        {f"{PREFIX}{k}.weight": (21, 10) for k in ("model.embed_tokens", "lm_head")},
        ("2 parameters are",),
    ),
    "an embedding": StandIn(
        maps(LLAMA, 12, 10) | maps(["model.embed_tokens"], 10, 21),
        LORA,
        {f"{PREFIX}model.embed_tokens.base_layer.weight": (21, 10)},
        table=("model.embed_tokens",),
    ),
    "torch.compile": StandIn(
        maps(LLAMA, 12, 10),
        LORA,
        {},
        ("names contain names of wrappers, as in _orig_mod.base_model",),
        called=lambda key: f"_orig_mod.{key}",
    ),
    "DDP or DeepSpeed": StandIn(
        maps(LLAMA, 12, 10),
        LORA,
        {},
        ("names contain names of wrappers, as in module.base_model",),
        called=lambda key: f"module.{key}",
    ),
    "FSDP with checkpoints": StandIn(
        maps(LLAMA, 12, 10),
        LORA,
        {},
        ("names contain names of wrappers, as in base_model.*_fsdp_wrapped_module",),
        called=lambda key: re.sub(
            r"layers\.(\d)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module.", key
        ),
    ),
    "PEFT around PEFT": StandIn(
        maps(LLAMA, 12, 10),
        LORA,
        {},
        ("wrappers, as in base_model.model.base_model.model",),
        called=lambda key: PREFIX + key,
    ),
    "no prefix": StandIn(
        maps(LLAMA, 12, 10),
        LORA,
        {},
        ("do not begin with base_model.model",),
        called=lambda key: key.removeprefix(PREFIX),
    ),
    "an adapter's name in the keys": StandIn(
        maps(LLAMA, 12, 10),
        LORA | {"use_dora": True},
        {f"{PREFIX}{m}.lora_magnitude_vector.weight": (12,) for m in LLAMA},
        (r"the adapter's name, as in .*\.lora_A\.my-task\.weight", "DoRA"),
        called=add("my-task"),
    ),
    "trained tokens": StandIn(
        maps(LLAMA, 12, 10),
        LORA | {"trainable_token_indices": [7, 9]},
        {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 10)},
        (
            "1 tensor acts beside B A, not in the numbers: .*delta",
            r"trainable_token_indices is \[7, 9\]: acts beside",
        ),
        agrees=False,
    ),
    "a bias on B": StandIn(
        maps(LLAMA, 12, 10),
        LORA | {"lora_bias": True},
        {f"{PREFIX}{m}.lora_B.bias": (12,) for m in LLAMA},
        ("4 tensors act beside B A", "lora_bias is True: acts beside"),
        agrees=False,
    ),
}


def write(name, folder):
    """Write a stand-in; its ΔW by module, in float64."""
    this, rng = STAND_INS[name], np.random.default_rng(len(name))
    rows = {"r": this.r, "target_modules": sorted({m.rpartition(".")[2] for m in this.modules})} | this.config
    over = np.sqrt(this.r) if rows.get("use_rslora") else this.r
    tensors, dense = {}, {}
    for module, (O, *inner) in this.modules.items():  # noqa: E741
        flat = len(inner) == 1
        A = rng.standard_normal((this.r, *inner)).astype(np.float32)
        B = rng.standard_normal((O, this.r) if flat else (O, this.r, *[1] * len(inner[1:]))).astype(
            np.float32
        )
        a, b = (f"lora_embedding_{x}" if module in this.table else f"lora_{x}.weight" for x in "AB")
        tensors[f"{PREFIX}{module}.{a}"], tensors[f"{PREFIX}{module}.{b}"] = A, B
        dW = rows["lora_alpha"] / over * B.reshape(O, -1).astype(float) @ A.reshape(this.r, -1)
        dense[module] = dW
    tensors |= {k: rng.standard_normal(shape).astype(np.float32) for k, shape in this.more.items()}
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(USUAL | rows))
    change = this.called or (lambda key: key)
    save_file({change(k): a for k, a in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return dense, tensors


def table():
    """Every stand-in as a row of Markdown: how much is in the file, what is said, what compression leaves."""
    from minilora.analysis.inspect import inspect
    from minilora.compose.truncate import compress
    from minilora.table import Table

    lines = []
    for name, this in STAND_INS.items():
        with tempfile.TemporaryDirectory() as root:
            _, tensors = write(name, Path(root, "in"))
            seen, small = inspect(Path(root, "in")), compress(Path(root, "in"), Path(root, "out"), rank=1)
        said = "; ".join(seen.notes) or "none"
        left = f"residual {small.residual:.2f}"
        lines.append((name, f"{len(tensors):,}", f"{len(this.modules):,}", said, left))
    head = ("adapter", "tensors", "modules", "read with the notes", "compressed to rank 1")
    return Table(head, lines).markdown("lrrlr")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(table())
