"""LoRA's rivals beside PEFT's: the same logits and gradients in float64, from the same random parameters.

transformers rounds parts of its Llama to float32 (test_parity.py), so agreement ends near 1e-7.
"""

import numpy as np
import pytest
from test_parity import TIED, UNTIED, F, agree, agree_on_a_batch, batch, fresh, llama_of_transformers, tensor

from minilora.backend import to_device
from minilora.lora import adapted, inject
from minilora.methods.bottleneck import HOULSBY, PFEIFFER, BottleneckConfig
from minilora.methods.prefixes import PrefixTuningConfig, PromptTuningConfig
from minilora.methods.vectors import IA3Config, VeraConfig
from minilora.ops import rope, rope_frequencies, rope_tables
from minilora.tree import trained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # PEFT passes it
]
BOUND = 5e-5


def both(base, ours, theirs):
    """A model with our fresh adapter, moved, PEFT's beside the same base, and the generator that goes on."""
    model, rng = fresh(base)
    hf = llama_of_transformers(model, torch.float64)
    inject(model, ours, rng=rng)
    for p in trained(model).values():
        p.data = p.data + to_device(0.3 * rng.standard_normal(p.shape))
    return model, peft.get_peft_model(hf, theirs).double(), rng


def compared(model, wrapped, name, rng):
    """Give PEFT's parameters the numbers of ours, as `name` calls them, and compare logits and gradients."""
    ours = {name(path): p for path, p in trained(model).items()}
    theirs = {k: p for k, p in wrapped.named_parameters() if p.requires_grad}
    assert {k: p.numel() for k, p in theirs.items()} == {k: p.size for k, p in ours.items()}
    for k, p in theirs.items():
        p.data = tensor(ours[k].data)
    agree_on_a_batch(model, lambda ids: wrapped(ids).logits, ours, theirs, rng, BOUND)


@pytest.mark.parametrize("base", [TIED, UNTIED], ids=["tied", "untied-biases"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]], ids=str)
def test_vera_is_pefts(base, targets):
    """With one A and one B for layers of seven shapes."""
    r = 6
    theirs = peft.VeraConfig(r=r, target_modules=targets, vera_dropout=0.0, save_projection=True)
    model, wrapped, rng = both(base, VeraConfig(r, targets), theirs)
    first = next(iter(adapted(model).values())).adapters["default"]
    for name in "AB":
        shared = getattr(wrapped.base_model, f"vera_{name}")
        assert tuple(shared["default"].shape) == getattr(first, name).shape
        shared["default"] = tensor(getattr(first, name))

    def name(path):
        module, leaf = path.split(".adapters.default.")
        return f"base_model.model.{module}.vera_lambda_{leaf}.default"

    compared(model, wrapped, name, rng)


@pytest.mark.parametrize("base", [TIED, UNTIED], ids=["tied", "untied-biases"])
@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [(["k_proj", "v_proj", "down_proj"], ["down_proj"]), (["q_proj", "up_proj", "o_proj"], ["o_proj"])],
)
def test_ia3_is_pefts(base, targets, feedforward):
    """Whose vectors are (O, 1) and (1, I), and are made flat before they are used."""
    theirs = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    model, wrapped, rng = both(base, IA3Config(targets, feedforward), theirs)

    def name(path):
        return f"base_model.model.{path.split('.adapters.default.')[0]}.ia3_l.default"

    compared(model, wrapped, name, rng)


@pytest.mark.parametrize("base", [TIED, UNTIED], ids=["tied", "untied-biases"])
@pytest.mark.parametrize("targets", [HOULSBY, PFEIFFER], ids=["houlsby", "pfeiffer"])
def test_a_bottleneck_is_torchs(base, targets):
    """PEFT has none: torch's own layers behind transformers' maps."""
    model, rng = fresh(base)
    hf = llama_of_transformers(model, torch.float64).requires_grad_(False)
    inject(model, BottleneckConfig(3, targets), rng=rng)
    ours, theirs = {}, {}
    for path, layer in adapted(model).items():
        adapter, D = layer.adapters["default"], base.hidden_size
        down, up = torch.nn.Linear(D, 3).double(), torch.nn.Linear(3, D).double()
        for name, here, there in (("down", adapter.down, down), ("up", adapter.up, up)):
            for leaf in ("weight", "bias"):
                p = getattr(here, leaf)
                p.data = to_device(0.5 * rng.standard_normal(p.shape))
                getattr(there, leaf).data = tensor(p.data)
                ours[f"{path} {name} {leaf}"], theirs[f"{path} {name} {leaf}"] = p, getattr(there, leaf)
        network = torch.nn.Sequential(down, torch.nn.GELU("tanh"), up)
        hf.get_submodule(path).register_forward_hook(lambda _, x, y, network=network: y + network(y))
    agree_on_a_batch(model, lambda ids: hf(ids).logits, ours, theirs, rng, BOUND)


@pytest.mark.parametrize("base", [TIED, UNTIED], ids=["tied", "untied-biases"])
@pytest.mark.parametrize("P", [1, 4])
def test_a_prefix_is_pefts(base, P):
    """Whose text begins at position P, so that its keys, and their gradients, are ours turned by P."""
    theirs = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    model, wrapped, rng = both(base, PrefixTuningConfig(P), theirs)
    G, E = base.num_key_value_heads, base.E
    tables = rope_tables(np.full(P, P), G, rope_frequencies(E, base.rope_theta), np.float64)

    def flat(arrays):
        """Path -> (P, G*E) as PEFT's (P, L*2*G*E)."""
        turned = [
            rope(a[None], *tables, E)[0][0] if path.endswith("keys") else a for path, a in arrays.items()
        ]
        return np.concatenate(turned, 1)

    (encoder,) = (p for p in wrapped.parameters() if p.requires_grad)
    encoder.data = tensor(flat({path: p.data for path, p in trained(model).items()}))
    ids, labels = batch(rng)
    _, back = model.loss(ids, labels, train=True)
    back()
    logits = wrapped(tensor(ids)).logits
    F.cross_entropy(logits.flatten(0, 1), tensor(labels).flatten()).backward()
    agree({"logits": model(ids)[0]}, {"logits": logits}, BOUND / 5)
    agree({"rows": flat({path: p.grad for path, p in trained(model).items()})}, {"rows": encoder.grad}, BOUND)


@pytest.mark.parametrize("base", [TIED, UNTIED], ids=["tied", "untied-biases"])
def test_a_prompt_is_pefts(base):
    """Whose logits still begin with the prompt's."""
    P = 4
    theirs = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    model, wrapped, rng = both(base, PromptTuningConfig(P), theirs)
    (p,), (encoder,) = trained(model).values(), (p for p in wrapped.parameters() if p.requires_grad)
    encoder.data = tensor(p.data)
    agree_on_a_batch(
        model, lambda ids: wrapped(ids).logits[:, P:], {"rows": p}, {"rows": encoder}, rng, BOUND
    )


def test_the_defaults_are_pefts():
    """Of (IA)³, what it takes of a Llama."""
    from peft.utils import constants

    theirs = peft.VeraConfig()
    assert (VeraConfig().r, VeraConfig().d_initial) == (theirs.r, theirs.d_initial)
    assert {*IA3Config().targets} == {*constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["llama"]}
    assert constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["llama"] == ["down_proj"]
