"""Adapters in memory: at most so many bytes, the least recently used out; and no name reaches outside."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft_cases import FIXTURES
from safetensors.numpy import load_file, save_file
from served import RANKS, UNTIED, adapted, base, bytes_of, write

from minilora.backend import to_host
from minilora.errors import (
    ConfigError,
    FormatError,
    InputError,
    MismatchError,
    NonFiniteError,
    StorageError,
    UnsupportedError,
)
from minilora.formats.huggingface import load
from minilora.lora import active, inject
from minilora.methods.lora_config import LoraConfig
from minilora.peft.folder import CONFIG, WEIGHTS
from minilora.peft.loading import save_adapter
from minilora.serve.bank import Bank
from minilora.tree import digest

NAMES = list(RANKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bank"))


def state(folder):
    """Everything below a folder: names, kinds, times, bytes."""
    return {path: (os.lstat(path).st_mtime_ns, path.is_file() and path.read_bytes())
            for path in sorted(Path(folder).rglob("*"))}  # fmt: skip


# ---- memory


class Memory(RuleBasedStateMachine):
    """Beside a bank a list of names, the least recently used first: what must be in it, and what must not."""

    @initialize(spare=st.integers(-1, 200), fits=st.sampled_from(NAMES))
    def open(self, spare, fits):
        self.budget = max(map(bytes_of, NAMES)) + bytes_of(fits) + spare
        self.model = base()
        self.bank = Bank(self.model, self.folder, self.budget)
        self.order, self.users = [], dict.fromkeys(NAMES, 0)
        self.expected = dict.fromkeys(("hits", "misses", "loads", "evictions"), 0)

    def fetched(self, name, keep=()):
        """Whether it gets in, by the rules alone."""
        if name not in self.order:
            out, more = [], sum(map(bytes_of, [*self.order, name])) - self.budget
            for other in self.order:
                if more > 0 and not self.users[other] and other not in keep:
                    out.append(other)
                    more -= bytes_of(other)
            if more > 0:
                return False
            self.order = [other for other in self.order if other not in out] + [name]
            self.expected["loads"] += 1
            self.expected["evictions"] += len(out)
        self.order.remove(name)
        self.order.append(name)
        return True

    @rule(name=st.sampled_from(NAMES))
    def take(self, name):
        there = name in self.order
        loaded = self.bank.take(name)
        assert (loaded is not None) is self.fetched(name)
        if loaded:
            self.users[name] += 1
            self.expected["hits" if there else "misses"] += 1
            assert loaded is self.bank.loaded[name]

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def give(self, data):
        name = data.draw(st.sampled_from([name for name, n in self.users.items() if n]))
        self.bank.give(name)
        self.users[name] -= 1

    @rule(name=st.sampled_from(NAMES), keep=st.lists(st.sampled_from(NAMES)))
    def fetch(self, name, keep):
        assert self.bank.fetch(name, keep) is self.fetched(name, keep)

    @invariant()
    def what_is_in_memory(self):
        if hasattr(self, "bank"):
            assert list(self.bank.loaded) == self.order
            held = sum(a.A.data.nbytes + a.B.data.nbytes
                       for one in self.bank.loaded.values() for a in one.layers.values())  # fmt: skip
            assert held == self.bank.counters.bytes <= self.budget
            counters = vars(self.bank.counters)
            assert {name: counters[name] for name in self.expected} == self.expected


def test_memory_holds_what_was_used_last_and_never_more_than_its_budget(folder):
    Memory.folder = folder
    case = Memory.TestCase
    case.settings = settings(max_examples=5, stateful_step_count=15)
    case().runTest()


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_has_the_factors_that_loading_gives(folder, name):
    bank, own = Bank(base(), folder), active(adapted(name))
    loaded = bank.take(name)
    assert loaded.layers.keys() == own.keys()
    for path, adapter in loaded.layers.items():
        assert adapter.scale == own[path].scale
        assert np.array_equal(to_host(adapter.A.data), to_host(own[path].A.data))
        assert np.array_equal(to_host(adapter.B.data), to_host(own[path].B.data))
        assert adapter.dropout is None
        assert not adapter.A.trainable
        assert not adapter.B.trainable


def test_one_that_is_larger_than_the_budget_is_refused_and_the_others_stay(folder):
    bank = Bank(base(), folder, bytes_of("c"))
    assert bank.fetch("a")
    with pytest.raises(InputError, match=f"e: has {bytes_of('e'):,} bytes .* at most {bytes_of('c'):,}"):
        bank.take("e")
    assert list(bank.loaded) == ["a"]
    assert bank.fetch("c")


@pytest.mark.parametrize(("spare", "fits"), [(-1, False), (0, True)])
def test_the_budget_is_exact_to_the_byte(folder, spare, fits):
    bank = Bank(base(), folder, bytes_of("b") + bytes_of("e") + spare)
    assert bank.take("e")
    assert (bank.take("b") is not None) is fits


def test_what_found_no_room_is_not_read_again_before_there_is_some(folder, monkeypatch):
    bank = Bank(base(), folder, bytes_of("e"))
    bank.take("e")
    reads = []
    monkeypatch.setattr(bank, "opened", lambda name, real=bank.opened: reads.append(name) or real(name))
    assert [bank.take("a") for _ in range(5)] == [None] * 5
    assert reads == ["a"]
    bank.give("e")
    assert bank.take("a")


def test_a_folder_that_changes_is_read_again_once_its_adapter_was_evicted(tmp_path):
    bank = Bank(base(), write(tmp_path, names=("a", "e")), bytes_of("e"))
    before = bank.take("a").layers
    bank.give("a")
    shutil.rmtree(tmp_path / "a")
    write(tmp_path, names=("b",))
    (tmp_path / "b").rename(tmp_path / "a")
    assert bank.take("a").layers is before
    bank.give("a")
    assert bank.fetch("e")
    assert len(next(iter(bank.take("a").layers.values())).A.data) == RANKS["b"]


def test_reading_writes_nothing_and_leaves_the_base_as_it_was(folder):
    model, before = base(), state(folder)
    bank, print_ = Bank(model, folder, bytes_of("e")), digest(model)
    for name in NAMES * 2:
        bank.check(name)
        bank.take(name)
        bank.give(name)
    assert (state(folder), digest(model)) == (before, print_)


# ---- names


OUTSIDE = [
    "..", ".", "", "../a", "/a", "a/", "a/../a", "a/b", "a\\b", "..\\a", "~", "a\0", "a\n", "a ", ".a", "é",
    "-a", "a" * 101, None, 3, b"a", ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_a_name_that_could_reach_outside_is_refused_without_a_look_at_the_disk(folder, name, monkeypatch):
    bank = Bank(base(), folder)
    monkeypatch.setattr(os, "lstat", None)
    for door in (bank.check, bank.take) if isinstance(name, str) else (bank.check,):
        with pytest.raises(InputError, match=r"the adapter's name is .*; expected letters"):
            door(name)


@given(name=st.text(st.sampled_from("a./\\~%-_0 \0é"), max_size=6))
def test_whatever_the_name_only_a_folder_in_the_folder_is_asked_for(folder, name):
    bank = Bank(base(), folder)
    asked = []
    bank.opened = asked.append
    with pytest.raises((InputError, AttributeError)):
        bank.take(name)
    if asked:
        assert asked == [name]
        assert (folder / name).parent == folder
        assert os.path.normpath(folder / name) == str(folder / name)


def test_an_unknown_name_is_refused_with_the_nearest(folder):
    bank = Bank(base(), folder)
    with pytest.raises(InputError, match="there is no adapter 'aa'; nearest: 'a'"):
        bank.check("aa")


def test_an_unknown_name_costs_a_look_at_its_neighbours_whatever_the_folder_holds(tmp_path, monkeypatch):
    for k in range(250):
        (tmp_path / f"x{k:03}").mkdir()
        (tmp_path / f"x{k:03}" / CONFIG).write_text("{}")
    bank, looks = Bank(base(), tmp_path), []
    monkeypatch.setattr(bank, "has", lambda name, real=bank.has: looks.append(name) or real(name))
    with pytest.raises(InputError, match="nearest: 'x120'"):
        bank.check("x120a")
    assert looks == ["x120a", *(f"x{k:03}" for k in range(21, 221))]
    looks.clear()
    with pytest.raises(InputError, match="nearest: 'x003'"):
        bank.check("x003a")
    assert looks == ["x003a", *(f"x{k:03}" for k in range(104))]


def test_an_adapter_that_has_left_the_memory_is_read_as_its_folder_is_now(tmp_path):
    bank = Bank(base(), write(tmp_path), bytes_of("e"))
    bank.take("a")
    assert not bank.fetch("e")
    bank.give("a")
    assert bank.fetch("e")
    (tmp_path / "e").rename(tmp_path / "large")
    (tmp_path / "b").rename(tmp_path / "e")  # which has room beside a
    bank.take("a")
    assert list(bank.loaded) == ["a"]
    assert bank.fetch("e")
    assert bank.counters.bytes == bytes_of("a") + bytes_of("b")


def test_the_base_is_read_when_the_bank_is_made_and_not_in_a_step(folder, monkeypatch):
    bank = Bank(base(), folder)
    monkeypatch.setattr("minilora.peft.loading.digest", None)
    assert bank.take("a")


def test_links_are_no_adapters(tmp_path):
    inside = write(tmp_path / "outside", names=("a", "b"))
    inner = tmp_path / "adapters"
    shutil.copytree(inside / "b", inner / "b")
    (inner / "linked").symlink_to(inside / "a", target_is_directory=True)
    (inner / "file").write_text("no folder")
    (inner / "empty").mkdir()
    (inner / ".hidden").mkdir()
    bank = Bank(base(), inner)
    assert bank.names() == ["b"]
    for name in ("linked", "file", "empty"):
        with pytest.raises(InputError, match="there is no adapter"):
            bank.take(name)
    os.remove(inner / "b" / WEIGHTS)
    (inner / "b" / WEIGHTS).symlink_to(inside / "b" / WEIGHTS)
    with pytest.raises(StorageError, match="is a link"):
        bank.take("b")
    assert not bank.loaded


def test_a_folder_that_becomes_a_link_between_two_looks_is_refused(tmp_path):
    inside = write(tmp_path / "outside", names=("a",))
    inner = tmp_path / "adapters"
    inner.mkdir()
    (inner / "a").symlink_to(inside / "a", target_is_directory=True)
    bank = Bank(base(), inner)
    bank.has = lambda name: True
    with pytest.raises(StorageError, match="is a link"):
        bank.take("a")


def test_a_bank_is_a_folder_and_a_budget(tmp_path):
    (tmp_path / "file").write_text("")
    for where in ("file", "missing"):
        with pytest.raises(StorageError, match="is not a folder"):
            Bank(base(), tmp_path / where)
    for budget in (0, -1, 1.5, True, "1"):
        with pytest.raises(ConfigError, match="budget is"):
            Bank(base(), tmp_path, budget)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)  # the user may name one
    assert Bank(base(), tmp_path / "link").names() == []


# ---- files


def edit(change):
    """Spoil a folder's config."""

    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | change))

    return spoil


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def flip(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(raw))


