"""The recipe of the experiments: the windows that are trained on and measured, the rates, and the loss."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.corpora import Corpus
from minilora.errors import NonFiniteError
from minilora.experiments import recipe
from minilora.experiments.recipe import LENGTH, drawn, learn, loss_on, windows
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule
from minilora.training import evaluate
from minilora.tree import digest, unfreeze

TINY = Config(vocab_size=7, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=LENGTH)  # fmt: skip


def text(*lengths):
    """A text whose splits have no character in common, so that a window tells where it is from."""
    splits = [
        2 * i + np.random.default_rng(i).integers(0, 2, n).astype(np.uint8) for i, n in enumerate(lengths)
    ]
    return Corpus("three parts", "made", *splits)


def model():
    made = llama(TINY, np.random.default_rng(0))
    unfreeze(made)
    return made


@given(st.integers(1, 9), st.integers(0, 3))
def test_training_draws_windows_of_the_train_split(batch, seed):
    ids = text(400, 300, 300)
    one, other = (drawn(ids, np.random.default_rng(seed), batch) for _ in range(2))
    for _ in range(3):
        (x, y), (again, _) = next(one), next(other)
        assert x.shape == y.shape == (batch, LENGTH)
        assert (x == again).all()
        assert x.max() <= 1


@given(st.integers(LENGTH + 1, 40 * LENGTH), st.integers(1, 50), st.sampled_from(["valid", "test"]))
def test_windows_are_spread_over_their_split_and_never_overlap(length, count, split):
    ids = text(300, length, length)
    found = np.concatenate([x for x, _ in windows(ids, split, count)])
    assert len(found) == min(count, (length - 1) // LENGTH)
    assert set(np.unique(found)) <= ({2, 3} if split == "valid" else {4, 5})


def test_a_loss_is_that_of_the_windows_and_a_number():
    ids, made = text(300, 900, 900), model()
    assert loss_on(made, ids, "test", 3) == evaluate(made, windows(ids, "test", 3))
    made.model.norm.weight.data = made.model.norm.weight.data * np.float32(np.nan)
    with pytest.raises(NonFiniteError, match="loss on valid of three parts is nan"):
        loss_on(made, ids, "valid", 3)


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_the_rate_rises_for_a_twentieth_of_the_steps_and_then_falls(steps):
    """To the bit what a plain loop over that schedule does, and with one BLAS thread."""
    made, plain, ids, called = model(), model(), text(400, 300, 300), {}
    real = recipe.train

    def train(model, batches, optimizer, **how):
        called.update(how)
        return real(model, batches, optimizer, **how)

    with mock.patch.object(recipe, "train", train):
        losses = learn(made, drawn(ids, np.random.default_rng(0), 2), AdamW(1e-2), steps)
    assert called == {"steps": steps, "schedule": Schedule(steps, warmup=steps // 20), "threads": 1}
    assert losses == real(plain, drawn(ids, np.random.default_rng(0), 2), AdamW(1e-2), **called).loss
    assert digest(made) == digest(plain)
    real(plain := model(), drawn(ids, np.random.default_rng(0), 2), AdamW(1e-2),
         **called | {"schedule": replace(called["schedule"], warmup=steps // 2 + 1)})  # fmt: skip
    assert digest(made) != digest(plain)
