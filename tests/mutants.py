"""Seeded bugs: each is put alone into a copy of the package, and the tests must turn red.

A suite that nothing can turn red proves nothing, so every law the tests claim to check is broken here
once, the way a tired programmer would break it. A bug that survives is a missing test.

    python tests/mutants.py [NAME ...] [--jobs 2]

Which test saw a mutant stands in witnesses.json. It is asked first, and all tests of the mutant's files only
if it does not see the mutant any more. What is asked must be green in the unchanged copy. One line per
mutant: the first test that fails, or SURVIVED. Exit 1 if one survives, no longer fits the source, or breaks
more than it should (a module that cannot even be imported proves nothing). test_mutants.py keeps the list
in step with the source.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
WITNESSES = ROOT / "tests/witnesses.json"  # mutant -> "ops::test_name", of tests/test_ops.py
FILES = {
    file.stem.removeprefix("test_"): str(file.relative_to(ROOT)) for file in ROOT.glob("tests/**/test_*.py")
}
LIMIT = 150  # seconds for one mutant
FORKS = multiprocessing.get_context("forkserver")  # a run is a fork of a process that has imported all this
FORKS.set_forkserver_preload(
    ["numpy", "pytest", "hypothesis", "matplotlib.pyplot", "safetensors.numpy", "tqdm"]
)
# Tests that kill processes take long, and what they kill may turn them red without any mutant: no witnesses.
UNFIT = "interrupted or second_sweep or worker"
READ = ("figures/rows.jsonl", "benchmarks/results/*.md")  # by tests
NO_SHRINKING = """
from hypothesis import Phase

