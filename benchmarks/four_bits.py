"""Four bits: how fast a weight is encoded and decoded, what training on it takes, and what it costs in loss.

    python benchmarks/four_bits.py [speed] [memory] [loss]    what is named, or all of it; writes results/
    python benchmarks/four_bits.py --draw                     only draws results/four_bits.png and .svg

Speed: 16 million weights to NF4 and back, in blocks of 64 with double quantization, one thread; beside a copy
of the float32 result, and beside bitsandbytes' CPU functions where it is installed. Contestants are processes
that take turns (common.py). Times are of the processor, so that other processes matter less; ratios are
medians.

Memory: LoRA on SmolLM2-135M, r = 8 on all linear maps, batch 8 of 128 tokens, three steps on one thread,
beside the base as it is and in NF4, each in a process of its own. It reports the bytes of the linear maps,
the resident memory once the base is ready (VmRSS after glibc's malloc_trim), and the most while it trains
(VmHWM, which is reset before the first step).

Loss: the shipped base on the five plays held out from its training, and SmolLM2 on the beginning of them,
before quantizing and after it, for every kind and several sizes of blocks.
"""

import argparse
import ctypes
import importlib.util
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import RESULTS, Contestant, alternate, answer, machine, ratio, threads

from minilora.table import Table

N = 1 << 24
ROUNDS = 9
FILE = RESULTS / "four_bits.json"
OURS = ("copy", "decode", "encode")
THEIRS = ("bitsandbytes decode", "bitsandbytes encode")
CELLS = [("nf4", 64, True), *((kind, 64, False) for kind in ("nf4", "fp4", "int4", "int4-affine")),
         *(("nf4", block, True) for block in (32, 256, 4096))]  # fmt: skip


# ---- speed


def run_of(name: str) -> Any:
    """What is timed under a name."""
    w = np.random.default_rng(0).standard_normal((N >> 12, 1 << 12), dtype=np.float32)
    if name == "copy":
        return lambda: w.copy()
    if name.startswith("bitsandbytes"):
        import torch
        from bitsandbytes import functional

        torch.set_num_threads(1)
        how = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        encode = partial(functional.quantize_4bit, torch.from_numpy(w), **how)
        codes, state = encode()
        return encode if name.endswith("encode") else lambda: functional.dequantize_4bit(codes, state)
    from minilora.methods.four_bit import decoded, encoded

    blocks = encoded(w)
    return (lambda: encoded(w)) if name == "encode" else (lambda: decoded(blocks))


def speed() -> dict[str, Any]:
    """Median milliseconds of the processor, and rates relative to the copy's."""
    there = importlib.util.find_spec("bitsandbytes") is not None
    if not there:
        print("bitsandbytes is not installed: nothing beside it")
    runners = {name: Contestant([__file__, "--as", name], threads(1)) for name in OURS + THEIRS * there}
    times = alternate(runners, ROUNDS, 1)
    found = {name: {"ms": median(t), "of_a_copy": ratio(times["copy"], t)} for name, t in times.items()}
    for name, row in found.items():
        print(f"{name:20} {row['ms']:8.1f} ms, {row['of_a_copy']:.2f} of a copy's rate")
    return found


# ---- memory


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    return 1024 * int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def train(bits: int | None) -> None:
    """Be a process that trains, and tells its memory."""
    import minilora as ml
    from minilora.lora import bases
    from minilora.targets import find_targets

    model = ml.load("smollm2")
    if bits:
        ml.quantize(model)
    ml.inject(model, ml.LoraConfig(r=8), rng=np.random.default_rng(0))
    layers = bases(model)
    maps = sum(layers[path].weight.data.nbytes for path in find_targets(layers, "all-linear"))
    ctypes.CDLL(None).malloc_trim(0)
    ready = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    rng = np.random.default_rng(0)
    batches = [tuple(rng.integers(0, model.config.vocab_size, (2, 8, 128)))] * 3
    history = ml.train(model, batches, ml.AdamW(1e-3), steps=3, threads=1)
    print(json.dumps({"maps": maps, "ready": ready, "peak": resident("VmHWM"), "losses": history.loss}))


def memory() -> dict[str, Any]:
    """Both bases, and 4 bits relative to float32."""
    found = {}
    for name, bits in (("float32", "0"), ("nf4", "4")):
        done = subprocess.run(
            [sys.executable, __file__, "--train", bits], capture_output=True, text=True, check=True
        )
        found[name] = json.loads(done.stdout)
    found["ratio"] = {what: found["nf4"][what] / found["float32"][what] for what in ("maps", "ready", "peak")}
    print(json.dumps(found, indent=1))
    return found


# ---- loss


def loss() -> list[dict[str, Any]]:
    """One row for each base and cell, the base itself first."""
    import minilora as ml
    from minilora.formats import huggingface, tokenizer
    from minilora.tree import replica

    rows = []
    play = ml.corpus("shakespeare").test
    for base, limit in (("base", 512 * 128), ("smollm2", 8 * 128)):
        model, ids = ml.load(base), play
        if base == "smollm2":
            words = huggingface.tokenizer_of(huggingface.checkpoint(base))
            ids = words.encode(tokenizer.decode(play)[:40_000])
        held = ml.eval_batches(ids, 4, 128, limit=limit)
        rows.append({"base": base, "kind": "float32", "block": 0, "double": False, "bits": 32.0, "error": 0.0,
                     "loss": ml.evaluate(model, held)})  # fmt: skip
        for kind, block, double in CELLS:
            four = replica(model)  # which shares what stays in float
            report = ml.quantize(four, kind=kind, block=block, double=double)
            rows.append({"base": base, "kind": kind, "block": block, "double": double, "bits": report.bits,
                         "error": report.error, "loss": ml.evaluate(four, held)})  # fmt: skip
    return rows


