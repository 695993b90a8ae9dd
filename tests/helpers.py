"""What several tests share: rounding bounds, the two checks of a gradient, and tiny models.

u is the unit roundoff, gamma(k) = k u / (1 - k u) bounds the relative error of k roundings in a row
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). All axes have different sizes,
so that no wrong transpose passes.
"""

import contextlib
import re
import signal
import warnings

from hypothesis import strategies as st
from library import np

from minilora.backend import to_device, to_host
from minilora.layers import Linear, Param
from minilora.lora import bases, inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.tree import named_params

U = 2.0**-53
N, T = 5, 7
SIZES = {
    "vocab_size": 11, "hidden_size": 10, "intermediate_size": 15, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 16,
    "rms_norm_eps": 1e-3, "rope_theta": 100.0,
}  # fmt: skip
LINEARS = re.compile(r".*(_proj|lm_head)")
EVERYTHING = re.compile(r".*(_proj|lm_head|embed_tokens)")
TIED = re.compile(r".*(_proj|embed_tokens)")  # the head stays tied, and sees what changes the embedding
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)
ranks = st.integers(1, 8)  # the smallest weight is k_proj, (8, 10)
dtypes = st.sampled_from([np.float32, np.float64])
flags = st.fixed_dictionaries(
    {"tie_word_embeddings": st.booleans(), "attention_bias": st.booleans(), "mlp_bias": st.booleans()}
)


def unit(dtype):
    """Unit roundoff u."""
    return float(np.finfo(dtype).eps) / 2


def gamma(k, u=U):
    """The relative error of k roundings in a row."""
    return k * u / (1 - k * u)


def linear(rng, outputs, inputs, bias=False):
    """A Linear with random weights in float32."""
    W = rng.standard_normal((outputs, inputs)).astype(np.float32)
    return Linear(Param(to_device(W)), Param(np.zeros(outputs, np.float32)) if bias else None)


def merge_bound(W, A, B, s, X, dtype):
    """Largest |(W x + s B A x) - (W + s B A) x| (O, M) for the columns of X (I, M), in `dtype`.

    Either side is within gamma(I+1) |W||x| + gamma(I+r+2) |s||B||A||x| of the exact value: the products
    take I and r terms, the scale one rounding, the sum one. tau is what underflow adds.
    """
    wide = np.float64 if dtype == np.float32 else np.longdouble
    u, eta = wide(np.finfo(dtype).eps) / 2, wide(np.finfo(dtype).smallest_subnormal)
    (_, n), r = W.shape, A.shape[0]
    W, A, B, X, s = (np.abs(np.asarray(v)).astype(wide) for v in (W, A, B, X, s))
    tau = 2 * eta * (n + 2 + s * (r + n * B.sum(1, keepdims=True)) + (s * r + 1) * X.sum(0, keepdims=True))
    return 2 * (gamma(n + 1, u) * (W @ X) + gamma(n + r + 2, u) * s * (B @ (A @ X))) + tau


