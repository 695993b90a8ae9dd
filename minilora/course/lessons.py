"""The lessons as notebooks, made from their sources and written anywhere, with solutions and data.

A source is Python in cells: "# %%" begins one of code, "# %% [markdown]" one of text in comments, and tags
may follow: tags=["exercise"] is a stub to be filled in, the cell after it its check; first (first.py is put
above it); claims (left out here: with them notebooks/build.py compares the numbers in the text). Lessons are
in the order of the numbers in their names. The sources are in a checkout, or in this folder once installed.
"""

import json
import platform
import re
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from ..errors import StorageError
from ..formats.atomic import Kind, read, write_atomic, write_folder
from ..table import Table

EXPERIMENTS = (  # whose rows the lessons read
    "known-rank", "subspaces", "intrinsic-dimension", "which-matrices", "scale", "initialisation",
    "beyond-language",
)  # fmt: skip
DATA = {  # where a lesson finds a file beside it -> the file in the repository, and what makes it
    "rows.jsonl": ("figures/rows.jsonl", "minilora sweep --out figures"),
    "serving.json": ("benchmarks/results/serving.json", "python benchmarks/serving.py"),
} | {
    f"{name}/rows.jsonl": (f"figures/{name}/rows.jsonl", f"minilora experiment {name} --out figures/{name}")
    for name in EXPERIMENTS
}
NEEDS = "jupyterlab ipywidgets gguf tokenizers scikit-learn"  # packages of the extra `notebooks`
ABOUT = (
    "Run each lesson from the top, in JupyterLab. At its end are exercises, which check your answers; the "
    "[solutions](solutions) are for later."
)
PICTURES = "figures/pictures"  # which a text shows by ![](attachment:NAME.png)
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class Cell(NamedTuple):
    """A cell of a source."""

    markdown: bool
    tags: list[str]
    source: str


def root() -> Path:
    """The folder of notebooks/, figures/ and benchmarks/; StorageError if this installation has none."""
    here = Path(__file__).resolve().parent
    for folder in (here, here.parents[1]):
        if (folder / "notebooks" / "src").is_dir():
            return folder
    raise StorageError(
        f"{here}: has no lessons; expected those of a wheel, or of a checkout of the repository"
    )


def lessons() -> tuple[str, ...]:
    """The names of all lessons, in order."""
    names = [path.stem for path in (root() / "notebooks" / "src").glob("[0-9]*_*.py")]
    return tuple(sorted(names, key=lambda name: int(name.partition("_")[0])))


def source(name: str) -> str:
    """The source of a lesson, or the part that all have first."""
    return read(root() / "notebooks" / "src" / f"{name}.py").decode()