def other_base(folder):
    model, rng = tiny(4, **UNTIED)
    inject(model, LoraConfig(r=2), rng=rng)
    shutil.rmtree(folder)
    save_adapter(model, folder)


SPOILT = {
    "cut": (cut, FormatError, "bytes"),
    "flipped bit": (flip, MismatchError, "is damaged"),
    "no weights": (lambda folder: os.remove(folder / WEIGHTS), StorageError, "cannot be read"),
    "another rank": (edit({"r": 5}), MismatchError, "with the config's r = 5"),
    "fewer targets": (edit({"target_modules": ["q_proj"]}), MismatchError, "does not match"),
    "another method": (edit({"peft_type": "IA3"}), UnsupportedError, "peft_type"),
    "beside": (edit({"lora_bias": True}), UnsupportedError, "lora_bias"),
    "another base": (other_base, MismatchError, "was trained on another base"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_file_that_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, how):
    spoil, error, says = SPOILT[how]
    model = base()
    bank = Bank(model, write(tmp_path, names=("a", "b")))
    bank.take("a")
    spoil(tmp_path / "b")
    before = state(tmp_path), digest(model), dict(vars(bank.counters)), list(bank.loaded)
    with pytest.raises(error, match=says) as caught:
        bank.take("b")
    assert str(tmp_path / "b") in str(caught.value)
    assert before == (state(tmp_path), digest(model), dict(vars(bank.counters)), list(bank.loaded))


KINDS = {  # fixtures of PEFT: what is more than plain LoRA on linear maps is refused
    "untied--q-and-v": None, "untied--regex": None, "untied--patterns": None,
    "untied--embedding-and-head": "embed_tokens: is adapted by more than A and B",
    "tied--head": None, "tied--embedding": "embed_tokens: is adapted by more",
    "tied--saved-embedding": "replaces model.embed_tokens", "biases--DoRA": "_proj: is adapted by more",
    "biases--bias-lora_only": "is adapted by more", "biases--all-linear-rsLoRA": None,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_only_plain_lora_on_linear_maps_is_served(name):
    model = load(FIXTURES / "bases" / name.split("--")[0], np.float64)
    bank = Bank(model, FIXTURES / "adapters")
    if KINDS[name] is None:
        assert bank.take(name).layers
    else:
        with pytest.raises(UnsupportedError, match=KINDS[name]):
            bank.take(name)
        assert not bank.loaded


def test_a_number_that_is_not_finite_is_refused_by_tensor(tmp_path):
    write(tmp_path, names=("a",))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    name = next(name for name in tensors if "v_proj.lora_B" in name)
    tensors[name][0, 0] = np.nan
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(NonFiniteError, match=r"v_proj\.lora_B"):
        Bank(base(), tmp_path).take("a")
