"""Agreement with PyTorch, transformers and PEFT, where they are installed (the extra `parity`).

Against the same model in torch's own operations everything agrees to the last digits of float64. Every axis
has another size, and norms, biases and both factors are random. `pytest -m parity -s` shows the figures.
"""

import re
from dataclasses import asdict, replace

import numpy as np
import pytest

from minilora.backend import to_device, to_host
from minilora.decoding import generate
from minilora.layers import Param
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.optim import AdamW, lora_plus
from minilora.training import train
from minilora.tree import named_params, trained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
F = torch.nn.functional

pytestmark = pytest.mark.parity

TIED = Config(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=26,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=16,
    rms_norm_eps=1e-3,
    rope_theta=500.0,
)
UNTIED = replace(TIED, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
R, ALPHA = 4, 8
PROJECTIONS, EVERYTHING = re.compile(r".*(_proj|lm_head)"), re.compile(r".*(_proj|lm_head|embed_tokens)")
BUT_THE_HEAD = re.compile(r".*(_proj|embed_tokens)")  # which stays tied


def fresh(config, dtype=np.float64):
    """A model whose norms and biases matter, and the generator that goes on."""
    rng = np.random.default_rng(0)
    model = llama(config, rng, dtype)
    for p in named_params(model).values():
        if p.data.ndim == 1:
            p.data += to_device(0.3 * rng.standard_normal(p.data.shape), dtype)
    return model, rng


def batch(rng):
    ids, labels = rng.integers(0, TIED.vocab_size, (2, 5, 7))
    labels[rng.random(labels.shape) < 0.2] = -100
    return ids, labels


def tensor(a, **how):
    return torch.tensor(to_host(a), **how)


def agree(ours, theirs, bound):
    """max |difference| / max |value| is within the bound for each array of two dicts."""
    assert ours.keys() == theirs.keys()
    figures = []
    for name in ours:
        a, b = to_host(ours[name]), theirs[name].detach().numpy()
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        figures.append(np.abs(a - b).max() / np.abs(b).max())
        assert figures[-1] <= bound, f"{name}: {figures[-1]:.1e}, expected at most {bound:.0e}"
    print(f"  {max(figures):.1e} at most in {len(ours)} arrays, the last {name}")


def agree_on_a_batch(model, forward, ours, theirs, rng, bound):
    ids, labels = batch(rng)
    loss, back = model.loss(ids, labels, train=True)
    back()
    logits = forward(tensor(ids))
    their_loss = F.cross_entropy(logits.flatten(0, 1), tensor(labels).flatten())
    their_loss.backward()
    agree({"logits": model(ids)[0], "loss": loss}, {"logits": logits, "loss": their_loss}, bound / 5)
    agree({k: p.grad for k, p in ours.items()}, {k: p.grad for k, p in theirs.items()}, bound)


class TorchLlama:
    """The Llama in torch: an adapter is an effective weight, rope a complex product, the rest autograd."""

    def __init__(self, model, kind):
        self.config, self.detach = model.config, "detach" in kind
        self.scale = ALPHA / (R**0.5 if "rslora" in kind else R)
        self.p = {k: tensor(p.data, requires_grad=p.trainable) for k, p in named_params(model).items()}
        self.trained = {k: p for k, p in self.p.items() if p.requires_grad}

    def weight(self, name):
        """W; W + s B A; or DoRA's m V / |V| with V = W + s B A."""
        if f"{name}.weight" in self.p:
            return self.p[f"{name}.weight"]
        parts = {k.split(".")[-1]: p for k, p in self.p.items() if k.startswith(f"{name}.adapters.default.")}
        delta = self.scale * parts["B"] @ parts["A"]
        tied = name == "lm_head" and self.config.tie_word_embeddings  # adapted, on the table of the embedding
        base = self.p[f"{'model.embed_tokens' if tied else name}.base.weight"]
        V = base + (delta.T if name.endswith("embed_tokens") else delta)
        if "magnitude" not in parts:
            return V
        n = V.detach().norm(dim=1) if self.detach else V.norm(dim=1)
        return (parts["magnitude"] / n)[:, None] * V

    def linear(self, name, x):
        return F.linear(x, self.weight(name), self.p.get(f"{name}.base.bias", self.p.get(f"{name}.bias")))

    def norm(self, name, x):
        return F.rms_norm(x, x.shape[-1:], self.p[f"{name}.weight"], self.config.rms_norm_eps)

    def turn(self, x):
        """Turn the pair (j, j + E/2) of position t, x (N, H, T, E), by the angle t theta^(-2j/E)."""
        t, j = (torch.arange(n, dtype=x.dtype) for n in (x.shape[-2], x.shape[-1] // 2))
        angle = torch.outer(t, self.config.rope_theta ** (-2 * j / x.shape[-1]))
        z = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag], -1)

    def attention(self, name, x):
        flat = (self.linear(f"{name}.{proj}", x) for proj in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for y in flat)
        a = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True, enable_gqa=True)
        return self.linear(f"{name}.o_proj", a.transpose(1, 2).flatten(2))

    def __call__(self, ids):
        table = self.weight("model.embed_tokens")
        x = F.embedding(ids, table)
        for i in range(self.config.num_hidden_layers):
            at = f"model.layers.{i}"
            x = x + self.attention(f"{at}.self_attn", self.norm(f"{at}.input_layernorm", x))
            n = self.norm(f"{at}.post_attention_layernorm", x)
            h = F.silu(self.linear(f"{at}.mlp.gate_proj", n)) * self.linear(f"{at}.mlp.up_proj", n)
            x = x + self.linear(f"{at}.mlp.down_proj", h)
        x = self.norm("model.norm", x)
        own = any(path.startswith("lm_head.") for path in self.p)
        return self.linear("lm_head", x) if own else F.linear(x, table)


