"""AdamW, gradient clipping and learning-rate schedules.

    m <- b1 m + (1-b1) g      v <- b2 v + (1-b2) g²      mhat = m / (1-b1^t)      vhat = v / (1-b2^t)
    p <- p - lr (mhat / (sqrt(vhat) + eps) + decay p)

Kingma and Ba 2015, algorithm 1; decay decoupled from the gradient as in Loshchilov and Hutter 2019.
Stands in for torch.optim.AdamW; leaves out amsgrad and fused kernels. Groups are functions of a
parameter's path: whether it decays, and how much faster it learns (LoRA+ is such a rule).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .backend import Array, floats, fused, to_device, to_host, xp
from .errors import ConfigError, MismatchError, NonFiniteError, check_float, check_int, short
from .layers import Param


def decay_matrices(path: str, p: Param) -> bool:
    """Decay parameters with two axes: matrices, but neither norms nor biases."""
    return p.data.ndim >= 2


def same_rate(path: str) -> float:
    """Every parameter learns at the same rate."""
    return 1.0


def lora_plus(ratio: float = 16.0) -> Callable[[str], float]:
    """B learns `ratio` times as fast as A (Hayou et al. 2024)."""
    check_float("ratio", ratio, 0, math.inf, open_low=True)
    return lambda path: ratio if path.endswith(".B") else 1.0


@dataclass
class AdamW:
    """The optimizer and its state: `step(params, lr_now)` updates each Param from its grad, in place."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0  # largest global norm of the gradient
    decays: Callable[[str, Param], bool] = decay_matrices
    rate: Callable[[str], float] = same_rate
    t: int = 0
    m: dict[str, Array] = field(default_factory=dict)
    v: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_float("lr", self.lr, 0, math.inf, open_low=True)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ConfigError(f"betas are {self.betas!r}; expected two numbers")
        for i, beta in enumerate(self.betas):
            check_float(f"betas[{i}]", beta, 0, 1)
        check_float("eps", self.eps, 0, math.inf, open_low=True)
        check_float("weight_decay", self.weight_decay, 0, math.inf)
        if self.clip is not None:
            check_float("clip", self.clip, 0, math.inf, open_low=True)

    def step(self, params: Mapping[str, Param], lr: float | None = None, norm: float | None = None) -> float:
        """Update every param that has a gradient, and clear it; returns the global norm of the gradient.

        Pass `norm` if it is on the host already. NonFiniteError, with nothing changed, when a gradient is
        not finite.
        """
        lr = self.lr if lr is None else lr
        norm = global_norm(params) if norm is None else norm
        if not math.isfinite(norm):
            bad = [path for path, p in params.items() if p.grad is not None and not xp.isfinite(p.grad).all()]
            what = f"the gradient of {bad[0]}" if bad else "the norm of the gradient"
            raise NonFiniteError(f"step {self.t + 1}: {what} is not finite")
        shrink = self.clip / norm if self.clip and norm > self.clip else None
        self.t += 1
        b1, b2 = self.betas
        correct1, correct2 = 1 - b1**self.t, 1 - b2**self.t
        for path, p in params.items():
            if p.grad is None:
                continue
            if path not in self.m:
                self.m[path], self.v[path] = xp.zeros_like(p.data), xp.zeros_like(p.data)
            rate = lr * self.rate(path)
            decay = 1 - rate * self.weight_decay if self.weight_decay and self.decays(path, p) else None
            scalars = (shrink, decay, b1, 1 - b1, b2, 1 - b2, rate / correct1, correct2, self.eps)
            own = [None if s is None else p.data.dtype.type(s) for s in scalars]
            _update(p.data, self.m[path], self.v[path], p.grad, *own)
            p.grad = None
        return norm

    def state(self) -> dict[str, Array]:
        """The moments on the host, under `m.path` and `v.path`."""
        moments = {"m": self.m, "v": self.v}
        return {f"{k}.{path}": to_host(a) for k, d in moments.items() for path, a in d.items()}

    def load(self, state: Mapping[str, Array], t: int) -> None:
        """Restore what `state` returned after `t` steps; MismatchError if an m lacks its v, or a v its m."""
        for name, a in state.items():
            if name[:2] not in ("m.", "v."):
                raise MismatchError(f"optimizer state has {short(name)}; expected names in 'm.' or 'v.'")
            other = {"m": "v", "v": "m"}[name[0]] + name[1:]
            if other not in state or (state[other].shape, state[other].dtype) != (a.shape, a.dtype):
                raise MismatchError(f"optimizer state has {short(name)}; expected {short(other)} like it")
        m, v = ({n[2:]: to_device(a.copy()) for n, a in state.items() if n[0] == k} for k in "mv")
        self.t, self.m, self.v = check_int("t", t, 0), m, v


@fused
def _update(
    p: Array, m: Array, v: Array, g: Array, shrink: Any, decay: Any, b1: Any, c1: Any, b2: Any, c2: Any,
    rate: Any, correct2: Any, eps: Any,
) -> None:  # fmt: skip
    """The formulas above for one parameter, in place; c = 1 - b, and `rate` includes the first correction."""
    if shrink is not None:
        g = g * shrink
    m *= b1
    m += c1 * g
    v *= b2
    v += c2 * (g * g)
    if decay is not None:
        p *= decay
    p -= rate * m / (xp.sqrt(v / correct2) + eps)


def squared_norm(params: Mapping[str, Param]) -> Array:
    """The sum of the squares of all gradients, on the device."""
    return sum(xp.vdot(p.grad, p.grad) for p in params.values() if p.grad is not None)


def global_norm(params: Mapping[str, Param]) -> float:
    """The Euclidean norm of all gradients taken together."""
    return math.sqrt(floats(squared_norm(params))[0])


@dataclass(frozen=True)
class Schedule:
    """The factor on the learning rate at step 0, 1, ...: linear warm-up, then constant or a cosine.

    The cosine falls from 1 to `final` at the last of `steps`.
    """

    steps: int
    warmup: int = 0
    kind: str = "cosine"  # or "constant"
    final: float = 0.0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)
        if type(self.warmup) is not int or not 0 <= self.warmup <= self.steps:
            raise ConfigError(f"warmup is {self.warmup!r}; expected an int from 0 to the {self.steps} steps")
        if self.kind not in ("cosine", "constant"):
            raise ConfigError(f"schedule is {self.kind!r}; expected 'cosine' or 'constant'")
        if type(self.final) not in (int, float) or not 0 <= self.final <= 1:
            raise ConfigError(f"final is {short(self.final)}; expected a number from 0 to 1")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