settings.register_profile("first", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("first")
"""  # one failure is enough; the smallest takes a while to find


class Mutant(NamedTuple):
    """One bug: `old`, which stands exactly once in `file`, becomes `new`; `tests` should see it."""

    name: str
    file: str  # below minilora/
    old: str
    new: str
    tests: str  # "ops atomic" for tests/test_ops.py and tests/formats/test_atomic.py


SWEEP = "experiments/rank_sweep.py"
HARNESS = "experiments/harness.py"
PRETRAIN = "experiments/pretrain.py"

# fmt: off
MUTANTS = (
    # ---- functions: forward and backward
    Mutant("softmax-back-without-its-sum", "ops.py",
           'p * (dp - xp.einsum("...i,...i->...", dp, p)[..., None])', "p * dp", "ops"),
    Mutant("silu-derivative", "ops.py", "    dgate += a\n", "", "ops"),
    Mutant("swiglu-derivative", "ops.py", "dgate = 1 - a\n", "dgate = 1 + a\n", "ops"),
    Mutant("gelu-derivative", "ops.py", "1 + 3 * 0.044715", "1 + 0.044715", "ops"),
    Mutant("swiglu-derivative-by-up", "ops.py", "dup = dy * a\n", "dup = dy * a / t\n", "ops"),
    Mutant("rms-norm-second-term", "ops.py", 'dx = y * (xp.einsum("...i,...i->...", dy, y)',
           'dx = 0 * y * (xp.einsum("...i,...i->...", dy, y)', "ops"),
    Mutant("rope-back-sign", "ops.py", "turn(dy, -sin)", "turn(dy, sin)", "ops"),
    Mutant("rope-turns-the-other-way", "ops.py", "concatenate([-sin, sin]", "concatenate([sin, -sin]", "ops"),
    Mutant("mask-off-by-one", "ops.py", "xp.arange(t) > xp.arange(t)[:",
           "xp.arange(t) > xp.arange(1, t + 1)[:", "ops"),
    Mutant("mask-on-the-wrong-end", "ops.py", "e[..., seen - t :] +=", "e[..., :t] +=", "ops"),
    Mutant("tiles-see-no-cache", "ops.py", "seen = S - T + of.stop", "seen = of.stop", "ops"),
    Mutant("later-tiles-overwrite-dk", "ops.py", "total[..., :seen, :] += part",
           "total[..., :seen, :] = part", "ops"),
    Mutant("delta-of-attention-left-out", "ops.py", "        d[..., E] *= -1\n",
           "        d[..., E] = 0\n", "ops"),
    Mutant("attention-scale", "ops.py", "1 / math.sqrt(E)", "1 / E", "ops"),
    Mutant("queries-read-the-wrong-group", "ops.py", "of, :] @ k[..., :seen",
           "of, :] @ k[:, ::-1, :, :seen", "ops"),
    Mutant("ignored-labels-counted", "ops.py", "xp.maximum(counted.sum(), 1)",
           "xp.maximum(len(labels), 1)", "ops"),
    Mutant("ignored-labels-have-a-gradient", "ops.py", "xp.where(counted, d / count, 0)",
           "xp.full(len(labels), d / count)", "ops"),
    Mutant("scatter-add-last-wins", "backend.py",
           "out[ids[first]] = xp.add.reduceat(values[order], first, axis=0)", "out[ids] = values[order]",
           "layers"),
    # ---- layers
    Mutant("gradient-overwritten", "layers.py", "self.grad += g", "self.grad = g", "layers"),
    Mutant("frozen-weight-gets-a-gradient", "layers.py", "        if weight.trainable:\n",
           "        if True:\n", "layers"),
    Mutant("frozen-norm-gets-a-gradient", "layers.py", "back_trained if w.trainable else back_frozen",
           "back_trained", "layers"),
    Mutant("gradient-of-the-bias-averaged", "layers.py", "rows(dy).sum(0)", "rows(dy).mean(0)", "layers"),
    Mutant("layer-norm-forgets-the-mean", "layers.py", "return dc - dc.mean(-1, keepdims=True)", "return dc",
           "layers"),
    Mutant("eps-beside-the-root", "ops.py", "[..., None] / D + eps)\n", "[..., None] / D) + eps\n", "ops"),
    Mutant("dropout-at-evaluation", "layers.py", "if need is Need.NONE or self.p == 0:", "if self.p == 0:", "layers"),
    Mutant("dropout-does-not-scale", "layers.py", ">= self.p) / (1 - self.p)", ">= self.p) * 1.0", "layers"),
    Mutant("unfreezing-trains-what-was-loaded", "tree.py", "p.data.copy(), None", "p.data, None", "layers"),
    # ---- LoRA
    Mutant("scale-always-over-the-root", "methods/lora_config.py", "(math.sqrt(r) if self.rslora else r)", "math.sqrt(r)", "lora"),
    Mutant("no-scale-in-dA", "lora.py", "A.add_grad(dh.T @ z)", "A.add_grad((dy @ B.data).T @ z)", "lora"),
    Mutant("no-scale-in-dB", "lora.py", "B.add_grad(dy.T @ h)", "B.add_grad(dy.T @ (z @ A.data.T))", "lora"),
    Mutant("no-scale-in-dx", "lora.py", "back_drop((dh @ A.data).reshape(shape))", "back_drop((rows(dy) @ B.data @ A.data).reshape(shape))", "lora"),
    Mutant("dA-and-dB-swapped-if-square", "lora.py", "        B.add_grad(dy.T @ h)  # dB = dYᵀ H\n        A.add_grad(dh.T @ z)", "        dA, dB = dh.T @ z, dy.T @ h\n        A.add_grad(dB.T if dA.shape == dB.T.shape else dA)\n        B.add_grad(dA.T if dA.shape == dB.T.shape else dB)", "lora"),
    Mutant("B-transposed-if-square", "lora.py",
           '(O, I)."""\n        return (self.scale * self.B.data) @ self.A.data',
           '(O, I)."""\n        B = self.B.data\n'
           "        return self.scale * ((B.T if B.shape[0] == B.shape[1] else B) @ self.A.data)", "lora"),
    Mutant("delta-transposed-if-square", "lora.py",
           '(O, I)."""\n        return (self.scale * self.B.data) @ self.A.data',
           '(O, I)."""\n        d = self.scale * (self.B.data @ self.A.data)\n'
           "        return d.T if d.shape[0] == d.shape[1] else d", "lora"),
    Mutant("dropout-left-out-on-the-way-back", "lora.py", "dx += back_drop((dh @ A.data).reshape(shape))", "dx += (dh @ A.data).reshape(shape)", "lora"),
    Mutant("merge-adds-twice", "lora.py", "W += base.weight.dense()",
           "W += W + base.weight.dense()", "lora"),
    Mutant("folded-without-the-scale-in-dB", "fast/folded.py", "adapter.scale * (z @ adapter.A.data.T), z", "z @ adapter.A.data.T, z", "folded"),
    Mutant("folded-dx-through-the-base-alone", "fast/folded.py", "back_x = Linear(self.weight, base.bias).backward", "back_x = Linear(base.weight, base.bias).backward", "folded"),
    Mutant("folded-whatever-the-rows", "fast/folded.py", "M * (O + I) > 2 * O * I", "M > 0", "folded"),
    Mutant("folded-in-spite-of-dropout", "fast/folded.py", "isinstance(adapter, LowRank) and adapter.dropout is None", "isinstance(adapter, LowRank)", "folded"),
    Mutant("folded-for-ever", "fast/folded.py", "put(place.parent, place.name, place.adapter)", "pass", "folded parallel"),
    Mutant("folded-though-merged", "fast/folded.py", "layer.active and layer.merged is None", "layer.active", "folded"),
    Mutant("merge-writes-into-the-base", "lora.py",
           "        W = self.delta()\n        W += base.weight.dense()\n",
           "        W = base.weight.dense()\n        W += self.delta()\n", "lora"),
    Mutant("unmerge-subtracts", "lora.py",
           'raise StateError("the model is not merged")\n    for layer in layers:\n',
           'raise StateError("the model is not merged")\n    for layer in layers:\n'
           "        if layer.active and isinstance(layer.adapters[layer.active], LowRank):\n"
           "            delta = layer.adapters[layer.active].delta()\n"
           "            layer.base.weight.data = layer.merged.weight.data - delta\n", "lora"),
    Mutant("merge-half-way", "lora.py", "plain[path] = adapter.merged",
           "plain[path] = layers[path].merged = adapter.merged", "lora"),
    Mutant("nan-check-on-the-first-tensor-only", "lora.py", "in named_params(plain[path]).items():",
           "in list(named_params(plain[path]).items())[: len(plain) == 1]:", "lora"),
    Mutant("disabled-forgets-the-merged", "adapters.py", "layer.active = layer.merged = None",
           "layer.active = None", "lora"),
    Mutant("tied-head-ignores-the-change", "lora.py", "adapter.attend(self.base, x, need)", "self.base.attend(x, need)", "lora"),
    Mutant("embedding-delta-transposed-if-square", "methods/embedding.py",
           "return self.scale * (self.B.data @ self.A.data).T",
           "d = self.scale * (self.B.data @ self.A.data)\n"
           "        return d if d.shape[0] == d.shape[1] else d.T", "lora"),
    Mutant("dora-norm-per-column-if-square", "methods/dora.py", 'xp.einsum("oi,oi->o", V, V)',
           'xp.einsum("oi,oi->i" if V.shape[0] == V.shape[1] else "oi,oi->o", V, V)', "lora"),
    Mutant("dora-norm-gradient-dropped", "methods/dora.py", "if not self.detach:", "if False:", "lora"),
    Mutant("dora-detach-ignored", "methods/dora.py", "if not self.detach:", "if True:", "lora"),
    Mutant("base-not-frozen", "lora.py", "    freeze(model)\n    for layer in layers.values():", "    for layer in layers.values():", "lora"),
    Mutant("saved-module-is-the-base-itself", "methods/lora_config.py", "FullCopy(deepcopy(base))", "FullCopy(base)", "lora"),
    Mutant("B-starts-at-random", "methods/lora_config.py", "draw((O, r), \"gaussian\" if self.init == \"both\" else \"zero\")", "draw((O, r), \"gaussian\")", "lora"),
    Mutant("A-drawn-too-wide", "methods/lora_config.py", "1 / math.sqrt(shape[1])", "math.sqrt(3 / shape[1])", "lora"),
    Mutant("alpha-pattern-ignored", "methods/lora_config.py", "pick(path, self.alpha_pattern, self.alpha)", "self.alpha", "lora"),
    # ---- the network and its text
    Mutant("recompute-with-fresh-masks", "fast/recompute.py", "before, strict=True):", "(), strict=False):", "recompute"),
    Mutant("recompute-turns-the-generator-back", "fast/recompute.py", "states, strict=True):", "(), strict=False):", "recompute"),
    Mutant("residual-gradient-dropped", "model.py", "return dy + d if need", "return d if need", "lora"),
    Mutant("recompute-all-of-it", "fast/recompute.py", "        last.again = True\n", "", "recompute"),
    Mutant("gradient-below-what-is-trained", "model.py", "if need is Need.WEIGHTS and trains(layer) else need", "if need is Need.WEIGHTS else need", "lora"),
    Mutant("positions-of-cached-text", "decoding.py", "self.seen, self.seen + k.shape[2]",
           "self.seen, self.seen + 1", "model"),
    Mutant("cached-values-are-keys", "decoding.py", "self.v[:, :, start : self.seen] = v",
           "self.v[:, :, start : self.seen] = k", "model"),
    Mutant("every-token-is-the-first", "decoding.py", "cos[seen : seen + T], sin[seen : seen + T]",
           "cos[:T], sin[:T]", "model"),
    Mutant("head-on-the-first-position", "decoding.py", "return x[:, -1:]", "return x[:, :1]", "model"),
    Mutant("past-appended-to", "decoding.py", "        self.k[:, :, start : self.seen] = k\n",
           "        self.k = self.k.copy()\n        self.k[:, :, start : self.seen] = k\n", "model"),
    Mutant("one-query-unscaled", "ops.py", "(q.reshape(N, G, -1, E) / math.sqrt(E))",
           "q.reshape(N, G, -1, E)", "ops"),
    Mutant("one-query-overflows", "ops.py", "p = x - x.real.max(-1, keepdims=True)", "p = x + 0", "ops"),
    Mutant("top-k-none-drops-the-last", "decoding.py", "    if top_k is not None:\n        p[:, top_k:] = 0",
           "    p[:, (top_k or -1) :] = 0", "model"),
    Mutant("temperature-ignored", "decoding.py", "(z - z[:, :1]) / temperature)", "z - z[:, :1])", "model"),
    Mutant("top-p-drops-the-one-that-completes", "decoding.py", "p[np.cumsum(p, -1) - p >=",
           "p[np.cumsum(p, -1) >", "model"),
    Mutant("negative-token-wraps", "model.py", "(values < 0) | (values >= V)", "values >= V", "model"),
    # ---- optimizer and loop
    Mutant("adam-without-bias-correction", "optim.py", "= 1 - b1**self.t, 1 - b2**self.t", "= 1.0, 1.0",
           "optim"),
    Mutant("adam-eps-inside-the-root", "optim.py", "(xp.sqrt(v / correct2) + eps)",
           "xp.sqrt(v / correct2 + eps)", "optim"),
    Mutant("decay-of-norms-and-biases", "optim.py", "return p.data.ndim >= 2", "return True", "optim"),
    Mutant("decay-coupled", "optim.py", "        p *= decay\n",
           "        m += c1 * (1 - decay) * p\n", "optim"),
    Mutant("two-transfers-a-step", "optim.py", "norm = global_norm(params) if norm is None else norm",
           "norm = global_norm(params)", "device"),
    Mutant("clip-without-effect", "optim.py", "shrink = self.clip / norm", "shrink = 1.0", "optim"),
    Mutant("clip-enlarges", "optim.py", "if self.clip and norm > self.clip", "if self.clip", "optim"),
    Mutant("bad-gradient-is-applied", "optim.py", "if not math.isfinite(norm):", "if False:", "optim"),
    Mutant("lora-plus-on-A", "optim.py", 'path.endswith(".B")', 'path.endswith(".A")', "optim"),
    Mutant("warm-up-starts-at-zero", "optim.py", "return (step + 1) / (self.warmup + 1)",
           "return step / (self.warmup + 1)", "optim"),
    Mutant("resume-forgets-the-step", "optim.py", 'self.t, self.m, self.v = check_int("t", t, 0), m, v',
           "self.m, self.v = m, v", "training"),
    Mutant("resume-forgets-the-moments", "optim.py", 'self.t, self.m, self.v = check_int("t", t, 0), m, v',
           "self.t, self.v = t, v", "training"),
    Mutant("resume-forgets-the-generators", "formats/checkpoint.py", 'rng.bit_generator.state = meta["rngs"][name]',
           "pass", "training"),
    Mutant("schedule-one-step-ahead", "training.py", "schedule(step) if", "schedule(step + 1) if", "training"),
    Mutant("accumulation-sums", "fast/parallel.py", "each, width = 1 / len(batches)", "each, width = 1.0", "training"),
    Mutant("micro-batches-weigh-the-same", "fast/parallel.py", "float(counts[part].sum() / max(counts.sum(), 1))", "len(ids[part]) / len(ids)", "parallel"),
    Mutant("replicas-share-gradients", "tree.py", "{id(p): Param(p.data, p.trainable)", "{id(p): p", "parallel"),
    Mutant("replicas-copy-the-base", "tree.py", "Param(p.data, p.trainable)", "Param(p.data.copy(), p.trainable)", "parallel"),
    Mutant("threads-draw-masks-at-once", "fast/parallel.py", "isinstance(node, Dropout)", "node is None", "parallel"),
    Mutant("blas-stays-at-one-thread", "backend.py", "with libraries.limit(limits=1):",
           "libraries.limit(limits=1)\n    with contextlib.nullcontext():", "parallel"),
    Mutant("one-blas-held-is-all-held", "backend.py", "yield all(library.num_threads", "yield any(library.num_threads",
           "parallel"),
    Mutant("all-layers-of-an-outline-are-one", "tree.py", "groups and groups[-1][2] == lines:", "groups:", "layers"),
    Mutant("every-shape-is-trained", "tree.py", "{' *' * p.trainable}", "{' *'}", "layers"),
    Mutant("last-evaluations-not-shown", "formats/checkpoint.py", '("...", ""), *rows[-FEW:]]', '("...", "")]', "training"),
    Mutant("names-not-in-the-digest", "digests.py", "{name} {a.shape}", "{a.shape}", "digests"),
    Mutant("shapes-not-in-the-digest", "digests.py", "{name} {a.shape}", "{name}", "digests"),
    Mutant("digest-of-what-was-not-before", "digests.py", "hashlib.sha256(before)", "hashlib.sha256()", "digests"),
    Mutant("half-precision-of-a-checkpoint-widened", "formats/checkpoint.py",
           "np.asarray(a, FLOATS[file.dtypes[name]])", "np.asarray(a)", "training"),
    Mutant("checkpoint-of-any-size", "formats/checkpoint.py", "if (size := stamp_of(path).size) > most:",
           "if (size := stamp_of(path).size) < 0:", "forms"),
    Mutant("evaluation-weighs-all-batches-alike", "training.py", "n = int((to_host(labels) >= 0).sum())",
           "n = 1", "training"),
    Mutant("checkpoint-digest-not-compared", "formats/checkpoint.py", 'if meta["sha256"] != sealed(meta, tensors):',
           "if False:", "training"),
    Mutant("checkpoint-of-another-run", "formats/checkpoint.py", 'for k in dict(run) | meta["run"]:', "for k in ():",
           "training"),
    # ---- files
    Mutant("fsync-left-out", "formats/atomic.py", "            os.fsync(fd)\n            os.replace",
           "            os.replace", "atomic"),
    Mutant("rename-before-fsync", "formats/atomic.py",
           "            os.fsync(fd)\n            os.replace(temp, path)\n",
           "            os.replace(temp, path)\n            os.fsync(fd)\n", "atomic"),
    Mutant("folder-not-synced-after-rename", "formats/atomic.py",
           "os.replace(temp, path)\n            sync_folder(path.parent)", "os.replace(temp, path)",
           "atomic"),
    Mutant("new-folder-not-synced-before-rename", "formats/atomic.py", "fill(temp)\n            os.fsync(fd)\n",
           "fill(temp)\n", "atomic"),
    Mutant("short-write-not-continued", "formats/atomic.py",
           "    while view:\n        view =", "    if view:\n        view =", "atomic"),
    Mutant("failed-write-leaves-its-temp", "formats/atomic.py", 
           "        finally:\n            with contextlib.suppress(OSError):\n                remove_tree(temp)\n",
           "        finally:\n            pass\n", "atomic"),
    Mutant("lock-not-exclusive", "formats/atomic.py", "fcntl.flock(fd, fcntl.LOCK_EX",
           "fcntl.flock(fd, fcntl.LOCK_SH", "atomic"),
    Mutant("unknown-activation-accepted", "formats/huggingface.py", "if settings.get(key, only[0]) not in only:", "if False:",
           "huggingface"),
    Mutant("missing-tensors-accepted", "formats/huggingface.py", "    for path in sorted(set(expected) ^ set(actual)):",
           "    expected = {path: shape for path, shape in expected.items() if path in actual}\n"
           "    for path in sorted(set(expected) ^ set(actual)):", "huggingface"),
    Mutant("extra-tensors-accepted", "formats/huggingface.py", "set(expected) ^ set(actual)", "set(expected) - set(actual)",
           "huggingface"),
    Mutant("base-nan-check-on-the-first-tensor-only", "formats/huggingface.py", "if not np.isfinite(cast).all():",
           "if path.endswith('embed_tokens.weight') and not np.isfinite(cast).all():", "huggingface"),
    Mutant("loaded-weights-writable", "formats/huggingface.py", "np.frombuffer(cast.tobytes(), dtype)", "cast", "huggingface"),
    Mutant("loaded-model-not-frozen", "formats/huggingface.py", "    freeze(model)\n", "", "huggingface"),
    Mutant("strided-weights-saved-as-they-lie", "formats/safetensors.py", "yield a.tobytes()", "yield a.tobytes('A')",
           "safetensors"),
    # ---- spectra
    Mutant("thin-svd-without-scale", "spectra.py", "xp.linalg.svd(scale * (R @ T.T), full",
           "xp.linalg.svd(R @ T.T, full", "spectra"),
    Mutant("thin-values-without-scale", "spectra.py", "scale * (R @ T.T), compute_uv", "R @ T.T, compute_uv",
           "spectra"),
    Mutant("effective-rank-of-squares", "spectra.py", "    total = s.sum()\n",
           "    s = s * s\n    total = s.sum()\n", "spectra"),
    Mutant("energy-of-plain-values", "spectra.py", "np.cumsum(relative(s) ** 2)", "np.cumsum(s)", "spectra"),
    Mutant("rank-at-one-too-few", "spectra.py", ".sum()) + 1 if s.any()", ".sum()) if s.any()", "spectra"),
    Mutant("spectrum-of-the-weight-not-its-change", "spectra.py",
           "singular_values(after[path].dense() - p.dense())", "singular_values(after[path].dense())",
           "spectra"),
    Mutant("noise-not-of-norm-one", "spectra.py", "s / np.sqrt((s * s).sum())", "s / s.sum()", "spectra"),
    # ---- texts
    Mutant("labels-not-shifted", "data/batching.py", "cut[:, :-1], cut[:, 1:]", "cut[:, :-1], cut[:, :-1]", "corpora"),
    Mutant("batches-miss-the-last-window", "data/batching.py", "rng.integers(len(ids) - length,",
           "rng.integers(len(ids) - length - 1,", "corpora"),
    Mutant("limited-evaluation-reads-the-beginning", "data/batching.py", "np.arange(count) * fit // count * length",
           "np.arange(count) * length", "corpora"),
    Mutant("held-out-plays-in-training", "data/corpora.py", "for stem, v in works if stem not in HELD_OUT)",
           "for stem, v in works)", "corpora"),
    Mutant("permutation-of-another-rank", "data/corpora.py", "SWAPS[:k]:\n", "SWAPS[: k + 1]:\n", "corpora"),
    Mutant("only-the-training-text-is-changed", "data/corpora.py",
           "[change(split) for split in (base.train, base.valid, base.test)]",
           "[change(base.train), base.valid, base.test]", "corpora"),
    Mutant("damaged-text-accepted", "data/corpora.py", "if text.digest != known.digest:", "if False:", "corpora"),
    # ---- the sweep
    Mutant("row-written-without-digest", HARNESS, 'row | {"sha256": seal(row)}', "row", "rank_sweep"),
    Mutant("rows-kept-without-their-gap", HARNESS, "rows = self.form.derive([self.done[id] for id in self.order])",
           "rows = [self.done[id] for id in self.order]", "rank_sweep harness"),
    Mutant("damaged-row-counted", HARNESS, 'row.pop("sha256", None) != seal(row):',
           'row.pop("sha256", None) is None:', "rank_sweep"),
    Mutant("rate-chosen-on-the-test-split", SWEEP, "evaluate(model, windows(run, split, inputs))",
           'evaluate(model, windows(run, "test", inputs))', "rank_sweep"),
    Mutant("worst-rate-chosen", SWEEP, "min(runs, key=lambda run: (store", "max(runs, key=lambda run: (store",
           "rank_sweep"),
    Mutant("search-stays-inside-its-edges", SWEEP, "if best[cell] in (min(rates[cell]), max(rates[cell]))]",
           "if False]", "rank_sweep"),
    Mutant("search-shares-a-seed-with-the-results", SWEEP, "seed=SEARCH_SEED", "seed=0", "rank_sweep"),
    Mutant("gap-over-the-base", SWEEP, '(base[0] - row["test"]) / gap', '(base[0] - row["test"]) / base[0]',
           "rank_sweep"),
    Mutant("oracle-keeps-one-more", SWEEP, "    r = run.rank\n", "    r = run.rank + 1\n", "rank_sweep"),
    Mutant("floor-on-the-permuted-text", SWEEP, "[(perm[x], perm[y]) for x, y in", "[(x, y) for x, y in", "rank_sweep"),
    Mutant("another-plan-in-the-folder", HARNESS, "        if old == new:\n", "        if True:\n", "forms"),
    Mutant("what-is-done-is-done-again", HARNESS, "for id, cell in runs.items() if id not in self.done]",
           "for id, cell in runs.items()]", "rank_sweep harness"),
    # ---- the harness
    Mutant("append-not-synced", "formats/atomic.py", "                write_all(fd, data)\n                os.fsync(fd)\n",
           "                write_all(fd, data)\n", "atomic harness"),
    Mutant("failed-append-leaves-half", "formats/atomic.py", "os.ftruncate(fd, before.st_size)", "pass", "atomic"),
    Mutant("append-follows-a-link", "formats/atomic.py", "os.O_WRONLY | os.O_APPEND | SAFE)",
           "os.O_WRONLY | os.O_APPEND)", "atomic"),
    Mutant("append-to-a-second-name", "formats/atomic.py", "if not plain(before := os.fstat(fd)):",
           "if not (before := os.fstat(fd)):", "atomic"),
    Mutant("append-writes-over-the-beginning", "formats/atomic.py", "os.O_WRONLY | os.O_APPEND | SAFE)",
           "os.O_WRONLY | SAFE)", "atomic"),
    Mutant("half-a-line-is-damage", HARNESS, 'if line.endswith((b"\\n", b"\\r")):', "if True:", "harness"),
    Mutant("row-appended-to-half-a-line", HARNESS, "self.replace(lines)  #", "pass  #", "harness"),
    Mutant("file-of-rows-replaced-for-each-row", HARNESS, "append(self.path, line)",
           'write_atomic(self.path, (read(self.path) if exists(self.path) else b"") + line)', "harness"),
    Mutant("rows-in-the-order-of-their-end", HARNESS, "[self.done[id] for id in self.order]",
           "[row for id, row in self.done.items() if id in self.order]", "harness"),
    Mutant("progress-told-before-the-row-is-kept", HARNESS, "        append(self.path, line)\n",
           "        self.progress and self.progress(self.count + 1, len(self.order), row)\n"
           "        append(self.path, line)\n", "harness"),
    Mutant("inputs-read-for-every-run", HARNESS, "self.inputs or read_again(self.source)",
           "read_again.__wrapped__(self.source)", "harness"),
    Mutant("inputs-read-again-in-each-process-and-run", HARNESS, "@lru_cache(1)\n", "@lru_cache(0)\n", "harness"),
    Mutant("inputs-sent-with-every-run", HARNESS, "return Job, (self.run, self.source)",
           "return Job, (self.run, self.source, self.inputs)", "harness"),
    Mutant("changed-base-read-by-a-worker", HARNESS, "if digest(base) != source.digest:", "if False:", "harness"),
    Mutant("changed-text-read-by-a-worker", HARNESS, "if texts[target].digest != expected:", "if False:", "harness"),
    Mutant("fallback-fetched-by-a-worker", HARNESS, "corpora.fallback(target) if fallback else corpora.corpus(target)",
           "corpora.corpus(target)", "harness"),
    Mutant("result-of-any-environment-kept", HARNESS, "            check_same(f\"run {row['id']}\", environment, self.environment)\n",
           "", "cluster harness"),
    Mutant("one-job-starts-a-process", HARNESS, "return held and (jobs or cores()) == 1", "return False", "harness"),
    Mutant("blas-threads-of-this-process-not-asked", HARNESS, "return held and (jobs or cores()) == 1",
           "return (jobs or cores()) == 1", "harness"),
    Mutant("jobs-without-processes-not-refused", HARNESS, "if jobs is not None and jobs > 1:", "if False:",
           "harness package"),
    Mutant("environment-not-put-back", HARNESS, "            for name, value in before.items():\n",
           "            for name, value in ():\n", "harness"),
    # ---- files of others: safetensors, GGUF, adapters
    Mutant("bfloat16-cut-and-not-rounded", "formats/safetensors.py", "((u + (0x7FFF + (upper & 1))) >> 16)", "(u >> 16)",
           "safetensors"),
    Mutant("bfloat16-half-away-from-even", "formats/safetensors.py", "(0x7FFF + (upper & 1))", "0x8000", "safetensors"),
    Mutant("a-hole-between-tensors-is-taken", "formats/safetensors.py", "        if begin != end:\n",
           "        if begin < end:\n", "bad_files"),
    Mutant("a-longer-file-is-taken", "formats/safetensors.py", "if end != size - 8 - length:",
           "if end > size - 8 - length:",
           "bad_files"),
    Mutant("a-name-given-twice-counts-once", "formats/safetensors.py", "    if len(members) < len(pairs):\n",
           "    if False:\n", "bad_files"),
    Mutant("header-length-not-checked", "formats/safetensors.py", "length > LONGEST or length > size - 8", "length < 0",
           "bad_files"),
    Mutant("metadata-in-any-order", "formats/safetensors.py", 'dict(sorted((metadata or {"format": "pt"}).items()))',
           'dict((metadata or {"format": "pt"}).items())', "safetensors"),
    Mutant("gguf-rows-left-in-pairs", "formats/gguf.py", "return half_split(W, heads) if heads else W", "return W",
           "gguf"),
    Mutant("gguf-keys-split-like-queries", "formats/gguf.py", '"k_proj": config.num_key_value_heads}',
           '"k_proj": config.num_attention_heads}', "gguf"),
    Mutant("llama3-stretches-the-fast-pairs", "model.py", "(1 - t) * inverse / self.factor + t * inverse",
           "t * inverse / self.factor + (1 - t) * inverse", "model"),
    Mutant("scale-of-the-default-alpha", "peft/folder.py",
           "alphas.get(module, settings.lora_alpha)", "settings.lora_alpha", "folder"),
    Mutant("rslora-forgotten-on-reading", "peft/config.py",
           "(math.sqrt(r) if self.use_rslora else r)", "r",
           "folder"),
    Mutant("excluded-modules-are-meant", "peft/config.py",
           "free = [m for m in modules if m not in excluded]", "free = list(modules)",
           "folder"),
    Mutant("text-counts-as-true", "peft/config.py",
           "        if value is not None and type(value) is not bool:\n            raise",
           "        if False:\n            raise", "patterns"),
    Mutant("a-second-half-is-not-missed", "peft/folder.py", "for half, other in ((a, b), (b, a)):",
           "for half, other in ((a, b),):", "bad_files"),
    Mutant("modules-missing-from-the-file", "peft/loading.py",
           "if missing := [m for m in meant(given.settings, modules, linears) if m not in given.pairs]:",
           "if missing := []:", "bad_files"),
    Mutant("another-base-is-taken", "peft/loading.py", "    if base and base != (own := fingerprint()):",
           "    if False and base != (own := fingerprint()):", "bad_files folder"),
    Mutant("a-changed-number-is-taken", "peft/folder.py", 'if "sha256" in made and',
           'if "sha256" in made and False and',
           "bad_files folder"),
    Mutant("nan-in-an-adapter", "peft/folder.py", "if bad := int(a.size - np.isfinite(a).sum()):",
           "if bad := 0:",
           "bad_files"),
    Mutant("tied-head-follows-the-embedding", "peft/loading.py", 'split = tied and not changed.isdisjoint({"model.embed_tokens", "lm_head"})', "split = False", "folder"),
    Mutant("tied-head-left-out-of-the-file", "peft/loading.py", "                if tied:  # ", "                if False:  # ", "folder"),
    Mutant("alpha-not-that-of-the-scale", "peft/config.py", "near = scale * over", "near = scale",
           "folder"),
    Mutant("bias-of-the-base-under-the-adapter", "methods/bias.py", "base = Linear(base.weight, self.bias)",
           "base = Linear(base.weight, base.bias)", "lora folder"),
    Mutant("bias-without-gradient-when-folded", "fast/folded.py", "Linear(self.weight, base.bias).backward(x, need)", "Linear(self.weight).backward(x, need)", "folded"),
    Mutant("layers-to-transform-ignored", "targets.py", "    if numbers is not None and paths:\n        paths = in_layers(numbers, paths)\n", "", "lora"),
    Mutant("prompt-has-a-loss", "data/examples.py", "labels[i, start - 1 : len(ids) - 1] = ids[start:]",
           "labels[i, : len(ids) - 1] = ids[1:]", "finetune"),
    Mutant("example-shifted-by-one", "data/examples.py", "labels[i, start - 1 : len(ids) - 1] = ids[start:]",
           "labels[i, start : len(ids)] = ids[start:]", "finetune"),
    Mutant("half-a-character-is-shown", "formats/tokenizer.py", 'if not text.endswith("\\ufffd"):', "if True:",
           "finetune"),
    Mutant("the-token-before-is-forgotten", "formats/tokenizer.py", "self.shown, self.new = self.new, []", "self.shown, self.new = [], []", "tokenizer"),
    Mutant("text-is-decoded-from-its-start", "formats/tokenizer.py", "self.shown, self.new = self.new, []", "self.shown, self.new = self.shown + self.new, []", "tokenizer"),
    Mutant("the-last-bytes-are-lost", "formats/tokenizer.py", "return self.piece() if self.new else \"\"", "return \"\"", "finetune"),
    # ---- behind HTTP
    Mutant("config-before-the-templates-file", "data/chat.py", "if exists(file := where / \"chat_template.jinja\"):", "if source is None and exists(file := where / \"chat_template.jinja\"):", "chat"),
    Mutant("old-special-tokens-first", "data/chat.py", "(\"special_tokens_map.json\", \"tokenizer_config.json\")", "(\"tokenizer_config.json\", \"special_tokens_map.json\")", "chat"),
    Mutant("template-outside-the-sandbox", "data/chat.py", "sandbox.ImmutableSandboxedEnvironment(", "jinja2.Environment(", "chat"),
    Mutant("messages-can-be-changed", "data/chat.py", "sandbox.ImmutableSandboxedEnvironment(", "sandbox.SandboxedEnvironment(", "chat"),
    Mutant("blocks-leave-their-lines", "data/chat.py", "trim_blocks=True, ", "", "chat"),
    Mutant("prompt-ends-with-the-user", "data/chat.py", "add_generation_prompt=True", "add_generation_prompt=False", "chat"),
    Mutant("tools-are-undefined", "data/chat.py", "tools=None, ", "", "chat"),
    Mutant("token-beyond-the-vocabulary", "data/chat.py", " if number < len(tokens)", "", "chat"),
    Mutant("true-is-one-choice", "serve/openai.py", "type(value) is type(one) and value == one", "value == one", "openai"),
    Mutant("unknown-fields-are-ignored", "serve/openai.py", "if name not in known:", "if False:", "openai"),
    Mutant("stop-string-is-shown", "serve/openai.py", "return text[: min(found)]", "return text[: max(found)]", "openai"),
    Mutant("stop-string-in-two-pieces-is-missed", "serve/openai.py", "(0 if last else max(starts, default=0))", "0", "openai"),
    Mutant("max-completion-tokens-is-ignored", "serve/openai.py", "limit = limit or more", "limit = limit", "openai"),
    Mutant("completion-without-a-limit", "serve/openai.py", "limit or (None if chat else 16)", "limit", "openai"),
    Mutant("half-a-character-in-an-error", "serve/openai.py", "param and plain(param[:200])", "param and param[:200]", "openai"),
    Mutant("tiny-temperature-overflows", "serve/openai.py", "0.0 if 0 < (t := check_number(given, \"temperature\")) < GREEDY else t", "check_number(given, \"temperature\")", "openai"),
    Mutant("bucket-without-its-bound", "serve/metrics.py", "self.counts[bisect_left(self.bounds, value)]", "self.counts[bisect_left(self.bounds, value + 1e-9)]", "metrics"),
    Mutant("buckets-not-cumulative", "serve/metrics.py", "below += count", "below = count", "metrics"),
    Mutant("sum-of-the-last-alone", "serve/metrics.py", "self.sum += value", "self.sum = value", "metrics"),
    Mutant("tokens-read-are-tokens-written", "serve/metrics.py", "{\"prompt\": done.prompt_tokens, \"generated\": done.new_tokens}", "{\"prompt\": done.new_tokens, \"generated\": done.prompt_tokens}", "metrics"),
    Mutant("counter-is-a-gauge", "serve/metrics.py", "\"counter\" if name.endswith(\"_total\")", "\"counter\" if name.endswith(\"_count\")", "metrics"),
    Mutant("slots-are-those-free", "serve/metrics.py", "len(engine.running) + len(engine.free)", "len(engine.free)", "metrics"),
    Mutant("bos-before-no-prompt", "serve/service.py", "self.words.begun(self.words.encode(want.prompt))", "self.words.encode(want.prompt)", "http"),
    Mutant("bos-twice-in-a-chat", "serve/service.py", "return self.words.encode(self.template(want.messages))", "return self.words.begun(self.words.encode(self.template(want.messages)))", "http"),
    Mutant("full-queue-is-the-clients-fault", "serve/service.py", "if isinstance(e, BusyError):", "if False:", "http"),
    Mutant("unknown-model-is-400", "serve/service.py", "raise Refused(404, ", "raise Refused(400, ", "http"),
    Mutant("folder-of-the-adapters-is-told", "serve/service.py", "str(e).replace(folder + os.sep, \"\").replace(folder, \"the adapters\")", "str(e)", "http"),
    Mutant("a-bug-is-told", "serve/service.py", "return Refused(500, \"internal error\")", "return Refused(500, str(e))", "http"),
    Mutant("seed-zero-for-all", "serve/service.py", "int(self.rng.integers(1 << 63)) if want.seed is None else want.seed", "want.seed or 0", "http"),
    Mutant("text-that-nobody-reads-goes-on", "serve/service.py", "if self.stream.finish_reason is None:", "if False:", "http"),
    Mutant("what-was-held-back-is-lost", "serve/service.py", "new += until.add(text.rest(), last=True)", "new += text.rest()", "http"),
    Mutant("hanging-up-is-not-seen", "serve/http.py", "return_when=asyncio.FIRST_COMPLETED", "return_when=asyncio.ALL_COMPLETED", "http"),
    Mutant("body-of-any-size", "serve/http.py", "if len(raw) > largest:", "if False:", "http"),
    Mutant("body-below-the-limit-alone", "serve/http.py", "if len(raw) > largest:", "if len(raw) >= largest:", "http"),
    Mutant("a-form-of-any-site-is-taken", "serve/http.py", ".strip().lower() != \"application/json\"", ".strip().lower() == \"text/xml\"", "http"),
    Mutant("silent-clients-stay", "serve/http.py", "if turn and not self.clock:", "if False:", "http"),
    Mutant("clock-runs-while-the-answer-is-made", "serve/http.py", "turn = self.cycle is None or self.cycle.response_complete or self.flow.write_paused", "turn = True", "http"),
    Mutant("client-that-does-not-read-stays", "serve/http.py", " or self.flow.write_paused", "", "http"),
    Mutant("any-number-of-connections", "serve/http.py", "if len(self.connections) > CONNECTIONS:", "if False:", "http"),
    Mutant("error-in-a-stream-is-hidden", "serve/http.py", "await event(failure(e.status, str(e)))", "pass", "http"),
    Mutant("no-grace", "serve/http.py", "finishing.join(self.grace)", "finishing.join(0)", "http"),
    Mutant("what-is-cut-off-is-not-said", "serve/http.py", "return not cut", "return True", "http"),
    Mutant("every-address-is-private", "serve/http.py", "ipaddress.ip_address(address).is_loopback", "True", "http"),
    # ---- under the microscope
    Mutant("phi-over-the-larger-span", "spectra.py", "np.minimum(i[:, None], j)", "np.maximum(i[:, None], j)",
           "spectra"),
    Mutant("chance-of-the-smaller-span", "spectra.py", "return max(i, j) / D", "return min(i, j) / D",
           "spectra"),
    Mutant("random-amplification-of-one-direction", "spectra.py",
           "float(xp.linalg.norm(W)) * len(S) / math.sqrt(",
           "float(xp.linalg.norm(W)) * math.sqrt(len(S)) / math.sqrt(", "spectra"),
    Mutant("intruders-without-the-change", "spectra.py", "xp.linalg.svd(W + delta, full_matrices=False)",
           "xp.linalg.svd(W, full_matrices=False)", "spectra"),
    Mutant("threshold-forgets-what-lies-outside", "spectra.py",
           "rest = rng.chisquare(D - n) if n < D else 0.0", "rest = 0.0", "spectra"),
    Mutant("top-vectors-of-one-round", "spectra.py", "for _ in range(rounds):", "for _ in range(0):",
           "spectra"),
    Mutant("zero-times-log-zero", "spectra.py",
           "    p = s / total if total > 0 else s[:0]\n    p = p[p > 0]\n",
           "    p = s[s > 0] / total if total > 0 else s[:0]\n", "spectra"),
    Mutant("overlap-with-chance-of-the-inputs", "analysis/inspect.py", "random_similarity(k, k, len(W))",
           "random_similarity(k, k, W.shape[1])", "inspect"),
    Mutant("noise-of-a-square", "analysis/inspect.py", "noise(pair.shape, pair.r),",
           "noise((pair.shape[1],) * 2, pair.r),", "inspect"),
    Mutant("directions-of-no-strength", "analysis/inspect.py", "k = max(rank_at(to_host(S), 1.0), 1)",
           "k = len(S)", "inspect"),
    Mutant("cosine-without-the-values", "analysis/inspect.py", "* s[:, None] * s2).sum()", ").sum()",
           "inspect"),
    Mutant("biases-not-noted", "analysis/inspect.py",
           " + sum(pair.bias is not None for pair in given.pairs.values())", "", "inspect"),
    Mutant("tied-head-unknown", "formats/huggingface.py", "names += [TABLE] if key == TIED else []", "names += []",
           "inspect"),
    Mutant("all-modules-in-memory", "analysis/inspect.py", "for module in each(one, given.pairs):",
           "held = [given.factors(name) for name in given.pairs]\n"
           "        for module in each(one, given.pairs):", "inspect"),
    Mutant("heat-map-of-the-last-expert", "analysis/figures.py", "grid[place] = math.fsum(values) / len(values)",
           "grid[place] = values[-1]", "inspect"),
    Mutant("figure-drawn-again", "analysis/plotting.py", "            self.made[kind] = stream.getvalue()\n",
           "            return stream.getvalue()\n", "plotting"),
    # ---- smaller adapters, differences, merged folders
    Mutant("cut-without-the-values-of-one-side", "compose/truncate.py", "(root[:, None] * Vt[:k])", "(Vt[:k])",
           "truncate"),
    Mutant("compressed-keeps-rslora", "compose/truncate.py", '"alpha_pattern", "use_rslora")', '"alpha_pattern")',
           "truncate"),
    Mutant("residual-is-the-optimum", "compose/truncate.py", "lost = left_over(B, A, pair.scale, Bk, Ak)",
           "lost = norm(S[k:])", "truncate"),
    Mutant("budget-overspent", "compose/truncate.py", "if spent + costs[module] <= budget:", "if spent < budget:",
           "truncate"),
    Mutant("narrow-modules-crowd-out-wide-ones", "compose/truncate.py", "return max(chosen, common, key=",
           "return max(chosen, chosen, key=", "truncate"),
    Mutant("common-rank-by-plain-values", "compose/truncate.py", "[np.pad(S * S, (0,", "[np.pad(S, (0,", "truncate"),
    Mutant("output-around-the-input", "compose/truncate.py", " or out in s.parents", "", "truncate"),
    Mutant("extracted-the-other-way-round", "compose/extract.py", "two.astype(np.float64) - one",
           "one.astype(np.float64) - two", "truncate"),
    Mutant("an-embedding-is-a-map", "compose/extract.py", ' and "embed" not in last and ', " and ", "truncate"),
    Mutant("extracted-for-any-base", "compose/extract.py", "write_adapter(out, config, tensors, fingerprint(before),",
           "write_adapter(out, config, tensors, None,", "truncate"),
    Mutant("copy-of-the-base-in-one-dtype", "peft/loading.py",
           "any(np.array_equal(copy, stored(W, kind)) for kind in CALLED)",
           'np.array_equal(copy, stored(W, "float32"))', "truncate"),
    Mutant("merged-in-float32", "compose/export.py", "assemble(source, np.float64)", "assemble(source, np.float32)",
           "export"),
    Mutant("lost-of-the-weight-not-of-its-change", "compose/export.py", "lost / size)",
           "lost / float(np.linalg.norm(W)))", "export"),
    Mutant("token-ids-forgotten", "compose/export.py", "token_ids(source.where), kind", "{}, kind", "export"),
    Mutant("asked-dtype-ignored", "compose/export.py", "kind = dtype or source.dtype", "kind = source.dtype",
           "export"),
    # ---- files, injuries and ends
    Mutant("links-followed", "formats/atomic.py", 'NOFOLLOW = flags("O_NOFOLLOW")', "NOFOLLOW = 0", "atomic"),
    Mutant("any-relative-link-is-the-hubs", "formats/atomic.py", "or not os.path.samestat(*above):", "or False:",
           "atomic"),
    Mutant("blobs-may-be-a-link", "formats/atomic.py", 'blobs", FOLDER | NOFOLLOW, here)',
           'blobs", FOLDER, here)', "atomic"),
    Mutant("lock-of-any-kind", "formats/atomic.py", "if not plain(os.fstat(fd)):", "if False:", "atomic"),
    Mutant("second-names-do-not-matter", "formats/atomic.py", "and state.st_nlink <= 1", "", "atomic"),
    Mutant("folder-of-ours-may-be-a-link", "formats/atomic.py", "descriptor(folder, FOLDER | NOFOLLOW)",
           "descriptor(folder, FOLDER)", "atomic"),
    Mutant("link-is-replaced", "formats/atomic.py", "if exists(path) and not plain(os.lstat(path)):", "if False:",
           "atomic"),
    Mutant("what-is-held-is-cleared", "formats/atomic.py",
           "            if not lock(fd):\n                return\n            if match",
           "            if match", "atomic"),
    Mutant("without-locks-all-is-left-behind", "formats/atomic.py", "            if not lock(fd):\n                return\n",
           "            lock(fd)\n", "atomic"),
    Mutant("memory-is-always-told", "finetune.py", ' if self.peak else ""', "", "package"),
    Mutant("errors-of-others-are-the-files", "formats/atomic.py",
           "        if \"\\0\" not in str(path):\n            raise\n", "", "atomic"),
    Mutant("temporary-name-not-held", "formats/atomic.py",
           "        lock(fd)\n        return os.path.samestat",
           "        return os.path.samestat", "atomic"),
    Mutant("leftovers-of-all-names", "formats/atomic.py", 'if name not in (None, match["name"]):', "if False:",
           "atomic"),
    Mutant("leftovers-stay", "formats/atomic.py", "    path = Path(path)\n    clear(path.parent, path.name)\n",
           "    path = Path(path)\n", "atomic"),
    Mutant("half-way-overwriting-not-undone", "formats/atomic.py", 'if match["kind"] == "old" and not exists(home):', "if False:",
           "atomic"),
    Mutant("exchange-in-two-steps", "formats/atomic.py", "    if exchanged(temp, path):\n        return\n", "",
           "atomic"),
    Mutant("work-of-a-finished-run-stays", "session.py", "            if spent or not exists",
           "            if not exists", "finetune"),
    Mutant("work-that-can-go-on-goes", "session.py",
           "return over and os.lstat(checkpoint).st_mtime_ns <= written", "return over", "finetune"),
    Mutant("link-in-a-folder-of-texts", "formats/atomic.py", "and not os.path.islink(path)", "", "corpora"),
    Mutant("stderr-ends-the-work", "console.py",
           "        with contextlib.suppress(OSError, ValueError):\n            self.stream.write(text)",
           "        if True:\n            self.stream.write(text)", "cli"),
    Mutant("encoding-strict", "console.py", 'reconfigure(errors="backslashreplace")',
           'reconfigure(errors="strict")', "cli"),
    Mutant("any-broken-pipe-is-done", "cli.py", "    except OSError as e:\n        return 4, str(e)",
           "    except OSError as e:\n        return 4 * (type(e) is not BrokenPipeError), str(e)", "cli"),
    Mutant("no-memory-is-a-traceback", "cli.py", "except MemoryError as e:", "except ZeroDivisionError as e:",
           "cli"),
    Mutant("hangup-forgotten", "console.py", '("SIGINT", "SIGTERM", "SIGHUP") if', '("SIGINT", "SIGTERM") if',
           "cli"),
    Mutant("nohup-undone", "console.py", "not in (signal.SIG_IGN, None)", "is not None", "cli"),
    Mutant("closed-streams-given-away", "console.py", "os.O_RDWR)) < 3:", "os.O_RDWR)) < 0:", "cli"),
    Mutant("interrupted-import-traced", "__init__.py", '("minilora", "-m")', "()", "cli"),
    # ---- what is fetched, what is text, where a sequence begins
    Mutant("setup-py-is-run", "formats/archives.py", "filter(None, [str(standin), os.", "filter(None, [os.",
           "fetch"),
    Mutant("built-with-tools-from-the-index", "formats/archives.py", '"--no-build-isolation", ', "", "fetch"),
    Mutant("pip-of-the-working-folder", "formats/archives.py", '"-P", "-m", "pip"', '"-m", "pip"', "fetch"),
    Mutant("archive-of-another-digest", "formats/archives.py", "if of_bytes(raw := read(path, MOST)) == digest:",
           "if raw := read(path, MOST):", "fetch"),
    Mutant("hidden-files-of-an-archive", "formats/archives.py", ' or "/." in f"/{name}":', ":", "fetch"),
    Mutant("archive-without-a-bound", "formats/archives.py", "left -= size", "left -= 0", "fetch"),
    Mutant("archive-in-its-own-order", "formats/archives.py", "dict(sorted(taken(path, raw, f\"{top}/\", endings)))",
           "dict(taken(path, raw, f\"{top}/\", endings))", "fetch"),
    Mutant("wrong-text-is-cached", "data/corpora.py", "            load(temp, name)\n", "", "corpora"),
    Mutant("damaged-cache-stays", "data/corpora.py", "            remove_tree(folder)\n", "            pass\n",
           "corpora"),
    Mutant("cached-text-is-not-compared", "data/corpora.py", "    if text.digest != known.digest:", "    if False:",
           "corpora"),
    Mutant("a-pdf-is-text", "formats/tokenizer.py", "if data.startswith(start) or path", "if path", "examples"),
    Mutant("an-ending-says-nothing", "formats/tokenizer.py", " or path.suffix.lower() in endings.split()", "", "examples"),
    Mutant("control-characters-are-text", "formats/tokenizer.py", "    if controls > MOST_LOST * len(text):",
           "    if False:", "examples"),
    Mutant("mixed-folder-is-text", "data/user_files.py", "    if texts and lines:", "    if False:", "examples"),
    Mutant("sweep-takes-examples-for-text", "data/user_files.py", "    if examples:\n", "    if False:\n", "examples"),
    Mutant("byte-order-mark-is-read", "formats/tokenizer.py", '.removeprefix("\\ufeff")', "", "examples"),
    Mutant("lost-text-is-trained-on", "finetune.py", "check_lost(where, sum(lost for _, lost in parts), ",
           "check_lost(where, 0, ", "examples"),
    Mutant("lost-examples-are-trained-on", "data/examples.py", "check_lost(path, lost, ", "check_lost(path, 0, ",
           "examples"),
    Mutant("unknown-words-are-known", "formats/tokenizer.py", "np.count_nonzero(ids == self.unknown)", "0",
           "examples"),
    Mutant("lines-end-anywhere", "data/examples.py", 'text.split("\\n")', "text.splitlines()", "examples"),
    Mutant("array-of-examples-is-lines", "data/examples.py", 'if path.suffix.lower() != ".json":', "if True:",
           "examples"),
    Mutant("first-bad-line-ends-it", "data/examples.py", "            bad.append((where, e))",
           '            raise type(e)(f"{where}: {e}") from e', "examples"),
    Mutant("bos-twice", "formats/tokenizer.py", "if tuple(ids[:n].tolist()) == self.start else", "if not n else",
           "examples"),
    Mutant("bos-forgotten-in-examples", "data/examples.py", "begun = words.begun(parts[0])", "begun = parts[0]",
           "examples"),
    Mutant("bos-cut-off-with-a-long-prompt", "data/examples.py",
           "np.concatenate([start, rest[max(0, len(rest) + len(start) - room) :]])",
           "prompt[max(0, len(prompt) - room) :]", "examples"),
    Mutant("bos-not-before-a-text", "finetune.py", "words.begun(np.concatenate([ids for ids, _ in parts]))",
           "np.concatenate([ids for ids, _ in parts])", "examples"),
    Mutant("bos-not-before-a-prompt", "completion.py", "words.begun(words.encode(prompt))",
           "words.encode(prompt)", "examples"),
    Mutant("bos-of-a-gguf-forgotten", "formats/gguf.py", '"post_processor": template(path, tokens)',
           '"post_processor": None', "gguf"),
    Mutant("hidden-path-is-not-said", "cli.py", "        note_shadowed(options)\n", "", "names"),
    Mutant("any-path-is-said-to-be-hidden", "cli.py", "for key, name in here if name in known[key])",
           "for key, name in here)", "names"),
    Mutant("a-path-before-a-name", "formats/huggingface.py", '"smollm2": smollm2}.get(str(spec), lambda: Path(spec))()',
           '"smollm2": smollm2}.get(str(spec) * (not exists(spec)), lambda: Path(spec))()', "names"),
    Mutant("every-module-adapted", "analysis/count.py", "m in adapted) for m, part", "True) for m, part", "count"),
    # ---- bases and checkpoints (issue 9, section 3)
    Mutant("extract-forgets-conv1d", "compose/extract.py",
           'turned = {module: bool(transposed(before.shapes, module)) for',
           "turned = {module: False for", "truncate"),
    Mutant("extract-writes-no-flag", "compose/extract.py", '"fan_in_fan_out": flag}', '"fan_in_fan_out": False}',
           "truncate"),
    Mutant("residual-of-what-was-meant", "compose/extract.py",
           "return change.T if given.settings.fan_in_fan_out else change\n", "return change\n", "truncate"),
    Mutant("conv1d-by-name-alone", "formats/huggingface.py",
           "        return weight[1] == (bias[0] if bias else max(weight))\n",
           "        return True\n", "truncate"),
    Mutant("square-conv1d-not-known", "formats/huggingface.py", "for name in (*beside, *others) if",
           "for name in (module,) if",
           "truncate inspect"),
    Mutant("gpt2-names-as-they-lie", "formats/huggingface.py", "any(map(BARE.match, names))", "not names", "truncate"),
    Mutant("inspect-trusts-the-flag", "analysis/inspect.py", "if turned is None:", "if not pair.embedding:",
           "inspect"),
    Mutant("linear-beside-conv1d-turned", "compose/extract.py",
           "if others := [module for module in parts if turned[module] != flag]:", "if others := []:",
           "truncate"),
    Mutant("rounding-is-a-change", "compose/extract.py", 'return change, rounding(one, two) if change.any() else ""',
           'return change, ""', "truncate"),
    Mutant("rounding-one-way", "compose/extract.py", "for wide, narrow in ((one, two), (two, one)):",
           "for wide, narrow in ((one, two),):", "truncate"),
    Mutant("grown-table-is-refused", "compose/extract.py", "if old != new and is_map(name, old):", "if old != new:",
           "truncate"),
    Mutant("what-one-has-is-not-told", "compose/extract.py", "        if alone:\n", "        if not alone:\n",
           "truncate"),
    Mutant("deeper-model-is-extracted", "compose/extract.py",
           "if LAYER.match(name) and is_map(name, own.shapes[name]):",
           "if not LAYER.match(name) and is_map(name, own.shapes[name]):", "truncate"),
    Mutant("tied-head-on-a-copy", "targets.py", "\"lm_head\": Linear(layers[\"model.embed_tokens\"].weight)}", "\"lm_head\": Linear(type(layers[\"model.embed_tokens\"].weight)(layers[\"model.embed_tokens\"].weight.data.copy()))}", "lora"),
    Mutant("table-counted-twice", "lora.py", "for path, a in new.items()), size(layers))", "for path, a in new.items()), sum(map(size, layers.values())))", "lora"),
    Mutant("untied-under-an-adapter", "lora.py", "if isinstance(model.model.embed_tokens, Adapted):\n        raise", "if False:\n        raise", "lora"),
    Mutant("tied-head-not-counted", "analysis/count.py", '"lm_head": Part("Linear", (V, D))}',
           '**({} if c.tie_word_embeddings else {"lm_head": Part("Linear", (V, D))})}', "count"),
    Mutant("tied-table-in-the-total-twice", "analysis/count.py",
           '    total -= outer["lm_head"].parameters * c.tie_word_embeddings\n',
           "", "count"),
    Mutant("qwen2-without-its-biases", "analysis/count.py", "biased = ATTENTION[:3] if",
           "biased = () if", "count"),
    Mutant("qwen3-norms-of-the-width", "analysis/count.py", 'Part("RMSNorm", (E,))', 'Part("RMSNorm", (D,))', "count"),
    Mutant("any-depth-is-listed", "analysis/count.py", "DEEPEST = 10_000", "DEEPEST = 10**40", "count"),
    Mutant("window-refused-to-count", "formats/huggingface.py",
           "    except UnsupportedError as e:\n        beyond = str(e)\n",
           "    except UnsupportedError:\n        raise\n", "count"),
    Mutant("window-loads", "formats/huggingface.py", "    if outline.beyond:\n", "    if False:\n", "huggingface"),
    Mutant("weights-need-a-config-of-llama", "formats/huggingface.py", "    root = root_of(config, tensors)\n",
           '    read_config(where / "config.json")\n    root = root_of(config, tensors)\n', "huggingface"),
    Mutant("changed-file-is-read-on", "formats/atomic.py", "if stamp and stamp != Stamp.of(",
           "if False and stamp != Stamp.of(",
           "huggingface"),
    Mutant("stamp-without-the-inode", "formats/atomic.py",
           "return cls(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)",
           "return cls(state.st_dev, 0, state.st_size, 0)", "huggingface"),
    Mutant("gguf-read-on", "formats/gguf.py", "blocks.size, file.stamp), np.uint8)", "blocks.size), np.uint8)",
           "gguf"),
    Mutant("pointer-is-a-damaged-file", "formats/safetensors.py",
           "if len(start) < BRIEF and start.startswith(POINTER):", "if False:", "huggingface"),
    Mutant("fingerprint-of-weights-alone", "peft/loading.py", "{path: p.dense() for path, p in named_params(bases(model)).items()}", "{path: p.dense() for path, p in named_params(bases(model)).items() if not path.endswith(\"bias\")}", "huggingface"),
    # ---- patterns of adapters' configs
    Mutant("steps-are-not-counted", "peft/patterns.py", "        self.left -= steps\n", "", "patterns"),
    Mutant("old-positions-are-new", "peft/patterns.py", "inner(names, new, back) & ~at",
           "inner(names, new, back)", "patterns"),
    Mutant("a-repeat-has-no-end", "peft/patterns.py", "while new and count < most:", "while new:", "patterns"),
    Mutant("a-repeat-need-not-begin", "peft/patterns.py", "while count < least:", "while False:", "patterns"),
    Mutant("look-ahead-looks-behind", "peft/patterns.py", "inner(names, names.every, not behind)",
           "inner(names, names.every, behind)", "patterns"),
    Mutant("what-must-not-follow-must", "peft/patterns.py", "at & ~there if absent", "at & there if absent",
           "patterns"),
    Mutant("a-match-runs-into-the-next-name", "peft/patterns.py",
           "        self.codes[self.ends] = len(letters)  # no character\n", "", "patterns"),
    Mutant("a-pattern-means-what-begins-so", "peft/patterns.py", "(text, text.first, False) & text.last)]",
           "(text, text.first, False))]", "patterns"),
    Mutant("dots-of-a-name-are-dots", "peft/patterns.py", 'dot[1] or "\\0"', 'dot[1] or "."', "patterns"),
    Mutant("an-escaped-dot-is-any-character", "peft/patterns.py", 'dot[1] or "\\0"',
           'dot[1] if dot[1] == "-" else "\\0"', "patterns"),
    Mutant("an-anchored-key-means-any-end", "peft/patterns.py", "(False, True)[: 1 + (start == 0)]",
           "(False, True)", "patterns"),
    Mutant("names-before-regular-expressions", "peft/patterns.py", "        fit.sort()\n", "", "patterns"),
    Mutant("keys-by-one-letter-only-at-a-dot", "peft/patterns.py",
           "return [0, *(place for place", "return [*(place for place", "patterns"),
    Mutant("the-last-key-counts", "peft/config.py", "numbers[fit[0]] for", "numbers[fit[-1]] for",
           "patterns"),
    Mutant("keys-that-agree-are-contested", "peft/config.py", "len({numbers[place] for place in fit}) > 1",
           "len(fit) > 1", "patterns"),
    Mutant("an-idle-key-passes-in-silence", "peft/folder.py", "        for key in values.idle:\n",
           "        for key in ():\n", "patterns"),
    Mutant("an-idle-key-is-loaded", "peft/loading.py", "for key in chosen(given.settings, name, modules).idle:",
           "for key in ():", "patterns"),
    Mutant("the-last-name-counts-on-injecting", "targets.py",
           "for entry, value in pattern.items() if matches(entry, path)), default)",
           "for entry, value in reversed(pattern.items()) if matches(entry, path)), default)", "patterns"),
    Mutant("a-byte-order-mark-is-no-news", "peft/config.py", "if read_at(path, 0, 3) == codecs.BOM_UTF8:",
           "if False:", "patterns"),
    Mutant("null-is-no-flag", "peft/config.py", "if value is not None and type(value) is not bool:",
           "if type(value) is not bool:", "patterns"),
    Mutant("ten-thousand-tensors", "formats/safetensors.py", "MOST = 100_000  #", "MOST = 10_000  #", "patterns"),
    # ---- the experiment: what is tested is not trained on, a seed is a seed, a recipe is what is run
    Mutant("train-on-the-held-out-text", "finetune.py", "return Text(batching.batches(ids, rng",
           "return Text(batching.batches(np.concatenate([ids, held_ids]), rng", "protocol"),
    Mutant("train-on-the-held-out-examples", "finetune.py", "draws(pairs[:-n], rng", "draws(pairs, rng",
           "protocol"),
    Mutant("held-out-text-overlaps", "finetune.py", "return text[:cut], text[cut:]",
           "return text[:cut], text[cut - 200 :]", "protocol"),
    Mutant("built-in-text-measured-where-trained", "finetune.py",
           "return tokenizer.decode(corpus.train), tokenizer.decode(corpus.test)",
           "return tokenizer.decode(corpus.train), tokenizer.decode(corpus.train)", "protocol"),
    Mutant("train-seed-of-A-dropped", "finetune.py", "rng=np.random.default_rng(recipe.seed)",
           "rng=np.random.default_rng(0)", "protocol"),
    Mutant("train-seed-of-batches-dropped", "finetune.py", "np.random.default_rng([recipe.seed, 1])",
           "np.random.default_rng([0, 1])", "protocol"),
    Mutant("train-schedule-dropped", "session.py",
           "        schedule=Schedule(recipe.steps, warmup=min(recipe.warmup, recipe.steps)),\n", "",
           "protocol"),
    Mutant("train-warm-up-dropped", "session.py", "warmup=min(recipe.warmup, recipe.steps)", "warmup=0",
           "protocol"),
    Mutant("train-betas-dropped", "finetune.py", "RATES[recipe.method], betas=(0.9, 0.99))",
           "RATES[recipe.method])", "protocol"),
    Mutant("train-rate-dropped", "finetune.py", "recipe.lr or RATES", "RATES", "protocol"),
    Mutant("train-alpha-dropped", "finetune.py", "r=self.r, alpha=self.alpha,", "r=self.r, alpha=16,",
           "protocol"),
    Mutant("train-targets-dropped", "finetune.py", "targets=self.targets, dora", "dora", "protocol"),
    Mutant("train-eval-tokens-ignored", "finetune.py", "rows, length, recipe.eval_tokens)", "rows, length)",
           "protocol"),
    Mutant("train-eval-tokens-ignored-for-examples", "finetune.py",
           "pairs[-n:][: max(1, recipe.eval_tokens // length)]", "pairs[-n:]", "protocol"),
    Mutant("train-measures-at-a-fixed-pace", "finetune.py", "every=recipe.eval_every,", "every=50,",
           "protocol"),
    Mutant("another-recipe-goes-on", "session.py", "\"recipe\": asdict(recipe)}", "\"recipe\": {}}", "finetune"),
    Mutant("another-text-goes-on", "session.py", "{\"text\": text, ", "{", "finetune"),
    Mutant("measuring-counts-as-training", "session.py", "start += time.monotonic() - before", "pass", "finetune"),
    Mutant("sweep-trains-on-the-test-split", SWEEP, "ids = text_of(run, inputs).train",
           "ids = text_of(run, inputs).test", "protocol"),
    Mutant("sweep-follows-the-test-loss", SWEEP, 'valid = windows(run, "valid", inputs)',
           'valid = windows(run, "test", inputs)', "protocol"),
    Mutant("sweep-rate-chosen-by-the-test-loss", SWEEP, '.get("valid", math.inf)', '.get("test", math.inf)',
           "protocol"),
    Mutant("sweep-one-count-of-windows", SWEEP, 'run.test_windows if split == "test" else run.valid_windows',
           "run.test_windows", "protocol"),
    Mutant("sweep-seed-of-A-dropped", SWEEP, "default_rng([run.seed, run.rank])",
           "default_rng([0, run.rank])", "protocol"),
    Mutant("sweep-seed-of-batches-dropped", SWEEP, "default_rng([run.seed, 0])", "default_rng([0, 0])",
           "protocol"),
    Mutant("sweep-eps-dropped", SWEEP, "betas=(0.9, 0.99), eps=run.eps)", "betas=(0.9, 0.99))", "protocol"),
    Mutant("sweep-betas-dropped", SWEEP, "AdamW(run.lr, betas=(0.9, 0.99), ", "AdamW(run.lr, ", "protocol"),
    Mutant("sweep-schedule-dropped", SWEEP,
           "        schedule=Schedule(run.steps, warmup=run.steps // 20),\n", "", "protocol"),
    Mutant("sweep-warm-up-dropped", SWEEP, "warmup=run.steps // 20", "warmup=0", "protocol"),
    Mutant("sweep-eps-of-the-setting-dropped", SWEEP, "alpha=how.alpha, eps=how.eps)", "alpha=how.alpha)",
           "protocol"),
    Mutant("sweep-alpha-of-the-plan-dropped", SWEEP, "alpha=self.alpha or usual.alpha", "alpha=usual.alpha",
           "protocol"),
    Mutant("sweep-search-steps-of-the-plan-dropped", SWEEP, "search_steps=self.search_steps or min(",
           "search_steps=min(", "protocol"),
    Mutant("sweep-always-three-seeds", SWEEP, "range(plan.seeds)", "range(3)", "protocol"),
    Mutant("sweep-valid-windows-of-the-plan-dropped", SWEEP,
           "test_windows=plan.test_windows, valid_windows=plan.valid_windows,",
           "test_windows=plan.test_windows,", "protocol"),
    Mutant("pretraining-sees-the-held-out-plays", PRETRAIN, "batching.batches(text.train, rng",
           "batching.batches(text.test, rng", "protocol"),
    Mutant("pretraining-seed-of-weights-dropped", PRETRAIN, "Config(), np.random.default_rng(recipe.seed)",
           "Config(), np.random.default_rng(0)", "protocol"),
    Mutant("pretraining-seed-of-batches-dropped", PRETRAIN, "default_rng([recipe.seed, 1])",
           "default_rng([0, 1])", "protocol"),
    Mutant("pretraining-decay-dropped", PRETRAIN, ", weight_decay=recipe.weight_decay)", ")", "protocol"),
    Mutant("pretraining-beta-dropped", PRETRAIN, "betas=(0.9, recipe.beta2)", "betas=(0.9, 0.99)",
           "protocol"),
    Mutant("pretraining-windows-swapped", PRETRAIN,
           '("test", recipe.test_windows), ("valid", recipe.test_windows // 4)',
           '("test", recipe.test_windows // 4), ("valid", recipe.test_windows)', "protocol"),
    Mutant("merge-experiment-seed-dropped", "experiments/merge_equivalence.py", "default_rng([seed, n])",
           "default_rng([0, n])", "protocol"),
    Mutant("adam-eps-dropped", "optim.py", "rate / correct1, correct2, self.eps)",
           "rate / correct1, correct2, 1e-8)", "protocol"),
    Mutant("adam-decays-everything", "optim.py", "if self.weight_decay and self.decays(path, p) else",
           "if self.weight_decay else", "protocol"),
    Mutant("schedule-final-dropped", "optim.py",
           "return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))",
           "return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))", "protocol"),
    Mutant("resumed-list-starts-too-early", "training.py", "islice(source, done * accumulate, None)",
           "islice(source, done, None)", "training"),
    Mutant("resumed-with-other-groups", "training.py",
           "[o.rate(path), bool(o.decays(path, p))]", "[1.0, True]", "training"),
    Mutant("sweep-fallback-not-said", SWEEP, 'fallback=harness.is_fallback(texts[target])',
           "fallback=False", "protocol"),
    Mutant("rope-theta-dropped", "model.py", "rope_frequencies(c.E, c.rope_theta)",
           "rope_frequencies(c.E, 10000.0)", "protocol"),
    Mutant("outputs-drawn-too-wide", "model.py", "out = 1 / math.sqrt(2 * c.num_hidden_layers)",
           "out = 1 / math.sqrt(c.num_hidden_layers)", "model"),
    Mutant("fresh-weights-by-their-outputs", "model.py", "normal(rng, shape, 1 / math.sqrt(shape[1]), dtype)",
           "normal(rng, shape, 1 / math.sqrt(shape[0]), dtype)", "model"),
    Mutant("table-factor-drawn-too-narrow", "methods/lora_config.py", 'draw((O, r), "unit"), scale)',
           'draw((O, r), "gaussian"), scale)', "lora"),
    # ---- flags
    Mutant("flag-seed-of-train-dropped", "cli.py", 'add("--seed", "seed of A and of the batches",',
           'add("--seed", "seed of A and of the batches", dest="seeds",', "flags"),
    Mutant("flag-targets-of-train-dropped", "cli.py", '"the linear maps that are adapted", type',
           '"the linear maps that are adapted", dest="target", type', "flags"),
    Mutant("flag-overwrite-of-train-dropped", "cli.py", "recipe, options.out, overwrite=options.overwrite,",
           "recipe, options.out,", "flags"),
    Mutant("flag-targets-of-sweep-dropped", "cli.py", 'dest="modules", type=words', "type=words", "flags"),
    Mutant("flag-base-of-sweep-dropped", "cli.py", "chosen = quick | typed(options, rank_sweep.Plan)",
           'chosen = quick | typed(options, rank_sweep.Plan) | {"base": "base"}', "flags"),
    Mutant("flag-dask-dropped", "cli.py", 'typed(options, rank_sweep.sweep) | {"out": out}',
           'typed(options, rank_sweep.sweep) | {"out": out, "dask": None}', "flags"),
    Mutant("quick-wins-over-what-is-typed", "cli.py", "chosen = quick | typed(options, rank_sweep.Plan)",
           "chosen = typed(options, rank_sweep.Plan) | quick", "flags"),
    Mutant("path-of-a-sweep-may-be-a-name", "cli.py", 'f"./{text}" if', "text if", "flags"),
    Mutant("flag-seed-of-pretrain-dropped", "cli.py", 'add("--seed", "seed of weights and batches",',
           'add("--seed", "seed of weights and batches", dest="seeds",', "flags"),
    Mutant("flag-seed-of-generate-dropped", "cli.py", "np.random.default_rng(options.seed)",
           "np.random.default_rng(0)", "flags"),
    Mutant("flag-top-p-dropped", "cli.py", "typed(options, completion.complete)",
           'typed(options, completion.complete) | {"top_p": 1.0}', "flags"),
    Mutant("flag-against-dropped", "cli.py", "**typed(options, inspect.inspect), progress",
           '**typed(options, inspect.inspect) | {"against": None}, progress', "flags"),
    Mutant("flag-per-module-of-compress-dropped", "cli.py", '"choose the rank of each module separately",',
           '"choose the rank of each module separately", dest="each",', "flags"),
    Mutant("flag-force-of-merge-dropped", "cli.py", '"merge even if the adapter was trained on another base",',
           '"merge even if the adapter was trained on another base", dest="forced",', "flags"),
    Mutant("flag-dora-of-params-dropped", "cli.py", '"count the magnitudes of DoRA too",',
           '"count the magnitudes of DoRA too", dest="magnitudes",', "flags"),
    Mutant("any-model-has-the-alphabet", "completion.py", "if model.config.vocab_size != VOCAB:", "if False:",
           "completion"),
    Mutant("text-longer-than-the-model", "completion.py", "min(max_tokens, max(room, 1))", "max_tokens", "completion"),
    Mutant("one-batch-is-batches", "training.py", "        kind = \"one batch\"\n", "        pass\n", "training"),
    Mutant("a-text-is-batches", "training.py", "isinstance(batches, str | Path)", "isinstance(batches, Path)",
           "training"),
    Mutant("zero-is-not-typed", "flags.py", "if name in values}", "if values.get(name)}",
           "flags"),
    Mutant("default-not-said", "flags.py", "action.nargs == 0 or action.required", "action.nargs == 0 or action.default",
           "flags"),
    Mutant("an-old-word-is-taken", "cli.py", "    add(\"--target\", SUPPRESS,", "    add(\"--former\", SUPPRESS,", "flags"),
    Mutant("nothing-to-do-first", "cli.py", "top.set_defaults(run=first)", "top.set_defaults(run=figures)", "cli"),
    # ---- names and numbers in figures
    Mutant("base-named-at-the-other-level", "experiments/rank_figures.py", 'level(ax, base[0]["test"], "frozen base"',
           'level(ax, f[0, 0], "frozen base"', "plotting"),
    Mutant("rank-named-at-the-other-end", "experiments/rank_figures.py", 'ax.annotate(f"r = {ranks[i]}", (p[i, 0], 100',
           'ax.annotate(f"r = {ranks[-1 - i]}", (p[i, 0], 100', "plotting"),
    Mutant("curve-of-the-first-seed", "experiments/rank_figures.py",
           'return np.array([row["curve"] for row in rows]).mean(0).T',
           'return np.array([row["curve"] for row in rows])[0].T', "plotting"),
    Mutant("spectrum-of-the-first-layer", "experiments/rank_figures.py", "return np.array(values).mean(0) if values",
           "return np.array(values)[0] if values", "plotting"),
    Mutant("ranks-labelled-by-their-place", "experiments/rank_figures.py", "ax.set_xticks(ticks, list(map(str, ticks)))",
           "ax.set_xticks(ticks, [str(i + 1) for i in range(len(ticks))])", "plotting"),
    # ---- refusals
    Mutant("true-is-an-int", "errors.py", "type(value) is not int", "not isinstance(value, int)", "lora"),
    # ---- our own files, forged, and foreign text where it is shown (issue 9, part g)
    Mutant("true-is-a-number", "formats/forms.py", "type(value) in (int, float) and",
           "isinstance(value, int | float) and", "forms"),
    Mutant("nan-is-a-number", "formats/forms.py", "(int, float) and low <= value <= high",
           "(int, float) and not (value < low or value > high)", "forms"),
    Mutant("a-field-may-be-missing", "formats/forms.py",
           '                raise FormatError(f"{name}.{key} is missing")\n',
           "                continue\n", "forms"),
    Mutant("row-of-another-run-counted", HARNESS, 'if row["id"] != id_of(row["config"]):', "if False:",
           "forms"),
    Mutant("curve-of-any-steps", "experiments/rows.py", '!= measured(config["steps"]):', '== [-1]:', "forms"),
    Mutant("matrix-of-any-size-drawn", "experiments/rows.py", "if O * I > SIDES or len(", "if len(", "forms"),
    Mutant("rows-of-two-sweeps-drawn", "experiments/rows.py", "if known.setdefault(what, value) != value:",
           "if known.setdefault(what, value) is None:", "forms"),
    Mutant("two-rows-of-one-run", HARNESS, 'if rows.setdefault(row["id"], row) != row:',
           'if rows.setdefault(row["id"], row) is None:', "forms"),
    Mutant("gap-as-the-file-says", HARNESS, "            row.pop(name, None)\n", "            pass\n", "forms"),
    Mutant("gap-may-be-infinite", SWEEP, "share if math.isfinite(share) else None", "share", "forms"),
    Mutant("rank-below-the-elbow-not-drawn", "experiments/rank_figures.py", "curve(right, truth[:k],",
           "right.plot(range(1, len(mean) + 1)[:k], truth[:k],", "forms"),
    Mutant("moments-may-be-missing", "formats/checkpoint.py", "sorted(expected.keys() | held.keys())", "sorted(held)",
           "forms"),
    Mutant("nan-in-a-checkpoint", "formats/checkpoint.py", "not np.isfinite(tensors[k]).all() or (k[0]", "(k[0]", "forms"),
    Mutant("negative-square-in-a-checkpoint", "formats/checkpoint.py", '(k[0] == "v" and (tensors[k] < 0).any())', "False",
           "forms"),
    Mutant("checkpoint-beyond-the-run", "formats/checkpoint.py", "if done > steps:", "if False:", "forms"),
    Mutant("generators-set-before-all-is-checked", "formats/checkpoint.py",
           '    META(f"{path}: meta", meta)\n', '    META(f"{path}: meta", meta)\n'
           '    for name, rng in rngs.items():\n'
           '        rng.bit_generator.state = meta["rngs"].get(name, rng.bit_generator.state)\n', "forms"),
    Mutant("direction-marks-pass", "table.py", "c if c.isprintable() or c in keep else",
           'c if c >= " " or c in keep else', "table"),
    Mutant("dollar-is-a-formula", "table.py", '    text = text.replace("$", r"\\$")\n', "", "table"),
    Mutant("label-left-out-of-the-legend", "table.py", 'return f" {text}" if text.startswith("_") else text',
           "return text", "table"),
    Mutant("line-of-a-report-as-it-is", "table.py", "else [plain(part)]", "else [part]",
           "table"),
    Mutant("cell-as-it-is", "table.py", "[[plain(cell) for cell in line]", "[[cell for cell in line]",
           "table"),
    Mutant("pipe-in-a-cell-ends-it", "table.py", '.replace("|", "\\\\|")', "", "table"),
    Mutant("line-in-a-notebook-as-it-is", "table.py", "markup(line) for line in group", "line for line in group",
           "table"),
    Mutant("markup-as-it-is", "table.py", "escape(plain(text), quote=True)",
           "escape(text, quote=True)", "table"),
    Mutant("error-as-it-is", "errors.py", "return plain(super().__str__())", "return super().__str__()",
           "table"),
    Mutant("text-of-a-drawing-changed-on-its-page", "analysis/report.py", 're.sub(r"<[^>]*>", lambda',
           're.sub(r"(?s).+", lambda', "table"),
    Mutant("what-a-model-writes-as-it-is", "cli.py", 'print(plain(piece, keep="\\n"), end',
           "print(piece, end", "table"),
    Mutant("text-called-permuted", "experiments/rank_figures.py", "if swaps := swaps_of(target):",
           'if swaps := swaps_of(target) or target.count("permuted"):', "table"),
    # ---- reading is generous and tells, loading is strict: the adapters that people have
    Mutant("who-loads-is-generous-too", "peft/loading.py", "    check_agreement(given)\n    check_name", "    check_name", "reading"),
    Mutant("who-looks-is-not-told", "analysis/inspect.py", "notes = [*given.all_notes,", "notes = [*given.notes,",
           "reading stand_ins"),
    Mutant("what-acts-beside-is-loaded", "peft/folder.py", "    if settings.beside:\n", "    if not settings:\n",
           "reading"),
    Mutant("replicated-layers-beside-the-base", "analysis/inspect.py", 'field.startswith("layer_replication")]',
           'field.startswith("layers")]', "reading"),
    Mutant("wrappers-stay-in-the-keys", "peft/folder.py", 'plain = WRAPPERS.sub("", key)', "plain = key",
           "reading"),
    Mutant("a-module-called-module-is-lost", "peft/folder.py", r'(base_model\.model\.)+")  # module: DDP',
           r'(base_model\.model\.)+((module|model)\.)*")  # module: DDP', "reading"),
    Mutant("two-keys-are-one-tensor", "peft/folder.py", "        if name in keys:\n", "        if not name:\n",
           "reading"),
    Mutant("two-adapters-are-one", "peft/folder.py", "if len(names) > 1:", "if len(names) > 2:", "reading"),
    Mutant("factors-without-numbers", "peft/folder.py", "if 0 in (*rows, *columns):", "if rows == 0:",
           "reading"),
    Mutant("one-of-two-tied-tables", "peft/loading.py", "if len(tables) < 2 or not np.array_equal(a, b):",
           "if not np.array_equal(a, b):", "reading"),
    Mutant("r-times-r-of-a-large-r", "peft/folder.py", "if len(a) > min(len(b), a.shape[1]):",
           "if len(a) > 1 << 30:", "reading"),
    Mutant("squares-of-small-values-are-lost", "spectra.py", "return s / s.max() if s.any() else s",
           "return s", "reading"),
    Mutant("norm-of-small-values-is-lost", "spectra.py", "return math.hypot(*s.tolist())",
           "return float((s * s).sum() ** 0.5)", "reading"),
    Mutant("a-pattern-is-left-in-the-config", "compose/truncate.py",
           "if isinstance(settings.target_modules, str) or list(about", "if list(about", "reading"),
    Mutant("a-module-is-promised-that-is-not-there", "compose/truncate.py",
           "if there != list(entries) or more:", "if more:", "reading"),
    Mutant("an-unlisted-head-is-left-unlisted", "compose/truncate.py", "[*there, *sorted(more)]", "[*there]",
           "reading"),
    Mutant("magnitudes-and-the-flag-differ", "compose/truncate.py", "config[kind.flag] = kind.flag not in settings.flags", "config[kind.flag] = kind.flag in settings.flags", "reading"),
    Mutant("bias-of-b-keeps-the-old-scale", "compose/truncate.py", "tensors[bias] * pair.scale", "tensors[bias] * 1",
           "reading"),
    Mutant("convolution-written-flat", "compose/truncate.py", "Ak.reshape(k, *inner[1:])", "Ak", "reading"),
    Mutant("targets-of-what-is-left-aside", "compose/truncate.py", "about_targets(replace(given, replaced=kept))",
           "about_targets(given)", "reading"),
    Mutant("fingerprint-lost-in-compression", "compose/truncate.py", 'tensors, given.made.get("base"), overwrite',
           "tensors, None, overwrite", "reading"),
    Mutant("budget-spent-on-the-strongest-not-the-best", "compose/truncate.py", "worth = [(S[i] ** 2 / costs[m], m)",
           "worth = [(S[i] ** 2, m)", "reading"),
    Mutant("pointer-of-lfs-unseen", "formats/safetensors.py", "start.startswith(POINTER):", "start == POINTER:",
           "recognise"),
    Mutant("a-model-taken-for-nothing", "peft/recognise.py", r'(r"config\.json", r"(pyt', r'(r"config", r"(pyt', "recognise"),
    Mutant("checkpoints-in-order-of-letters", "peft/recognise.py", "int(match[2][:18] or 0)", "0", "recognise"),
    Mutant("the-file-is-not-its-folder", "peft/recognise.py", "if path.name in (CONFIG, WEIGHTS) and",
           "if path.name in (CONFIG,) and", "recognise"),
    # ---- the fuzzers of bases: folders and GGUF files
    Mutant("gguf-rows-are-no-pairs", "formats/gguf.py", "if heads and len(W) % (2 * heads):",
           "if heads and len(W) % heads:", "gguf"),
    Mutant("missing-factors-of-the-first-module", "peft/loading.py",
           "for m in meant(given.settings, modules, linears) if m not",
           "for m in meant(given.settings, modules, linears)[1:] if m not", "reading"),
    Mutant("gguf-any-alignment", "formats/gguf.py", " or align.bit_count() > 1", "", "gguf"),
    Mutant("merging-warns-of-overflow", "compose/export.py",
           "@quiet_overflow()  # of logits, which the report tells; what is written is looked at\n", "",
           "export"),
    # ---- the fast path, and what the contracts promise
    Mutant("each-replica-forms-its-own", "fast/folded.py", "weight = same[0].adapter.merged(same[0].base).weight\n            for place in same:\n", "for place in same:\n                weight = place.adapter.merged(place.base).weight\n", "folded parallel"),
    Mutant("evaluate-folds-the-model-itself", "training.py", "copy = replica(model)", "copy = model", "folded protocol"),
    Mutant("evaluate-never-folds", "training.py", "with folded([adapters], M):", "with folded([adapters], 0):", "folded"),
    Mutant("recomputed-block-stays-broken", "fast/recompute.py", "            last.again = False\n", "", "recompute"),
    Mutant("replicas-draw-masks-of-their-own", "tree.py", "    shared |= {id(node.rng): node.rng for _, node in walk(tree) if isinstance(node, Dropout)}\n", "", "recompute training"),
    Mutant("recompute-is-forgotten", "training.py", "on_threads(model, threads, recompute)", "on_threads(model, threads)", "recompute"),
    Mutant("a-name-of-peft-is-a-type-error", "methods/lora_config.py", "            if name in PEFT:", "            if False:", "lora"),
    Mutant("another-default-of-alpha", "methods/lora_config.py", "alpha: float = 16", "alpha: float = 8", "finetune"),
    Mutant("loaded-dora-is-not-pefts", "peft/kinds.py", "detach=True)", "detach=False)", "folder"),
    Mutant("what-is-no-config-is-injected", "lora.py",
           "if isinstance(config, type) or not isinstance(config, AdapterConfig):", "if config is None:", "lora"),
    Mutant("finished-runs-are-submitted-again", "experiments/harness.py", "del left[futures[future]]", "pass", "harness"),
    Mutant("a-base-is-a-text", "cli.py", 'if key == "data" and corpora.built_in(n)', "if corpora.built_in(n)", "names"),
    Mutant("layers-of-no-targets", "targets.py", "if numbers is not None and paths:", "if numbers is not None:", "lora"),
    Mutant("a-final-too-long-to-print", "optim.py", "short(self.final)", "self.final!r", "optim"),
    Mutant("an-unknown-type-has-no-dimensions", "formats/gguf.py", "        if not block:\n", "        if False:\n", "gguf"),
    Mutant("a-holder-without-a-host", "formats/atomic.py", " on {platform.node()}", "", "atomic"),
    Mutant("a-class-is-a-config", "lora.py", "if isinstance(config, type) or not", "if not", "lora"),
    Mutant("recomputed-unasked", "training.py", "recompute: bool = False", "recompute: bool = True", "recompute"),
    # ---- mixed batches and packed training
    Mutant("mixed-without-the-scale", "fast/mixed.py", "(s.astype(h.dtype, copy=False) * h) @ B", "h @ B", "mixed"),
    Mutant("mixed-scattered-rows-are-not-written", "fast/mixed.py", "        y[at] = part\n", "        pass\n", "mixed"),
    Mutant("mixed-segment-without-the-scale", "fast/mixed.py", "h = float(adapter.scale) * (flat(", "h = 1.0 * (flat(", "mixed"),
    Mutant("mixed-neighbours-that-are-none", "fast/mixed.py", "if list(numbers) == list(range(first, first + len(numbers))):", "if numbers[-1] - first + 1 == len(numbers):", "mixed"),
    Mutant("mixed-rows-unsorted-in-a-stack", "fast/mixed.py", "self.rows = index([order[k] for k in range(n)])", "self.rows = index([number for number, _ in rows])", "mixed"),
    Mutant("mixed-slot-keeps-another-adapter", "fast/mixed.py", "                self.copy(k, member.adapters)\n", "                self.copy(k, member.adapters) if k else None\n", "mixed"),
    Mutant("mixed-half-a-stack-is-taken-for-one", "fast/mixed.py", "        room, arrays = 1 << (n - 1).bit_length(), {}\n", "        room, arrays = 1 << (n - 1).bit_length(), self.arrays\n        self.slots = [None] * room\n", "mixed"),
    Mutant("mixed-copies-every-row-again", "fast/mixed.py", "if have := free.get(member):", "if have := free.get(None) and []:", "mixed"),
    Mutant("mixed-stacks-what-is-trained", "fast/mixed.py", "if member.trained or member in several or len(numbers) > FEW:", "if member in several or len(numbers) > FEW:", "mixed"),
    Mutant("mixed-stacks-a-prompt", "fast/mixed.py", "if member.trained or member in several or len(numbers) > FEW:", "if member.trained or member in several:", "mixed"),
    Mutant("mixed-rank-is-no-layout", "fast/mixed.py", "layout.append((path, len(A), A.dtype, B.dtype))", "layout.append((path, 0, A.dtype, B.dtype))", "mixed"),
    Mutant("mixed-invariance-of-the-base-alone", "fast/mixed.py", "(same, xp.ascontiguousarray) if layer.batch.invariant", "(rows, xp.ascontiguousarray) if layer.batch.invariant", "mixed"),
    Mutant("mixed-invariance-of-the-adapters-alone", "fast/mixed.py", "RowByRow(base.weight, base.bias) if invariant and isinstance(base, Linear) else base", "base", "mixed"),
    Mutant("mixed-invariance-without-bias", "fast/mixed.py", "RowByRow(base.weight, base.bias)", "RowByRow(base.weight, None)", "mixed"),
    Mutant("mixed-slot-laid-out-otherwise", "fast/mixed.py", "(same, xp.ascontiguousarray) if layer.batch.invariant", "(same, same) if layer.batch.invariant", "mixed"),
    Mutant("mixed-tree-does-not-see-what-is-trained", "fast/mixed.py", "layer.trained = [some[path] for some in trained if path in some]", "pass", "mixed"),
    Mutant("mixed-trained-is-what-it-was", "fast/mixed.py", " and any(map(is_trained, self.params)) is self.trained", "", "mixed"),
    Mutant("mixed-dx-without-the-adapter", "fast/mixed.py", "add_at(dx, at, back_drop(", "add_at(dx, at, 0 * back_drop(", "mixed"),
    Mutant("mixed-dx-through-the-mask-no-more", "fast/mixed.py", "back_drop((dh @ adapter.A.data).reshape(-1, *dx.shape[1:]))", "(dh @ adapter.A.data).reshape(-1, *dx.shape[1:])", "mixed"),
    Mutant("mixed-frozen-adapter-learns", "fast/mixed.py", "            if trains(adapter):\n", "            if adapter:\n", "mixed"),
    Mutant("mixed-loop-lets-a-frozen-adapter-learn", "fast/mixed.py", "            if not trains(adapter):\n", "            if not adapter:\n", "mixed"),
    Mutant("mixed-gathers-a-prompt", "fast/mixed.py", "(gathered if x.shape[1] == 1 else segments)", "(gathered)", "mixed"),
    Mutant("mixed-base-rows-change-with-the-batch", "fast/mixed.py", "    freeze(copy)\n    table", "    table", "mixed"),
    Mutant("mixed-any-number-of-rows", "fast/mixed.py", "        if self.N != N:\n", "        if self.N < N:\n", "mixed"),
    Mutant("mixed-rows-for-ever", "fast/mixed.py", "        finally:\n            self.N = None\n", "        finally:\n            pass\n", "mixed"),
    Mutant("mixed-factors-of-any-width", "fast/mixed.py", "(O, len(A), len(A), I):", "(O, len(A), len(A), A.shape[1]):", "mixed"),
    Mutant("mixed-though-merged", "fast/mixed.py", "    refuse_merged(model)\n    layers = {", "    layers = {", "mixed"),
    Mutant("mixed-half-a-copy-is-taken-for-one", "fast/mixed.py", "                self.slots[k] = None  # until all is copied\n", "", "mixed"),
    Mutant("mixed-half-arranged-is-taken-for-done", "fast/mixed.py", "            self.order = None\n            self.arrange", "            self.arrange", "mixed"),
    Mutant("mixed-changed-mapping-is-not-checked", "fast/mixed.py", "list(self.adapters.items()) == self.items and ", "", "mixed"),
    Mutant("mixed-trains-after-the-rows", "fast/mixed.py", "            for layer in self.layers.values():\n                layer.trained = []\n", "", "mixed"),
    Mutant("mixed-width-of-B-is-that-of-A", "fast/mixed.py", "A.dtype, B.dtype))", "A.dtype, A.dtype))", "mixed"),
    Mutant("mixed-scale-of-the-factors-width", "fast/mixed.py", "[*dtypes, float]", "[*dtypes, dtypes[0]]", "mixed"),
    Mutant("mixed-scale-widens-a-stack", "fast/mixed.py", "s.astype(h.dtype, copy=False) * h", "s * h", "mixed"),
    Mutant("mixed-scale-widens-a-segment", "fast/mixed.py", "h = float(adapter.scale) * (flat(", "h = adapter.scale * (flat(", "mixed"),
    Mutant("mixed-A-laid-out-otherwise", "fast/mixed.py", "layout(adapter.A.data).T", "adapter.A.data.T", "mixed"),
    Mutant("mixed-stacks-the-tokens-of-a-text", "fast/mixed.py", "if member.trained or member in several or len(numbers) > FEW:", "if member.trained or len(numbers) > FEW:", "mixed"),
    Mutant("mixed-lengths-are-no-part-of-the-order", "fast/mixed.py", "(order := (rows, {member for member, count in texts if count > 1})) != self.order", "(order := (rows, {member for member, count in texts if count > 1}))[0] != (self.order or [0])[0]", "mixed"),
    Mutant("mixed-stack-never-shrinks", "fast/mixed.py", "if not n <= len(self.slots) < 4 * n:", "if n > len(self.slots):", "mixed"),
    Mutant("mixed-keeps-who-left-alive", "fast/mixed.py", "        self.slots[n:] = [None] * (len(self.slots) - n)\n", "", "mixed"),
    Mutant("mixed-walks-the-tree-for-each-row", "fast/mixed.py", "names = dict.fromkeys(a for a in adapters if isinstance(a, str))", "names = [a for a in adapters if isinstance(a, str)]", "mixed"),
    Mutant("mixed-name-is-what-it-was", "fast/mixed.py", "found = {name: named(self.model, name) for name in names}", "self.found = found = {name: named(self.model, name) for name in names} | vars(self).get(\"found\", {})", "mixed"),
    Mutant("packed-rows-of-the-first-run", "fast/packed.py", "at = slice(start, start := start + len(own))", "at = slice(0, len(own))", "packed"),
    Mutant("packed-losses-weigh-the-rows", "fast/packed.py", "dlogits[at] = back_loss()", "dlogits[at] = back_loss(len(own) / len(ids))", "packed"),
    Mutant("packed-one-rate-for-all", "fast/packed.py", "rates[name], math", "next(iter(rates.values())), math", "packed"),
    Mutant("packed-schedule-one-step-ahead", "fast/packed.py", "run.schedule(step) if", "run.schedule(step + 1) if", "packed"),
    Mutant("packed-clips-by-the-norm-of-all", "fast/packed.py", "math.sqrt(found[name][1])", "math.sqrt(sum(square for _, square in found.values()))", "packed"),
    Mutant("packed-trains-the-last-alone", "fast/packed.py", "            p.trainable = True\n", "            pass\n", "packed"),
    Mutant("packed-leaves-all-trained", "fast/packed.py", "            p.trainable = trainable\n", "            pass\n", "packed"),
    Mutant("packed-leaves-another-active", "fast/packed.py", "            layer.active = active\n", "            pass\n", "packed"),
    Mutant("packed-never-invariant", "fast/packed.py", "compute=segments, invariant=invariant", "compute=segments", "packed"),
    Mutant("packed-steps-before-all-are-checked", "fast/packed.py", "if not math.isfinite(loss + square):", "if not math.isfinite(loss + square) and name == next(iter(runs)):", "packed"),
    Mutant("packed-shares-an-optimizer", "fast/packed.py", "[[run.optimizer] for run in runs.values()]", "[[name] for name in runs]", "packed"),
    Mutant("packed-transfers-each-loss", "fast/packed.py", "values = floats(*losses, *squares)", "values = [floats(v)[0] for v in (*losses, *squares)]", "packed"),
    Mutant("packed-shares-a-generator", "fast/packed.py", "map(generators, entries.values())", "[]", "packed"),
    Mutant("packed-shares-the-bits-of-a-generator", "fast/packed.py", "node.rng.bit_generator", "node.rng", "packed"),
    Mutant("packed-steps-before-all-rates", "fast/packed.py", "                rates = {\n                    name: run.optimizer.lr * (run.schedule(step) if run.schedule else 1.0)\n                    for name, run in runs.items()\n                }\n                for name, run in runs.items():\n                    run.optimizer.step(params[name], rates[name], ", "                for name, run in runs.items():\n                    run.optimizer.step(params[name], run.optimizer.lr * (run.schedule(step) if run.schedule else 1.0), ", "packed"),
    # ---- serving
    Mutant("bank-evicts-the-most-recently-used", "serve/bank.py", "for name, one in self.loaded.items():\n            if more <= 0:", "for name, one in reversed(self.loaded.items()):\n            if more <= 0:", "bank"),
    Mutant("bank-evicts-what-is-in-use", "serve/bank.py", "if not one.users and name not in keep:", "if name not in keep:", "bank"),
    Mutant("bank-evicts-what-waits", "serve/bank.py", "if not one.users and name not in keep:", "if not one.users:", "bank"),
    Mutant("bank-one-byte-too-many", "serve/bank.py", "self.counters.bytes + size - self.budget", "self.counters.bytes + size - self.budget - 1", "bank"),
    Mutant("bank-forgets-to-count-what-left", "serve/bank.py", "self.counters.bytes -= self.loaded.pop(other).bytes", "self.loaded.pop(other)", "bank"),
    Mutant("bank-use-is-no-news", "serve/bank.py", "        self.loaded.move_to_end(name)\n", "", "bank"),
    Mutant("bank-follows-a-linked-folder", "serve/bank.py", "where.is_dir() and not where.is_symlink()", "where.is_dir()", "bank"),
    Mutant("bank-follows-a-link-that-came-later", "serve/bank.py", "        if given.where != where:\n", "        if False:\n", "bank"),
    Mutant("bank-name-with-a-separator", "serve/bank.py", "[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", "[A-Za-z0-9_][A-Za-z0-9._/-]{0,99}", "bank"),
    Mutant("bank-name-that-ends-with-a-newline", "serve/bank.py", "not NAME.fullmatch(name):", "not NAME.match(name):", "bank"),
    Mutant("bank-any-base", "serve/bank.py", "        check_base(given, lambda: self.fingerprint)\n", "", "bank"),
    Mutant("bank-config-and-file-may-disagree", "serve/bank.py", "        check_agreement(given)\n", "", "bank"),
    Mutant("bank-serves-dora-as-lora", "serve/bank.py", "not pair.embedding and not pair.vectors and", "not pair.embedding and", "bank"),
    Mutant("bank-drops-what-is-replaced", "serve/bank.py", "        if given.replaced:\n", "        if not given:\n", "bank"),
    Mutant("bank-trains-what-it-serves", "serve/bank.py", "            freeze(layers)\n", "", "bank"),
    Mutant("bank-reads-again-what-has-no-room", "serve/bank.py", "                self.full = {name: size}\n", "", "bank"),
    Mutant("slots-see-the-token-after", "serve/slots.py", "lengths[slots] = [span.start + 1 for span in spans]", "lengths[slots] = [span.start + 2 for span in spans]", "slots"),
    Mutant("slots-see-one-token-less", "serve/slots.py", "lengths[slots] = [span.start + 1 for span in spans]", "lengths[slots] = [max(span.start, 1) for span in spans]", "slots"),
    Mutant("slots-without-a-mask", "serve/slots.py", "np.where(np.arange(S) < lengths[:, None], 0, -math.inf)", "np.where(np.arange(S) < S, 0, -math.inf)", "slots"),
    Mutant("slots-in-order-though-they-are-not", "serve/slots.py", "dense, where = np.array_equal(slots, np.arange(n)), to_device(slots)", "dense, where = len(slots) == n, to_device(slots)", "slots"),
    Mutant("slots-span-begins-at-zero", "serve/slots.py", "np.arange(s.start, s.start + s.length)", "np.arange(s.length)", "slots"),
    Mutant("slots-span-sees-only-itself", "serve/slots.py", "causal(span.slot, span.start + span.length)", "causal(span.slot, span.length)", "slots"),
    Mutant("slots-rows-of-singles-taken-for-neighbours", "serve/slots.py", "if at[-1] - at[0] + 1 == len(at) else", "if at else", "slots"),
    Mutant("slots-clear-the-keys-alone", "serve/slots.py", "self.k[:, slot, :, :filled] = self.v[:, slot, :, :filled] = 0", "self.k[:, slot, :, :filled] = 0", "slots"),
    Mutant("slots-attend-together-where-each-should-alone", "serve/slots.py", "        if alone:\n", "        if not spans:\n", "slots"),
    Mutant("attend-one-forgets-its-mask", "ops.py", "        scores += mask\n", "        pass\n", "slots"),
    Mutant("rope-of-rows-at-the-first-position", "serve/slots.py", "(table[at[1]][:, None] for table", "(table[at[1] * 0][:, None] for table", "slots"),
    Mutant("engine-adapter-keeps-its-turn", "serve/engine.py", "                self.waiting.move_to_end(name)\n", "                pass\n", "engine"),
    Mutant("engine-a-cancelled-request-passes-the-turn", "serve/engine.py", "            if not line:\n                del self.waiting[stream.request.adapter]\n", "            self.waiting.move_to_end(stream.request.adapter)\n            if not line:\n                del self.waiting[stream.request.adapter]\n", "engine"),
    Mutant("engine-queue-of-one-more", "serve/engine.py", "(n := self.queued()) >= self.queue", "(n := self.queued()) > self.queue", "engine"),
    Mutant("engine-keeps-the-adapter-of-a-finished-text", "serve/engine.py", "            self.bank.give(row.stream.request.adapter)\n", "            pass\n", "engine"),
    Mutant("engine-slot-keeps-its-text", "serve/engine.py", "        self.cache.clear(slot)\n", "", "engine"),
    Mutant("engine-loses-a-slot", "serve/engine.py", "        heapq.heappush(self.free, slot)\n", "        if reason != \"cancelled\":\n            heapq.heappush(self.free, slot)\n", "engine"),
    Mutant("engine-a-stop-token-is-text", "serve/engine.py", "        if token in request.stops:\n", "        if token in request.stops and row.stream.tokens:\n", "engine"),
    Mutant("engine-one-token-too-many", "serve/engine.py", "if len(row.stream.tokens) + 1 < request.max_new_tokens:", "if len(row.stream.tokens) < request.max_new_tokens:", "engine"),
    Mutant("engine-one-generator-for-all", "serve/engine.py", "np.random.default_rng(stream.request.seed)", "np.random.default_rng(0)", "engine"),
    Mutant("engine-prompts-without-a-limit", "serve/engine.py", "(count := min(len(row.pending), left))", "(count := len(row.pending))", "engine"),
    Mutant("engine-prompts-by-slot", "serve/engine.py", "for slot, row in self.running.items():  # in the order of their coming", "for slot, row in sorted(self.running.items()):", "engine"),
    Mutant("engine-reads-many-adapters-in-a-step", "serve/engine.py", "if full or (missing and read):", "if full:", "engine"),
    Mutant("engine-reads-nothing-ahead", "serve/engine.py", "        if not read:\n            self.read_ahead()\n", "", "engine"),
    Mutant("engine-an-overflow-is-a-token", "serve/engine.py", "    if not np.isfinite(logits).all():\n", "    if not np.isfinite(logits).all() and row.seen == 0:\n", "engine"),
    Mutant("engine-an-error-ends-all", "serve/engine.py", "                except Exception as e:  # a folder that is gone", "                except ZeroDivisionError as e:  # a folder that is gone", "engine"),
    Mutant("engine-a-listener-ends-the-engine", "serve/engine.py", "            except Exception:  # whoever listened", "            except ZeroDivisionError:  # whoever listened", "engine"),
    Mutant("engine-stops-without-finishing", "serve/engine.py", "                if not self.busy():\n                    return\n", "                if self.stopping:\n                    return\n", "engine"),
    Mutant("engine-drops-those-that-run-alone", "serve/engine.py", "                cancelled.update(*self.waiting.values())\n", "", "engine"),
    Mutant("engine-token-of-the-first-of-a-prompt", "serve/engine.py", "np.cumsum(lengths) - 1", "np.cumsum(lengths) - lengths", "engine"),
    Mutant("engine-not-invariant", "serve/engine.py", "self.cache.step([span for span, _ in parts], self.invariant, ", "self.cache.step([span for span, _ in parts], False, ", "engine"),
    Mutant("engine-takes-the-prompt-as-it-will-be", "serve/engine.py", "stream = Stream(request, self.check(request), self, told)", "self.check(request)\n        stream = Stream(request, request.prompt, self, told)", "engine"),
    Mutant("engine-unknown-adapters-wait", "serve/engine.py", "            self.bank.check(request.adapter)\n", "            pass\n", "engine"),
    Mutant("engine-any-stops", "serve/engine.py", "type(request.stops) is not frozenset or any(type(token) is not int for token in request.stops)", "not isinstance(request.stops, frozenset | set | None)", "engine"),
    Mutant("engine-cancels-streams-of-others", "serve/engine.py", "not isinstance(stream, Stream) or stream.engine is not self", "not isinstance(stream, Stream)", "engine"),
    Mutant("engine-notes-cancelled-ones-that-have-ended", "serve/engine.py", "            if stream.finish_reason is None:\n                self.cancelled.add(stream)\n", "            self.cancelled.add(stream)\n", "engine"),
    Mutant("engine-a-second-stop-overrules-the-first", "serve/engine.py", "self.dropping |= not finish", "self.dropping = not finish", "engine"),
    Mutant("engine-finishes-all-on-an-error", "serve/engine.py", "self.stop(finish=kind is None)", "self.stop()", "engine"),
    Mutant("engine-fails-and-nobody-is-told", "serve/engine.py", "            self.fail(e)\n            raise\n", "            raise\n", "engine"),
    Mutant("engine-fails-and-takes-requests", "serve/engine.py", "self.stopping, self.failure = True, cause", "self.failure = None", "engine"),
    Mutant("engine-fails-and-forgets-those-that-wait", "serve/engine.py", "            streams = [stream for line in self.waiting.values() for stream in line]\n", "            streams = []\n", "engine"),
    Mutant("engine-one-listener-ends-the-telling", "serve/engine.py", "with contextlib.suppress(BaseException):", "with contextlib.suppress(ValueError):", "engine"),
    Mutant("engine-forgets-a-text-that-is-ending", "serve/engine.py", "        row = self.running[slot]\n        self.cache.clear(slot)\n", "        row = self.running.pop(slot)\n        self.cache.clear(slot)\n        self.running[slot] = row\n", "engine"),
    Mutant("engine-a-failed-draw-ends-all", "serve/engine.py", "            except Exception as e:  # its numbers are its own\n", "            except NonFiniteError as e:  # its numbers are its own\n", "engine"),
    Mutant("engine-nobody-computes-and-nobody-says-so", "serve/engine.py", "                    if self.engine.thread is None:\n", "                    if self.engine.thread is None and self.engine.stopping:\n", "engine"),
    Mutant("engine-wakes-a-client-before-its-slot-is-free", "serve/engine.py", "        row = self.running[slot]\n        self.cache.clear(slot)\n        if self.bank and row.stream.request.adapter is not None:\n            self.bank.give(row.stream.request.adapter)\n        del self.running[slot]\n        heapq.heappush(self.free, slot)\n        self.close(row.stream, reason, error, token)\n", "        row = self.running[slot]\n        self.close(row.stream, reason, error, token)\n        self.cache.clear(slot)\n        if self.bank and row.stream.request.adapter is not None:\n            self.bank.give(row.stream.request.adapter)\n        del self.running[slot]\n        heapq.heappush(self.free, slot)\n", "engine"),
    Mutant("engine-a-damaged-adapter-keeps-its-turn", "serve/engine.py", "                    self.refuse(stream, \"error\", e)\n                    self.pass_turn(name)\n                    continue\n", "                    self.refuse(stream, \"error\", e)\n                    passed += 1\n                    continue\n", "engine"),
    Mutant("engine-no-room-for-one-holds-up-all", "serve/engine.py", "                    full = True\n                    passed += 1\n                    continue\n", "                    return\n", "engine"),
    Mutant("engine-who-passes-takes-the-memory", "serve/engine.py", "                    full = True\n", "                    pass\n", "engine"),
    Mutant("engine-who-passes-takes-the-slot", "serve/engine.py", "while len(self.free) > passed and (line", "while self.free and (line", "engine"),
    Mutant("engine-the-head-sees-every-token", "serve/engine.py", "None if whole else last)", "None)\n        whole = True", "engine"),
    Mutant("engine-a-head-with-an-adapter-sees-the-last-alone", "serve/engine.py", "whole = any(some and \"lm_head\" in some for some in layers)", "whole = False", "engine"),
    Mutant("engine-counts-prompts-twice", "serve/engine.py", "            if row.seen < len(row.stream.prompt):\n", "            if row.seen <= len(row.stream.prompt):\n", "engine"),
    Mutant("slots-clear-one-position-too-few", "serve/slots.py", "        filled = self.filled[slot]\n", "        filled = self.filled[slot] - 1\n", "slots"),
    Mutant("slots-filled-by-the-last-span-alone", "serve/slots.py", "max(self.filled[span.slot], span.start + span.length)", "span.length", "slots"),
    Mutant("slots-logits-for-all", "serve/slots.py", "return x if self.rows is None else x[self.rows]", "return x", "slots"),
    Mutant("bank-looks-at-every-name", "serve/bank.py", "nearest(name, filter(self.has, there[max(at - NEIGHBOURS, 0) : at + NEIGHBOURS]))", "nearest(name, filter(self.has, there))", "bank"),
    Mutant("bench-counts-what-was-read-before", "serve/bench.py", "        play(self.engine, [0.0] * len(requests), requests)\n        self.before = self.counters()\n", "        play(self.engine, [0.0] * len(requests), requests)\n", "bench"),
    Mutant("bench-an-error-is-a-short-text", "serve/bench.py", "        if stream.error:\n            raise stream.error\n", "        pass\n", "bench"),
    Mutant("bench-each-trial-has-other-texts", "serve/bench.py", "trial.burst(popular(rng, same, trial.adapters, zipf))", "trial.burst(workload(rng, requests, trial.adapters, zipf, V))", "bench"),
    Mutant("bench-the-base-always-first", "serve/bench.py", "else trials[::-1]", "else trials", "bench"),
    Mutant("a-failed-engine-is-an-internal-error", "serve/service.py", "        if isinstance(e, StateError):  # the engine's", "        if False:  # the engine's", "http"),
    Mutant("sampling-overflows-near-zero", "decoding.py", "    with quiet_overflow():  # to -inf, at a temperature near 0\n", "    if True:\n", "engine"),
    Mutant("bench-every-adapter-is-as-popular", "serve/bench.py", "** -float(zipf)", "** -0.0", "bench"),
    Mutant("bench-the-unpopular-stay", "serve/bench.py", "in reversed(names(min(count, budget // size))):", "in names(min(count, budget // size)):", "bench"),
    Mutant("bench-waiting-begins-at-the-start", "serve/bench.py", "1000 * (stream.times[1] - start - at)", "1000 * (stream.times[-1] - start - at + 1e-9)", "bench"),
    Mutant("bench-all-arrive-at-once", "serve/bench.py", "while (wait := start + at - engine.clock()) > 0:", "while (wait := start - engine.clock()) > 0:", "bench"),
    Mutant("bench-prompts-one-token-short", "serve/bench.py", "rng.integers(PROMPT[0], PROMPT[1] + 1)", "rng.integers(PROMPT[0], PROMPT[1])", "bench"),
)
# fmt: on