KINDS = {
    "full": (UNTIED, {}),
    "tied": (TIED, {"targets": BUT_THE_HEAD}),
    "tied-head-adapted": (TIED, {"targets": EVERYTHING}),
    "untied-biases": (UNTIED, {"targets": EVERYTHING}),
    "rslora": (TIED, {"targets": EVERYTHING, "rslora": True}),
    "dora": (UNTIED, {"targets": PROJECTIONS, "dora": True}),
    "dora-detach": (UNTIED, {"targets": PROJECTIONS, "dora": True, "detach": True}),
}


@pytest.mark.parametrize(("config", "kind"), KINDS.values(), ids=KINDS)
def test_gradients_match_autograd(config, kind):
    model, rng = fresh(config)
    if kind:
        inject(model, LoraConfig(R, ALPHA, init="both", **kind), rng=rng)
    reference = TorchLlama(model, kind)
    agree_on_a_batch(model, reference, trained(model), reference.trained, rng, 1e-10)


def clip_(params, largest):
    """torch's clipping without the 1e-6 in its factor; returns the norm."""
    # torch multiplies by min(1, c' / (norm + 1e-6)); with c' = c (norm + 1e-6) / norm that is what
    # minilora multiplies by, min(1, c / norm), after which the norm is exactly c
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    torch.nn.utils.clip_grad_norm_(params, float(largest * (norm + 1e-6) / norm))
    return float(norm)


def test_adamw_matches_torch():
    rng = np.random.default_rng(1)
    shapes = {"q_proj.A": (4, 24), "q_proj.B": (60, 4), "norm.weight": (24,)}
    params = {k: Param(to_device(rng.standard_normal(shape))) for k, shape in shapes.items()}
    theirs = {k: tensor(p.data, requires_grad=True) for k, p in params.items()}
    ours = AdamW(0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, clip=3.0, rate=lora_plus(16.0))
    own = ({}, {"lr": 16 * 0.02}, {"weight_decay": 0.0})  # LoRA+, and a vector does not decay
    groups = [{"params": [p], **more} for p, more in zip(theirs.values(), own, strict=True)]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    norms = []
    for step in range(5):
        for k, p in params.items():
            g = rng.standard_normal(shapes[k]) * (0.01, 1.0)[step % 2]
            p.grad, theirs[k].grad = to_device(g), tensor(g)
        norms.append(clip_(theirs.values(), 3.0))
        adamw.step()
        assert ours.step(params) == pytest.approx(norms[-1], rel=1e-13)
    assert min(norms) < 3.0 < max(norms)  # some were clipped, some not
    agree({k: p.data for k, p in params.items()}, theirs, 1e-12)