def assert_gradient(value, at, gradient, rng, directions=5):
    """`gradient` is that of value(arrays) at `at` (name -> array): the complex step (Squire, Trapp 1998).

    Im f(x + ihv) / h has neither cancellation nor truncation (h² = 1e-40), so it is g·v but for the
    roundings of both sides; 1000 u of the sum of |g v| allows for a thousand in a row, and the measured
    worst is 2 u. Directions: each array alone, then all at once.
    """
    h = 1e-20
    assert gradient.keys() == at.keys()
    for k, g in gradient.items():
        assert g.shape == at[k].shape, k
        assert np.isfinite(g).all(), k
    for chosen in [*([k] for k in at), *[list(at)] * directions]:
        v = {k: rng.standard_normal(a.shape) * (k in chosen) for k, a in at.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error", np.exceptions.ComplexWarning)
            slope = value({k: a + 1j * h * v[k] for k, a in at.items()}).imag / h
        terms = np.concatenate([(gradient[k] * v[k]).ravel() for k in at])
        assert abs(slope - terms.sum()) <= 1000 * U * np.abs(terms).sum(), chosen


def assert_layer_gradient(call, params, x, rng):
    """call(x) -> (y, back) has the right gradient for x and all params (name -> Param)."""
    y, back = call(x)
    weights = rng.standard_normal(y.shape)  # the scalar is sum(weights * y)
    dx = back(weights.copy())
    data = {k: p.data for k, p in params.items()}
    at, gradient = data, {k: p.grad for k, p in params.items()}
    if x.dtype.kind == "f":
        at, gradient = at | {"x": x}, gradient | {"x": dx}

    def value(arrays):
        for k, p in params.items():
            p.data = arrays[k]
        return (weights * call(arrays.get("x", x))[0]).sum()

    assert_gradient(value, at, gradient, rng)
    for k, p in params.items():
        p.data = data[k]


def assert_precision_scales(f):
    """f(dtype) -> two arrays that differ by nothing but rounding.

    Rounding shrinks by 2^29 from float32 to float64, a wrong formula does not; 64 allows for luck in
    float32, where the difference counts as one unit of the result at least.
    """
    (a, b), (c, d) = f(np.float32), f(np.float64)
    assert a.dtype == b.dtype == np.float32
    assert c.dtype == d.dtype == np.float64
    d32, d64 = np.abs(a - b).max(), np.abs(c - d).max()
    assert d64 <= 64 * 2.0**-29 * max(d32, 2.0**-24 * np.abs(a).max())


def tiny(seed=0, dtype=np.float64, **how):
    """A Llama whose norms and biases matter too, and the generator that goes on."""
    rng = np.random.default_rng(seed)
    model = llama(Config(**SIZES | how), rng, dtype)
    for p in named_params(model).values():
        if p.data.ndim == 1:
            p.data += to_device(0.3 * rng.standard_normal(p.data.shape), dtype)
    return model, rng


def tiny_lora(seed=0, dtype=np.float64, r=3, config=None, **how):
    """The like with a LoRA of both factors on every linear map and the embedding."""
    model, rng = tiny(seed, dtype, **how)
    targets = TIED if model.lm_head is None else EVERYTHING
    inject(model, config or LoraConfig(r=r, alpha=7, targets=targets, init="both"), rng=rng)
    return model, rng


def batch(rng, n=N, t=T, ignored=0.2):
    """ids and labels (n, t), some of which are ignored, but never the first."""
    ids, labels = rng.integers(0, SIZES["vocab_size"], (2, n, t))
    labels[rng.random((n, t)) < ignored] = -100
    labels[0, 0] = 1
    return ids, labels


def gradients(model, ids, labels):
    """The loss, and path -> gradient of all that is trained."""
    loss, back = model.loss(ids, labels, train=True)
    back()
    params = {k: p for k, p in named_params(model).items() if p.trainable}
    found = {k: p.grad for k, p in params.items()}
    for p in params.values():
        p.grad = None
    return loss, found


def stored(model):
    """Every array of the base as it is kept, copied; codes and scales of a packed weight one by one."""
    found = {}
    for path, p in named_params(bases(model)).items():
        arrays = p.data.arrays if p.packed else [p.data]
        found |= {f"{path} {i}": to_host(a).copy() for i, a in enumerate(arrays)}
    return found


def same_bits(a, b):
    """Two dicts of arrays are equal in every bit."""
    bits = [{k: (x.dtype, x.shape, x.tobytes()) for k, x in arrays.items()} for arrays in (a, b)]
    return bits[0] == bits[1]


class TooLong(BaseException):
    """Not an Exception, so that no reader takes it for its own."""


@contextlib.contextmanager
def within(seconds):
    """TooLong if it takes more time of the processor, or fifteen times as much of the clock's."""

    def ring(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring), signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_REAL, 15 * seconds)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGPROF, before[1])


def says(error, root):
    """The error is one printable line of a sane length that names the file."""
    said = str(error)
    assert said.isprintable(), ascii(said)
    assert len(said) <= 2000
    assert str(root) in said
