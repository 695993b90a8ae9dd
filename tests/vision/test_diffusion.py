"""The diffusion model: its noise, its way back, and what it draws."""

import itertools
import math
from dataclasses import dataclass, field

import numpy
import pytest
from helpers import U, assert_precision_scales, gamma, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np
from models import CONFIG, STEPS, batch_of, lora_of, model_of

from minilora.backend import to_device, to_host
from minilora.data.digits import Images
from minilora.errors import ConfigError, InputError
from minilora.layers import Need, Param
from minilora.model import Config
from minilora.training import evaluate
from minilora.vision.diffusion import Noisy, add_noise, denoiser, noised, posterior, sample, signal, waves

few = settings(max_examples=8)
lengths = st.integers(1, 200)


@given(steps=lengths)
def test_the_signal_falls_from_one_to_almost_nothing_by_the_cosine(steps):
    a = signal(steps)
    assert a.shape == (steps + 1,)
    assert a[0] == 1
    beta = 1 - a[1:] / a[:-1]
    assert (beta > 0).all()
    assert (beta <= 0.999 + 4 * U).all()
    t = numpy.arange(steps) / steps  # the last is cut
    f = numpy.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    assert a[:-1] == pytest.approx(f / f[0], rel=1e-9)
    assert a[-1] <= 1e-3 * (1 + gamma(16))


@given(steps=st.integers(2, 100), data=st.data())
def test_the_way_back_is_bayes_rule(steps, data):
    """The product of two normal densities of x_{t-1}: around √a_{t-1} x_0, and such that x_t follows."""
    t = data.draw(st.integers(2, steps))
    a = signal(steps)
    (c0, ct), deviation = posterior(a, t)
    alpha = a[t] / a[t - 1]
    precision = 1 / (1 - a[t - 1]) + alpha / (1 - alpha)
    assert deviation**2 == pytest.approx(1 / precision, rel=1e-9)
    assert c0 == pytest.approx(math.sqrt(a[t - 1]) / (1 - a[t - 1]) / precision, rel=1e-9)
    assert ct == pytest.approx(math.sqrt(alpha) / (1 - alpha) / precision, rel=1e-9)
    assert posterior(a, 1) == ((1.0, 0.0), 0.0)


@few
@given(seed=seeds, steps=st.integers(1, 30))
def test_noise_is_added_as_stated(seed, steps):
    rng = numpy.random.default_rng(seed)
    pixels = rng.uniform(-1, 1, (300, 64)).astype(numpy.float32)
    (noisy, time), noise = add_noise(pixels, rng, steps)
    a = signal(steps)[time][:, None]
    want = numpy.sqrt(a) * pixels + numpy.sqrt(1 - a) * noise
    # noise is rounded once, and so is the sum
    bound = 2.0**-24 * (abs(noise) + abs(want)) * 1.01
    assert (abs(noisy - want) <= bound).all()
    assert noisy.dtype == noise.dtype == numpy.float32
    assert time.min() >= 1
    assert time.max() <= steps
    # 19,200 draws: a mean within 6 / sqrt(n), a variance within 6 sqrt(2 / n)
    assert abs(noise.mean()) < 6 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 6 * math.sqrt(2 / noise.size)


def test_every_time_is_drawn():
    (_, time), _ = add_noise(numpy.zeros((400, 64)), numpy.random.default_rng(0), 7)
    assert set(time.tolist()) == set(range(1, 8))


def test_batches_are_images_with_their_noise():
    """What is left of a noisy image without its noise is one of the images."""
    pixels = numpy.random.default_rng(0).uniform(-1, 1, (6, 64))
    source = noised(Images(pixels, numpy.arange(6)), numpy.random.default_rng(1), 5, 4)
    found = set()
    for (noisy, time), noise in itertools.islice(source, 20):
        a = signal(4)[time][:, None]
        plain = (noisy - numpy.sqrt(1 - a) * noise) / numpy.sqrt(a)
        near = abs(plain[:, None] - pixels).max(2)
        assert (near.min(1) < 1e-10).all()  # √a is at least 4e-4
        found |= set(near.argmin(1).tolist())
    assert found == set(range(6))


@dataclass(eq=False)
class Oracle:
    """It knows the image, so it knows the noise."""

    image: numpy.ndarray
    steps: int
    weight: Param = field(default_factory=lambda: Param(np.zeros(1)))

    def __call__(self, noisy):
        a = signal(self.steps)[noisy.time][:, None]
        return to_device((noisy.pixels - numpy.sqrt(a) * self.image) / numpy.sqrt(1 - a)), None


@given(seed=seeds, steps=st.integers(1, 40))
def test_who_knows_the_image_draws_it(seed, steps):
    rng = numpy.random.default_rng(seed)
    image = rng.uniform(-1, 1, 64)
    found = sample(Oracle(image, steps), 3, rng)
    assert abs(found - image).max() <= 1e-9
    beyond = sample(Oracle(2 * numpy.sign(image), steps), 3, rng)
    assert abs(beyond - numpy.sign(image)).max() <= 1e-9  # nothing is blacker than ink


@dataclass(eq=False)
class OfNoise(Oracle):
    """The best guess where images are themselves N(0, s²)."""

    s: float = 0.2

    def __call__(self, noisy):
        a = signal(self.steps)[noisy.time][:, None]
        return to_device(numpy.sqrt(1 - a) / (a * self.s**2 + 1 - a) * noisy.pixels), None


