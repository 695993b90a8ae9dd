"""A file is complete or as it was; one process at a time works in a folder; no other module writes."""

import ast
import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora.errors import FormatError, LockedError, StorageError
from minilora.formats import atomic
from minilora.formats.atomic import (
    append,
    check_free,
    clear,
    exchanged,
    locked,
    named,
    read,
    read_at,
    remove_tree,
    stamp_of,
    write_atomic,
    write_folder,
)  # fmt: skip

PACKAGE = Path(minilora.__file__).parent


def fails(number):
    def call(*args, **how):
        raise OSError(number, os.strerror(number))

    return call


@given(data=st.binary(max_size=5000))
def test_reading_gives_what_was_written(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("files")
    write_atomic(folder / "a", b"before")
    write_atomic(folder / "a", data)
    assert read(folder / "a") == data
    assert os.listdir(folder) == ["a"]


@given(pieces=st.lists(st.binary(max_size=300), max_size=20))
def test_pieces_are_written_in_order(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("files") / "a"
    write_atomic(path, iter(pieces))
    assert read(path) == b"".join(pieces)
    assert stamp_of(path).size == len(b"".join(pieces))


def test_an_error_while_producing_a_piece_keeps_the_old_file(tmp_path):
    def pieces():
        yield b"half"
        raise KeyError("half way")

    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(KeyError):
        write_atomic(tmp_path / "a", pieces())
    assert os.listdir(tmp_path) == ["a"]
    assert read(tmp_path / "a") == b"old"


@given(data=st.binary(max_size=300), start=st.integers(0, 300), count=st.integers(0, 300))
def test_a_range_is_read_or_the_error_says_where_the_file_ends(tmp_path_factory, data, start, count):
    path = tmp_path_factory.getbasetemp() / "part"
    path.write_bytes(data)
    if start + count <= len(data):
        assert read_at(path, start, count) == data[start : start + count]
    elif count:
        with pytest.raises(StorageError, match=f"ends at byte {max(start, len(data))}; it has changed"):
            read_at(path, start, count)


def test_a_short_read_is_continued(tmp_path, monkeypatch):
    """One call of the system may give less than was asked for."""
    write_atomic(tmp_path / "a", bytes(range(100)))
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, count: real(fd, min(count, 3)))
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


def test_data_are_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    write_atomic(tmp_path / "a", b"new")
    assert calls == ["write", "fsync", "replace", "fsync"]


@given(pieces=st.lists(st.binary(max_size=300), max_size=9))
def test_append_adds_at_the_end(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("files") / "a"
    for piece in pieces:
        append(path, piece)
    assert not pieces or read(path) == b"".join(pieces)


def test_an_append_is_synced_and_continues_a_short_write(tmp_path, monkeypatch):
    append(tmp_path / "a", b"old")
    calls, write, fsync = [], os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: (calls.append("write"), write(fd, data[:3]))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    append(tmp_path / "a", b"and new")
    monkeypatch.undo()
    assert calls == ["write", "write", "write", "fsync"]
    assert read(tmp_path / "a") == b"oldand new"


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_failed_append_leaves_the_file_unchanged(call, tmp_path, monkeypatch):
    append(tmp_path / "a", b"old")
    real, count = getattr(os, call), 0

    def full(*args, **how):
        """A disk that takes three bytes more."""
        nonlocal count
        count += 1
        if call == "write" and count == 1:
            return real(args[0], args[1][:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"a: not written: No space left on device"):
        append(tmp_path / "a", b"and new")
    monkeypatch.undo()
    assert read(tmp_path / "a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        write_atomic(tmp_path / "none" / "a", b"")


def test_a_folder_appears_completely_or_not_at_all(tmp_path):
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


def test_overwriting_replaces_the_whole_folder(tmp_path):
    write_folder(tmp_path / "f", filled("config.json", "a.md"))
    write_folder(tmp_path / "f", filled("config.json", "b.md"), overwrite=True)
    assert sorted(os.listdir(tmp_path / "f")) == ["b.md", "config.json"]
    write_folder(tmp_path / "g", filled("a"), overwrite=True)  # where there is none
    assert sorted(os.listdir(tmp_path)) == ["f", "g"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_whichever_call_fails_only_the_old_folder_remains(call, overwrite, tmp_path, monkeypatch):
    """Every call of the system in turn fails, until there is none left that could."""
    monkeypatch.setattr(atomic, "exchanged", lambda a, b: False)
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
    assert nth >= {"open": 6, "write": 2, "fsync": 6, "replace": 2, "rename": 1 + 2 * overwrite}[call]
    assert sorted(os.listdir(tmp_path / "f")) == ["a", "b"]
    assert os.listdir(tmp_path) == ["f"]


def test_an_incomplete_folder_does_not_replace_the_old_one(tmp_path):
    def bad(temp):
        write_atomic(temp / "a", b"1")
        assert os.listdir(tmp_path / "f") == ["config.json"]
        raise KeyError("half way")

    write_folder(tmp_path / "f", filled("config.json"))
    with pytest.raises(KeyError):
        write_folder(tmp_path / "f", bad, overwrite=True)
    assert os.listdir(tmp_path) == ["f"]
    assert os.listdir(tmp_path / "f") == ["config.json"]


def test_an_old_folder_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "f", filled("config.json"))
    monkeypatch.setattr(os, "rmdir", fails(errno.EBUSY))
    with pytest.raises(StorageError, match=r"f: is written, but the old folder, .*\.tmp, cannot be removed"):
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
def test_only_a_folder_of_a_model_or_adapter_is_overwritten(others, tmp_path):
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


def test_only_a_regular_file_within_the_size_limit_is_read(tmp_path):
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
import sys, minilora.formats.atomic as s
try:
    with s.locked(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except s.LockedError as e:
    print(e, flush=True)
"""


def test_a_lock_excludes_a_second_process_until_the_first_dies(tmp_path):
    def child():
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PACKAGE.parent
        )

    with child() as first:
        assert first.stdout.readline() == "held\n"
        (tmp_path / ".a.1.0123abcd.tmp").write_bytes(b"")  # the holder's own, in the making
        with pytest.raises(LockedError, match=f"process {first.pid} on {platform.node()}"), locked(tmp_path):
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
        if file.name == "atomic.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or "os.devnull" in ast.unparse(node):
                continue
            where = f"{file.name}:{node.lineno}"
            if isinstance(node.func, ast.Attribute):
                name, owner = node.func.attr, ast.unparse(node.func.value)
                assert name not in ("write_text", "write_bytes", "save_file", "tofile", "touch"), where
                assert name not in ("read_text", "read_bytes"), where
                assert owner != "os" or name not in ("open", "replace", "rename", "write", "makedirs"), where
                assert owner != "np" or not name.startswith("save"), where
            elif isinstance(node.func, ast.Name):
                name = node.func.id
            if name == "open":
                texts = {str(a.value) for a in ast.walk(node) if isinstance(a, ast.Constant)}
                modes = [text for text in texts if set(text) <= set("rwaxbt+")]
                assert not set("".join(modes)) & set("wax+"), where


def test_a_new_folder_is_on_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    write_folder(tmp_path / "f", lambda temp: None)
    assert calls == ["fsync", "rename", "fsync"]


# ---- links


LINKS = ("out of the folder", "absolute", "inside the folder", "a folder", "a link", "nowhere", "loop")


def put_link(kind, path):
    """A link of a kind at a path; beside its folder there is a secret."""
    secret, inside = path.parent.parent / "secret", path.with_name("inside")
    secret.write_bytes(b"secret")
    inside.write_bytes(b"inside")
    path.with_name("again").symlink_to("inside")
    targets = dict(zip(LINKS, ("../secret", secret, "inside", "..", "again", "none", path.name), strict=True))
    path.symlink_to(targets[kind])
    return secret


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize(
    "call",
    [read, stamp_of, lambda p: read_at(p, 0, 1), lambda p: write_atomic(p, b"new"),
     lambda p: append(p, b"new")],
)  # fmt: skip
def test_no_link_is_followed(call, kind, tmp_path):
    path = tmp_path / "f" / "a"
    path.parent.mkdir()
    secret = put_link(kind, path)
    with pytest.raises(StorageError, match=r"a: is (a link, which is|not a regular file without hard links)"):
        call(path)
    assert secret.read_bytes() == b"secret"
    assert path.is_symlink()
    assert sorted(os.listdir(path.parent)) == ["a", "again", "inside"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "second name", *LINKS])
def test_a_lock_is_never_a_link_or_a_fifo(kind, tmp_path):
    """What stands in its place would be emptied, or waited for."""
    path, other = tmp_path / "f" / ".lock", tmp_path / "v"
    other.write_bytes(b"mine")
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "second name":
        os.link(other, path)
    else:
        put_link(kind, path)
    with pytest.raises(StorageError, match="f"), locked(path.parent):
        pass
    assert other.read_bytes() == b"mine"
    assert (tmp_path / "f" / "inside").exists() is (kind in LINKS)


def test_a_link_is_locked_only_if_the_user_named_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(StorageError), locked(tmp_path / "link"):
        pass
    assert os.listdir(tmp_path / "real") == []
    with locked(named(tmp_path / "link")):
        assert os.listdir(tmp_path / "real") == [".lock"]


def test_a_hard_linked_file_is_read_and_not_replaced(tmp_path):
    (tmp_path / "v").write_bytes(b"mine")
    os.link(tmp_path / "v", tmp_path / "a")
    assert read(tmp_path / "a") == b"mine"  # pip and uv put files into place so
    with pytest.raises(StorageError, match="hard links"):
        write_atomic(tmp_path / "a", b"new")
    with pytest.raises(StorageError, match="hard links"):
        append(tmp_path / "a", b"new")
    assert (tmp_path / "v").read_bytes() == b"mine"


def test_a_link_swapped_in_before_opening_is_not_written(tmp_path, monkeypatch):
    """A link that somebody puts there just then is not followed, nor is a second name written."""
    (tmp_path / "v").write_bytes(b"mine")
    for put in (os.symlink, os.link):
        (tmp_path / "a").write_bytes(b"old")
        real = os.open

        def meanwhile(path, *args, put=put, real=real, **how):
            os.unlink(tmp_path / "a")
            put(tmp_path / "v", tmp_path / "a")
            return real(path, *args, **how)

        monkeypatch.setattr(os, "open", meanwhile)
        with pytest.raises(StorageError, match="a: "):
            append(tmp_path / "a", b"new")
        monkeypatch.undo()
        os.unlink(tmp_path / "a")
    assert (tmp_path / "v").read_bytes() == b"mine"


def test_a_path_named_by_the_user_may_be_a_link(tmp_path):
    (tmp_path / "v").write_bytes(b"text")
    (tmp_path / "a").symlink_to("v")
    assert read(named(tmp_path / "a")) == read(named(tmp_path / "v")) == b"text"
    assert named("none") == Path("none")
    for kind in ("none", "/dev/zero"):
        (tmp_path / "b").unlink(missing_ok=True)
        (tmp_path / "b").symlink_to(kind)
        with pytest.raises(StorageError, match="b: "):
            named(tmp_path / "b")


HASH = "0123abcd" * 8


def hub(root, deep=""):
    """A file as the hub's client lays it out: (the link, the blob)."""
    path, blob = root / "snapshots" / "main" / deep / "config.json", root / "blobs" / HASH
    path.parent.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_bytes(b"{}")
    path.symlink_to(os.path.relpath(blob, path.parent))
    return path, blob


@pytest.mark.parametrize("deep", ["", "sub", "sub/sub"])
def test_a_link_into_the_blobs_of_the_hubs_cache_is_followed(deep, tmp_path):
    path, _ = hub(tmp_path, deep)
    assert read(path) == b"{}"
    (tmp_path / "mine").symlink_to(path.parent)  # the user's own
    assert read(tmp_path / "mine" / "config.json") == b"{}"


def moved(path, to):
    os.rename(path, to)
    path.symlink_to(to)


ALMOST = {
    "blobs is a link": lambda path, blob: moved(blob.parent, blob.parent.with_name("b")),
    "the blob is a link": lambda path, blob: moved(blob, blob.with_name("b")),
    "snapshots is a link": lambda path, blob: moved(path.parent.parent, path.parent.parent.with_name("s")),
    "snapshots has another name": lambda path, blob: os.rename(
        path.parent.parent, blob.parent.with_name("s")
    ),
    "it is absolute": lambda path, blob: (path.unlink(), path.symlink_to(blob)),
    "it is one higher": lambda path, blob: (path.unlink(), path.symlink_to(f"../../../blobs/{HASH}")),
    "the blob is deeper": lambda path, blob: (path.unlink(), path.symlink_to("../../blobs/a/b")),
    "the blob has a dot": lambda path, blob: (path.unlink(), path.symlink_to("../../blobs/..")),
    "the blob is a folder": lambda path, blob: (blob.unlink(), blob.mkdir()),
    "it goes astray": lambda path, blob: (path.unlink(), path.symlink_to(f"../main/../../blobs/{HASH}")),
}


@pytest.mark.parametrize("kind", ALMOST)
def test_a_link_that_is_not_quite_the_hubs_is_not_followed(kind, tmp_path):
    path, blob = hub(tmp_path / "models")
    ALMOST[kind](path, blob)
    if not path.is_symlink():
        path = tmp_path / "models" / "s" / "main" / "config.json"
    with pytest.raises(StorageError):
        read(path)


# ---- what the dead left


def test_two_folders_are_exchanged_atomically(tmp_path):
    for name in "ab":
        write_folder(tmp_path / name, filled(name))
    if not exchanged(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system has no such step")
    assert (os.listdir(tmp_path / "a"), os.listdir(tmp_path / "b")) == (["b"], ["a"])
    with pytest.raises(FileNotFoundError):
        exchanged(tmp_path / "a", tmp_path / "none")


def test_while_overwriting_the_name_always_exists(tmp_path, monkeypatch):
    for name in ("f", "g"):
        write_folder(tmp_path / name, filled("config.json"))
    if not exchanged(tmp_path / "f", tmp_path / "g"):
        pytest.skip("this system or file system has no such step")
    monkeypatch.setattr(os, "rename", None)
    write_folder(tmp_path / "f", filled("config.json", "new.md"), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["f", "g"]
    assert sorted(os.listdir(tmp_path / "f")) == ["config.json", "new.md"]


names = st.text("ab.*[+$\\", min_size=1, max_size=6).filter(lambda name: name not in (".", ".."))


@given(name=names, other=names)
def test_clearing_removes_leftovers_of_that_name_only(tmp_path_factory, name, other):
    folder = tmp_path_factory.mktemp("left")
    ours, theirs = (folder / f".{n}.1.0123abcd.tmp" for n in (name, other))
    ends = (".tmp", ".1.0123abcd.tmp.mine", ".x.0123abcd.tmp", ".1.0123abcd.new")
    kept = [f"{name}.1.0123abcd.tmp", *(f".{name}{end}" for end in ends)]
    for path in (ours, theirs, *(folder / n for n in kept)):
        path.write_bytes(b"")
    (folder / f".{name}.2.0123abcd.tmp").mkdir()
    (folder / f".{name}.2.0123abcd.tmp" / "half").write_bytes(b"")
    (folder / f".{name}.3.0123abcd.tmp").symlink_to(folder)
    clear(folder, name)
    left = {*kept, f".{name}.3.0123abcd.tmp", *([theirs.name] if other != name else [])}
    assert set(os.listdir(folder)) == left


def test_a_folder_being_written_is_not_cleared(tmp_path):
    """Whatever its process id is: it is held."""

    def fill(temp):
        os.rename(temp, held := temp.with_name(".f.1.0123abcd.tmp"))
        clear(tmp_path, "f")
        assert held.exists()
        os.rename(held, temp)
        write_atomic(temp / "a", pieces(temp))

    def pieces(temp):
        yield b"1"
        (half,) = (path for path in temp.iterdir() if path.name.startswith(".a."))
        clear(temp, "a")
        assert half.exists()
        yield b"2"

    write_folder(tmp_path / "f", fill)
    assert read(tmp_path / "f" / "a") == b"12"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("there", [False, True])
def test_an_unfinished_overwrite_is_undone_and_reported(there, tmp_path, capsys):
    for name in ("f", ".f.7.0123abcd.old", ".f.7.0123abcd.tmp")[0 if there else 1 :]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    with pytest.raises(StorageError, match="there already"):
        check_free(tmp_path / "f")
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f" / "config.json").read_text() == ("f" if there else ".f.7.0123abcd.old")
    assert capsys.readouterr().err.count("is put back") == (not there)


def test_locking_a_folder_restores_what_an_unfinished_overwrite_moved_away(tmp_path, capsys):
    """Not only who writes that name again."""
    (tmp_path / ".f.7.0123abcd.old").mkdir()
    with locked(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "f"]
    assert "f: is put back" in capsys.readouterr().err


def test_without_locks_nothing_is_cleared(tmp_path, monkeypatch):
    """What a process that still lives is making has the same name as what a dead one left."""
    left = tmp_path / ".a.1.00000000.tmp"
    left.write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)
        write_atomic(tmp_path / "a", b"one")
        with locked(tmp_path / "held"):
            assert left.exists()
    write_atomic(tmp_path / "a", b"two")
    assert (sorted(os.listdir(tmp_path)), (tmp_path / "a").read_bytes()) == (["a", "held"], b"two")


@pytest.mark.parametrize("error", [FormatError("no text"), ValueError("no number"), KeyError("x")], ids=repr)
def test_an_error_of_the_fill_function_is_raised_unchanged(error, tmp_path):
    def fill(temp):
        raise error

    with pytest.raises(type(error)) as e:
        write_folder(tmp_path / "a", fill)
    assert e.value is error
    assert os.listdir(tmp_path) == []
    with pytest.raises(StorageError, match="embedded null byte"):
        write_atomic(tmp_path / "a\0", b"")
