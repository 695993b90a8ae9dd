"""A file is complete or as it was; one process at a time works in a folder; no other module writes."""

import ast
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora.errors import LockedError, StorageError
from minilora.storage import (
    check_free,
    locked,
    read,
    read_at,
    remove_tree,
    size_of,
    write_atomic,
    write_folder,
)  # fmt: skip

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


@given(pieces=st.lists(st.binary(max_size=300), max_size=20))
def test_pieces_are_written_in_a_row(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("files") / "a"
    write_atomic(path, iter(pieces))
    assert read(path) == b"".join(pieces)
    assert size_of(path) == len(b"".join(pieces))


def test_a_piece_that_cannot_be_made_leaves_the_old_file(tmp_path):
    def pieces():
        yield b"half"
        raise KeyError("half way")

    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(KeyError):
        write_atomic(tmp_path / "a", pieces())
    assert os.listdir(tmp_path) == ["a"]
    assert read(tmp_path / "a") == b"old"


@given(data=st.binary(max_size=300), start=st.integers(0, 300), count=st.integers(0, 300))
def test_a_part_is_read_or_it_is_said_where_the_file_ends(tmp_path_factory, data, start, count):
    path = tmp_path_factory.getbasetemp() / "part"
    path.write_bytes(data)
    if start + count <= len(data):
        assert read_at(path, start, count) == data[start : start + count]
    elif count:
        with pytest.raises(StorageError, match=f"ends at byte {max(start, len(data))}; it has changed"):
            read_at(path, start, count)


def test_a_part_that_comes_in_pieces_is_read_whole(tmp_path, monkeypatch):
    """One call of the system may give less than was asked for."""

    class Reluctant(io.FileIO):
        def read(self, count):
            return super().read(min(count, 3))

    write_atomic(tmp_path / "a", bytes(range(100)))
    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Reluctant(path, "rb"))
    found = read_at(tmp_path / "a", 10, 50)
    monkeypatch.undo()
    assert found == bytes(range(10, 60))


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


def filled(*names):
    """What writes files of these names and nothing else."""

    def fill(temp):
        for name in names:
            write_atomic(temp / name, name.encode())

    return fill


def test_overwriting_replaces_a_folder_by_the_whole_new_one(tmp_path):
    write_folder(tmp_path / "f", filled("config.json", "a.md"))
    write_folder(tmp_path / "f", filled("config.json", "b.md"), overwrite=True)
    assert sorted(os.listdir(tmp_path / "f")) == ["b.md", "config.json"]
    write_folder(tmp_path / "g", filled("a"), overwrite=True)  # where there is none
    assert sorted(os.listdir(tmp_path)) == ["f", "g"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_whatever_fails_the_old_folder_stays_and_nothing_else(call, overwrite, tmp_path, monkeypatch):
    """Every call of the system in turn fails, until there is none left that could."""
    real, fill = getattr(os, call), filled("a", "b")
    if overwrite:
        write_folder(tmp_path / "f", filled("config.json"))
    for nth in range(100):
        left = nth

        def failing(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                write_folder(tmp_path / "f", fill, overwrite)
                break
            except StorageError as e:
                said = str(e)
        assert "not written: No space left on device" in said
        assert os.listdir(tmp_path) == ["f"] * overwrite
        assert not overwrite or os.listdir(tmp_path / "f") == ["config.json"]
    assert nth >= {"open": 6, "write": 2, "fsync": 6, "replace": 2, "rename": 1 + overwrite}[call]
    assert sorted(os.listdir(tmp_path / "f")) == ["a", "b"]
    assert os.listdir(tmp_path) == ["f"]


def test_a_half_made_folder_does_not_replace_the_old_one(tmp_path):
    def bad(temp):
        write_atomic(temp / "a", b"1")
        assert os.listdir(tmp_path / "f") == ["config.json"]
        raise KeyError("half way")

    write_folder(tmp_path / "f", filled("config.json"))
    with pytest.raises(KeyError):
        write_folder(tmp_path / "f", bad, overwrite=True)
    assert os.listdir(tmp_path) == ["f"]
    assert os.listdir(tmp_path / "f") == ["config.json"]


def test_what_cannot_be_removed_is_named_and_the_new_folder_is_there(tmp_path, monkeypatch):
    write_folder(tmp_path / "f", filled("config.json"))
    monkeypatch.setattr(os, "rmdir", fails(errno.EBUSY))
    with pytest.raises(StorageError, match=r"f: is written; .*\.tmp, what was there, is not removed"):
        write_folder(tmp_path / "f", filled("new"), overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path / "f") == ["new"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "here"])
def test_only_a_folder_is_overwritten(kind, tmp_path, monkeypatch):
    path = tmp_path / "f"
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "here":
        monkeypatch.chdir(tmp_path)
        path = Path(".")
    else:
        path.symlink_to(tmp_path / "g")
        if kind == "link":
            (tmp_path / "g").mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(StorageError):
        write_folder(path, filled("a"), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("others", [["a.txt"], ["a.json"], ["config.json", "sub"], ["config.json", "x.py"]])
def test_nobody_elses_folder_is_overwritten(others, tmp_path):
    for name in others:
        path = tmp_path / "f" / name
        (path if name == "sub" else path.parent).mkdir(parents=True, exist_ok=True)
        if name != "sub":
            path.write_bytes(b"mine")
    with pytest.raises(StorageError, match="only the folder of a model or adapter is overwritten"):
        write_folder(tmp_path / "f", filled("config.json"), overwrite=True)
    assert sorted(os.listdir(tmp_path / "f")) == sorted(others)
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