def test_drawings_of_normal_images_have_their_variance():
    """That of the images, as steps grow: within 6 deviations of 12,800 pixels, and what the steps cost."""
    found = sample(OfNoise(None, 400), 200, numpy.random.default_rng(0))
    assert abs(found.std() / 0.2 - 1) < 6 / math.sqrt(2 * found.size) + 0.05
    assert abs(found.mean()) < 6 * 0.2 / math.sqrt(found.size)


def test_a_seed_is_a_drawing():
    model, _ = lora_of("denoiser")
    one, again, other = (sample(model, 3, numpy.random.default_rng(seed)) for seed in (1, 1, 2))
    assert numpy.array_equal(one, again)
    assert (one != other).any(1).all()
    assert one.shape == (3, 64)
    assert abs(one).max() <= 1 + 1e-12


@few
@given(seed=seeds)
def test_time_matters_and_each_image_has_its_own(seed):
    model, rng = model_of("denoiser", seed)
    x, _ = batch_of("denoiser", rng)
    y = model(x)[0]
    later = x._replace(time=x.time % STEPS + 1)
    assert (to_host(model(later)[0]) != to_host(y)).any(1).all()
    mixed = later.time.copy()
    mixed[1:] = x.time[1:]
    assert np.array_equal(model(x._replace(time=mixed))[0][1:], y[1:])


@few
@given(seed=seeds)
def test_the_noise_is_that_of_the_formula(seed):
    def both(dtype):
        model, rng = model_of("denoiser", seed, dtype)
        x, _ = batch_of("denoiser", rng, dtype)
        e = model.encoder
        t = to_host(x.time)[:, None] / STEPS * 1000.0 ** (numpy.arange(5) / 4)
        w = to_device(numpy.concatenate([numpy.sin(t), numpy.cos(t)], 1).astype(dtype))
        tokens = e.embed(x.pixels, Need.NONE)[0] + model.time(w, Need.NONE)[0][:, None]
        y = e(tokens, Need.NONE)[0] @ model.output.weight.data.T
        want = to_host(y).reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 64)
        return model(x)[0], to_device(want)

    assert_precision_scales(both)


def test_a_fresh_model_guesses_no_noise_and_has_the_noises_variance_as_loss():
    model = denoiser(CONFIG, STEPS, np.random.default_rng(0), np.float64)
    (x, time), noise = batch_of("denoiser", np.random.default_rng(1))
    assert not model(Noisy(x, time))[0].any()
    want = float((to_host(noise) ** 2).mean())
    assert abs(float(model.loss(Noisy(x, time), noise)[0]) - want) <= 2 * gamma(noise.size) * want


@pytest.mark.parametrize("width", [10, 2])
def test_waves_tell_any_two_times_apart(width):
    found = to_host(waves(np.arange(1, 101), width, 100, np.float64))
    assert found.shape == (100, width)
    assert len({tuple(row) for row in found.tolist()}) == 100


@pytest.mark.parametrize(
    ("time", "says"),
    [([1, 2, 3, 4], r"\(4,\)"), ([1, 2, 3, 4, 0], "0 to 4"), ([1, 2, 3, 4, STEPS + 1], f"1 to {STEPS + 1}"),
     ([1.0] * 5, "float64"), ([[1]] * 5, r"\(5, 1\)")],
    ids=str,
)  # fmt: skip
def test_times_that_cannot_be_are_refused(time, says):
    model, rng = model_of("denoiser")
    x, _ = batch_of("denoiser", rng)
    with pytest.raises(InputError, match=says):
        model(x._replace(time=numpy.array(time)))


def test_noise_of_another_shape_is_refused():
    model, rng = model_of("denoiser")
    x, noise = batch_of("denoiser", rng)
    with pytest.raises(InputError, match=r"\(4, 64\); expected the pixels' \(5, 64\)"):
        model.loss(x, noise[:4])


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 1.5}, {"hidden_size": 9}])
def test_a_model_that_cannot_be_is_refused(change):
    how = {"hidden_size": 10, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    steps = change.pop("steps", 5)
    with pytest.raises(ConfigError):
        denoiser(Config(**how | change), steps, np.random.default_rng(0))


def test_no_drawing_is_refused():
    model, _ = model_of("denoiser")
    with pytest.raises(ConfigError, match="count is 0"):
        sample(model, 0, numpy.random.default_rng(0))


@pytest.mark.parametrize("sign", [-1, 1])
def test_evaluation_weighs_a_batch_by_its_images(sign):
    """Noise is no label: below zero it counts as well."""
    model, rng = model_of("denoiser")
    batches = [
        (noisy, sign * abs(noise)) for noisy, noise in (batch_of("denoiser", rng, n=n) for n in (2, 5))
    ]
    losses = [float(model.loss(*some)[0]) for some in batches]
    assert evaluate(model, batches) == pytest.approx((2 * losses[0] + 5 * losses[1]) / 7, rel=1e-12)


@pytest.mark.parametrize(
    ("pixels", "noise", "says"),
    [
        (numpy.zeros((2, 64)), numpy.zeros((2, 64), int), "noise are int64"),
        (numpy.zeros((2, 64)).tolist(), numpy.zeros((3, 64)), r"noise has shape \(3, 64\)"),
        ([[0.0] * 64, [0.0]], numpy.zeros((2, 64)), "pixels are ragged"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(pixels, noise, says):
    model, _ = model_of("denoiser")
    with pytest.raises(InputError, match=says):
        model.loss(Noisy(pixels, numpy.ones(2, int)), noise)
