"""A file is complete or as it was; one process at a time works in a folder; no other module writes."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora.errors import LockedError, StorageError
from minilora.storage import check_free, locked, read, remove_tree, write_atomic, write_folder

PACKAGE = Path(minilora.__file__).parent


def fails(number):
    def call(*args):
        raise OSError(number, os.strerror(number))

    return call


@given(data=st.binary(max_size=5000))
def test_what_is_written_is_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("files")
    write_atomic(folder / "a", b"before")
    write_atomic(folder / "a", data)
    assert read(folder / "a") == data
    assert os.listdir(folder) == ["a"]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    write_atomic(tmp_path / "a", b"twelve bytes")
    monkeypatch.undo()
    assert read(tmp_path / "a") == b"twelve bytes"


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr(os, call, fails(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"a: not written: No space left on device"):
        write_atomic(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    assert read(tmp_path / "a") == b"old"


def test_the_data_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    write_atomic(tmp_path / "a", b"new")
    assert calls == ["write", "fsync", "replace", "fsync"]


def test_a_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        write_atomic(tmp_path / "none" / "a", b"")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def good(temp):
        assert not (tmp_path / "f").exists()
        write_atomic(temp / "a", b"1")

    def bad(temp):
        good(temp)
        raise KeyError("half way")

    with pytest.raises(KeyError):
        write_folder(tmp_path / "f", bad)
    assert os.listdir(tmp_path) == []
    write_folder(tmp_path / "f", good)
    assert os.listdir(tmp_path / "f") == ["a"]
    with pytest.raises(StorageError, match="there already"):
        write_folder(tmp_path / "f", good)
    with pytest.raises(StorageError, match="there already"):
        check_free(tmp_path / "f")
    assert os.listdir(tmp_path) == ["f"]


def test_removing_a_tree_follows_no_link(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_bytes(b"1")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "tree")
    remove_tree(tmp_path / "tree")  # which is not there
    assert os.listdir(tmp_path) == ["kept"]
    assert read(tmp_path / "kept" / "a") == b"1"


def test_only_a_regular_file_of_a_sane_size_is_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    write_atomic(tmp_path / "a", b"12345")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "loop", tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(StorageError) as e:
            read(path)
        assert str(path) in str(e.value)
    with pytest.raises(StorageError, match="5 bytes; at most 4"):
        read(tmp_path / "a", limit=4)


HOLD = """
import sys, minilora.storage as s
try:
    with s.locked(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except s.LockedError as e:
    print(e, flush=True)
"""


def test_a_second_process_is_kept_out_until_the_first_dies(tmp_path):
    def child():
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PACKAGE.parent
        )

    with child() as first:
        assert first.stdout.readline() == "held\n"
        (tmp_path / ".a.1.0123abcd.tmp").write_bytes(b"")  # the holder's own, in the making
        with pytest.raises(LockedError, match=f"process {first.pid}"), locked(tmp_path):
            pass
        assert (tmp_path / ".a.1.0123abcd.tmp").exists()
        first.kill()
    with locked(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock"]  # what the dead one left is gone
        with child() as second:
            assert f"process {os.getpid()}" in second.stdout.readline()
    with locked(tmp_path):
        pass


def test_no_other_module_writes_files():
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name == "storage.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            where = f"{file.name}:{node.lineno}"
            if isinstance(node.func, ast.Attribute):
                name, owner = node.func.attr, ast.unparse(node.func.value)
                if "os.devnull" in ast.unparse(node):
                    continue
                assert name not in ("write_text", "write_bytes", "save_file", "tofile", "touch"), where
                assert owner != "os" or name not in ("open", "replace", "rename", "write", "makedirs"), where
                assert owner != "np" or not name.startswith("save"), where
            elif isinstance(node.func, ast.Name):
                name = node.func.id
            if name == "open":
                texts = {str(a.value) for a in ast.walk(node) if isinstance(a, ast.Constant)}
                modes = [text for text in texts if set(text) <= set("rwaxbt+")]
                assert not set("".join(modes)) & set("wax+"), where


def test_a_new_folder_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    write_folder(tmp_path / "f", lambda temp: None)
    assert calls == ["fsync", "rename", "fsync"]