def cells(text: str) -> Iterator[Cell]:
    """The cells of a source."""
    for part in re.split(r"^# %%", text, flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        tags = json.loads(match[1]) if (match := re.search(r"tags=(\[.*\])", head)) else []
        if markdown := "[markdown]" in head:
            body = re.sub(r"^# ?", "", body, flags=re.M)
        if "first" in tags:
            body = f"{source('first')}\n{body.strip()}"
        yield Cell(markdown, tags, body.strip())


class Opening(NamedTuple):
    """What a lesson says of itself first."""

    title: str
    see: str  # what one will see, in a sentence of Markdown
    needs: list[str]  # names of lessons


def opening(name: str) -> Opening:
    """The title of a lesson, the first sentence of what one will see, and the lessons that it needs."""
    head = next(cells(source(name))).source

    def part(label: str) -> str:
        found = re.search(rf"^\*\*{label}\.\*\* (.*?)(?:\n\n|\Z)", head, re.M | re.S)
        return " ".join(found[1].split()) if found else ""

    see = re.match(r".*?(?:[.?!](?= |$)|$)", part("What you will see"))
    needs = re.findall(r"\]\((\w+)\.ipynb\)", part("What you need"))
    return Opening(head.splitlines()[0].removeprefix("# "), see[0] if see else "", needs)


def readme() -> str:
    """The list of all lessons in Markdown, with what one will see in each and which ones it needs."""
    numbers = {name: name.partition("_")[0] for name in lessons()}
    rows = []
    for name, number in numbers.items():
        title, see, needs = opening(name)
        links = ", ".join(f"[{numbers[other]}]({other}.ipynb)" for other in needs)
        rows.append((f"{number}. [{title}]({name}.ipynb)", see, links or "–"))
    table = Table(("lesson", "what you will see", "needs"), rows).markdown("lll")
    return f"# Lessons\n\n{ABOUT}\n\n{table}\n"


def notebook(name: str) -> dict[str, Any]:
    """A lesson as a notebook to work in, without claims."""
    return document([cell for cell in cells(source(name)) if "claims" not in cell.tags])


def document(kept: Sequence[Cell]) -> dict[str, Any]:
    """Cells as a notebook without outputs, nbformat 4.5.

    It names this Python as its kernel does; else JupyterLab would add that, and call the notebook unsaved.
    """
    language = {
        "codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py",
        "mimetype": "text/x-python", "name": "python", "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3", "version": platform.python_version(),
    }  # fmt: skip
    return {
        "cells": [as_json(cell, number) for number, cell in enumerate(kept, 1)],
        "metadata": {"kernelspec": KERNEL, "language_info": language},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def as_json(cell: Cell, number: int) -> dict[str, Any]:
    """A cell of a notebook."""
    made: dict[str, Any] = {
        "cell_type": "markdown" if cell.markdown else "code", "id": f"cell-{number:02}",
        "metadata": {"tags": cell.tags} if cell.tags else {}, "source": cell.source,
    }  # fmt: skip
    if not cell.markdown:
        return made | {"execution_count": None, "outputs": []}
    folder, attached = root() / PICTURES, {}
    for name in re.findall(r"!\[\]\(attachment:(\w+)\.png\)", cell.source):
        says = json.loads(read(folder / "MANIFEST.json"))["says"][name]
        made["source"] = made["source"].replace(f"![](attachment:{name}", f"![{says}](attachment:{name}")
        attached[f"{name}.png"] = {"image/png": b64encode(read(folder / f"{name}.png")).decode()}
    return made | ({"attachments": attached} if attached else {})


def solutions() -> dict[str, str]:
    """Where the solutions lie beside the lessons -> the files in the repository."""
    return {f"solutions/{name}.md": f"notebooks/solutions/{name}.md" for name in lessons()}


@dataclass(frozen=True)
class Written:
    """A folder of lessons; prints how to open it."""

    folder: Path
    lessons: int

    def __str__(self) -> str:
        python = quote(sys.executable)
        return (
            f"{self.lessons} lessons without outputs, their data and solutions: {self.folder}\n"
            f"to open them: {python} -m pip install {NEEDS}\n"
            f"then: {python} -m jupyterlab {quote(str(self.folder))}"
        )


def write(out: Path | str = "lessons", overwrite: bool = False) -> Written:
    """Write all lessons to a new folder, with their list, the files they read and solutions/.

    StorageError if anything is there; with `overwrite` a folder of lessons is replaced, answers and all.
    """
    where, names = root(), lessons()
    files = {f"{name}.ipynb": json.dumps(notebook(name), indent=1, ensure_ascii=False) for name in names}
    files["README.md"] = readme().rstrip()
    copies = solutions() | {place: file for place, (file, _) in DATA.items()}

    def fill(temp: Path) -> None:
        for place, text in files.items():
            write_atomic(temp / place, f"{text}\n".encode())
        for place, file in copies.items():
            (temp / place).parent.mkdir(exist_ok=True)
            write_atomic(temp / place, read(where / file))

    known = [*files, *copies, *(f"{Path(place).parent}/" for place in copies)]
    course = Kind(
        "the lessons", marks=re.compile(re.escape(f"{names[0]}.ipynb")),
        files=re.compile(rf"{'|'.join(map(re.escape, known))}|(.*/)?\.ipynb_checkpoints/.*"),
    )  # fmt: skip
    write_folder(out, fill, overwrite, course)
    return Written(Path(out), len(names))
