"""LoRA on a real pretrained model: SmolLM2-135M learns the spelling of the First Folio, on a CPU.

    python benchmarks/smollm2.py            writes benchmarks/results/smollm2.json and keeps runs/folio

The command `minilora train` runs as a user types it, r = 8 on all linear maps. Told are the held-out loss
(five plays that are held out in every spelling) in nats per character before, during and after, the time, the
process's peak memory; continuations of one prompt before and after, greedy and sampled from three seeds;
and the perplexity of a paragraph of an encyclopedia under the base, before and after. At last the adapter
goes under the microscope, which draws benchmarks/results/smollm2_heat_map.png and smollm2_spectra.png.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from minilora import decoding
from minilora.analysis import inspect
from minilora.formats import huggingface
from minilora.peft import loading

RESULTS = Path(__file__).parent / "results"
PARAGRAPH = (
    "The Moon is the only natural satellite of the Earth. It orbits our planet at an average distance of "
    "about 384,000 kilometres, and takes a little over 27 days to complete one orbit. Because it always "
    "shows the same face to the Earth, its far side was not seen until a spacecraft photographed it in 1959. "
    "The gravity of the Moon is the main cause of the tides in the oceans."
)
PROMPT = "KING. Now tell me, my good lord, why you have come. LORD. "
CHILD = """
import re, sys
from minilora.cli import main
code = main(sys.argv[1:])
print(re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\\t", " "))[1], file=sys.stderr)
sys.exit(code)
"""


def perplexity(llama, words):
    """Of PARAGRAPH."""
    ids = words.encode(PARAGRAPH)[None, :]
    return float(np.exp(float(llama.loss(ids[:, :-1], ids[:, 1:])[0]))), ids.shape[1]


def sample(llama, words, temperature, seed):
    """The continuation of PROMPT by 50 tokens."""
    ids = words.encode(PROMPT)[None, :]
    tokens = decoding.generate(llama, ids, 50, rng=np.random.default_rng(seed), temperature=temperature)
    return words.decode(np.array([int(t[0]) for t in tokens]))


def draw(adapter):
    """The adapter under the microscope, beside its base: smollm2_heat_map and smollm2_spectra."""
    seen = inspect.inspect(adapter, "smollm2")
    for name, picture in inspect.pictures(seen).items():
        picture.save(RESULTS, f"smollm2_{name}")
    looked_at = sum(len(m.base.cosines) for m in seen.modules)
    return {
        "summary": seen.summary(),
        "intruders": f"{sum(m.base.intruders for m in seen.modules)} of {looked_at}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/folio"))
    options = parser.parse_args()
    how = ["--steps", options.steps, "--lr", options.lr, "--batch", 8, "--length", 128, "--eval-every", 20]
    command = [
        "train",
        "--base",
        "smollm2",
        "--data",
        "folio",
        "--out",
        options.out,
        "--rank",
        8,
        *how,
        "--overwrite",
    ]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, command)], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    told = re.search(r"([\d.]+) -> ([\d.]+) per character", done.stdout)
    found = {
        "command": f"minilora {' '.join(map(str, command))}",
        "seconds": seconds,
        "peak_GB": int(done.stderr.split()[-1]) * 1024 / 1e9,
        "nats_per_character": [float(x) for x in told.groups()],
        "evals_nats_per_token": [
            [int(a), float(b)] for a, b in re.findall(r"step (\d+): held-out loss ([\d.]+)", done.stderr)
        ],
    }
    llama = huggingface.load("smollm2")
    words = huggingface.tokenizer_of(huggingface.checkpoint("smollm2"))
    for state in ("before", "after"):
        if state == "after":
            print(loading.load_adapter(llama, options.out))
        value, tokens = perplexity(llama, words)
        found[state] = {
            "perplexity": value,
            "tokens": tokens,
            "greedy": sample(llama, words, 0, 0),
            "sampled": [sample(llama, words, 0.7, seed) for seed in range(3)],
        }
    RESULTS.mkdir(exist_ok=True)
    found["inspect"] = draw(options.out)
    (RESULTS / "smollm2.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
