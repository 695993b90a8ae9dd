"""Every command that takes an adapter names what it was given instead, and says what to do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from by_hand import CONFIG, PREFIX, WEIGHTS, write_peft
from peft_cases import FIXTURES
from safetensors.numpy import save_file

from minilora.analysis.inspect import inspect
from minilora.cli import main
from minilora.compose.truncate import compress
from minilora.errors import ConfigError, FormatError, MismatchError, StorageError, UnsupportedError
from minilora.formats.huggingface import load
from minilora.merging.merge import merge_checkpoint
from minilora.peft.folder import open_adapter
from minilora.peft.loading import load_adapter
from minilora.table import Table

GOOD, BASE = FIXTURES / "adapters/untied--q-and-v", FIXTURES / "bases/untied"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 160069389\n"


def put(name, data=b"", folder=""):
    """A file instead of the good adapter's, or beside them."""

    def make(root):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_bytes(data)
        return root

    return make


def tensors(name, *keys):
    def make(root):
        save_file({key: np.ones((2, 3), np.float32) for key in keys}, root / name)
        return root

    return make


def at(name, *makers):
    """The path of a file inside, made by others."""

    def make(root):
        for maker in makers:
            maker(root)
        return root / name

    return make


def both(*makers):
    return at(".", *makers)


def good(name):
    """An adapter in a folder below."""

    def make(root):
        shutil.copytree(GOOD, root / name)
        return root

    return make


def only(*names):
    """Files of the good adapter."""

    def make(root):
        for name in names:
            shutil.copy(GOOD / name, root)
        return root

    return make


MLX = json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "num_layers": 4})
KEY = PREFIX + "q_proj.lora_A.weight"
KINDS = {  # what it is -> error, what it says, how to get there
    "a pointer for the tensors": (
        FormatError,
        "pointer of Git LFS.*160,069,389 bytes.*git lfs pull",
        both(only(CONFIG), put(WEIGHTS, POINTER)),
    ),
    "a pointer for the config": (
        FormatError,
        "config.json: is a pointer",
        both(only(WEIGHTS), put(CONFIG, POINTER)),
    ),
    "a pointer by its path": (
        FormatError,
        "pointer of Git LFS",
        at("x.safetensors", put("x.safetensors", POINTER)),
    ),
    "a model": (
        UnsupportedError,
        "is a model, not an adapter; expected .*minilora extract",
        lambda root: shutil.copytree(BASE, root / "m"),
    ),
    "a model in parts": (
        UnsupportedError,
        "is a model",
        lambda root: shutil.copytree(FIXTURES / "bases/sharded", root / "m"),
    ),
    "a model of pickles": (
        UnsupportedError,
        "is a model",
        both(put("config.json", b"{}"), put("pytorch_model.bin")),
    ),
    "a pickle": (
        UnsupportedError,
        "'adapter_model.bin' only: a pickle.*python -c .*'adapter_model.bin', weights_only=True",
        both(only(CONFIG), put("adapter_model.bin")),
    ),
    "a pickle by its path": (
        UnsupportedError,
        r"a pickle.*save_file.*'adapter_model.safetensors'",
        at("adapter_model.bin", only(CONFIG), put("adapter_model.bin")),
    ),
    "a pickle by its bytes": (UnsupportedError, "a pickle", at("lora", put("lora", b"\x80\x02}q\x00."))),
    "torchtune's checkpoint": (UnsupportedError, "'adapter_0.pt' only: a pickle", put("adapter_0.pt")),
    "one half of a pair": (
        MismatchError,
        "_to_q.lora_down.weight is one factor of unet.down_blocks.0.to_q; the other is missing",
        at("a.safetensors", tensors("a.safetensors", "lora_unet_down_blocks_0_to_q.lora_down.weight")),
    ),
    "one half beside MLX's config": (
        MismatchError,
        "model.q_proj.lora_b is one factor of model.q_proj",
        both(put(CONFIG, MLX.encode()), tensors("adapters.safetensors", "model.q_proj.lora_b")),
    ),
    "MLX's config without its file": (
        StorageError,
        "adapters.safetensors: is missing",
        put(CONFIG, MLX.encode()),
    ),
    "a module by two names": (
        MismatchError,
        "are the same part of unet.mid_block.x",
        tensors("a.safetensors", "unet.mid_block.x.lora_A.weight", "lora_unet_mid_block_x.lora_down.weight"),
    ),
    "a mixture of tools": (
        MismatchError,
        "names of MLX and of PEFT; expected those of one tool",
        tensors("a.safetensors", "x.lora_a", "x.lora_b", "y.lora_A.weight", "y.lora_B.weight"),
    ),
    "several files": (
        UnsupportedError,
        "has 2 files, such as 'a.safetensors'; expected one",
        both(tensors("a.safetensors", "x.lora_a"), tensors("b.safetensors", "x.lora_a")),
    ),
    "kohya's tensors": (
        MismatchError,
        "kohya",
        both(only(CONFIG), tensors(WEIGHTS, "lora_te1_text_model_q.lora_up.weight")),
    ),
    "MLX's tensors": (
        MismatchError,
        "MLX",
        both(only(CONFIG), tensors(WEIGHTS, "model.layers.0.q_proj.lora_a")),
    ),
    "no LoRA but a LoKr": (
        UnsupportedError,
        r"holds no LoRA but LoKr \(2 modules\)",
        tensors("a.safetensors", "lora_unet_x.lokr_w1", "lora_unet_x.lokr_w2_a", "lora_unet_y.lokr_w1"),
    ),
    "loralib's dictionary": (
        ConfigError,
        "a file of loralib does not have the scale; give alpha and r",
        tensors("a.safetensors", "fc.lora_A", "fc.lora_B"),
    ),
    "torchtune's dictionary": (
        ConfigError,
        "a file of torchtune does not have the scale; give alpha",
        tensors("a.safetensors", "layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"),
    ),
    "a model's tensors": (
        UnsupportedError,
        "weights of a model",
        at("model.safetensors", tensors("model.safetensors", "model.norm.weight")),
    ),
    "an adapter's file without its config": (
        StorageError,
        "adapter_config.json: is missing, and only it has the scale of b.safetensors",
        at("b.safetensors", tensors("b.safetensors", KEY, KEY.replace("_A", "_B"))),
    ),
    "the beginning of llama.cpp's file": (FormatError, "header", at("a", put("a", b"GGUF"))),
    "a name on the hub": (
        StorageError,
        "hf download someone/their-lora.v2 --local-dir their-lora.v2",
        lambda root: "someone/their-lora.v2",
    ),
    "an address of the hub": (
        StorageError,
        "hf download someone/lora --local-dir lora",
        lambda root: "https://huggingface.co/someone/lora",
    ),
    "a path that is not there": (StorageError, "is missing; expected a folder", lambda root: root / "none"),
    "some other file": (
        StorageError,
        "cannot be read as an adapter",
        at("notes.txt", put("notes.txt", b"x")),
    ),
    "the folder above": (StorageError, "there is one in 'checkpoint-60'$", good("checkpoint-60")),
    "a trainer's folder": (
        StorageError,
        "there are 3 below, the last in 'checkpoint-500'",
        both(good("checkpoint-60"), good("checkpoint-500"), good("checkpoint-100")),
    ),
    "an empty folder": (
        StorageError,
        "adapter_config.json: is missing; expected a folder with",
        put("README.md"),
    ),
}


