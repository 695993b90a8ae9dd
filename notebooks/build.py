"""Make the lessons: notebooks/src/NAME.py -> notebooks/NAME.ipynb, executed, the same bytes every time.

    python notebooks/build.py                build all of them
    python notebooks/build.py --check        execute again, compare with what is stored; exit 1 if it differs
    python notebooks/build.py --student DIR  write copies without solutions and outputs, to run from anywhere

A source is Python in cells: "# %%" begins one of code, "# %% [markdown]" one of text in comments, and tags
may follow: tags=["exercise"] is a stub to be filled in; check (sees the student's answer and no other);
solution (text that is folded at first, left out for students); first (src/first.py is put below it); claims
(see below); corpus (the outputs need the fetched texts); smollm2 (they need its weights); unkept (the outputs
are not kept: they hold random names, or depend on what is installed); rounding (rounding errors are shown);
trained (what is printed was computed from trained weights).

Claims are code that is executed with the lesson and not shown in it: `says("a residual of {:.3f}", x)` and
`holds("most of them", 2 * x > y)`. The words, with the numbers that came out, must stand in the lesson's
text; tests/project/test_notebooks.py lets no number stand there that no claim has said.

What is compared: text must be equal, but each number that was trained may be off by one in its last digit,
since processors add in different orders. A figure is compared if the same matplotlib drew it, but for a few
pixels. Where rounding errors are what is shown, only the words count.
"""

import argparse
import base64
import html
import json
import os
import re
import shutil
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
from nbformat import v4

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parent / "figures/pictures"  # which a text shows by (attachment:NAME.png)
LESSONS = (
    "1_lora_from_one_equation", "2_merging_costs_nothing", "3_which_rank", "4_under_the_microscope",
    "5_four_bits", "6_adding_adapters", "7_a_thousand_adapters", "8_low_rank_low_dimension",
    "9_what_to_adapt_and_how", "10_beyond_language",
)  # fmt: skip


def experiments(*names):
    """Where a copy of a lesson finds the rows of experiments -> the rows, and what makes them."""
    folders = {name: f"figures/{name}" for name in names}
    return {
        f"{name}/rows.jsonl": (
            HERE.parent / folder / "rows.jsonl",
            f"minilora experiment {name} --out {folder}",
        )
        for name, folder in folders.items()
    }


READ = {  # lesson -> where a copy of it finds each file that it reads -> the file, and what makes it
    LESSONS[2]: {"rows.jsonl": (HERE.parent / "figures/rows.jsonl", "minilora sweep --out figures")},
    LESSONS[6]: {
        "serving.json": (HERE.parent / "benchmarks/results/serving.json", "python benchmarks/serving.py")
    },
    LESSONS[7]: experiments("known-rank", "subspaces", "intrinsic-dimension"),
    LESSONS[8]: experiments("which-matrices", "scale", "initialisation"),
    LESSONS[9]: experiments("beyond-language"),
}
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.(?P<decimals>\d+))?(?:e(?P<power>[-+]\d+))?")
FIGURE = re.compile(r'<img alt="(?P<says>[^"]*)" [^>]*src="data:image/png;base64,(?P<png>[^"]*)"')
PIXELS = 0.02  # the share of pixels that may differ
CLAIMS = """
import json
from pathlib import Path

LESSONS = Path.cwd()


def says(words, *values):
    print(json.dumps([words, words.format(*values), True]))


def holds(words, condition):
    print(json.dumps([words, words, bool(condition)]))
"""


