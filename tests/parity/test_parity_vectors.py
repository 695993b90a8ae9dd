"""Sums of adapters beside PEFT's add_weighted_adapter: every method that both have, and where the two differ.

Adapters in float64 with random factors, so what is left is the rounding of both (`vectors.rounding`), and
what enlarges it. PEFT holds the weights of all methods but "cat" in float32: they are powers of two here, but
the roots that its "linear" takes are rounded (ROOTS). And a matrix cut at a rank is settled only as far as
the gap between its singular values allows (`settled`). `pytest -m parity -s` shows the figures.
"""

import math
import re

import numpy as np
import pytest
from by_hand import U32, changes, read_peft
from peft_cases import SHAPE
from vectors import crossed, of, rounding

from minilora.compose.combine import METHODS, combine
from minilora.errors import InputError, UnsupportedError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1:UserWarning"),
]

ROOTS = 4 * U32  # w s rounded, which the root halves, and the root: 1.5 u on either side, and their square
NAMES = ["one", "two", "three"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PAIRS = {  # what the two adapters are: (LoraConfig's arguments, ...), and the weights
    "the same": (({"r": 3, "lora_alpha": 7}, {"r": 3, "lora_alpha": 7}), (0.5, 0.25)),
    "other alphas": (({"r": 3, "lora_alpha": 7}, {"r": 3, "lora_alpha": 2}), (0.5, 2.0)),
    "negation": (({"r": 3, "lora_alpha": 7}, {"r": 3, "lora_alpha": 5}), (1.0, -0.5)),
    "alpha pattern": (
        ({"r": 3, "lora_alpha": 7, "alpha_pattern": {"k_proj": 2}}, {"r": 3, "lora_alpha": 5}), (0.5, -2.0),
    ),
    "rsLoRA second": (({"r": 3, "lora_alpha": 7}, {"r": 3, "lora_alpha": 5, "use_rslora": True}), (0.5, 0.5)),
    "other targets": (
        ({"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
         {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}), (0.5, -0.25),
    ),
    "all-linear": (
        ({"r": 2, "lora_alpha": 7, "target_modules": "all-linear"},
         {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"}), (0.5, 1.0),
    ),
    "embedding": (
        ({"r": 3, "lora_alpha": 7, "target_modules": ["embed_tokens", "q_proj"]},
         {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]}), (0.5, -0.5),
    ),
}  # fmt: skip
RANKS = {  # the like of several ranks, for the methods that take them
    "other ranks": (({"r": 3, "lora_alpha": 7}, {"r": 5, "lora_alpha": 2}), (0.5, -0.25)),
    "rank pattern": (
        ({"r": 3, "lora_alpha": 7, "rank_pattern": {"k_proj": 2}}, {"r": 4, "lora_alpha": 5}), (0.5, 2.0),
    ),
}  # fmt: skip
SAME = {  # our method -> PEFT's name for it, and the options of both
    "cat": ("cat", {}, {}),
    "peft_linear": ("linear", {}, {}),
    "svd": ("svd", {"rank": 4}, {"svd_rank": 4}),
    "magnitude": ("magnitude_prune_svd", {"density": 0.3, "rank": 4}, {"density": 0.3, "svd_rank": 4}),
    "ties": ("ties_svd", {"density": 0.3, "rank": 4}, {"density": 0.3, "svd_rank": 4}),
}
DROPPING = {"dare": "dare_linear_svd", "dare_ties": "dare_ties_svd"}
APART = ("magnitude_prune", "ties", "dare_linear", "dare_ties")  # PEFT prunes A and B each on its own


def adapters(folder, *configs):
    """A model of PEFT's with adapters one, two, ... of random factors, and their folders."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.float64)
    model = None
    for name, config in zip(NAMES, configs, strict=False):
        config = peft.LoraConfig(**{"target_modules": list(ATTENTION)} | config)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.data = torch.randn(p.shape, dtype=torch.float64)
    model.save_pretrained(folder)
    return model, [folder / name for name in NAMES[: len(configs)]]


def theirs(model, name="new"):
    """Module -> ΔW (O, I), of an embedding (D, V), of one of PEFT's adapters."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and name in layer.scaling:
            change = layer.get_delta_weight(name).detach().numpy()
            found[path.removeprefix("base_model.model.")] = change.T if "embed" in path else change
    return found


def both(folder, pair, method, kind, ours, peft_s):
    """Module -> ΔW, as minilora and as PEFT combine two adapters, and of the exact sum; and `allowed`."""
    configs, weights = pair
    model, folders = adapters(folder, *configs)
    model.add_weighted_adapter(NAMES[:2], list(weights), "new", combination_type=kind, **peft_s)
    weighted = list(zip(folders, weights, strict=True))
    combine(weighted, folder / "new", method=method, **ours)
    a, b = map(changes, folders)
    exact = {m: weights[0] * a.get(m, 0) + weights[1] * b.get(m, 0) for m in {**a, **b}}
    return changes(folder / "new"), theirs(model), exact, allowed(weighted, folder / "whole", method, **ours)


def allowed(weighted, whole, method="cat", rank=None, **ours):
    """Module -> how far apart two results may be, Frobenius, each of them computed in float64."""
    updates = {}
    for folder, w in weighted:
        for m, (A, B, s) in read_peft(folder)[0].items() if w else ():
            updates.setdefault(m, []).append((w, of(B, A, s)))
    off = {m: 2 * rounding(parts, ours.get("density", 1.0)) for m, parts in updates.items()}
    if method == "peft_linear":
        return {m: off[m] + ROOTS * crossed(parts) for m, parts in updates.items()}
    if rank:
        combine(weighted, whole, method="cat" if method == "svd" else method, **ours)
        off = {m: settled(dW, rank, off[m]) for m, dW in changes(whole).items()}
    return off


def settled(M, k, off):
    """What an error of M makes of its first k terms P M, P the projector on k singular vectors.

    |P'M' - P M| <= |M' - M| + |P' - P| |M|, with the spectral norm of M, and by Wedin (1972) |P' - P| <=
    2 √2 |M' - M| over the gap between the values k and k + 1.
    """
    S = [*np.linalg.svd(M, compute_uv=False), 0.0]
    k = min(k, len(S) - 1)
    return off * (1 + 2 * math.sqrt(2) * S[0] / (S[k - 1] - S[k])) if k < min(M.shape) else off


def reached(one, other, off):
    """The largest share of what is allowed that two dicts of matrices are apart."""
    assert one.keys() == other.keys() == off.keys()
    return max(np.linalg.norm(one[m] - other[m]) / off[m] for m in one)


def farthest(one, other):
    """The largest |difference| of two dicts of matrices, relative to the norm of the second."""
    assert one.keys() == other.keys()
    return max(np.linalg.norm(one[m] - other[m]) / np.linalg.norm(other[m]) for m in one)


@pytest.mark.parametrize("method", SAME)
@pytest.mark.parametrize("pair", PAIRS)
def test_both_make_the_same_update(pair, method, tmp_path):
    kind, how, peft_s = SAME[method]
    mine, their, exact, off = both(tmp_path, PAIRS[pair], method, kind, how, peft_s)
    share = f"{farthest(mine, their):.1e}, {reached(mine, their, off):.1e} of what is allowed"
    print(f"  {method:12} {pair:14} {share}; from the exact sum {farthest(their, exact):.2g}")
    assert reached(mine, their, off) <= 1
    if method == "cat":
        assert reached(their, exact, off) <= 1


@pytest.mark.parametrize("method", ["cat", "svd", "ties"])
@pytest.mark.parametrize("pair", RANKS)
def test_ranks_may_differ(pair, method, tmp_path):
    kind, how, peft_s = SAME[method]
    mine, their, _, off = both(tmp_path, RANKS[pair], method, kind, how, peft_s)
    assert reached(mine, their, off) <= 1


@pytest.mark.parametrize("method", DROPPING)
def test_of_the_same_draws_dare_makes_the_same_update(method, tmp_path, monkeypatch):
    """PEFT draws module by module in the model's order; here there is one module.

    It draws for the adapters as they are named, and here an order of their own decides: one of the two.
    """

    def bernoulli(p):
        return torch.from_numpy((rng.random(p.shape) < p.numpy()).astype(np.float64))

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    one = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    how = {"density": 0.5, "rank": 4}
    pair = ((one, one | {"lora_alpha": 5}), (0.5, -0.25))
    peft_s = {"combination_type": DROPPING[method], "density": 0.5, "svd_rank": 4}
    model, folders = adapters(tmp_path, *pair[0])
    weighted = list(zip(folders, pair[1], strict=True))
    combine(weighted, tmp_path / "new", method=method, seed=5, **how)
    mine, off = changes(tmp_path / "new"), allowed(weighted, tmp_path / "whole", method, seed=5, **how)
    assert len(mine) == 1
    found = []
    for step in (1, -1):
        rng = np.random.default_rng(5)
        model.add_weighted_adapter(NAMES[:2][::step], list(pair[1])[::step], f"new{step}", **peft_s)
        found.append(theirs(model, f"new{step}"))
    print(f"  {method:12} {min(farthest(mine, their) for their in found):.1e} with the same draws")
    shares = [reached(mine, their, off) for their in found]
    assert min(shares) <= 1 < max(shares)


# ---- where the two differ


@pytest.mark.parametrize("kind", APART)
def test_pruning_a_and_b_apart_is_another_update(kind, tmp_path):
    """Even at density 1, where nothing is pruned, cross terms remain; ours is then the exact sum."""
    ours = {"magnitude_prune": "magnitude", "dare_linear": "dare"}.get(kind, kind)
    how = {"density": 1.0}
    mine, their, exact, off = both(tmp_path, PAIRS["the same"], ours, kind, how, how)
    assert farthest(their, exact) > 0.3
    if "ties" not in kind:
        assert reached(mine, exact, off) <= 1


def test_of_one_adapter_peft_takes_linear_whatever_is_asked(tmp_path):
    model, (a,) = adapters(tmp_path, {"r": 3, "lora_alpha": 7})
    model.add_weighted_adapter(["one"], [1.0], "new", combination_type="svd", svd_rank=1)
    assert reached(theirs(model), changes(a), allowed([(a, 1.0)], tmp_path, "peft_linear")) <= 1
    rows = combine({a: 1}, tmp_path / "new", method="svd", rank=1).rows
    assert {row.rank for row in rows} == {1}
    assert min(row.residual for row in rows) > 0


def test_with_rslora_in_the_first_adapter_peft_is_off_by_a_root(tmp_path):
    """Its new adapter keeps use_rslora with alpha = r: the scale is sqrt(r), not 1."""
    pair = (({"r": 3, "lora_alpha": 7, "use_rslora": True}, {"r": 3, "lora_alpha": 7}), (0.5, 0.5))
    mine, their, exact, off = both(tmp_path, pair, "cat", "cat", {}, {})
    assert reached(mine, exact, off) <= 1
    assert reached({m: dW / math.sqrt(6) for m, dW in their.items()}, exact, off) <= 1


def test_a_rank_above_the_shape_breaks_the_factors_of_peft(tmp_path):
    """k_proj has 4 outputs. Here it gets the rank that it can have."""
    configs = {"r": 3, "lora_alpha": 7}, {"r": 3, "lora_alpha": 7}
    model, (a, b) = adapters(tmp_path, *configs)
    model.add_weighted_adapter(NAMES[:2], [1.0, 1.0], "new", combination_type="svd", svd_rank=6)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        theirs(model)
    rows = combine({a: 1, b: 1}, tmp_path / "new", method="svd", rank=6).rows
    assert {row.rank for row in rows} == {4, 6}
    off = allowed([(a, 1.0), (b, 1.0)], tmp_path)
    assert all(row.residual <= off[row.module] for row in rows)


def test_peft_counts_an_adapter_of_weight_0(tmp_path):
    """In its vote on signs; here it is absent."""
    same = {"r": 3, "lora_alpha": 7}
    model, (a, b, c) = adapters(tmp_path, same, same, same)
    how = {"combination_type": "ties_svd", "density": 0.5, "svd_rank": 4}
    model.add_weighted_adapter(NAMES, [1.0, 1.0, 0.0], "all", **how)
    model.add_weighted_adapter(NAMES[:2], [1.0, 1.0], "both", **how)
    ours = {"method": "ties", "density": 0.5, "rank": 4}
    combine({a: 1, b: 1, c: 0}, tmp_path / "new", **ours)
    mine, off = changes(tmp_path / "new"), allowed([(a, 1), (b, 1)], tmp_path / "whole", **ours)
    assert reached(mine, theirs(model, "both"), off) <= 1
    assert farthest(mine, theirs(model, "all")) > 0.1


def test_what_peft_drops_silently_is_refused_here(tmp_path):
    """Modules saved in full are not in PEFT's sum, and nothing says so."""
    model, (a, _) = adapters(tmp_path, {"r": 3, "modules_to_save": ["lm_head"]}, {"r": 3})
    model.add_weighted_adapter(NAMES[:2], [1.0, 1.0], "new", combination_type="cat")
    assert theirs(model)
    with pytest.raises(UnsupportedError, match=r"lm_head.weight replaces lm_head.weight"):
        combine({a: 1}, tmp_path / "mine")


def test_a_name_in_use_is_an_error_here_and_nothing_in_peft(tmp_path):
    model, (a, _) = adapters(tmp_path, {"r": 3}, {"r": 3})
    before = theirs(model, "one")
    assert model.add_weighted_adapter(["two"], [1.0], "one", combination_type="linear") is None
    assert farthest(theirs(model, "one"), before) == 0
    with pytest.raises(InputError, match="is given twice"):
        combine([(a, 1), (a, 1)], tmp_path / "mine")


def test_every_method_is_compared_or_explained():
    """PEFT's names, from its own list in the documentation of add_weighted_adapter."""
    said = peft.tuners.lora.LoraModel.add_weighted_adapter.__doc__
    listed = said[said.index("combination_type") : said.index("svd_rank")]
    names = {*re.findall(r"`([a-z_]+)`", listed)} - {"list", "str"}
    compared = {kind for kind, *_ in SAME.values()} | {*DROPPING.values()} | {*APART}
    assert names == compared
    assert {*SAME, *DROPPING, "linear", "kohya_linear"} == {*METHODS}
