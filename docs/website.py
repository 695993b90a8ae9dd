"""Build the site: `python docs/website.py --out DIR`. Nothing is fetched, and every warning is an error.

Most pages are the repository's own. The others are made here from what is there: the start page (the README),
the gallery, the reference of `minilora`, and a page for every source file that another page links. Sphinx
renders them, as conf.py says.
"""

import argparse
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import minilora as ml
from minilora.errors import StorageError
from minilora.experiments import questions, rank_figures, rank_report, rank_sweep
from minilora.formats.atomic import Kind, write_folder

ROOT = Path(__file__).resolve().parents[1]
MENU = {  # where the pages of docs/ stand in the navigation; one that is not named here comes last
    "How to": ("lab", "fine_tuning", "adapters", "your_experiment", "cluster", "serving", "serving_http"),
    "What was found": (
        "claims", "which_rank", "low_rank", "what_to_adapt", "rivals", "beyond_language", "forgetting",
        "merging", "adding_adapters", "four_bits", "cost", "speed",
    ),
    "Reference": ("modules",),
    "Project": ("decisions", "trust"),
}  # fmt: skip
LESSONS = "notebooks/README.md"
FORMATS = "benchmarks/results/lora_formats.md"
LISTS = {
    "figures": "gallery.md",
    "notebooks": LESSONS,
    "benchmarks/results": "results.md",
}  # of a folder
SITE = Kind(
    "a site", marks=re.compile(r"objects\.inv"),
    files=re.compile(r"(.*/)?(_\w+/.*|[^/]+\.html|)|objects\.inv|searchindex\.js|\.buildinfo"),
)  # fmt: skip
LANGUAGES = {  # of a file that has a page of its own
    ".py": "python", ".sh": "bash", "": "bash", ".yml": "yaml", ".txt": "text", ".md": "markdown",
    ".html": "text", ".css": "text", ".js": "text",  # whose lexers do not know all of today's syntax
}  # fmt: skip
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def found(*patterns: str) -> list[str]:
    """The files of some patterns, as paths from the root; 9 stands before 10."""
    paths = (path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(paths, key=lambda path: [part.zfill(4) for part in re.split(r"(\d+)", path)])


def read(path: str) -> str:
    """A file of the repository; a lesson has its pictures in place, and its first lines of code folded."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".ipynb"):
        return text
    lesson = json.loads(text)
    for cell in lesson["cells"]:
        if {"first", "solution"} & {*cell["metadata"].get("tags", [])}:
            cell["metadata"]["tags"].append("hide-input")
        for name, forms in cell.pop("attachments", {}).items():
            for kind, data in forms.items():
                source = "".join(cell["source"])
                cell["source"] = source.replace(f"(attachment:{name})", f"(data:{kind};base64,{data})")
    return json.dumps(lesson)


def title(page: str) -> str:
    """The first heading of a page, or of a lesson."""
    return re.search(r'(?:^|")# (.*?)(?:\\n|"|$)', page, re.M)[1]


def first(thing: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


# ---- the navigation


def menu() -> dict[str, list[str]]:
    """The title of a section -> its pages."""
    docs = found("docs/*.md")
    sections = {"Course": [LESSONS]}
    for section, names in MENU.items():
        sections[section] = [path for name in names if (path := f"docs/{name}.md") in docs]
    sections["What was found"] += ["gallery.md", "results.md"]
    sections["Reference"] = ["api.md", FORMATS, "ARCHITECTURE.md", *sections["Reference"]]
    sections["Project"] += ["CONTRIBUTING.md", "CHANGELOG.md"]
    sections["More"] = [path for path in docs if path not in chain(*sections.values())]
    return {section: paths for section, paths in sections.items() if paths}


def toctree(paths: Iterable[str], *options: str) -> str:
    """Pages that stand below this one in the navigation."""
    return "\n".join(["```{toctree}", *options, "", *paths, "```", ""])


def start(pages: dict[str, str]) -> str:
    """The start page: the README, and before its second heading a card for every section."""
    head, rest = re.split(r"^(?=## )", read("README.md"), maxsplit=1, flags=re.M)
    parts = [head, "::::{grid} 1 2 2 2", ":gutter: 3"]
    for section, paths in menu().items():
        shown = paths if section != "Course" else found("notebooks/*.ipynb")
        said = " · ".join(title(pages[path]) for path in shown)
        card = [
            f":::{{grid-item-card}} {section}",
            f":link: {paths[0].removesuffix('.md')}",
            ":link-type: doc",
        ]
        parts += [*card, "", said, ":::"]
    trees = [toctree(paths, ":hidden:", f":caption: {section}") for section, paths in menu().items()]
    return "\n".join([*parts, "::::", "", rest, *trees])


# ---- the gallery


@cache
def commands() -> dict[str, str]:
    """Every committed figure -> the command that draws it; ValueError for one that nothing draws."""
    programs, drawn = {Path(path).stem: path for path in found("benchmarks/*.py")}, {}
    for figure in found("figures/**/*.png", "benchmarks/results/*.png"):
        folder, name = os.path.split(figure)
        program = max((stem for stem in programs if name.startswith(stem)), key=len, default="")
        if (ROOT / folder / "MANIFEST.json").exists():
            drawn[figure] = json.loads(read(f"{folder}/MANIFEST.json"))["command"]
        elif Path(folder).name in questions.MODULES:
            drawn[figure] = f"minilora experiment {Path(folder).name} --out {folder}"
        elif folder == "benchmarks/results" and program:
            drawn[figure] = f"python {programs[program]}"
        else:
            raise ValueError(f"{figure}: there is no {folder}/MANIFEST.json with the command that draws it")
    return drawn


def sentences() -> dict[str, str]:
    """Figure -> the sentence that says what it shows, from the code that draws it."""
    pictures = rank_report.pictures(rank_sweep.read_rows(ROOT / "figures/rows.jsonl"))
    merged = json.loads(read("figures/merge_equivalence.json"))
    pictures["merge_equivalence"] = rank_figures.merge_equivalence(merged)
    for name in questions.MODULES:
        rows, reads = questions.measured(name, ROOT / "figures")
        pictures |= {f"{name}/{which}": picture for which, picture in reads.pictures(rows).items()}
    return {f"figures/{name}.png": picture.says for name, picture in pictures.items()}


def chapters() -> dict[str, str]:
    """Folder of figures -> the question that they answer, or what they show."""
    asked = {f"figures/{name}": first(questions.question(name)[0]) for name in questions.MODULES}
    return {
        "figures/pictures": "LoRA in pictures", "figures": "The rank sweep",
        **{folder: re.match(r"[^?:]*\??", said)[0] for folder, said in asked.items()},
        "benchmarks/results": "Speed and memory",
    }  # fmt: skip


def anchor(figure: str) -> str:
    """The name of a figure in the gallery."""
    return re.sub(r"\W+", "-", figure.removesuffix(".png"))


def gallery(pages: dict[str, str], says: dict[str, str]) -> str:
    """Every figure with what it shows, and the command that draws it."""
    links = (link for path, page in pages.items() for link in LINK.finditer(page) if path.endswith(".md"))
    alt = {Path(link[3]).stem: link[2] for link in links if link[1]}  # as other pages say it
    parts = ["---", "hide-toc: true", "---", "# Gallery", "", "Every figure, and the command that draws it."]
    grid = ["", "::::{grid} 1 1 2 2", ":class-container: gallery", ":gutter: 4"]
    for folder in dict.fromkeys([*(heads := chapters()), *map(os.path.dirname, commands())]):
        figures = [figure for figure in commands() if os.path.dirname(figure) == folder]
        parts += ["", f"## {heads.get(folder, Path(folder).name)}", *grid] if figures else []
        for figure in figures:
            brief = alt.get(Path(figure).stem, Path(figure).stem.replace("_", " "))
            caption = re.sub(r"([*<>$\[\]`\\])", r"\\\1", says.get(figure, brief))
            options = [f":name: {anchor(figure)}", f":alt: {brief}", ":width: 100%"]
            parts += [":::{grid-item}", f"```{{figure}} {figure}", *options, "", caption, "```"]
            parts += ["", f"`{commands()[figure]}`", ":::"]
        parts += ["::::"] if figures else []
    return "\n".join(parts) + "\n"


# ---- the reference


def reference() -> dict[str, str]:
    """The pages of the reference: one for every folder of the package, and the list of all names."""
    folders: dict[str, list[str]] = {"": []}
    for name, thing in ((name, getattr(ml, name)) for name in ml.__all__):
        part = (thing.__name__ if inspect.ismodule(thing) else thing.__module__).split(".")[1]
        folders.setdefault(part if (ROOT / "minilora" / part).is_dir() else "", []).append(name)
    listed, pages = ["# Python API", "", "All public names of `import minilora as ml`."], {}
    for folder, names in sorted(folders.items()):
        said = (
            first(sys.modules[f"minilora.{folder}"])
            if folder
            else "What the files directly in `minilora/` hold."
        )
        path, heading = f"api/{folder or 'minilora'}.md", f"minilora.{folder}".strip(".")
        page = [f"# {heading}", "", said, ""]
        listed += ["", f"## [{heading}]({path})", "", said, "", "| name | what it does |", "| --- | --- |"]
        for name, thing in ((name, getattr(ml, name)) for name in names):
            kind = "module" if inspect.ismodule(thing) else "class" if inspect.isclass(thing) else "function"
            target = thing.__name__ if kind == "module" else f"minilora.{name}"
            options = [] if kind == "function" else [":members:"]
            options += [":imported-members:"] if hasattr(thing, "__path__") else []
            page += ["```{eval-rst}", f".. auto{kind}:: {target}", *(f"   {o}" for o in options), "```", ""]
            listed += [f"| {{py:obj}}`{name} <{target}>` | {first(thing).replace('|', chr(92) + '|')} |"]
        pages[path] = "\n".join(page)
    return {"api.md": "\n".join([*listed, "", toctree(pages, ":hidden:")])} | pages


# ---- the tree that Sphinx reads


def pages(says: dict[str, str]) -> dict[str, str]:
    """Path -> text of every page; `says` are the captions of figures."""
    measured = [path for path in found("benchmarks/*.md", "benchmarks/results/*.md") if path != FORMATS]
    own = [*found("notebooks/*.ipynb", "notebooks/*.md", "docs/*.md"), *measured, FORMATS]
    every = {path: read(path) for path in [*own, "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]}
    every |= reference() | {
        "results.md": f"# Results\n\n{toctree(measured, ':titlesonly:')}",
    }
    below = [f"/{path}" for path in [*found("notebooks/*.ipynb"), "notebooks/COVERAGE.md"]]
    every[LESSONS] += "\n" + toctree(below, ":hidden:")
    every["gallery.md"] = gallery(every | {"README.md": read("README.md")}, says)
    return every | {"index.md": start(every)}


def listing(path: str) -> str:
    """The page of a file of the source, or of a folder."""
    head = ["---", "orphan: true", "nosearch: true", "---", f"# `{path}`", ""]
    if (ROOT / path).is_dir():
        inside = [other for other in found(f"{path}/*") if not Path(other).name.startswith("__")]
        return "\n".join([*head, *(f"- [`{Path(other).name}`](/{other})" for other in inside)])
    fence, language = "`" * 8, LANGUAGES[Path(path).suffix]
    return "\n".join([*head, f"{fence}{{code-block}} {language}", ":linenos:", "", read(path), fence])


def lay_out(folder: Path, every: dict[str, str]) -> None:
    """Write pages, all that they show and link, and a page for each file of the source among it."""
    figures = commands()

    def copy(path: str) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)

    def led(page: str, link: re.Match[str]) -> str:
        """A link, to where the site has what it leads to."""
        image, words, target, heading = link.groups(default="")
        path = os.path.normpath(Path("/", page).parent / target)[1:]
        file = ROOT / path
        if path == "README.md" or path in every or not file.exists():
            path = "index.md" if path == "README.md" else path
        elif path in figures and not image:
            return f"[{words}](#{anchor(path)})"
        elif path in LISTS:
            path = LISTS[path]
        elif file.is_dir() or file.suffix in LANGUAGES:
            if not (folder / f"source/{path}.md").exists():
                write(f"source/{path}.md", listing(path))
            path, heading = f"source/{path}.md", ""
        else:
            copy(path)
        return f"{image}[{words}](/{path}{heading})"

    def write(page: str, text: str) -> None:
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).touch()  # a folder's page and its files' link each other
        (folder / page).write_text(LINK.sub(lambda link: led(page, link), text), encoding="utf-8")

    for figure in figures:
        copy(figure)
    for page, text in every.items():
        write(page, text)


def build(site: Path) -> None:
    """Build into an empty folder; SystemExit with Sphinx's status if it fails."""
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder, "pages"), pages(sentences()))
        options = ["-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-d", f"{folder}/doctrees"]
        if status := build_main([*options, f"{folder}/pages", f"{folder}/site"]):  # MyST-NB writes beside it
            sys.exit(status)
        shutil.copytree(f"{folder}/site", site, dirs_exist_ok=True)


def main() -> None:
    """Make the folder of the site, whole or not at all; a site that is there is replaced."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the site goes")
    out = parser.parse_args().out
    try:
        write_folder(out, build, overwrite=True, kind=SITE)
    except StorageError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
