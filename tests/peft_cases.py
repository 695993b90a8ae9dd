"""Tiny Llamas and adapters as transformers and PEFT write them: every option of the two formats once.

    python tests/peft_cases.py        write tests/fixtures again (needs the extra `parity`)

A fixture is a base's folder, an adapter's folder, token ids and the float64 logits that PEFT computes.
The everyday tests read them without torch; the parity suite makes the whole product of bases and adapters.
"""

import json
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
SHAPE = {
    "vocab_size": 23, "hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
}  # fmt: skip
BASES = {  # name -> (what differs in the config, stored dtype, bytes of a shard)
    "untied": ({}, "float32", None),
    "tied": ({"tie_word_embeddings": True}, "float32", None),
    "biases": ({"attention_bias": True, "mlp_bias": True}, "float32", None),
    "head_dim": ({"head_dim": 6}, "float32", None),
    "all heads": ({"num_key_value_heads": 3}, "float32", None),
    "llama3": ({"rope_parameters": LLAMA3}, "float32", None),
    "sharded": ({}, "float32", 6000),
    "bfloat16": ({}, "bfloat16", None),
    "float16": ({"tie_word_embeddings": True}, "float16", None),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {  # name -> LoraConfig's arguments
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear, rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": LINEARS, "rank_pattern": {"q_proj": 2, r"^model.layers.1.mlp.down_proj": 4},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 5, "up_proj": 0.75},
    },
    "regex": {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    "excluded": {"target_modules": LINEARS, "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "saved norm and head": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "DoRA, rsLoRA": {"target_modules": LINEARS, "use_dora": True, "use_rslora": True},
    "bias lora_only": {"target_modules": ["q_proj", "gate_proj"], "bias": "lora_only"},
    "bias all": {"target_modules": ["v_proj"], "bias": "all"},
    "bfloat16": {"target_modules": ["q_proj", "up_proj"]},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.25},
}  # fmt: skip
NOTHING_TO_DO = {("head", "bias lora_only")}
FIXED = [  # (base, adapter) of the fixtures
    ("untied", "q and v"), ("biases", "all-linear, rsLoRA"), ("untied", "patterns"), ("untied", "regex"),
    ("untied", "excluded"), ("untied", "one layer"), ("tied", "embedding"), ("untied", "embedding and head"),
    ("tied", "head"), ("tied", "saved norm and head"), ("tied", "saved embedding"), ("biases", "DoRA"),
    ("biases", "bias lora_only"), ("biases", "bias all"), ("bfloat16", "bfloat16"), ("llama3", "q and v"),
    ("sharded", "q and v"), ("float16", "q and v"), ("head_dim", "DoRA, rsLoRA"),
]  # fmt: skip
IDS = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 40))


def slug(name):
    """A name as that of a folder."""
    return name.replace(",", "").replace(" ", "-")


def make_base(name, folder):
    """Write a base with random weights, norms and biases as transformers does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    changes, dtype, shard = BASES[name]
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.4 if p.ndim == 2 else 0.3) + (p.ndim == 1) * 1.0)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))


def make_adapter(base, name, folder, dtype=None):
    """Write an adapter with random numbers in all that it holds, beside a base's folder, as PEFT does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(2)
    how = {"r": 3, "lora_alpha": 7} | ADAPTERS[name]
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **how))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "magnitude" in key:
                p.mul_(1 + 0.3 * torch.rand_like(p))
            elif "lora_" in key:
                p.copy_(torch.randn_like(p) * 0.3)
            elif p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    if name == "bfloat16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "a-tiny-llama"
    for key, value in config.items():
        if key == "target_modules" and isinstance(value, list):
            config[key] = sorted(value)  # PEFT writes a set, in any order
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def logits(base, adapter=None, dtype="float64", ids=IDS):
    """What transformers and PEFT compute (N, T, V)."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.double().numpy()


def main():
    import shutil
    import warnings

    warnings.simplefilter("ignore")
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for base in dict.fromkeys(base for base, _ in FIXED):
        make_base(base, FIXTURES / "bases" / slug(base))
        (FIXTURES / "bases" / slug(base) / "generation_config.json").unlink(missing_ok=True)
    for base, adapter in FIXED:
        folder = FIXTURES / "adapters" / f"{slug(base)}--{slug(adapter)}"
        make_adapter(FIXTURES / "bases" / slug(base), adapter, folder)
        np.save(folder / "logits.npy", logits(FIXTURES / "bases" / slug(base), folder, ids=IDS[:, ::4]))
    print(sum(f.stat().st_size for f in FIXTURES.rglob("*") if f.is_file()) // 1024, "KiB")


if __name__ == "__main__":
    main()
