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
from minilora.compose.export import merge_checkpoint
from minilora.compose.truncate import compress
from minilora.errors import FormatError, MismatchError, StorageError, UnsupportedError
from minilora.formats.huggingface import load
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
        "adapter_model.bin only: a pickle",
        both(only(CONFIG), put("adapter_model.bin")),
    ),
    "a pickle by its path": (
        UnsupportedError,
        "a pickle",
        at("adapter_model.bin", only(CONFIG), put("adapter_model.bin")),
    ),
    "torchtune's checkpoint": (UnsupportedError, "has pickles only", put("adapter_0.pt")),
    "kohya's file": (
        UnsupportedError,
        "kohya",
        at("a.safetensors", tensors("a.safetensors", "lora_unet_down_blocks_0_to_q.lora_down.weight")),
    ),
    "kohya's tensors": (
        MismatchError,
        "kohya",
        both(only(CONFIG), tensors(WEIGHTS, "lora_te1_text_model_q.lora_up.weight")),
    ),
    "diffusers' file": (
        UnsupportedError,
        "LoRA of diffusers",
        at(
            "pytorch_lora_weights.safetensors",
            tensors("pytorch_lora_weights.safetensors", "unet.mid_block.to_q.lora_A.weight"),
        ),
    ),
    "diffusers' folder": (
        UnsupportedError,
        "LoRA of diffusers",
        tensors("pytorch_lora_weights.safetensors", "unet.q.lora.up.weight"),
    ),
    "MLX's folder": (
        UnsupportedError,
        "adapter of MLX",
        both(put(CONFIG, MLX.encode()), tensors("adapters.safetensors", "a.lora_a")),
    ),
    "MLX's folder without a config": (
        UnsupportedError,
        "adapter of MLX",
        tensors("adapters.safetensors", "a.lora_a"),
    ),
    "MLX's tensors": (
        MismatchError,
        "MLX",
        both(only(CONFIG), tensors(WEIGHTS, "model.layers.0.q_proj.lora_a")),
    ),
    "a model's tensors": (
        UnsupportedError,
        "weights of a model",
        at("model.safetensors", tensors("model.safetensors", "model.norm.weight")),
    ),
    "an adapter's file without its config": (
        UnsupportedError,
        "no adapter_config.json beside it",
        at("b.safetensors", tensors("b.safetensors", KEY)),
    ),
    "llama.cpp's file": (UnsupportedError, "file of llama.cpp", at("a.gguf", put("a.gguf", b"GGUF"))),
    "llama.cpp's folder": (UnsupportedError, "file of llama.cpp", put("a-f16.gguf", b"GGUF")),
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
    """`python tests/peft/test_recognise.py` prints it."""
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