# ---- the tables and the figure


def table(found: dict[str, Any]) -> str:
    """The losses in Markdown, beside what they cost."""
    lines = []
    for row in found["loss"]:
        more = row["loss"] - next(r["loss"] for r in found["loss"] if r["base"] == row["base"])
        scales = "" if row["kind"] == "float32" else "8 bits" if row["double"] else "float32"
        lines.append((row["base"], row["kind"], str(row["block"] or ""), scales, f"{row['bits']:.3f}",
                      f"{row['error']:.4f}", f"{row['loss']:.4f}", f"{more:+.4f}"))  # fmt: skip
    head = ("base", "kind", "block", "scales", "bits per weight", "|W - Ŵ| / |W|", "loss", "more")
    return Table(head, lines).markdown("lllrrrrr")


def said(found: dict[str, Any]) -> list[str]:
    """What the page says of speed and memory."""
    ms = {name: f"{row['ms']:,.0f} ms" for name, row in found["speed"].items()}
    rate, memory = found["speed"]["decode"]["of_a_copy"], found["memory"]
    theirs = ""
    if THEIRS[0] in ms:
        theirs = f"; bitsandbytes' CPU functions take {ms[THEIRS[1]]} and {ms[THEIRS[0]]}"

    def megabytes(what: str) -> str:
        four, plain = (memory[name][what] / 1e6 for name in ("nf4", "float32"))
        return f"{four:,.0f} MB instead of {plain:,.0f} ({four / plain:.3f})"

    return [
        f"16 million weights are encoded in {ms['encode']} of one core and decoded in {ms['decode']}, "
        f"{rate:.2f} of the rate at which the float32 result is copied{theirs}.",
        f"the linear maps take {megabytes('maps')}, the process {megabytes('ready')} before the first step, "
        f"and at its peak {megabytes('peak')}.",
    ]


def draw(found: dict[str, Any]) -> None:
    """results/four_bits.png and .svg: the loss of quantizing against bits per weight."""
    from minilora.analysis.plotting import BLUE, GREEN, GREY, ORANGE, PINK, Picture, axes, styled

    looks = {"nf4": (BLUE, "o", "NF4"), "fp4": (ORANGE, "s", "FP4"), "int4": (GREEN, "^", "int4, symmetric"),
             "int4-affine": (PINK, "D", "int4, affine")}  # fmt: skip
    titles = {"base": "The shipped base, 344,736 parameters", "smollm2": "SmolLM2, 135 million parameters"}

    @styled
    def picture() -> Picture:
        figure, (panels,) = axes(2, size=(12, 4.6))
        says = []
        for panel, base in zip(panels, titles, strict=True):
            rows = [row for row in found["loss"] if row["base"] == base]
            plain = rows[0]["loss"]
            for kind, (colour, marker, label) in looks.items():
                for double in (True, False):
                    some = sorted((r["bits"], r["loss"] - plain, r["block"]) for r in rows
                                  if r["kind"] == kind and r["double"] == double)  # fmt: skip
                    if not some:
                        continue
                    bits, more, _ = zip(*some, strict=True)
                    how = {"color": colour, "marker": marker, "linestyle": "-" if some[1:] else "none",
                           "markerfacecolor": colour if double else "white",
                           "label": f"{label}, scales in {'8 bits' if double else 'float32'}"}  # fmt: skip
                    panel.plot(bits, more, **how)
                    for *at, block in some if double else ():
                        panel.annotate(str(block), at, textcoords="offset points", xytext=(5, 5), fontsize=9,
                                       color=GREY)  # fmt: skip
            panel.set_title(f"{titles[base]}; float32: {plain:.4f}", fontsize=11)
            panel.set_xlabel("bits per weight of the linear maps")
            panel.set_ylim(bottom=0)
            usual = next(r for r in rows if (r["kind"], r["block"], r["double"]) == ("nf4", 64, True))
            says.append(f"{titles[base]}: {usual['loss'] - plain:+.4f} nats")
        panels[0].set_ylabel("loss above that of float32 (nats per token)")
        panels[0].legend(fontsize=9, loc="lower left")
        return Picture(
            figure,
            f"Loss added by quantizing, against bits per weight; NF4 in blocks of 64: {'; '.join(says)}.",
        )

    picture().save(RESULTS, "four_bits")


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="speed, memory, loss; all unless given")
    parser.add_argument("--draw", action="store_true", help="only draw what is written")
    parser.add_argument("--as", dest="part", help=argparse.SUPPRESS)
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        answer(run_of(args.part), 1, time.process_time)
        return
    if args.train is not None:
        train(args.train)
        return
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    if not args.draw:
        for name, part in {"speed": speed, "memory": memory, "loss": loss}.items():
            if not args.parts or name in args.parts:
                found[name] = part()
        RESULTS.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(found | machine(), indent=1) + "\n")
    print(table(found), *said(found), sep="\n")
    draw(found)


if __name__ == "__main__":
    sys.exit(main())