def table():
    """What may lie where an adapter is expected, and the error that says so, as Markdown."""
    lines = [(kind, error.__name__, says) for kind, (error, says, _) in KINDS.items()]
    return Table(("what lies there", "error", "what it says"), lines).markdown("lll")


def test_the_second_table_of_bad_files_matches_the_tests():
    """`python tests/lora_files/test_recognise.py` prints it."""
    assert table() in (Path(__file__).parents[2] / "benchmarks/results/bad_files.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_adapter_is_named_for_what_it_is(kind, tmp_path, monkeypatch, capsys):
    """By inspect, --against, compress, merge and whoever loads: one line each, nothing written."""
    error, says, make = KINDS[kind]
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    model = load(BASE)
    for call in (
        lambda: open_adapter(path),
        lambda: inspect(path),
        lambda: inspect(GOOD, against=path),
        lambda: compress(path, tmp_path / "out", rank=1),
        lambda: merge_checkpoint(BASE, path, tmp_path / "out"),
        lambda: load_adapter(model, path),
    ):
        with pytest.raises(error, match=says) as e:
            call()
        assert type(e.value) is error
        assert str(e.value).isprintable()
        assert len(str(e.value)) < 500 + len(str(tmp_path))
    assert main(["compress", str(path), str(tmp_path / "out"), "--rank", "1"]) == error.exit_code
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", CONFIG, WEIGHTS])
def test_a_file_of_an_adapter_stands_for_its_folder(name, tmp_path):
    whole, part = inspect(GOOD), inspect(GOOD / name)
    assert whole.modules == part.modules
    merge_checkpoint(BASE, GOOD / name, tmp_path / "merged")
    assert "adapter untied--q-and-v merged" in (tmp_path / "merged/README.md").read_text()


def test_a_large_file_that_begins_like_a_pointer_is_no_pointer(tmp_path):
    """Only a whole small file is one: a real file of tensors begins with its header's length."""
    folder = write_peft(tmp_path / "a", {"a.b": (np.ones((2, 3)), np.ones((4, 2)))})
    (folder / WEIGHTS).write_bytes(POINTER + bytes(2000))
    with pytest.raises(FormatError, match="header length"):
        open_adapter(folder)


if __name__ == "__main__":
    print(table())
