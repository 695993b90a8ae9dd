"""Imports point down the list, each library has one door, and device work goes through xp."""

import ast

import pytest
from wings import PACKAGE, imports
from wings import module_name as module

ORDER = [  # a wing or a file stands above all that it imports
    "table", "errors", "backend", "digests", "ops", "layers", "tree", "targets", "model", "decoding", "lora",
    "adapters", "optim", "spectra",
    "methods.bias", "methods.dora", "methods.embedding", "methods.full_copy", "methods.lora_config",
    "methods.starts", "methods.intrinsic", "methods.vectors", "methods.bottleneck", "methods.prefixes",
    "methods.four_bit", "methods.quantize", "methods.bitsandbytes",
    "fast.folded", "fast.recompute", "fast.parallel", "fast.mixed", "fast.packed",
    "formats.atomic", "formats.forms", "formats.archives", "formats.safetensors", "formats.gguf",
    "formats.tokenizer", "formats.huggingface", "formats.checkpoint", "training", "session", "completion",
    "data.batching", "data.user_files", "data.corpora", "data.examples", "data.chat", "data.digits",
    "vision.vit", "vision.diffusion",
    "lora_files.contents", "lora_files.names", "lora_files.grammar", "lora_files.recognise",
    "lora_files.image", "lora_files.dictionaries", "lora_files.llama_cpp", "lora_files.opening",
    "peft.patterns", "peft.kinds", "peft.config", "peft.folder", "peft.image_forms",
    "peft.language_forms", "peft.convert", "peft.loading",
    "serve.bank", "serve.slots", "serve.engine", "serve.bench", "serve.metrics", "serve.openai",
    "serve.service", "serve.http",
    "merging.places", "merging.plan", "merging.changes", "merging.by_name", "merging.llama", "merging.merge",
    "compose.arithmetic", "compose.sparsify", "compose.ranks", "compose.truncate", "compose.extract",
    "compose.combine", "compose.quantize", "console",
    "analysis.count", "analysis.plotting", "analysis.report", "analysis.names", "analysis.figures",
    "analysis.measures", "analysis.tables", "analysis.inspect",
    "pictures.canvas", "pictures.maps", "pictures.blocks", "pictures.memory", "pictures.batch",
    "pictures.sheets", "pictures.trained", "pictures.images",
    "finetune", "experiments.cluster", "experiments.harness", "experiments.recipe", "experiments.rows",
    "experiments.rank_reading", "experiments.rank_figures", "experiments.reading",
    "experiments.merge_equivalence",
    "experiments.pretrain",
    "experiments.rank_sweep", "experiments.rank_report", "experiments.adding_adapters",
    "experiments.adding_figures", "experiments.known_rank", "experiments.known_figures",
    "experiments.which_matrices", "experiments.which_figures", "experiments.subspaces",
    "experiments.subspace_figures", "experiments.scale", "experiments.scale_figures",
    "experiments.forgetting", "experiments.forgetting_figures", "experiments.rivals",
    "experiments.rivals_figures",
    "experiments.initialisation", "experiments.initialisation_figures", "experiments.merging",
    "experiments.merging_figures",
    "experiments.cost", "experiments.cost_figures",
    "experiments.size", "experiments.size_figures",
    "experiments.beyond_tasks", "experiments.beyond_language", "experiments.beyond_figures",
    "experiments.intrinsic_tasks", "experiments.intrinsic_dimension", "experiments.intrinsic_figures",
    "experiments.questions", "claims.claim", "claims.ranks", "claims.size", "claims.dimension",
    "claims.choices", "claims.starts", "claims.full", "claims.rivals", "claims.beyond",
    "claims.use", "claims.cost", "claims.decided", "claims.ledger",
    "course.exercises", "course.lessons", "course.work",
    "lab.events", "lab.learning", "lab.planted", "lab.reading", "lab.lab", "lab.site", "course.lite",
    "flags", "cli", "__main__",
]  # fmt: skip
MOST = 8  # files of a wing, besides those with one method, one subject of claims, or one question
SUBJECTS = (
    "rank_", "merge_equivalence", "adding_", "known_", "which_", "subspace", "scale", "forgetting",
    "initialisation", "merging", "intrinsic_", "rivals", "size", "cost", "beyond_",
)  # fmt: skip
QUESTIONS = ("methods.", "claims.", *(f"experiments.{subject}" for subject in SUBJECTS))
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")
DOORS = {"cupy": {"backend", "cli"}, "gguf": {"formats.gguf", "peft.convert"},
         "tokenizers": {"formats.tokenizer"},
         "jinja2": {"data.chat"}, "sklearn": {"data.digits", "course.exercises"}}  # fmt: skip
NUMERIC = ["ops", "layers", "model", "lora", "optim", "spectra", "vision.vit"]
TYPES = {"ndarray", "float32", "float64", "int64", "dtype", "errstate", "random.Generator"}
DRAWS = {"random.default_rng"}  # random numbers are drawn on the host
ON_THE_HOST = {"digest", "intruder_threshold"}


def place(name):
    """Where a module stands in ORDER, itself or by its wing."""
    return next(i for i, entry in enumerate(ORDER) if name == entry or name.startswith(entry + "."))


@pytest.mark.parametrize("file", [f for f in FILES if f.name != "__init__.py"], ids=module)
def test_imports_point_down(file):
    for _, name, _, ours in imports(file):
        assert name != "minilora", f"{file.name}: imports inside the package are relative"
        if ours and name:  # not the package's own names
            assert place(name) < place(module(file)), f"{module(file)} imports {name}"
            assert {name, module(file)} != {"model", "lora"}


def test_every_file_is_in_the_order_and_a_wing_has_at_most_eight():
    files = {module(file) for file in FILES if file.name != "__init__.py"}
    assert {entry for entry in ORDER if entry not in files} <= {wing.name for wing in PACKAGE.iterdir()}
    assert all(place(name) is not None for name in files)
    for wing in {name.partition(".")[0] for name in files if "." in name}:
        others = [name for name in files if name.startswith(f"{wing}.") and not name.startswith(QUESTIONS)]
        assert len(others) <= MOST, wing


def test_each_library_is_imported_in_one_place():
    for file in FILES:
        names = {item.module for item in imports(file) if not item.ours}
        assert "cupy" not in names
        assert "threadpoolctl" not in names or module(file) == "backend"
        assert "hashlib" not in names or module(file) == "digests"
        assert "matplotlib" not in names or module(file) == "analysis.plotting"
        assert not names & {"dask", "distributed"} or module(file) == "experiments.cluster"
        assert not names & {"starlette", "uvicorn"} or module(file) == "serve.http"
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
def test_arrays_are_computed_through_xp_only(name):
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

    file = PACKAGE / f"{name.replace('.', '/')}.py"
    found = set(look(ast.parse(file.read_text())))
    assert not {f for f in found if not any(f == t or f.startswith(t + ".") for t in TYPES | DRAWS)}


def test_importing_only_defines_names():
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(
                node, ast.Import | ast.ImportFrom
            ):  # what a browser lacks is imported where it is used
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"fcntl", "resource"}, file.name
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                assert module(file) == "backend", f"{file.name}:{node.lineno}"
