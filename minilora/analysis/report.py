"""Pieces of HTML -> one page that needs nothing else: contents, text, terms, figures, tables.

A page can be read on a phone and by keyboard: a wide table scrolls in a box of its own, a figure shrinks.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..table import Table, markup
from .plotting import Picture

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }}
a {{ color: #0055aa }}
:focus-visible {{ outline: 3px solid #0055aa; outline-offset: 2px }}
.skip {{ position: absolute; left: -99rem }}
.skip:focus {{ position: static }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; min-width: 100%; overflow-wrap: normal; white-space: nowrap }}
caption {{ text-align: left; font-weight: 600; padding: .5rem 0; white-space: normal }}
th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
dt {{ font-weight: 600 }}
dd {{ margin: 0 0 .5rem 1rem }}
figure {{ margin: 2rem 0 }}
svg {{ max-width: 100%; height: auto }}
figcaption {{ color: #444; font-size: .9rem }}
pre {{ background: #f4f4f4; padding: 1rem; white-space: pre-wrap }}
</style>
</head>
<body>
<a class="skip" href="#part-1">Skip to the answer</a>
<main>
<h1>{title}</h1>
<nav aria-label="Contents"><ul>
{contents}
</ul></nav>
{body}
</main>
</body>
</html>
"""
TERMS = {  # what a page says of a term where it first stands
    "ΔW and rank r": (
        "what LoRA adds to a weight matrix W, which stays frozen: ΔW = s B A, where B has r columns and "
        "A has r rows. So ΔW acts along at most r directions, pairs of an input and an output direction."
    ),
    "gain": "the test loss of the frozen base less that of the trained model.",
    "full fine-tuning": "training every weight of the model, without LoRA.",
    "gap closed": (
        "a gain as a share of full fine-tuning's, (L_base - L) / (L_base - L_full) with L the test loss: "
        "0 % is the frozen base, 100 % is what full fine-tuning reached."
    ),
    "nats": (
        "the unit of a loss: the mean of -ln p over the characters of a text, where p is the probability "
        "that the model gives to the right one. With 0.69 nats less, p is twice as large."
    ),
    "range over seeds": (
        "the least and the largest loss of runs that differ in their random numbers alone: the batches, "
        "and how A starts."
    ),
    "singular values": (
        "s_1 ≥ s_2 ≥ … of ΔW: how strongly it acts along each of its directions. At rank r all beyond "
        "the first r are 0."
    ),
    "energy": (
        "the sum of the squares of singular values; all of them give |ΔW|², with |·| the Frobenius norm."
    ),
    "effective rank": (
        "how many directions are used in effect: exp(H), with H the entropy of the singular values over "
        "their sum. It is k for k equal ones, and less if some are weak."
    ),
    "noise": (
        "the same number for random matrices: the product of two Gaussian factors of the same shapes and "
        "rank, or beside full fine-tuning a Gaussian matrix of the same norm. What is as with noise is "
        "no finding."
    ),
    "stable rank": "|ΔW|² / s_1².",
    "at 90 %, at 99 %": "how many singular values hold that share of the energy.",
    "amplifies": (
        "|ΔW| over the norm of the part of W between ΔW's directions: how many times as strong as W it "
        "is there (Hu et al. 2021, section 7.3); in brackets between random directions."
    ),
    "overlap": "which share of its output directions ΔW has in common with the first ones of W, 0 to 1.",
    "intruders": (
        "how many of the first singular vectors of W + ΔW resemble none of W's more than a random vector "
        "does (Shuttleworth et al. 2024)."
    ),
    "cosine": "of two ΔW as vectors of numbers: 1 for the same direction, 0 for unrelated ones.",
    "φ(i), phi": (
        "which share of its first i directions one adapter has in common with the first i of another, 0 to 1."
    ),
}


def page(title: str, sections: Mapping[str, Sequence[str]]) -> str:
    """One HTML page: heading -> pieces of HTML, the answer first."""
    places = [(f"part-{i + 1}", markup(heading)) for i, heading in enumerate(sections)]
    contents = "\n".join(f'<li><a href="#{id}">{heading}</a></li>' for id, heading in places)
    body = [
        piece
        for (id, heading), pieces in zip(places, sections.values(), strict=True)
        for piece in (f'<h2 id="{id}">{heading}</h2>', *pieces)
    ]
    return PAGE.format(title=markup(title), contents=contents, body="\n".join(body))


def drawing(name: str, picture: Picture) -> str:
    """The figure as inline SVG that names and describes itself."""
    svg = picture.encoded("svg").decode()
    svg = svg[svg.index("<svg") :]
    says = markup(picture.says)
    # all figures use the same ids, which must differ on one page; only tags may change, no text
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r'\bid="|href="#|url\(#', rf"\g<0>{name}-", tag[0]), svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title" ', 1)
    at = svg.index(">") + 1
    svg = f'{svg[:at]}<title id="{name}-title">{says}</title>{svg[at:]}'
    return f"<figure>{svg}<figcaption>{says}</figcaption></figure>"


def boxed(table: Table) -> str:
    """A table in a box that scrolls, by keyboard too."""
    name = markup(table.caption)
    return f'<div class="wide" role="group" aria-label="{name}" tabindex="0">{table.html()}</div>'


def terms(*names: str) -> str:
    """A list of terms and what they mean."""
    lines = "\n".join(f"<dt><dfn>{markup(name)}</dfn></dt><dd>{markup(TERMS[name])}</dd>" for name in names)
    return f"<dl>\n{lines}\n</dl>"


def points(lines: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>\n" + "\n".join(f"<li>{markup(line)}</li>" for line in lines) + "\n</ul>"


def facts(values: Mapping[str, Any]) -> str:
    """One line for each fact."""
    lines = "\n".join(markup(f"{name}: {value}") for name, value in values.items())
    return f"<pre>{lines}</pre>"


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{markup(text)}</p>"