def cells(text):
    """(is markdown, tags, source) of every cell of a source."""
    for part in re.split(r"^# %%", text, flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        tags = json.loads(found[1]) if (found := re.search(r"tags=(\[.*\])", head)) else []
        markdown = "[markdown]" in head
        if markdown:
            body = re.sub(r"^# ?", "", body, flags=re.M)
        yield markdown, tags, body.strip()


def notebook(name, claims=False):
    """The lesson without outputs; with its claims, if they are to be executed."""
    text, first = ((HERE / "src" / f"{file}.py").read_text(encoding="utf-8") for file in (name, "first"))
    about = {"matplotlib": matplotlib.__version__, "source": sha256((text + first).encode()).hexdigest()}
    nb = v4.new_notebook(metadata={"kernelspec": KERNEL, "minilora": about})
    if claims:
        nb.cells.append(v4.new_code_cell(CLAIMS, id="claims-00", metadata={"tags": ["claims"]}))
    shown = 0
    for markdown, tags, source in cells(text):
        if "claims" in tags:
            if claims:
                hidden = v4.new_code_cell(source, id=f"claims-{len(nb.cells):02}", metadata={"tags": tags})
                nb.cells.append(hidden)
            continue
        if "first" in tags:
            source += "\n\n" + first.strip()
        shown += 1
        cell = (v4.new_markdown_cell if markdown else v4.new_code_cell)(source, id=f"cell-{shown:02}")
        if pictures := re.findall(r"\(attachment:([\w.]+)\)", source) if markdown else ():
            files = {picture: (PICTURES / picture).read_bytes() for picture in pictures}
            cell.attachments = {
                name: {"image/png": base64.b64encode(a).decode()} for name, a in files.items()
            }
        if tags:
            cell.metadata["tags"] = tags
        nb.cells.append(cell)
    return nb


def student(nb):
    """A copy without solutions and outputs."""
    nb = nbformat.from_dict(json.loads(json.dumps(nb)))
    nb.cells = [cell for cell in nb.cells if "solution" not in tags_of(cell)]
    del nb.metadata["minilora"]  # how it was built
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nb


def tags_of(cell):
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def execute(nb, folder=HERE):
    """Run all cells in a fresh kernel, begun in a folder, and drop what differs from run to run.

    The claims go from the cells into the metadata: what each says, and with which numbers.
    """
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as profile:
        os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
        os.environ["IPYTHONDIR"] = profile  # one order of summation, and nobody's startup files
        NotebookClient(
            nb, timeout=1800, kernel_name="python3", record_timing=False, store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(folder)}},
        ).execute()  # fmt: skip
    nb.metadata.pop("language_info", None)  # holds the patch version of Python
    nb.metadata.pop("widgets", None)
    claimed, count = [], 0
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if "claims" in tags_of(cell):
            lines = "".join(output["text"] for output in cell.outputs).splitlines()
            claimed += [{"tags": tags_of(cell)[1:], "claim": json.loads(line)} for line in lines]
        elif cell.cell_type == "code":
            cell.execution_count = count = count + 1
            cell.outputs = [] if "unkept" in tags_of(cell) else tidy(cell.outputs)
    nb.cells = [cell for cell in nb.cells if "claims" not in tags_of(cell)]
    nb.metadata["minilora"]["claims"] = claimed
    return nb


def tidy(outputs):
    """The outputs with what was printed in one piece, and each figure's sentence for its plain text."""
    whole = []
    for output in outputs:
        if whole and output.get("name") and output.get("name") == whole[-1].get("name"):
            whole[-1]["text"] += output["text"]  # it came in pieces, by chance
            continue
        data = output.get("data", {})
        if found := FIGURE.search(data.get("text/html", "")):
            data["text/plain"] = html.unescape(found["says"])
        whole.append(output)
    return whole


