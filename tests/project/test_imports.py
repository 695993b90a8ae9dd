"""Imports point down the list, each library has one door, and device work goes through xp."""

import ast
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
ORDER = [  # a wing or a file stands above all that it imports
    "table", "errors", "backend", "digests", "ops", "layers", "tree", "model", "decoding", "lora", "optim",
    "spectra", "fast", "formats.atomic", "formats.forms", "formats.archives", "formats.safetensors",
    "formats.gguf", "formats.tokenizer", "formats.huggingface", "formats.checkpoint", "training", "session",
    "completion",
    "data.batching", "data.user_files", "data.corpora", "data.examples",
    "peft.patterns", "peft.config", "peft.recognise", "peft.folder", "peft.loading",
    "compose.truncate", "compose.extract", "compose.export",
    "analysis.count", "analysis.plotting", "analysis.report", "analysis.figures", "analysis.inspect",
    "finetune", "experiments.rows", "experiments.cluster", "experiments.rank_figures",
    "experiments.merge_equivalence", "experiments.pretrain", "experiments.rank_sweep", "console", "flags",
    "cli", "__main__",
]  # fmt: skip
MOST = 8  # files of a wing
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")
DOORS = {"cupy": {"backend", "cli"}, "gguf": {"formats.gguf"}, "tokenizers": {"formats.tokenizer"}}
NUMERIC = ["ops", "layers", "model", "lora", "optim", "spectra"]
TYPES = {"ndarray", "float32", "float64", "int64", "dtype", "errstate", "random.Generator"}
DRAWS = {"random.default_rng"}  # random numbers are drawn on the host
ON_THE_HOST = {"digest", "intruder_threshold"}


def module(file):
    """lora.py -> lora, formats/gguf.py -> formats.gguf, formats/__init__.py -> formats."""
    return ".".join(part for part in file.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


def imports(file):
    """(module of this package or library, whether it is ours) of every import of a file, in functions too."""
    wing = file.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield node.module.split(".")[0], False
                continue
            start = ".".join([*wing[: len(wing) + 1 - node.level], *(node.module or "").split(".")]).strip(
                "."
            )
            names = [f"{start}.{alias.name}".strip(".") for alias in node.names]
            known = [name for name in names if (PACKAGE / name.replace(".", "/")).with_suffix(".py").exists()]
            yield from ((name, True) for name in known)
            if len(known) < len(names) and start:
                yield start, True


def place(name):
    """Where a module stands in ORDER, itself or by its wing."""
    return next(i for i, entry in enumerate(ORDER) if name == entry or name.startswith(entry + "."))


@pytest.mark.parametrize("file", [f for f in FILES if f.name != "__init__.py"], ids=module)
def test_imports_point_down(file):
    for name, ours in imports(file):
        assert name != "minilora", f"{file.name}: imports inside the package are relative"
        if ours:
            assert place(name) < place(module(file)), f"{module(file)} imports {name}"
            assert {name, module(file)} != {"model", "lora"}


def test_every_file_has_its_place_and_a_wing_has_at_most_eight():
    files = {module(file) for file in FILES if file.name != "__init__.py"}
    assert {entry for entry in ORDER if entry not in files} <= {wing.name for wing in PACKAGE.iterdir()}
    assert all(place(name) is not None for name in files)
    for wing in {name.partition(".")[0] for name in files if "." in name}:
        assert sum(name.startswith(f"{wing}.") for name in files) <= MOST, wing


def test_each_library_has_one_door():
    for file in FILES:
        names = {name for name, ours in imports(file) if not ours}
        assert "cupy" not in names
        assert "threadpoolctl" not in names or module(file) == "backend"
        assert "hashlib" not in names or module(file) in ("digests", "experiments.rank_sweep")
        assert "matplotlib" not in names or module(file) == "analysis.plotting"
        assert not names & {"dask", "distributed"} or module(file) == "experiments.cluster"
        assert not names & {
            "torch",
            "transformers",
            "peft",
            "scipy",
            "pickle",
            "gguf",
            "tokenizers",
            "safetensors",
        }
        found = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
        for library, doors in DOORS.items():  # loaded by name, when it is needed
            assert library not in found or module(file) in doors, f"{file.name} names {library}"


@pytest.mark.parametrize("name", NUMERIC)
def test_device_work_goes_through_xp(name):
    def look(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):  # whose signature says that it handles host arrays
                signature = ast.unparse(child.args) + ast.unparse(child.returns)
                if "np.ndarray" in signature or child.name in ON_THE_HOST:
                    continue
            if isinstance(child, ast.Attribute):
                text = ast.unparse(child)
                if text.startswith("np."):
                    yield text[3:]
                    continue
            yield from look(child)

    found = set(look(ast.parse((PACKAGE / f"{name}.py").read_text())))
    assert not {f for f in found if not any(f == t or f.startswith(t + ".") for t in TYPES | DRAWS)}


def test_importing_has_no_effect_but_names():
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):  # what Windows and a browser lack is imported where it is used
                assert not {alias.name for alias in node.names} & {"fcntl", "resource"}, file.name
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                assert module(file) == "backend", f"{file.name}:{node.lineno}"
