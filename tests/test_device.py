"""The whole life of an adapter on the stand-in device: nothing leaks to NumPy, and no bit differs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from device import DeviceArray, namespace
from helpers import EVERYTHING, LINEARS, N, T, batch, gamma, tiny
from library import LIBRARY

from minilora import backend
from minilora.adapters import disabled
from minilora.backend import fused, scatter_add, to_device, to_host
from minilora.decoding import generate
from minilora.experiments.merge_equivalence import one
from minilora.formats.checkpoint import load_checkpoint, save_checkpoint
from minilora.lora import fuse, inject, merge, unmerge
from minilora.methods.lora_config import LoraConfig
from minilora.ops import gelu, saved, softmax
from minilora.optim import AdamW, Schedule
from minilora.training import evaluate, train
from minilora.tree import digest, named_params

pytestmark = pytest.mark.skipif(LIBRARY != "numpy", reason="compares the stand-in with NumPy")

LAWS = ("test_ops.py", "test_layers.py", "test_optim.py")
MORE = (
    "test_model.py", "test_lora.py", "test_training.py", "test_spectra.py", "test_finetune.py",
    "formats/test_huggingface.py", "peft/test_folder.py", "methods", "compose", "analysis/test_inspect.py",
    "serve/test_slots.py", "vision",
)  # fmt: skip

KINDS = {
    "lora": LoraConfig(r=3, alpha=7, targets=EVERYTHING, init="both"),
    "dropout": LoraConfig(r=3, alpha=7, targets=LINEARS, dropout=0.3),
    "dora": LoraConfig(r=3, alpha=7, targets=LINEARS, init="both", dora=True),
    "saved": LoraConfig(r=3, alpha=7, modules_to_save=["norm", "embed_tokens"]),
}


def life(folder, config, tie):
    """All numbers that a model and its adapter bring forth, on the host."""
    model, rng = tiny(1, np.float32, tie_word_embeddings=tie, attention_bias=True)
    ids, labels = (to_device(a) for a in batch(rng))
    inject(model, config, rng=rng)
    optimizer = AdamW(lr=0.01, weight_decay=0.1)
    history = train(
        model,
        [(ids, labels)] * 6,
        optimizer,
        steps=3,
        accumulate=2,
        schedule=Schedule(3),
        evaluate=lambda: evaluate(model, [(ids, labels)]),
    )
    file = folder / f"{config.dora}{tie}.safetensors"
    save_checkpoint(file, model, optimizer, {}, history, {})
    load_checkpoint(file, model, optimizer, {}, {}, 9)
    _, back = model.loss(ids, labels, train=True)
    back()
    numbers = [history.loss, history.evals, optimizer.step({k: p for k, p in named_params(model).items()})]
    numbers += [to_host(model(ids)[0])]
    with disabled(model):
        numbers += [to_host(model(ids)[0])]
    merge(model)
    numbers += [to_host(model(ids)[0])]
    unmerge(model)
    numbers += list(generate(model, ids, 4, rng=rng, top_k=4, top_p=0.9))
    fuse(model)
    return [*numbers, digest(model), *(a for _, a in sorted(optimizer.state().items()))]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_device_and_host_agree_to_the_bit(kind, tie, tmp_path, request):
    host = life(tmp_path, KINDS[kind], tie)
    (tmp_path / f"{KINDS[kind].dora}{tie}.safetensors").unlink()
    request.getfixturevalue("device")
    for a, b in zip(host, life(tmp_path, KINDS[kind], tie), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("library", ["standin", "cupy"])
@pytest.mark.parametrize("names", [LAWS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["core", "files"])
def test_the_suite_passes_on_the_device(library, names):
    if library == "cupy":
        pytest.importorskip("cupy")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short", "-n0"]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in names)], cwd=Path(__file__).parent.parent,
        env=os.environ | {"MINILORA_TEST_BACKEND": library, "HYPOTHESIS_PROFILE": "few"},
        capture_output=True, text=True,
    )  # fmt: skip
    if missing := [line for line in done.stderr.splitlines() if "numpy stays in use" in line]:
        pytest.skip(missing[-1].removeprefix("E   "))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_merge_experiment_is_the_same_on_the_device(request):
    host = one(np.random.default_rng(0), 32, 4, np.float32)
    request.getfixturevalue("device")
    assert one(np.random.default_rng(0), 32, 4, np.float32) == host


@pytest.mark.parametrize("op", [softmax, gelu])
def test_an_op_that_the_model_does_not_train_stays_on_the_device(device, op):
    y, back = op(to_device(np.linspace(-2, 2, N * T).reshape(N, T)))
    assert isinstance(back(y), DeviceArray)
    assert all(isinstance(a, DeviceArray) for a in saved(back).values())


@pytest.mark.parametrize("clip", [1e-6, None])
@pytest.mark.parametrize("kind", [*KINDS, "full"])
def test_a_step_makes_one_transfer_for_loss_and_norm(kind, clip, device):
    model, rng = tiny(1, np.float32)
    if kind != "full":
        inject(model, KINDS[kind], rng=rng)
    batches = [batch(rng) for _ in range(8)]  # on the host, where the texts are
    counts = []
    train(model, batches, AdamW(clip=clip, weight_decay=0.1), steps=4, accumulate=2, schedule=Schedule(4),
          progress=lambda step, loss: counts.append(DeviceArray.transfers))  # fmt: skip
    assert np.diff(counts).tolist() == [1, 1, 1]


def test_a_fused_chain_is_compiled_once_by_the_active_library(request):
    compiled = []

    def compiles(chain):
        compiled.append(chain.__name__)
        return lambda x: -chain(x)

    @fused
    def twice(x):
        return x + x

    def run():
        return [float(twice(to_device(np.float64(3)))) for _ in range(2)]

    assert run() == [6, 6]
    request.getfixturevalue("device")
    assert run() == [6, 6]
    backend.xp.fuse = compiles
    assert run() == [-6, -6]
    assert compiled == ["twice"]


@pytest.mark.parametrize(
    "chain",
    [lambda x: x.sum(), lambda x: x[0], lambda x: float(x[0]), lambda x: backend.xp.einsum("i->", x),
     lambda x: backend.xp.where(x > 0, x, 0)],
)  # fmt: skip
def test_a_fused_chain_takes_elementwise_operations_only(chain, device):
    x = to_device(np.ones(3))
    chain(x)
    with pytest.raises(TypeError, match="in a fused chain"):
        fused(chain)(x)
    with pytest.raises(TypeError, match="several dtypes"):
        fused(lambda x, s: x * s)(x, np.float32(2))


def test_the_stand_in_refuses_to_mix_with_numpy(device):
    x = to_device(np.ones((N, T)))
    for leak in (
        lambda: np.exp(x),
        lambda: np.concatenate([x, x]),
        lambda: np.asarray(x),
        lambda: x + np.ones((N, T)),
        lambda: np.ones((N, T)) * x,
        lambda: x[np.arange(3)],
        lambda: namespace.where(np.ones(T, bool), x, 0),
        lambda: namespace.exp(x, out=np.ones((N, T))),
    ):
        with pytest.raises(TypeError, match=r"device array|dispatcher"):
            leak()
    y = to_host(2.0 * x / 3 + 1)  # scalars are no leak
    assert np.array_equal(y, 2.0 * np.ones((N, T)) / 3 + 1)


@pytest.mark.parametrize("library", ["numpy", "cupy"])
def test_scatter_add_sums_the_values_of_each_id(library, monkeypatch):
    monkeypatch.setattr(backend, "name", library)  # CuPy has no reduceat, so it goes another way
    rng = np.random.default_rng(0)
    ids, values = rng.integers(0, 8, 30), rng.standard_normal((30, 3))
    exact = (ids == np.arange(9)[:, None]).astype(float) @ values
    total = (ids == np.arange(9)[:, None]).astype(float) @ np.abs(values)
    # a sum of at most 30 terms in any order, on both sides
    assert (np.abs(scatter_add(9, ids, values) - exact) <= 2 * gamma(30) * total).all()
    assert not scatter_add(9, ids, values)[8].any()  # an id that does not occur
