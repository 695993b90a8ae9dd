"""PiSSA, OLoRA and LoRA-GA beside PEFT's: the same start, logits and gradients, and a file that PEFT loads.

PEFT computes these starts in float32 only, so agreement ends near its roundings. Its LoRA-GA multiplies B₀ by
the gradient's singular values and leaves A₀ without a factor, so only the directions are compared.
"""

import numpy as np
import pytest
from test_parity import TIED, agree, agree_on_a_batch, batch, fresh, llama_of_transformers, peft_name, tensor

from minilora.backend import to_device
from minilora.lora import adapted, inject
from minilora.methods.lora_config import LoraConfig
from minilora.methods.starts import StartConfig, as_lora, lora_ga, olora, pissa, weight_gradients
from minilora.peft.loading import save_adapter
from minilora.tree import trained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

R, ALPHA = 6, 9
STARTS = {"pissa": pissa, "olora": olora}


def both(kind, start):
    """The same base with our fresh adapter and with PEFT's; and the generator that goes on."""
    model, rng = fresh(TIED, np.float32)
    hf = llama_of_transformers(model, torch.float32)
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=kind)
    wrapped = peft.get_peft_model(hf, config)
    inject(model, StartConfig(LoraConfig(R, ALPHA), start), rng=rng)
    return model, wrapped, rng


def moved(model, rng):
    """Factors that have left their start."""
    for p in trained(model).values():
        p.data = p.data + to_device((0.1 * rng.standard_normal(p.shape)).astype(np.float32))


@pytest.mark.parametrize("kind", STARTS)
def test_a_start_is_pefts(kind):
    """B₀ A₀, whose signs no decomposition settles, and W less it, which PEFT writes over W."""
    model, wrapped, _ = both(kind, STARTS[kind])
    ours, theirs = {}, {}
    for path, layer in adapted(model).items():
        adapter, module = layer.adapters["default"], wrapped.get_submodule(f"base_model.model.{path}")
        s, W = adapter.low_rank.scale, layer.base.weight.data
        A, B = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        assert module.scaling["default"] == s
        ours |= {f"{path} start": adapter.B0 @ adapter.A0, f"{path} W": W - s * adapter.B0 @ adapter.A0}
        theirs |= {f"{path} start": B @ A, f"{path} W": module.base_layer.weight}
    agree(ours, theirs, 2e-5)


@pytest.mark.parametrize("kind", STARTS)
def test_logits_and_gradients_are_pefts(kind):
    model, wrapped, rng = both(kind, STARTS[kind])
    moved(model, rng)
    ours = {peft_name(path.replace(".low_rank", "")): p for path, p in trained(model).items()}
    theirs = {k: p for k, p in wrapped.named_parameters() if p.requires_grad}
    for k, p in theirs.items():
        p.data = tensor(ours[k].data)
    agree_on_a_batch(model, lambda ids: wrapped(ids).logits, ours, theirs, rng, 5e-4)


@pytest.mark.parametrize("kind", [*STARTS, "lora_ga"])
def test_an_exported_adapter_loads_in_peft(kind, tmp_path):
    model, rng = fresh(TIED, np.float32)
    hf = llama_of_transformers(model, torch.float32)
    ids, labels = batch(rng)
    start = STARTS.get(kind) or lora_ga(weight_gradients(model, ids, labels))
    inject(model, StartConfig(LoraConfig(R, ALPHA), start), rng=rng)
    moved(model, rng)
    ours = model(ids)[0]
    as_lora(model)
    save_adapter(model, tmp_path / "a")
    wrapped = peft.PeftModel.from_pretrained(hf, tmp_path / "a")
    assert {c.r for c in wrapped.peft_config.values()} == {2 * R}
    agree({"logits": ours}, {"logits": wrapped(tensor(ids)).logits}, 2e-5)


def test_lora_ga_has_the_directions_of_pefts():
    model, rng = fresh(TIED, np.float32)
    hf = llama_of_transformers(model, torch.float32)
    ids, labels = batch(rng)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )  # fmt: skip

    def step():
        logits = hf(tensor(ids)).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tensor(labels).flatten()).backward()

    config.target_modules = {path.rpartition(".")[2] for path in weight_gradients(model, ids, labels)}
    peft.tuners.lora.preprocess_loraga(hf, config, step)
    wrapped = peft.get_peft_model(hf, config)
    inject(model, StartConfig(LoraConfig(R, ALPHA), lora_ga(weight_gradients(model, ids, labels))), rng=rng)
    apart = []
    for path, layer in adapted(model).items():
        adapter, module = layer.adapters["default"], wrapped.get_submodule(f"base_model.model.{path}")
        c = len(adapter.B0) ** 0.25 / 4
        A, B = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        A, B = A.detach().numpy(), B.detach().numpy()
        B = B / np.linalg.norm(B, axis=0)
        apart += [
            np.abs(np.abs(cosines) - np.eye(R)).max()
            for cosines in (adapter.A0 @ A.T / c, adapter.B0.T @ B / c)
        ]
    print(f"  {max(apart):.1e} at most in {len(apart)} sets of directions")
    assert max(apart) <= 1e-4  # no two singular values are so close that roundings turn their vectors
