"""Adapters as people publish them are inspected with notes and compressed; loading is strict."""

import re
from pathlib import Path

import numpy as np
import pytest
from by_hand import bound32, changes
from stand_ins import STAND_INS, table, write

from minilora.analysis.inspect import inspect
from minilora.compose.truncate import compress
from minilora.errors import MiniloraError
from minilora.formats.safetensors import open_tensors
from minilora.peft.folder import check_agreement, open_adapter

MANY = "15,360 tensors of a mixture of experts"
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name == MANY)) for name in STAND_INS]


def test_an_adapter_of_many_experts_can_be_opened(tmp_path):
    write(MANY, tmp_path / "in")
    found = open_adapter(tmp_path / "in")
    assert found.pairs.keys() == STAND_INS[MANY].modules.keys()
    assert (len(found.tensors), found.all_notes) == (15360, ())


@pytest.mark.parametrize("name", EACH)
def test_public_adapters_are_read_with_notes(name, tmp_path):
    this = STAND_INS[name]
    dense, tensors = write(name, tmp_path / "in")
    seen = inspect(tmp_path / "in")
    assert {m.module: m.shape for m in seen.modules} == {m: dW.shape for m, dW in dense.items()}
    for m in seen.modules:
        S = np.linalg.svd(dense[m.module], compute_uv=False)
        assert np.abs(np.array(m.singular_values) - S[: m.r]).max() <= 1e-12 * S[0]
    assert len(seen.notes) == len(this.says)
    for note, says in zip(seen.notes, this.says, strict=True):
        assert re.search(says, note), note
    assert seen.parameters == sum(this.r * sum(dW.shape) for dW in dense.values())
    assert len(open_adapter(tmp_path / "in").tensors) == len(tensors)


@pytest.mark.parametrize("name", EACH)
def test_compressed_public_adapters_are_consistent_and_optimal(name, tmp_path):
    """Config and file agree, whatever they did before, and ΔW is the nearest; all else is the same."""
    this = STAND_INS[name]
    dense, tensors = write(name, tmp_path / "in")
    found = compress(tmp_path / "in", tmp_path / "out", rank=1)
    assert [bool(re.search(says, note)) for says, note in zip(this.says, found.notes, strict=False)] == [
        True for _ in found.notes
    ]
    after = changes(tmp_path / "out")
    for module, dW in dense.items():
        U, S, Vt = np.linalg.svd(dW)
        near = S[0] * np.outer(U[:, 0], Vt[0])
        assert np.abs(after[module] - near).max() <= bound32(S[:1]) + 1e-12 * S[0]
    again = open_adapter(tmp_path / "out")
    assert not again.doubts
    if this.agrees:
        check_agreement(again)
    else:
        with pytest.raises(MiniloraError, match="not supported"):
            check_agreement(again)
    written = open_tensors(tmp_path / "out" / "adapter_model.safetensors")
    for key, a in tensors.items():
        name = re.sub(r"(magnitude_vector)\.weight", r"\1", key)
        assert name in written
        assert written.shapes[name][2:] == a.shape[2:]
    compress(tmp_path / "out", tmp_path / "twice", rank=1)
    assert again.all_notes == tuple(note for note in found.notes if "beside" in note or "tables" in note)


@pytest.mark.slow
def test_the_table_of_stand_ins_matches_the_tests():
    """`python tests/stand_ins.py` prints it."""
    assert table() in (Path(__file__).parents[2] / "benchmarks/results/adapters.md").read_text()