def apply(mutant: Mutant, root: Path) -> tuple[Path, str, str]:
    """The file, its text and its mutated text; ValueError unless `old` stands in it exactly once."""
    path = root / "minilora" / mutant.file
    text = path.read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"its old text stands {count} times in {mutant.file}")
    return path, text, text.replace(mutant.old, mutant.new)


def witnesses() -> dict[str, str]:
    """Mutant -> the test that saw it last."""
    return dict(json.loads(WITNESSES.read_text())) if WITNESSES.exists() else {}


def witness(red: str) -> str:
    """The name of a test in a failure such as "test_ops.py::test_name[3]"."""
    file, _, test = red.partition(".py::")
    return f"{Path(file).name.removeprefix('test_')}::{test.partition('[')[0]}"


def be_pytest(copy: Path, arguments: list[str], said: Path) -> None:
    """Run pytest in a copy of package and tests; what it prints goes to a file."""
    import pytest

    with open(said, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if "minilora" in sys.modules:  # a program that is run has imported it; the copy would not be asked
        sys.exit("minilora is imported already, and not from the copy")
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}  # for processes of the tests
    sys.dont_write_bytecode = True  # or one mutant's would be taken for the next one's
    sys.exit(pytest.main(arguments))


def run_tests(copy: Path, tests: str) -> tuple[bool, str]:
    """Whether a test fails, and which; else what kept pytest from ending green, if anything did.

    The tests are those of files, or single ones: "ops lora" or "ops::test_name".
    """
    names = [name.partition("::") for name in tests.split()]
    if missing := [file for file, _, _ in names if file not in FILES]:
        return False, f"there is no test_{missing[0]}.py"
    files = [f"{FILES[file]}{colons}{test}" for file, colons, test in names]
    arguments = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=no", "-k", f"not ({UNFIT})"]
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is imported already
    said = copy / "said"  # what is in the base folder of temporary files belongs to this copy alone
    run = FORKS.Process(
        target=be_pytest, args=(copy, [*arguments, f"--basetemp={copy / 'temp'}", *files], said)
    )
    run.start()
    run.join(LIMIT)
    if run.exitcode is None:
        run.kill()
        run.join()
        return False, f"no end within {LIMIT} s"
    printed = said.read_text(encoding="utf-8", errors="replace")
    red = re.search(r"^(?:FAILED|ERROR) tests/(\S+::.+?)(?: - |$)", printed, re.M)
    last = (printed.strip().splitlines() or ["nothing"])[-1]
    return (True, red[1]) if run.exitcode == 1 and red else (False, last if run.exitcode else "")


