"""Agreement with transformers and PEFT through files: bases, adapters both ways, merged models, training.

The product of all bases and adapters of peft_cases, where the option has something to act on. Differences
are max |ours - theirs| / max |theirs|; what rounding may make of them is derived step by step in `Rounded`.
`pytest -m parity -s` shows the figures, and MINILORA_WRITE_PARITY=1 writes them to benchmarks/results.
"""

import json
import math
import os
import re
import shutil
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import peft_cases
import pytest
from peft_cases import IDS, SHAPE, logits, slug

from minilora.adapters import scales, set_scale
from minilora.backend import to_device, to_host
from minilora.formats.huggingface import load, save_model
from minilora.formats.safetensors import stored
from minilora.layers import Linear
from minilora.lora import Adapted, fuse, inject, owners
from minilora.methods.bias import WithBias
from minilora.methods.dora import DoRA
from minilora.methods.full_copy import FullCopy
from minilora.methods.lora_config import LoraConfig
from minilora.optim import AdamW
from minilora.peft.loading import load_adapter, save_adapter
from minilora.table import Table
from minilora.training import train
from minilora.tree import named_params, trained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
F = torch.nn.functional

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]

BASES = peft_cases.BASES | {
    "grouped": ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}, "float32", None),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}, "float32", None),
}
ADAPTERS = peft_cases.ADAPTERS
LEFT_OUT = {  # what the config names and PEFT does not adapt
    "saved, too": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["up_proj"]},
    "saved of all": {"target_modules": "all-linear", "modules_to_save": ["o_proj", "norm"]},
    "in no layer": {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [1, 7]},
}
PAIRS = [
    (base, adapter)
    for base in peft_cases.BASES
    for adapter, how in ADAPTERS.items()
    if "bias" not in how or base == "biases"  # else there is no bias to train
]
U = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
DRAWS = 4
HEADS = {"embedding", "embedding and head", "head", "saved norm and head", "saved embedding"}

OPTIONS = {  # line of the table -> the bases and adapters that have it
    "float32 files": ["untied"], "float16 files": ["float16"], "bfloat16 files": ["bfloat16"],
    "tied": ["tied"], "untied": ["untied"], "GQA": ["untied", "grouped"], "biases": ["biases"],
    "head_dim": ["head_dim", "grouped"], "sharded": ["sharded"], "llama3": ["llama3"],
    "rope theta": ["theta"], "q and v": ["q and v"], "all-linear": ["all-linear, rsLoRA"],
    "rsLoRA": ["all-linear, rsLoRA", "DoRA, rsLoRA"],
    "rank pattern": ["patterns"], "alpha pattern": ["patterns"], "regex targets": ["regex"],
    "exclude_modules": ["excluded"], "layers_to_transform": ["one layer"],
    "modules_to_save": ["saved norm and head", "saved embedding"], "embedding": ["embedding"],
    "head": ["head", "embedding and head"], "DoRA": ["DoRA", "DoRA, rsLoRA"],
    "bias lora_only": ["bias lora_only"], "bias all": ["bias all"], "bf16 adapter": ["bfloat16 adapter"],
    "dropout": ["dropout"], "ours -> PEFT": ["ours -> PEFT"],
    "PEFT -> ours -> PEFT": ["PEFT -> ours -> PEFT"],
    "merged -> transformers": ["merged"], "gradients": ["gradients"], "ten steps": ["ten steps"],
    "transformers in float16": ["in float16"], "transformers in bfloat16": ["in bfloat16"],
}  # fmt: skip
figures = defaultdict(list)  # case -> (dtype, difference, bound)


# ---- what rounding may do


