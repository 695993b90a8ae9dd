"""A new kind of adapter that only implements the contract works everywhere: training, merging, files."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers import assert_gradient, batch, gradients, seeds, tiny
from hypothesis import given, settings

from minilora.adapters import remove, scales
from minilora.analysis.inspect import inspect
from minilora.compose.truncate import compress
from minilora.errors import MismatchError, UnsupportedError
from minilora.layers import Factors, Linear, Need, Param
from minilora.lora import LowRank, adapted, fuse, inject, merge, unmerge
from minilora.methods.bias import WithBias
from minilora.methods.bottleneck import Bottleneck
from minilora.methods.dora import DoRA
from minilora.methods.embedding import LowRankEmbedding
from minilora.methods.full_copy import FullCopy
from minilora.methods.lora_config import LoraConfig
from minilora.methods.prefixes import Prefix, Prompt, WithoutPrompt
from minilora.methods.vectors import ScaledInputs, ScaledOutputs, VeRA
from minilora.ops import rows
from minilora.optim import AdamW
from minilora.peft import kinds
from minilora.peft.folder import open_adapter
from minilora.peft.loading import load_adapter, save_adapter
from minilora.spectra import spectrum
from minilora.targets import find_targets
from minilora.training import train
from minilora.tree import digest, named_params, trained


@dataclass(eq=False)
class Gated:
    """ΔW = s diag(g) B A: LoRA with a gate g (O,) on each output."""

    low_rank: LowRank
    gate: Param

    def __call__(self, base, x, need=Need.ALL):
        A, B, s, g = self.low_rank.A, self.low_rank.B, self.low_rank.scale, self.gate
        y, back_base = base(x, need)
        z = rows(x)
        h = s * (z @ A.data.T)
        change = h @ B.data.T
        y += (g.data * change).reshape(y.shape)

        def back(dy):
            dy_ = rows(dy)
            g.add_grad((dy_ * change).sum(0))
            dh = self.low_rank.learn(g.data * dy_, h, z)
            dx = back_base(dy)
            return dx + (dh @ A.data).reshape(x.shape) if need is Need.ALL else dx

        return y, back

    def change(self, base):
        return Factors(
            self.gate.data[:, None] * self.low_rank.B.data, self.low_rank.A.data, self.low_rank.scale
        )

    def merged(self, base):
        B, A, scale = self.change(base)
        return Linear(Param(base.weight.dense() + scale * (B @ A), trainable=False), base.bias)


@dataclass(frozen=True)
class Gates:
    """What to gate."""

    r: int
    targets: Any = "all-linear"

    def fresh(self, layers, rng):
        plain = LoraConfig(r=self.r, alpha=2 * self.r, targets=self.targets).fresh(layers, rng)
        gates = {
            path: np.ones(len(layers[path].weight.data), layers[path].weight.data.dtype) for path in plain
        }
        return {path: Gated(plain[path], Param(gates[path])) for path in find_targets(layers, self.targets)}


@pytest.fixture
def row(monkeypatch):
    """The row of the formats' table."""
    row = kinds.Kind(Gated, "use_gate", "lora_gate_vector", "gate", Gated, "its gates scale the rows of ΔW")
    monkeypatch.setattr(kinds, "KINDS", kinds.KINDS)
    kinds.KINDS.append(row)
    yield row
    kinds.KINDS.remove(row)


def gated(seed=0, dtype=np.float64, steps=3):
    """A tiny model with trained gates."""
    model, rng = tiny(seed, dtype)
    before = digest(model)
    report = inject(model, Gates(2), rng=rng)
    train(model, [batch(rng) for _ in range(steps)], AdamW(1e-2), steps=steps)
    return model, rng, report, before


def adapters(model):
    return list(adapted(model).values())