@contextlib.contextmanager
def copies(jobs: int) -> Iterator[queue.SimpleQueue[Path]]:
    """Copies of package and tests, one for each job, in a folder that goes."""
    with tempfile.TemporaryDirectory() as temp:
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(jobs):
            copy = Path(temp, str(i))
            for part in ("minilora", "tests"):
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            for file in (ROOT / "pyproject.toml", *(file for files in READ for file in ROOT.glob(files))):
                (copy / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy / file.relative_to(ROOT))
            with open(copy / "tests/conftest.py", "a", encoding="utf-8") as conftest:
                conftest.write(NO_SHRINKING)
            free.put(copy)
        yield free


def attempt(
    free: queue.SimpleQueue[Path], tests: str, mutated: tuple[str, str] | None = None
) -> tuple[bool, str]:
    """`run_tests` in a copy that is free, where a file below minilora/ holds another text meanwhile."""
    copy = free.get()
    try:
        if mutated is None:
            return run_tests(copy, tests)
        path = copy / "minilora" / mutated[0]
        text = path.read_text(encoding="utf-8")
        path.write_text(mutated[1], encoding="utf-8")
        try:
            return run_tests(copy, tests)
        finally:
            path.write_text(text, encoding="utf-8")
    finally:
        free.put(copy)