def prose(nb):
    """The text of a lesson and the sentences of its figures, in one line."""
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```", " ", text, flags=re.S)  # a solution
    text = re.sub(r"(?m)^#+ |</?\w+>|\]\([^)]*\)", " ", text)  # headings, tags, where links lead
    return " ".join(" ".join([text, *pictured(nb)]).split())


def pictured(nb):
    """The sentences of a lesson's figures."""
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if FIGURE.search(output.get("data", {}).get("text/html", "")):
                yield output["data"]["text/plain"]


def unsaid(nb):
    """The claims that do not hold, or whose words with the numbers that came out are not in the text."""
    text = prose(nb)
    for words, said, holds in (row["claim"] for row in nb.metadata["minilora"]["claims"]):
        if not holds:
            yield f"it does not hold: {words}"
        elif " ".join(said.split()) not in text:
            yield f"the text does not say: {said}"


def written(nb):
    """The notebook as the text of its file."""
    nbformat.validate(nb)
    return nbformat.writes(nb) + "\n"


def lacking(nbs):
    """The tags whose cells need what cannot be had; the rest is fetched now, and no lesson speaks of it."""
    from minilora.data import corpora
    from minilora.errors import StorageError
    from minilora.formats import huggingface

    used = {tag for nb in nbs for cell in nb.cells for tag in tags_of(cell)}
    for tag, fetch in (("corpus", lambda: corpora.corpus("folio")), ("smollm2", huggingface.smollm2)):
        try:
            if tag in used:
                fetch()
        except StorageError as e:
            print(f"what {tag} needs is not there: {e}", file=sys.stderr)
            yield tag


def differences(old, new, missing):
    """What is different in two executions of one lesson, in words, but for cells with a tag in `missing`."""
    if [cell.source for cell in old.cells] != [cell.source for cell in new.cells]:
        yield "its cells are not those of src/; build it again"
        return
    stored, now = old.metadata["minilora"], new.metadata["minilora"]
    drawn = stored["matplotlib"] == now["matplotlib"]
    rows, again = ([row for row in nb["claims"] if not missing & {*row["tags"]}] for nb in (stored, now))
    if [row["claim"][0] for row in rows] != [row["claim"][0] for row in again]:
        yield "its claims are not those of src/; build it again"
        return
    for row, other in zip(rows, again, strict=True):
        (_, was, _), (_, says, holds) = row["claim"], other["claim"]
        close = "trained" in row["tags"] and all(map(neighbours, *map(NUMBER.finditer, (was, says))))
        if not holds or (was != says and not close):
            yield f"the text says: {was}\nand now: {says}, which {'holds' if holds else 'does not hold'}"
    for a, b in zip(old.cells, new.cells, strict=True):
        tags = tags_of(a)
        if a.cell_type == "code" and not missing & {*tags}:
            if len(a.outputs) != len(b.outputs):
                yield f"{a.id}: {len(a.outputs)} outputs are stored, {len(b.outputs)} came now"
                continue
            for x, y in zip(a.outputs, b.outputs, strict=True):
                figures = [FIGURE.search(o.get("data", {}).get("text/html", "")) for o in (x, y)]
                if all(figures):
                    if drawn and not alike(*figures, "rounding" in tags):
                        yield f"{a.id}: the figure is another"
                elif x != y and not near(x, y, tags):
                    yield f"{a.id}: stored is\n{shown(x)}\nand now it is\n{shown(y)}"


def alike(a, b, words_only):
    """Whether two figures show the same: the sentence but for its numbers, and nearly all pixels."""
    from io import BytesIO

    from matplotlib.image import imread

    words = [NUMBER.sub("#", html.unescape(figure["says"])) for figure in (a, b)]
    if words_only or words[0] != words[1]:
        return words[0] == words[1]
    p, q = (imread(BytesIO(base64.b64decode(figure["png"]))) for figure in (a, b))
    return p.shape == q.shape and (np.abs(p - q) > 0.1).any(-1).mean() <= PIXELS


def near(a, b, tags):
    """Whether two outputs print the same words, and numbers as near as their tags let one expect."""
    if {a.output_type, b.output_type} != {"stream"} or not {"rounding", "trained"} & {*tags}:
        return False
    texts = a["text"], b["text"]
    if len({" ".join(NUMBER.sub("#", text).split()) for text in texts}) > 1:
        return False
    return "rounding" in tags or all(map(neighbours, *(NUMBER.finditer(text) for text in texts)))


def neighbours(a, b):
    """Whether two printed numbers differ by one in the last digit of the coarser one, or not at all."""
    p, q = (float(n[0].replace(",", "")) for n in (a, b))
    unit = max(10.0 ** (int(n["power"] or 0) - len(n["decimals"] or "")) for n in (a, b))
    return abs(p - q) <= 1.01 * unit


def shown(output):
    """An output for the terminal."""
    return output.get("text") or json.dumps(output.get("data", output), ensure_ascii=False)[:2000]


def faults(nb):
    """What a lesson's outputs must not hold, in words."""
    for cell in nb.cells:
        if "execution" in cell.metadata:
            yield f"{cell.id}: holds times"
        for output in cell.get("outputs", []):
            said = json.dumps({k: v for k, v in output.get("data", {}).items() if k != "text/html"})
            said += output.get("text", "")
            if output.output_type == "error" or output.get("name") == "stderr":
                yield f"{cell.id}: {shown(output)}"
            if re.search(r"(?<![\w.)])/(home|root|tmp|work|usr|opt|Users|var|mnt)/|[A-Z]:\\\\", said):
                yield f"{cell.id}: names a path of this machine"
            if re.search(r"\bat 0x[0-9a-f]{6,}", said):
                yield f"{cell.id}: names an address in memory"


def main(argv=None):
    """Build, check or copy; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"which lessons (default all: {', '.join(LESSONS)})")
    parser.add_argument("--check", action="store_true", help="compare with what is stored, change nothing")
    parser.add_argument("--student", type=Path, metavar="DIR", help="write copies without solutions into DIR")
    args = parser.parse_args(argv)
    names = [Path(name).stem for name in args.names] or list(LESSONS)
    if unknown := set(names) - set(LESSONS):
        parser.error(f"there is no lesson {min(unknown)!r}; there are {', '.join(LESSONS)}")
    read = {place: file for name in names for place, file in READ.get(name, {}).items()}
    for path, command in read.values():
        if not path.exists():
            print(f"{path.relative_to(HERE.parent)} is missing; `{command}` makes it", file=sys.stderr)
            return 1
    if args.student:
        args.student.mkdir(parents=True, exist_ok=True)
        for name in names:
            (args.student / f"{name}.ipynb").write_text(written(student(notebook(name))), encoding="utf-8")
        for place, (path, _) in read.items():
            (args.student / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, args.student / place)
        return 0
    nbs = {name: notebook(name, claims=True) for name in names}
    missing = set(lacking(nbs.values()))
    if missing and not args.check:
        return 1
    wrong = 0
    for name in names:
        path, nb = HERE / f"{name}.ipynb", execute(nbs[name])
        found = [] if missing else list(faults(nb))
        if args.check:
            found += differences(nbformat.read(path, 4), nb, missing)
        elif not (found := found + list(unsaid(nb))):
            path.write_text(written(nb), encoding="utf-8")
        for what in found:
            print(f"{name}: {what}", file=sys.stderr)
        wrong += bool(found)
        print(f"{name}: {'wrong' if found else 'as stored' if args.check else 'built'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