class Rounded:
    """The network once more, in torch and float64, where each step errs by as much as rounding allows.

    transformers rounds each step to the dtype of the model, with unit roundoff u; RMSNorm and rope's
    angles are computed in float32 whatever the model's, v = 2^-24; sums are taken in the finer of the
    two, w = min(u, v). To first order (Higham, Accuracy and Stability, sections 2.2 and 3.1):

        linear map     (I + r + 3) w of (|W| + s |B||A|) |x| + 3 |b|, for I + r terms, scale and sum; 2u |y|
        DoRA           3 more, and |W| + s |B||A| = M times 1 + 2g, for PEFT's W x + (g - 1) W x + g s B A x,
                       before which it takes b off; and times g |M| / |V| for the row norms |V| in g
        table          (r + 3) w (|E| + s |B A|) + u |x|, if it is adapted; else none
        RMSNorm        (D/2 + 6) v |n|: x, half of its square's and of D sums', the root's, the product's;
                       2u |y|. Backward (D + 8) v (|g| + |n| mean |g n|) in g = dn
        rope           frequency: ln θ + 3 roundings of the power and its exponent, angle one more, cos
                       and sin two; llama3: δ of the mixture is 4 high / (high - low) + 4 more, and
                       its weight 1/factor makes that factor times as much. Turning: 2u (|q cos| + |q' sin|)
        attention      (E + 2) w + u of |q||k| / sqrt(E); (T + 4) w + u of p; (T + 1) w p |v| + u |y|
        SwiGLU         3u + 6w        sum of the stream: u

    Every error has its largest size and a sign that is drawn (Higham and Mary 2019: the worst of all signs
    does not happen): what they become on their way to logits and gradients is measured on the network
    itself. Before `drawn` there is no error at all, and it is the oracle of minilora's own float64.
    """

    v = U["float32"]

    def __init__(self, model):
        self.config, self.layers = model.config, dict(owners(model))
        self.u, self.w, self.draws = 0.0, 0.0, None
        self.turns = cache(self.tables)
        self.tensors = {}
        for p in named_params(model).values():
            t = torch.tensor(to_host(p.data), dtype=torch.float64, requires_grad=p.trainable)
            self.tensors[id(p)] = t
        self.trained = {path: self.tensors[id(p)] for path, p in trained(model).items()}

    def drawn(self, seed, u=U["float64"]):
        """The same network, from now on with errors of these signs."""
        self.u, self.w, self.draws = u, min(u, self.v), torch.Generator().manual_seed(seed)
        self.turns = cache(self.tables)  # the same frequencies for all positions, layers and steps
        return self

    def off(self, y, size):
        """y, off by that much up or down."""
        if self.draws is None:
            return y
        sign = torch.randint(0, 2, y.shape, generator=self.draws, dtype=torch.float64) * 2 - 1
        return y + sign * size.detach()

    def weight(self, path):
        """W, the sum of the sizes of its terms, r, the roundings beside the sum, and the bias."""
        layer = self.layers.get(path, self.layers["model.embed_tokens"])  # the head, if it is tied
        adapter = layer.adapters[layer.active] if isinstance(layer, Adapted) and layer.active else None
        base = (
            adapter.layer
            if isinstance(adapter, FullCopy)
            else layer.base
            if isinstance(layer, Adapted)
            else layer
        )
        bias = base.bias if isinstance(base, Linear) else None
        if isinstance(adapter, WithBias):
            adapter, bias = adapter.adapter, adapter.bias
        W = self.tensors[id(base.weight)]
        b = torch.zeros(()) if bias is None else self.tensors[id(bias)]
        if adapter is None or isinstance(adapter, FullCopy):
            return W, W.abs(), 0, b
        f = adapter.low_rank if isinstance(adapter, DoRA) else adapter
        A, B = self.tensors[id(f.A)], self.tensors[id(f.B)]
        D, M = f.scale * B @ A, f.scale * B.abs() @ A.abs()
        D, M = (D, M) if isinstance(base, Linear) else (D.T, M.T)
        V, M = W + D, W.abs() + M
        if not isinstance(adapter, DoRA):
            return V, M, len(A), b
        n = V.detach().norm(dim=1)
        g = self.tensors[id(adapter.magnitude)] / n
        return g[:, None] * V, (1 + 2 * g + g * M.norm(dim=1) / n)[:, None] * M, len(A) + 3, b

    def linear(self, path, x):
        W, M, r, b = self.weight(path)
        y = x @ W.T + b
        size = (W.shape[1] + r + 3) * self.w * (x.abs() @ M.T + 3 * b.abs()) + 2 * self.u * y.abs()
        return self.off(y, size)

    def table(self, ids):
        E, M, r, _ = self.weight("model.embed_tokens")
        x = E[ids]
        return self.off(x, (r + 3) * self.w * M[ids] + self.u * x.abs()) if r else x

    def norm(self, path, x):
        D, v = x.shape[-1], self.v
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        n = self.off(n, (D / 2 + 6) * v * n.abs())

        def back(g):
            return self.off(g, (D + 8) * v * (g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True)))

        if n.requires_grad:
            n.register_hook(back)
        y = n * self.weight(path)[0]
        return self.off(y, 2 * self.u * y.abs())

    def tables(self, T):
        c, v = self.config, self.v
        f, off = c.rope_theta ** (-2 * np.arange(c.E // 2) / c.E), math.log(c.rope_theta) + 3
        if s := c.rope_scaling:
            f = s(f)
            off += s.factor * (4 * s.high_freq_factor / (s.high_freq_factor - s.low_freq_factor) + 4)
        f = torch.tensor(f)
        angle = torch.arange(T)[:, None] * self.off(f, off * v * f)
        angle = self.off(angle, v * angle)
        return [self.off(y, (2 * v + self.u) * y.abs()) for y in (angle.cos(), angle.sin())]

    def turn(self, x):
        """Turn the pairs of each head in x (N, H, T, E)."""
        cos, sin = self.turns(x.shape[-2])
        a, b = x.chunk(2, -1)
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        a, b, cos, sin = (t.abs() for t in (a, b, cos, sin))
        return self.off(y, 2 * self.u * torch.cat([a * cos + b * sin, b * cos + a * sin], -1))

    def attention(self, at, x):
        c, u, w, T = self.config, self.u, self.w, x.shape[1]
        flat = (self.linear(f"{at}.{name}", x) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (y.unflatten(-1, (-1, c.E)).transpose(1, 2) for y in flat)
        q, k = self.turn(q), self.turn(k)
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        z = q @ k.mT / math.sqrt(c.E)
        z = self.off(z, ((c.E + 2) * w + u) * (q.abs() @ k.abs().mT) / math.sqrt(c.E))
        p = torch.softmax(z + torch.full((T, T), -math.inf).triu(1), -1)
        p = self.off(p, ((T + 4) * w + u) * p)
        y = p @ v
        y = self.off(y, (T + 1) * w * (p @ v.abs()) + u * y.abs())
        return self.linear(f"{at}.o_proj", y.transpose(1, 2).flatten(2))

    def mlp(self, at, x):
        h = F.silu(self.linear(f"{at}.gate_proj", x)) * self.linear(f"{at}.up_proj", x)
        return self.linear(f"{at}.down_proj", self.off(h, (3 * self.u + 6 * self.w) * h.abs()))

    def __call__(self, ids):
        x = self.table(ids)
        for i in range(self.config.num_hidden_layers):
            at = f"model.layers.{i}"
            x = x + self.attention(f"{at}.self_attn", self.norm(f"{at}.input_layernorm", x))
            x = self.off(x, self.u * x.abs())
            x = x + self.mlp(f"{at}.mlp", self.norm(f"{at}.post_attention_layernorm", x))
            x = self.off(x, self.u * x.abs())
        return self.linear("lm_head", self.norm("model.norm", x))


def difference(a, b):
    """max |a - b| / max |b|."""
    a, b = (t.detach().numpy() if isinstance(t, torch.Tensor) else np.asarray(t) for t in (a, b))
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def bound(model, *units):
    """How far logits may lie from the exact ones where each side is computed with its unit roundoff."""
    ids = torch.tensor(IDS)
    with torch.no_grad():
        net = Rounded(model)
        exact = net(ids)
        ours = to_host(model(IDS)[0])
        assert difference(ours, exact) <= 1e-11 * U[str(ours.dtype)] / U["float64"]
        return sum(max(difference(net.drawn(seed, u)(ids), exact) for seed in range(DRAWS)) for u in units)


def agree(cases, ours, theirs, limit, dtype="float64"):
    """The difference is within the limit; both are noted for the table."""
    found = difference(ours, theirs)
    for case in cases:
        figures[case].append((dtype, found, limit))
    assert found <= limit, f"{found:.1e}, expected at most {limit:.1e}"


# ---- files of both sides


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(base, adapter or None) -> its folder, written by transformers or PEFT once."""
    root = tmp_path_factory.mktemp("hub")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    @cache
    def write(base, adapter=None):
        folder = root / slug(f"{base}--{adapter}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peft_cases, "BASES", BASES)
            patch.setattr(peft_cases, "ADAPTERS", ADAPTERS | LEFT_OUT)
            if adapter:
                peft_cases.make_adapter(write(base), adapter, folder)
            else:
                peft_cases.make_base(base, folder)
        return folder

    return write


@pytest.fixture(autouse=True)
def strictly(monkeypatch):
    """Neither transformers nor PEFT says of a key that it is missing or not expected."""
    read_base, read_adapter = transformers.LlamaForCausalLM.from_pretrained, peft.PeftModel.load_adapter

    def from_pretrained(*args, **how):
        model, info = read_base(*args, output_loading_info=True, **how)
        assert "missing_keys" in info
        assert not any(info.values()), info
        return model

    def load_adapter(self, *args, **how):
        result = read_adapter(self, *args, **how)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        return result

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(peft.PeftModel, "load_adapter", load_adapter)


@pytest.fixture(scope="module", autouse=True)
def table():
    """At the end, the figures: for each option the case that came nearest to its bound."""
    yield
    head = ["option", "cases", "float64: difference", "bound", "float32: difference", "bound"]
    lines = []
    for option, cases in OPTIONS.items():
        found = [figure for case in cases for figure in figures[case]]
        row = [option, str(len(found))]
        for dtype in ("float64", "float32"):
            of = [(a, b) for kind, a, b in found if kind == dtype]
            row += [f"{x:.1e}" for x in max(of, key=lambda ab: ab[0] / ab[1])] if of else ["", ""]
        lines.append(row)
    made = Table(head, lines).markdown()
    print(f"\n{made}")
    complete = all(figures[case] for cases in OPTIONS.values() for case in cases)
    if complete and os.environ.get("MINILORA_WRITE_PARITY") == "1":
        versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft))
        text = ["# Agreement with transformers and PEFT through files", "", f"{ABOUT} With {versions}.", ""]
        to = Path(__file__).parents[2] / "benchmarks" / "results" / "parity.md"
        to.write_text("\n".join([*text, made]) + "\n")


ABOUT = """\
`MINILORA_WRITE_PARITY=1 pytest -m parity tests/parity/test_parity_files.py` writes this. A difference is
max |ours - theirs| / max |theirs|: of logits, of each gradient of what is trained, or of the losses of ten
steps of AdamW. Of all cases of an option it is that of the one which came nearest to its bound. The bounds
are derived in `Rounded` in `tests/parity/test_parity_files.py`; even where the model is in float64,
transformers computes RMSNorm and rotary angles in float32. Merged models were written in float32, float16
and bfloat16; in float32 the running adapter is compared with the merged file. In the last two lines our
float32 stands against transformers' arithmetic of 16 bits."""


def label(adapter):
    """An adapter's name in the table; the base of that name has another line."""
    return f"{adapter} adapter" if adapter in BASES else adapter


def read(base, adapter=None, dtype="float64"):
    """Our model of two folders."""
    model = load(base, np.dtype(dtype))
    if adapter:
        load_adapter(model, adapter)
    return model


def tying(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


pairs = pytest.mark.parametrize(("base", "adapter"), PAIRS, ids=lambda name: slug(name))


# ---- their files, read by us


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("base", BASES)
def test_bases_of_transformers_are_read(hub, base, dtype):
    model = read(hub(base), dtype=dtype)
    units = [U["float32"]] * 2 if dtype == "float32" else [U["float64"]]
    agree([base], model(IDS)[0], logits(hub(base), dtype=dtype), bound(model, *units), dtype)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_16_bit_bases_are_read_like_transformers(hub, kind):
    model = read(hub(kind), dtype="float32")
    limit = bound(model, U[kind], U["float32"])
    agree([f"in {kind}"], model(IDS)[0], logits(hub(kind), dtype=kind), limit, "float32")


@pytest.mark.parametrize("base", ["theta", "llama3"])
def test_the_older_spelling_of_rope_is_read(hub, base, tmp_path):
    folder = shutil.copytree(hub(base), tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    new = config.pop("rope_parameters")
    old = {"rope_theta": new.pop("rope_theta"), "rope_scaling": new if base == "llama3" else None}
    (folder / "config.json").write_text(json.dumps(config | old))
    model = read(folder)
    agree([base], model(IDS)[0], logits(folder), bound(model, U["float64"]))


@pairs
def test_adapters_of_peft_are_read(hub, base, adapter):
    folders = hub(base), hub(base, adapter)
    model = read(*folders)
    agree([label(adapter)], model(IDS)[0], logits(*folders), bound(model, U["float64"]))
    model = read(*folders, "float32")
    limit = bound(model, *[U["float32"]] * 2)
    agree([label(adapter)], model(IDS)[0], logits(*folders, "float32"), limit, "float32")


@pytest.mark.parametrize("adapter", LEFT_OUT)
def test_modules_that_peft_skips_are_skipped(hub, adapter, tmp_path):
    folders = hub("untied"), hub("untied", adapter)
    model = read(*folders)
    limit = bound(model, U["float64"])
    assert difference(model(IDS)[0], logits(*folders)) <= limit
    save_adapter(model, tmp_path / "again")
    assert difference(model(IDS)[0], logits(hub("untied"), tmp_path / "again")) <= limit


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_bounds_detect_a_scale_off_by_a_thousandth(hub, adapter):
    folders = hub("biases"), hub("biases", adapter)
    model = read(*folders)
    limit = bound(model, U["float64"])
    set_scale(model, {path: 1.001 * s for path, s in scales(model).items()})
    assert difference(model(IDS)[0], logits(*folders)) > 10 * limit


# ---- our files, read by them


def as_ours(how, tied):
    """PEFT's options in our words."""
    targets = how["target_modules"]
    if isinstance(targets, list) and tied:  # the head is the table here
        targets = [name for name in targets if name != "lm_head"]
    elif targets != "all-linear" and isinstance(targets, str):
        targets = re.compile(targets)
    ours = {"rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern", "bias": "bias",
            "exclude_modules": "exclude_modules", "layers_to_transform": "layers_to_transform",
            "modules_to_save": "modules_to_save", "use_rslora": "rslora", "use_dora": "dora",
            "lora_dropout": "dropout"}  # fmt: skip
    given = {ours[key]: value for key, value in how.items() if key != "target_modules"}
    given["rank_pattern"] = {k.removeprefix("^"): r for k, r in given.get("rank_pattern", {}).items()}
    saved = [name for name in given.get("modules_to_save", []) if not (tied and name == "lm_head")]
    return LoraConfig(3, 7, targets, **given | {"modules_to_save": saved, "detach": "use_dora" in how})


@pairs
def test_peft_reads_our_adapters(hub, base, adapter, tmp_path):
    model, rng = read(hub(base)), np.random.default_rng(3)
    inject(model, as_ours(ADAPTERS[adapter], model.lm_head is None), rng=rng)
    kind = "bfloat16" if adapter == "bfloat16" else "float32"
    for p in trained(model).values():
        new = to_host(p.data) + 0.3 * rng.standard_normal(p.data.shape)
        p.data = to_device(stored(new.astype(np.float32), kind).astype(np.float64))
    save_adapter(model, tmp_path / "ours", dtype=kind)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == ADAPTERS[adapter].get("lora_dropout", 0)
    theirs = logits(hub(base), tmp_path / "ours")
    limit = bound(model, U["float64"])
    agree(["ours -> PEFT"], model(IDS)[0], theirs, limit)
    agree(["ours -> PEFT"], read(hub(base), tmp_path / "ours")(IDS)[0], theirs, limit)

    fuse(model)  # where the head is tied it stays so: both have changed by the same
    save_model(model, tmp_path / "merged", "a card\n", dtype="float64")
    assert tying(tmp_path / "merged") is BASES[base][0].get("tie_word_embeddings", False)
    agree(["merged"], model(IDS)[0], logits(tmp_path / "merged"), limit)


@pairs
def test_peft_reads_its_adapters_after_we_save_them_again(hub, base, adapter, tmp_path):
    model = read(hub(base), hub(base, adapter))
    save_adapter(model, tmp_path / "again", dtype="bfloat16" if adapter == "bfloat16" else "float32")
    theirs = logits(hub(base), tmp_path / "again")
    agree(["PEFT -> ours -> PEFT"], model(IDS)[0], theirs, bound(model, U["float64"]))


@pairs
def test_transformers_reads_merged_models(hub, base, adapter, tmp_path):
    model = read(hub(base), hub(base, adapter), "float32")
    running, limit = model(IDS)[0], bound(model, U["float32"], U["float64"])
    fuse(model)
    tied = BASES[base][0].get("tie_word_embeddings", False) and adapter not in HEADS
    for kind in ("float32", "float16", "bfloat16"):
        save_model(model, tmp_path / kind, "a card\n", dtype=kind)
        assert tying(tmp_path / kind) is tied
        theirs, again = logits(tmp_path / kind), read(tmp_path / kind)
        agree(["merged"], again(IDS)[0], theirs, bound(again, U["float64"]))
        for p, q in zip(named_params(model).values(), named_params(again).values(), strict=True):
            rounded = torch.tensor(to_host(p.data)).to(getattr(torch, kind))
            assert np.array_equal(rounded.double(), to_host(q.data))
        if kind == "float32":
            agree(["merged"], running, theirs, limit, kind)


# ---- training


def batch():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, SHAPE["vocab_size"], IDS.shape)
    labels[rng.random(labels.shape) < 0.2] = -100
    return IDS, labels


def loss_of(forward):
    ids, labels = map(torch.tensor, batch())
    return F.cross_entropy(forward(ids).flatten(0, 1), labels.flatten())


def trainable(base, adapter):
    """PEFT's model in float64, without dropout."""
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).to(torch.float64).eval()


def theirs_by_our_names(ours, wrapped):
    """Path of our trained parameter -> PEFT's; none is left over on either side."""
    theirs = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    found = {}
    for path in ours:
        module, leaf = path.split(".adapters.default.")
        table, leaf = module.endswith("embed_tokens"), leaf.rpartition(".")[2]
        forms = {
            "A": "lora_embedding_A.default" if table else "lora_A.default.weight",
            "B": "lora_embedding_B.default" if table else "lora_B.default.weight",
            "magnitude": "lora_magnitude_vector.default.weight",
            "weight": "modules_to_save.default.weight", "bias": "base_layer.bias",
        }  # fmt: skip
        name = f"base_model.model.{module}.{forms[leaf]}"
        found[path] = theirs.pop(name if name in theirs else name.replace(".base_layer", ""))
    assert theirs == {}
    return found


def gradients(forward, params):
    loss_of(forward).backward()
    return {path: p.grad for path, p in params.items()}


@pytest.mark.parametrize(("base", "adapter"), [p for p in PAIRS if p[0] in ("biases", "tied")])
def test_gradients_match_peft(hub, base, adapter):
    model, wrapped = read(hub(base), hub(base, adapter)), trainable(hub(base), hub(base, adapter))
    params = trained(model)
    theirs = gradients(lambda ids: wrapped(ids).logits, theirs_by_our_names(params, wrapped))
    nets = [Rounded(model), *(Rounded(model).drawn(seed) for seed in range(DRAWS))]
    exact, *off = (gradients(net, net.trained) for net in nets)
    limit = max(difference(g[path], exact[path]) for g in off for path in g)
    loss, back = model.loss(*batch(), train=True)
    back()
    for path, p in params.items():
        assert difference(p.grad, exact[path]) <= 1e-10, path
        agree(["gradients"], p.grad, theirs[path], limit)
    assert abs(loss - float(loss_of(lambda ids: wrapped(ids).logits).detach())) <= limit * loss


def ten_losses(forward, params):
    matrices, vectors = ([p for p in params.values() if (p.ndim > 1) is many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01)
    losses = []
    for _ in range(10):
        adamw.zero_grad()
        loss = loss_of(forward)
        loss.backward()
        adamw.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


STEPS = ["q and v", "all-linear, rsLoRA", "DoRA", "embedding and head", "saved norm and head",
         "bias lora_only", "bias all"]  # fmt: skip


@pytest.mark.parametrize("adapter", STEPS)
def test_ten_steps_match_peft(hub, adapter):
    folders = hub("biases"), hub("biases", adapter)
    model, wrapped = read(*folders), trainable(*folders)
    nets = [Rounded(model), *(Rounded(model).drawn(seed) for seed in range(DRAWS))]
    exact, *off = (ten_losses(net, net.trained) for net in nets)
    theirs = ten_losses(lambda ids: wrapped(ids).logits, theirs_by_our_names(trained(model), wrapped))
    ours = np.array(train(model, [batch()] * 10, AdamW(0.01, weight_decay=0.1, clip=None), steps=10).loss)
    assert ours[-1] < ours[0] - 0.2
    assert difference(ours, exact) <= 1e-9
    agree(["ten steps"], ours, theirs, max(difference(losses, exact) for losses in off))


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> <t> $A <t>", "$A <t>"])
@pytest.mark.parametrize("text", ["", "ab", "a b h", "<s> a", "a<t>b"])
def test_a_sequence_has_the_start_tokens_of_transformers(single, text, tmp_path):
    """What it puts after a text is left out, for a text goes on; what is there already is not doubled."""
    from test_examples import made
    from tokenizers.models import WordLevel

    letters = WordLevel({letter: i for i, letter in enumerate("abcdefgh")}, unk_token="h")
    ours = made(tmp_path, letters, single, **{"<s>": 8, "<t>": 9})
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = theirs(text)["input_ids"]
    ids = ids[: len(ids) - single.partition("$A")[2].count("<")]
    if text == "<s> a" and single == "<s> $A":
        ids = ids[1:]
    assert ours.begun(ours.encode(text)).tolist() == ids