def not_green(free: queue.SimpleQueue[Path], pool: ThreadPoolExecutor, tests: Iterable[str]) -> list[str]:
    """What is red in these test files, or in these tests of them, without any change."""
    asked: dict[str, set[str]] = {}
    for name in sorted({name for some in tests for name in some.split()}):
        asked.setdefault(name.partition("::")[0], set()).add(name)
    asked = {file: names for file, names in asked.items() if file in FILES}
    runs = [file if file in names else " ".join(sorted(names)) for file, names in asked.items()]
    said = dict(zip(asked, pool.map(lambda run: attempt(free, run)[1], runs), strict=True))
    return [f"test_{file}.py is not green without any mutant: {why}" for file, why in said.items() if why]


def tried(free: queue.SimpleQueue[Path], mutant: Mutant, asked_first: str | None = None) -> tuple[bool, str]:
    """Whether a test is red with the mutant and green without it, and which one; else why not, if known.

    `asked_first` is its witness, which is known to be green. If it does not see the mutant, all tests are
    asked; that a test of theirs is green has not been looked at yet.
    """
    try:
        mutated = mutant.file, apply(mutant, ROOT)[2]
    except ValueError as e:
        return False, str(e)
    if asked_first and (result := attempt(free, asked_first, mutated))[0]:
        return result
    seen, said = attempt(free, mutant.tests, mutated)
    if seen and asked_first and (red := attempt(free, witness(said))[1]):
        return False, f"not green without it either: {red}"
    return seen, said


def main() -> int:
    """Try the mutants named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mutants")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once (2)")
    given = parser.parse_args()
    if unknown := set(given.names) - {m.name for m in MUTANTS}:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTANTS if not given.names or m.name in given.names]
    known = witnesses()

    os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
    with copies(given.jobs) as free, ThreadPoolExecutor(given.jobs) as pool:
        start = time.monotonic()
        if red := not_green(free, pool, (known.get(m.name, m.tests) for m in chosen)):
            print(*red, sep="\n")
            return 1
        print(f"what is asked is green without any mutant, {time.monotonic() - start:.0f} s")
        caught = 0
        results = pool.map(lambda m: tried(free, m, known.get(m.name)), chosen)
        for mutant, (seen, said) in zip(chosen, results, strict=True):
            caught += seen
            if seen:
                known[mutant.name] = witness(said)
            how = f"caught by {said}" if seen else f"SURVIVED{f' ({said})' if said else ''}"
            print(f"{mutant.name:42} {how}", flush=True)
    names = [m.name for m in MUTANTS if m.name in known]
    WITNESSES.write_text(json.dumps({name: known[name] for name in names}, indent=1) + "\n")
    print(f"{caught} of {len(chosen)} mutants caught, {time.monotonic() - start:.0f} s")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
