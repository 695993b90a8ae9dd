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

FOUR, QUANTIZE, BNB = "methods/four_bit.py", "methods/quantize.py", "methods/bitsandbytes.py"

# fmt: off
MUTANTS = (
    # ---- four bits
    Mutant("four-bit-quantiles-from-eight-below", FOUR, "[-quantiles(7), np.zeros(1, np.float32), quantiles(8)]",
           "[-quantiles(8), np.zeros(1, np.float32), quantiles(7)]", "four_bit"),
    Mutant("four-bit-spacing-from-one-end", FOUR, "np.where(i < count // 2, float(a) + step * i, float(b) - step * i[::-1])",
           "(float(a) + step * i)", "four_bit"),
    Mutant("four-bit-offset-of-the-quantiles", FOUR, "0.9677083", "0.96875", "four_bit"),
    Mutant("four-bit-code-rounded-down", FOUR, "x > middle  # a", "x >= middle  # a", "four_bit"),
    Mutant("four-bit-absmax-without-abs", FOUR, "scale[some] = xp.abs(x).max(1)", "scale[some] = x.max(1)",
           "four_bit"),
    Mutant("four-bit-block-off-by-one", FOUR, "part = flat[some.start * block :", "part = flat[some.start * block + 1 :",
           "four_bit"),
    Mutant("four-bit-lower-half-first", FOUR, "16 * code[::2] + code[1::2]", "code[::2] + 16 * code[1::2]", "four_bit"),
    Mutant("four-bit-multiplies-by-the-inverse", FOUR, "x /= xp.where(c > 0, c, xp.ones_like(c))[:, None]",
           "x *= (1 / xp.where(c > 0, c, xp.ones_like(c)))[:, None]", "four_bit"),
    Mutant("four-bit-zeros-divided-by-zero", FOUR, "x /= xp.where(c > 0, c, xp.ones_like(c))[:, None]",
           "x /= c[:, None]", "four_bit"),
    Mutant("four-bit-mean-not-added", FOUR, "[: len(q)] + self.offset", "[: len(q)]", "four_bit"),
    Mutant("four-bit-scales-in-blocks-of-255", FOUR, "xp.repeat(self.absmax, SCALES)", "xp.repeat(self.absmax, SCALES - 1)",
           "four_bit"),
    Mutant("four-bit-middles-are-values", FOUR, "return (values[1:] + values[:-1]) / np.float32(2)", "return values[1:]",
           "four_bit"),
    Mutant("four-bit-least-forgotten", FOUR, "            part += blocks.least[some, None]\n", "            pass\n",
           "four_bit"),
    Mutant("four-bit-not-finite-let-through", FOUR, "if not xp.isfinite(scale).all() or", "if False or", "four_bit"),
    Mutant("four-bit-decoded-once-for-all", FOUR, "        return decoded(self.data)\n",
           "        return decoded_once(self.data)\n\n\n@functools.cache\ndef decoded_once(blocks: Blocks) -> Array:\n"
           '    """Once."""\n    return decoded(blocks)\n', "four_bit quantize"),
    Mutant("four-bit-weight-may-be-trained", FOUR, '(name == "trainable" and value) or ', "", "four_bit"),
    Mutant("four-bit-weight-may-be-written", FOUR, ' or (name == "data" and not isinstance(value, Blocks))', "",
           "four_bit"),
    Mutant("four-bit-any-block-size", FOUR, "if type(block) is not int or block not in BLOCKS:",
           "if type(block) is not int or block < 2:", "four_bit"),
    Mutant("four-bit-last-chunk-never-coded", FOUR, "range(0, count, step)", "range(0, max(count - step, 0) + 1, step)", "four_bit"),
    Mutant("four-bit-offset-is-the-largest", FOUR, "scale.mean(dtype=xp.float64)", "scale.max()", "four_bit"),
    Mutant("four-bit-mean-overflows", FOUR, "scale.mean(dtype=xp.float64)", "scale.mean()", "four_bit"),
    Mutant("four-bit-least-of-the-first-chunk", FOUR, "part += blocks.least[some, None]",
           "part += blocks.least[: some.stop - some.start, None]", "four_bit"),
    Mutant("four-bit-bound-nine-times-the-change", FOUR, "(1 + U) * abs(own - c) + tiny", "9 * abs(own - c) + tiny", "four_bit"),
    Mutant("four-bit-bound-of-affine-too-wide", FOUR, "most += 3 * U * c", "most += 3 * c", "four_bit"),
    Mutant("four-bit-bound-without-the-last-cast", FOUR, "    if dtype.bits < 32:\n", "    if False:\n", "four_bit"),
    Mutant("four-bit-codes-alone-closed", FOUR, "    for a in blocks.arrays:\n", "    for a in blocks.arrays[:1]:\n", "four_bit"),
    Mutant("four-bit-values-writable", FOUR, "return unwritten(BOOKS[kind]())", "return BOOKS[kind]()", "four_bit"),
    Mutant("four-bit-infinite-once-decoded", FOUR, "    if not finite(blocks):\n", "    if False:\n", "four_bit"),
    Mutant("four-bit-a-copys-codes-are-its-own", FOUR, "        return self\n", "        return Blocks(*map(np.copy, self.arrays[:2]), self.shape, self.dtype)\n", "four_bit"),
    Mutant("quantize-reached-halved", QUANTIZE, "/ bound(blocks, c)", "/ bound(blocks, c) / 2", "quantize"),
    Mutant("dora-keeps-a-packed-base-decoded", "methods/dora.py", "kept = None if base.weight.packed else V", "kept = V", "quantize"),
    Mutant("fingerprint-decodes-the-whole-base", "peft/loading.py", "digest(bases(model), np.float32)",
           "fingerprint({k: p.dense() for k, p in named_params(bases(model)).items()})", "quantize"),
    Mutant("adapter-of-one-base-only", "peft/loading.py", "filter(None, (quantized_from, base_print(model)))",
           "filter(None, (quantized_from or base_print(model),))", "finetune"),
    Mutant("four-bit-codes-writable", FOUR, "        a.flags.writeable = False\n", "        pass\n", "four_bit"),
    Mutant("folded-keeps-a-packed-weight-decoded", "fast/folded.py", "lasting = not layer.base.weight.packed",
           "lasting = True", "quantize"),
    Mutant("packed-weight-unfrozen", "tree.py", "    check_trainable(params)\n    for p", "    for p", "quantize"),
    Mutant("packed-weight-trained-by-freeze", "tree.py", "    check_trainable(kept)\n", "", "quantize"),
    Mutant("replica-shares-the-gradient", "tree.py", "    twin.grad = None\n", "", "quantize"),
    Mutant("full-copy-of-a-packed-weight", "methods/full_copy.py", "        unpack(layer)\n", "", "quantize"),
    Mutant("quantize-swaps-before-it-is-sure", QUANTIZE, "            new[path] = encoded(weight.dense(), kind, block, double)\n",
           "            new[path] = encoded(weight.dense(), kind, block, double)\n            layers[path].weight = FourBit(new[path])\n",
           "quantize"),
    Mutant("quantize-the-head-too", QUANTIZE, 'find_targets(layers, "all-linear")',
           '[p for p in layers if p.endswith(("_proj", "lm_head"))]', "quantize"),
    Mutant("quantize-twice", QUANTIZE, "if weight.packed:", "if False:", "quantize"),
    Mutant("quantize-beneath-a-merged-layer", QUANTIZE, "layer.merged is not None for", "False for", "quantize"),
    Mutant("quantize-bits-without-the-scales", QUANTIZE, "8 * new[path].nbytes /", "8 * new[path].codes.nbytes /",
           "quantize"),
    Mutant("quantize-error-squared", QUANTIZE, "np.sqrt(np.square(lost).sum(0))", "np.sum(lost, 0)", "quantize"),
    Mutant("bnb-codes-flat", BNB, "to_host(blocks.codes)[:, None]", "to_host(blocks.codes)", "bitsandbytes"),
    Mutant("bnb-offset-in-single-quantization", BNB, '"nested_blocksize": SCALES', '"nested_blocksize": blocks.block',
           "bitsandbytes"),
    Mutant("bnb-values-not-compared", BNB, 'if not np.array_equal(parts["quant_map"]', 'if False and np.array_equal(parts["quant_map"]', "bitsandbytes"),
    Mutant("bnb-map-of-ones-own-machine", BNB, "own = usual if values.tobytes() == to_host(usual).tobytes() else kept(values)",
           "own = usual", "bitsandbytes"),
    Mutant("bnb-scale-below-zero", BNB, "if (top < 0).any():", "if False:", "bitsandbytes"),
    Mutant("bnb-scale-not-finite", BNB, "    if not finite(blocks):\n", "    if False:\n", "bitsandbytes"),
    Mutant("bnb-odd-weights", BNB, "(size + 1) // 2", "size // 2", "bitsandbytes"),
    Mutant("bnb-small-blocks-alone", BNB, '"blocksize": blocks.block}', '"blocksize": min(blocks.block, 64)}', "bitsandbytes"),
    Mutant("bnb-skips-a-packed-map", BNB, '["lm_head", *sorted', '["lm_head", "q_proj", *sorted', "bitsandbytes"),
    Mutant("bnb-fused-maps-not-named", "formats/huggingface.py", "if not layer.weight.packed]", "if False]", "bitsandbytes"),
    Mutant("bnb-loaded-arrays-writable", BNB, "return unwritten(to_device(np.array(a)))", "return to_device(np.array(a))",
           "bitsandbytes"),
    Mutant("bnb-a-map-for-each-weight", BNB, "usual if values.tobytes() == to_host(usual).tobytes() else kept(values)",
           "kept(values)", "bitsandbytes"),
    Mutant("bnb-in-one-file-only", "formats/huggingface.py", "dtypes, fetch, bytes_of=bytes_of)", "dtypes, fetch)", "bitsandbytes"),
    Mutant("bnb-renamed-by-its-old-name", "formats/safetensors.py", "packed = {new: self.packed[old]",
           "packed = {old: self.packed[old]", "bitsandbytes"),
    Mutant("merged-in-float32-if-the-largest-is-packed", "formats/huggingface.py", "if name not in self.tensors.packed]",
           "]", "bitsandbytes"),
    Mutant("quantize-command-in-float32", "compose/quantize.py", "extra, source.dtype, beside=", "extra, None, beside=", "bitsandbytes"),
    Mutant("quantize-command-reads-first", "compose/quantize.py", "    check_form(kind, block, KINDS)\n", "", "bitsandbytes"),
    Mutant("bnb-lengths-not-compared", BNB, "a.shape != (length,) or a.dtype != wanted", "a.dtype != wanted",
           "bitsandbytes"),
    Mutant("bnb-more-in-the-state", BNB, "    if state.keys() != expected:", "    if not expected <= state.keys():",
           "bitsandbytes"),
    Mutant("bnb-any-quantization-config", BNB, 'and config.get("load_in_4bit") is True', "", "bitsandbytes"),
    Mutant("bnb-decoded-when-loaded", "formats/huggingface.py",
           "replace(model, path, FourBit(source.tensors.packed[path](dtype)))\n            continue",
           "pass", "bitsandbytes"),
    Mutant("quantize-command-ignores-its-kind", "compose/quantize.py", "quantize(model, kind=kind, block",
           "quantize(model, block", "bitsandbytes"),
    Mutant("quantize-command-without-tokenizer", "compose/quantize.py", "beside=beside(source.where), ", "", "bitsandbytes"),
    Mutant("quantize-command-writes-over-its-input", "compose/quantize.py", "    refuse_same(out, source.where)\n", "",
           "bitsandbytes"),
    Mutant("quantize-command-double-whatever", "compose/quantize.py", "double=double)", "double=True)", "bitsandbytes"),
    Mutant("quantize-command-without-special-tokens", "compose/quantize.py", "extra = token_ids(source.where)",
           "extra = None", "bitsandbytes"),
    Mutant("quantize-command-any-folder", "compose/quantize.py", "overwrite=overwrite)\n    return",
           "overwrite=False)\n    return", "bitsandbytes"),
    Mutant("train-bits-ignored", "finetune.py", "    if recipe.bits:\n        quantize(model)", "    if False:\n        quantize(model)",
           "finetune"),
    Mutant("train-bits-in-full", "finetune.py", 'if self.bits and self.method == "full":', "if False:", "finetune"),
    Mutant("train-bits-names-the-decoded-base", "finetune.py", "base_print(model) if recipe.bits else None", "None", "finetune"),
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
    Mutant("saved-module-is-the-base-itself", "methods/lora_config.py", "FullCopy.of(base)", "FullCopy(base)", "lora"),
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
    Mutant("head-on-the-first-position", "model.py", "x = x[:, -1:]", "x = x[:, :1]", "model"),
    Mutant("past-appended-to", "decoding.py", "        self.k[:, :, start : self.seen] = k\n",
           "        self.k = self.k.copy()\n        self.k[:, :, start : self.seen] = k\n", "model"),
    Mutant("one-query-unscaled", "ops.py", "(q.reshape(N, G, -1, E) / math.sqrt(E))",
           "q.reshape(N, G, -1, E)", "ops"),
    Mutant("one-query-overflows", "ops.py", "p = x - x.real.max(-1, keepdims=True)", "p = x + 0", "ops"),
    Mutant("top-k-none-drops-the-last", "decoding.py", "    if top_k is not None:\n        p[:, top_k:] = 0",
           "    p[:, (top_k or -1) :] = 0", "model"),
    Mutant("temperature-ignored", "decoding.py", "order, -1) / temperature", "order, -1)", "model"),
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
    Mutant("replicas-share-gradients", "tree.py", "{id(p): without_gradient(p)", "{id(p): p", "parallel"),
    Mutant("replicas-copy-the-base", "tree.py", "twin = copy(p)", "twin = deepcopy(p)", "parallel"),
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
    Mutant("unknown-activation-accepted", "formats/huggingface.py", "if value not in only and not", "if False and not",
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
    Mutant("another-base-is-taken", "peft/loading.py", 'if base and not force',
           'if False and base and not force', "bad_files folder"),
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
    Mutant("cut-without-the-values-of-one-side", "compose/arithmetic.py", "U[:, :k] * root,", "U[:, :k],",
           "truncate"),
    Mutant("compressed-keeps-rslora", "compose/truncate.py", '"alpha_pattern", "use_rslora")', '"alpha_pattern")',
           "truncate"),
    Mutant("residual-is-the-optimum", "compose/truncate.py",
           "lost = size([(1.0, old), (-1.0, Factors(to_device(Bk), to_device(Ak), 1.0))])", "lost = norm(S[k:])",
           "truncate"),
    # ---- sums of adapters
    Mutant("sum-without-the-scale", "compose/arithmetic.py",
           "(w * change.scale) * change.A",
           "w * change.A", "arithmetic"),
    Mutant("weight-0-takes-part", "compose/arithmetic.py",
           "for w, change in updates if w]",
           "for w, change in updates]", "arithmetic"),
    Mutant("cross-terms-with-the-sign-on-both-sides", "compose/arithmetic.py",
           "B = B + root * change.B",
           "B = B + math.copysign(root, size) * change.B", "arithmetic"),
    Mutant("roots-of-the-weight-alone", "compose/arithmetic.py",
           "sizes = [w * change.scale for w, change in updates]",
           "sizes = [w for w, change in updates]", "arithmetic"),
    Mutant("distance-to-nothing", "compose/arithmetic.py",
           "size([*updates, (-1.0, new)])",
           "size(updates)", "arithmetic"),
    Mutant("one-value-more-is-cut", "compose/arithmetic.py",
           "norm(to_host(S)[rank:])",
           "norm(to_host(S)[rank + 1 :])", "arithmetic"),
    Mutant("any-rank-of-a-sum", "compose/arithmetic.py",
           "check_rank(rank, len(S))",
           "check_rank(rank)", "arithmetic"),
    Mutant("the-first-dtype-counts", "compose/arithmetic.py",
           "dtype = np.result_type(*(part.dtype for _, change in updates for part in change[:2]))",
           "dtype = updates[0][1].A.dtype", "arithmetic"),
    Mutant("a-sum-too-large-for-its-dtype", "compose/arithmetic.py",
           "if not exact + residual <= float(np.finfo(dtype).max):",
           "if not exact + residual <= math.inf:", "arithmetic"),
    Mutant("shapes-of-outputs-alone-compared", "compose/arithmetic.py",
           "shapes = {(change.B.shape[0], change.A.shape[1]): None",
           "shapes = {(change.B.shape[0], 0): None", "arithmetic"),
    Mutant("true-is-a-weight", "compose/arithmetic.py",
           "if isinstance(w, bool) or not isinstance(w, int | float)",
           "if not isinstance(w, int | float)", "arithmetic"),
    Mutant("smallest-entries-kept", "compose/sparsify.py",
           "xp.partition(entries, change.size - keep)[change.size - keep]",
           "xp.partition(entries, keep)[keep]", "sparsify"),
    Mutant("all-equal-entries-kept", "compose/sparsify.py",
           "above | (equal & (xp.cumsum(equal) <= keep - above.sum()))",
           "above | equal", "sparsify"),
    Mutant("share-of-entries-rounded-up", "compose/sparsify.py",
           "keep = int(density * change.size)",
           "keep = round(density * change.size)", "sparsify"),
    Mutant("dare-not-enlarged", "compose/sparsify.py",
           "(rng.random(change.shape) < density) / density",
           "(rng.random(change.shape) < density)", "sparsify"),
    Mutant("signs-elected-after-the-weights", "compose/sparsify.py",
           "xp.where(sum(parts) >= 0,",
           "xp.where(sum(w * part for (w, _), part in zip(updates, parts, strict=True)) >= 0,", "sparsify"),
    Mutant("a-tie-elects-minus", "compose/sparsify.py",
           "sum(parts) >= 0, 1.0, -1.0",
           "sum(parts) > 0, 1.0, -1.0", "sparsify"),
    Mutant("mean-over-all-adapters", "compose/sparsify.py",
           "whole / xp.maximum(sum(agrees.astype(xp.float64) for agrees in agreeing), 1.0)",
           "whole / len(parts)", "sparsify"),
    Mutant("zeros-agree-with-every-sign", "compose/sparsify.py",
           "xp.sign(part) == sign for",
           "part * sign >= 0 for", "sparsify"),
    Mutant("rounding-counts-as-rank", "compose/sparsify.py",
           "int((values > max(whole.shape) * np.finfo(np.float64).eps * values[0]).sum())",
           "len(values)", "sparsify"),
    Mutant("density-0", "compose/sparsify.py",
           "not 0 < density <= 1",
           "not 0 <= density <= 1", "sparsify"),
    Mutant("one-adapter-twice", "compose/combine.py",
           "if places[i] in places[:i]]",
           "if False]", "combine"),
    Mutant("option-of-another-method-ignored", "compose/combine.py",
           "if value is not None and name not in takes:",
           "if False:", "combine"),
    Mutant("rank-beyond-a-small-module", "compose/combine.py",
           '"rank": rank and min(rank, most[module])',
           '"rank": rank', "combine"),
    Mutant("modules-drawn-in-the-order-given", "compose/combine.py",
           "enumerate(sorted(updates))",
           "enumerate(updates)", "combine"),
    Mutant("saved-modules-dropped-silently", "compose/combine.py",
           "in given.replaced.items():",
           "in ():", "combine"),
    Mutant("magnitudes-dropped-silently", "compose/combine.py",
           "for tensor in (*pair.vectors.values(), pair.bias):",
           "for tensor in (pair.bias,):", "combine"),
    Mutant("biases-dropped-silently", "compose/combine.py",
           "for tensor in (*pair.vectors.values(), pair.bias):",
           "for tensor in pair.vectors.values():", "combine"),
    Mutant("adapters-of-two-bases-summed", "compose/combine.py",
           "if len(bases) > 1:",
           "if len(bases) > 2:", "combine"),
    Mutant("selectors-though-modules-differ", "compose/combine.py",
           "for name in SELECTORS} if alike else {}", "for name in SELECTORS}", "combine"),
    Mutant("names-of-two-bases", "compose/combine.py",
           "if all(config.get(name) == first.get(name) for config in configs):", "if first:", "combine"),
    Mutant("layers-of-an-adapter-of-weight-0", "compose/combine.py",
           "            if weight:\n                pair: Any", "            if True:\n                pair: Any", "combine"),
    Mutant("one-adapter-by-two-names", "compose/combine.py", "os.path.realpath(folder.where)",
           "os.path.abspath(folder.where)", "combine"),
    Mutant("turned-adapter-summed", "compose/combine.py",
           "if folder.settings.fan_in_fan_out != first",
           "if False != first", "combine"),
    Mutant("window-of-a-convolution-lost", "compose/combine.py",
           ".reshape(row.rank, *inner)",
           ".reshape(row.rank, -1)", "combine"),
    Mutant("float64-sum-narrowed", "compose/combine.py",
           '"float64" if wide else "float32"',
           '"float32"', "combine"),
    Mutant("combined-adapter-of-scale-2", "compose/combine.py",
           "Param(factors.B), 1.0)",
           "Param(factors.B), 2.0)", "combine"),
    Mutant("other-kinds-summed-in-a-model", "compose/combine.py",
           "if type(one) not in (LowRank, LowRankEmbedding):",
           "if False:", "combine"),
    Mutant("weight-cut-off-at-the-first-colon", "flags.py",
           'text.rpartition(":")',
           'text.partition(":")', "flags"),
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