@settings(max_examples=10)
@given(seed=seeds)
def test_a_new_kinds_gradient_matches_the_complex_step(seed):
    model, rng, _, _ = gated(seed)
    ids, labels = batch(rng)
    _, g = gradients(model, ids, labels)
    everything, params = named_params(model), trained(model)

    def value(arrays):
        kind = np.result_type(*arrays.values())
        for path, p in everything.items():
            p.data = arrays[path] if path in arrays else p.data.real.astype(kind)
        return model.loss(ids, labels)[0]

    assert_gradient(value, {path: p.data for path, p in params.items()}, g, rng, directions=3)


def test_a_new_kind_is_injected_counted_trained_merged_and_removed():
    model, rng, report, before = gated()
    ids, _ = batch(rng)
    assert {line.kind for line in report.rows} == {"Gated"}
    assert report.parameters == sum(p.data.size for p in trained(model).values())
    assert set(scales(model).values()) == {2.0}
    gates = [layer.gate.data for layer in (a.adapters["default"] for a in adapters(model))]
    assert any((gate != 1).any() for gate in gates)
    y = model(ids)[0]
    merge(model)
    assert np.allclose(model(ids)[0], y, rtol=0, atol=1e-12 * abs(y).max())
    unmerge(model)
    assert np.array_equal(model(ids)[0], y)
    S = spectrum(model)
    for path, layer in zip(S, adapters(model), strict=True):
        change = layer.adapters["default"].merged(layer.base).weight.data - layer.base.weight.data
        assert np.allclose(S[path][:2], np.linalg.svd(change)[1][:2], atol=1e-12)
    fuse(model)
    assert np.allclose(model(ids)[0], y, rtol=0, atol=1e-12 * abs(y).max())
    model, *_ = gated()
    remove(model, "default")
    assert digest(model) == before


def test_a_new_kind_is_saved_loaded_inspected_and_truncated(row, tmp_path):
    model, rng, _, _ = gated(dtype=np.float32)
    save_adapter(model, tmp_path / "a")
    assert open_adapter(tmp_path / "a").settings.flags == {"use_gate"}
    again, _ = tiny(0, np.float32)
    load_adapter(again, tmp_path / "a")
    assert digest(again) == digest(model)
    ids, _ = batch(rng)
    assert np.array_equal(again(ids)[0], model(ids)[0])
    seen = inspect(tmp_path / "a")
    assert len(seen.modules) == len(adapters(model))
    assert "Gated: the numbers are those of B A alone; its gates scale the rows of ΔW" in seen.notes
    compress(tmp_path / "a", tmp_path / "b", rank=1)
    small, _ = tiny(0, np.float32)
    load_adapter(small, tmp_path / "b")
    gates = [[layer.adapters["default"].gate.data for layer in adapters(m)] for m in (model, small)]
    assert all(np.array_equal(a, b) for a, b in zip(*gates, strict=True))


def test_a_kind_without_a_file_format_is_refused_by_name(tmp_path):
    model, *_ = gated(dtype=np.float32)
    with pytest.raises(UnsupportedError, match="Gated cannot be stored in PEFT's files"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_tensors_that_the_config_does_not_declare_are_refused(row, tmp_path):
    model, *_ = gated(dtype=np.float32)
    save_adapter(model, tmp_path / "a")
    config = tmp_path / "a/adapter_config.json"
    config.write_text(config.read_text().replace('"use_gate": true', '"use_gate": false'))
    with pytest.raises(MismatchError, match="has a lora_gate_vector; use_gate is False"):
        load_adapter(tiny(0, np.float32)[0], tmp_path / "a")


def test_every_kind_has_every_member_of_the_contract():
    """Every member of the contract is there, so that no caller asks which kind it has."""
    for kind in (
        LowRank,
        LowRankEmbedding,
        DoRA,
        WithBias,
        FullCopy,
        Gated,
        VeRA,
        ScaledOutputs,
        ScaledInputs,
        Bottleneck,
        Prefix,
        Prompt,
        WithoutPrompt,
    ):
        members = {*vars(kind), *kind.__dataclass_fields__}
        assert {"__call__", "merged", "change", "low_rank"} <= members, kind
