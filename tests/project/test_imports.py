"""Imports point up the reading order, each library has one door, and device work goes through xp."""

import ast
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
ORDER = [
    "shown", "errors", "forms", "backend", "ops", "layers", "model", "lora", "optim", "storage", "archives",
    "tensors", "data", "gguf", "tokenizer", "lanes", "train", "files", "patterns", "adapter_config",
    "recognise", "adapters", "sizes", "spectra", "compose", "merging", "plots", "report", "microscope",
    "finetune", "cluster", "experiments", "cli", "__main__",
]  # fmt: skip
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")
DOORS = {"cupy": {"backend", "cli"}, "gguf": {"gguf"}, "tokenizers": {"tokenizer"}}
NUMERIC = ["ops", "layers", "model", "lora", "optim", "spectra"]
TYPES = {"ndarray", "float32", "float64", "int64", "dtype", "errstate", "random.Generator"}
DRAWS = {"random.default_rng"}  # random numbers are drawn on the host
ON_THE_HOST = {"digest", "intruder_threshold"}


def room(file):
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(file):
    """(room or library, how deep) of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((name.split(".")[0], node.level) for name in names if name != "__version__")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_up_the_reading_order(file):
    depth = len(file.relative_to(PACKAGE).parts)
    for name, level in imports(file):
        if level == depth:
            assert ORDER.index(name) < ORDER.index(room(file)), f"{file.name} imports {name}"
            assert {name, room(file)} != {"model", "lora"}
        else:  # a sibling in the wing, or a library
            assert level < depth
            assert name != "minilora" or level, f"{file.name}: imports inside the package are relative"


def test_each_library_has_one_door():
    for file in FILES:
        names = {name for name, level in imports(file) if not level}
        assert "cupy" not in names
        assert "matplotlib" not in names or room(file) == "plots"
        assert not names & {"dask", "distributed"} or room(file) == "cluster"
        assert not names & {"torch", "transformers", "peft", "scipy", "pickle", "gguf", "tokenizers"}
        found = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
        for library, doors in DOORS.items():  # loaded by name, when it is needed
            assert library not in found or room(file) in doors, f"{file.name} names {library}"


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
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                assert room(file) == "backend", f"{file.name}:{node.lineno}"