def test_ten_steps_match_torch():
    model, rng = fresh(TIED)
    inject(model, LoraConfig(R, ALPHA, targets=EVERYTHING), rng=rng)  # one factor of each pair is 0
    reference = TorchLlama(model, {})
    batches = [batch(rng)] * 10
    adamw = torch.optim.AdamW(reference.trained.values(), lr=0.02, weight_decay=0.1)
    ours = train(model, batches, AdamW(0.02, weight_decay=0.1, clip=0.5), steps=10).loss
    theirs = []
    for ids, labels in batches:
        adamw.zero_grad()
        theirs.append(F.cross_entropy(reference(tensor(ids)).flatten(0, 1), tensor(labels).flatten()))
        theirs[-1].backward()
        clip_(reference.trained.values(), 0.5)
        adamw.step()
    assert ours[-1] < ours[0] - 1
    agree({"losses": np.array(ours)}, {"losses": torch.stack(theirs)}, 1e-9)
    agree({k: p.data for k, p in trained(model).items()}, reference.trained, 1e-9)


def llama_of_transformers(model, dtype):
    """transformers' Llama with our weights under our names.

    Even in float64 it rounds to float32 the inner part of RMSNorm and the rotary embedding's angles, cos
    and sin ("eager" attention the softmax, too), so agreement ends near 1e-7; without, it is 1e-14.
    """
    config = transformers.LlamaConfig(**asdict(model.config), attn_implementation="sdpa")
    theirs = transformers.LlamaForCausalLM(config).to(dtype).eval()
    state = {path: tensor(p.data) for path, p in named_params(model).items()}
    theirs.load_state_dict(state, strict=model.lm_head is not None)  # a tied head has a second name there
    return theirs


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied-biases"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 2e-6), ("float32", 5e-6)])
def test_logits_match_transformers(config, dtype, bound):
    model, rng = fresh(config, np.dtype(dtype))
    ids, _ = batch(rng)
    theirs = llama_of_transformers(model, getattr(torch, dtype))
    agree({"logits": model(ids)[0]}, {"logits": theirs(tensor(ids)).logits}, bound)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied-biases"])
def test_greedy_decoding_matches_transformers(config):
    model, rng = fresh(config)
    prompt, steps = rng.integers(0, config.vocab_size, (5, 6)), 10
    theirs = llama_of_transformers(model, torch.float64)
    theirs.generation_config.eos_token_id = None
    seen = torch.ones(prompt.shape, dtype=torch.int64)  # or a 0 in the prompt would be taken for padding
    how = {"attention_mask": seen, "pad_token_id": 0}
    text = theirs.generate(tensor(prompt), max_new_tokens=steps, do_sample=False, **how).numpy()
    ours = np.stack(list(generate(model, to_device(prompt), steps, rng=rng, temperature=0)), 1)
    logits = np.sort(to_host(model(to_device(text))[0]), -1)[:, prompt.shape[1] - 1 : -1]
    lead = (logits[..., -1] - logits[..., -2]).min()
    print(f"  the first token leads by {lead:.1e} or more")
    assert lead > 1e-4  # no tie that transformers' rounding could break
    assert np.array_equal(text[:, prompt.shape[1] :], ours)


def peft_name(path):
    module, leaf = path.split(".adapters.default.")
    leaf = "magnitude_vector" if leaf == "magnitude" else leaf[-1]
    ending = f"embedding_{leaf}.default" if module.endswith("embed_tokens") else f"{leaf}.default.weight"
    return f"base_model.model.{module}.lora_{ending}"


PEFT_KINDS = {
    "lora": (TIED, "all-linear", {}, {}),
    "rslora": (TIED, "all-linear", {"rslora": True}, {"use_rslora": True}),
    "dora": (UNTIED, "all-linear", {"dora": True, "detach": True}, {"use_dora": True}),
    "embedding-head": (UNTIED, ["q_proj", "embed_tokens", "lm_head"], {}, {}),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize(("config", "targets", "kind", "more"), PEFT_KINDS.values(), ids=PEFT_KINDS)
def test_adapters_match_peft(config, targets, kind, more):
    # the bounds leave room: random factors on both sides, times s, amplify transformers' rounding
    model, rng = fresh(config)
    hf = llama_of_transformers(model, torch.float64)
    inject(model, LoraConfig(R, ALPHA, targets, init="both", **kind), rng=rng)
    wrapped = peft.get_peft_model(hf, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, **more))
    ours = {peft_name(path): p for path, p in trained(model).items()}
    theirs = {k: p for k, p in wrapped.named_parameters() if p.requires_grad}
    assert {k: p.data.shape for k, p in ours.items()} == {k: p.shape for k, p in theirs.items()}
    for k, p in theirs.items():
        p.data = tensor(ours[k].data)
    agree_on_a_batch(model, lambda ids: wrapped(ids).logits, ours, theirs, rng, 5e-5)
