"""The engine writes what PEFT's mixed batches write, from the same folders."""

from dataclasses import asdict

import numpy as np
import pytest
import served
from helpers import tiny

from minilora.serve.bank import Bank
from minilora.serve.engine import Engine, Request
from minilora.tree import named_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]


def test_the_engine_and_a_mixed_batch_of_peft_write_the_same_text(tmp_path, monkeypatch):
    """Greedy in float64, so that no rounding decides a token; PEFT reads the folders that this wrote."""
    wide = {"hidden_size": 12}  # transformers wants a multiple of the heads
    monkeypatch.setattr(served, "base", lambda dtype: tiny(3, dtype, **served.UNTIED | wide)[0])
    folder, model, RANKS = served.write(tmp_path), served.base(np.float64), served.RANKS
    config = transformers.LlamaConfig(**asdict(model.config), attn_implementation="eager")
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    theirs.load_state_dict({path: torch.tensor(p.data) for path, p in named_params(model).items()})
    theirs.generation_config.eos_token_id = None
    first, *others = RANKS
    mixed = peft.PeftModel.from_pretrained(theirs, folder / first, adapter_name=first).eval()
    for name in others:
        mixed.load_adapter(folder / name, adapter_name=name)
    names = [*RANKS, None, *list(RANKS)[::-1]]
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (len(names), 5))
    with torch.no_grad():
        text = mixed.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=int), max_new_tokens=9,
            do_sample=False, pad_token_id=0, adapter_names=[name or "__base__" for name in names],
        )[:, 5:]  # fmt: skip
    engine = Engine(model, Bank(model, folder), slots=3)
    streams = [engine.submit(Request(p, 9, name, temperature=0)) for p, name in zip(ids, names, strict=True)]
    engine.run()
    assert [stream.tokens for stream in streams] == text.tolist()
    assert len({tuple(stream.tokens) for stream in streams}) == len(names)
