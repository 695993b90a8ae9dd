"""Pieces of HTML -> one page that needs nothing else: text, figures, tables, and how it was made."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..table import markup
from .plotting import Picture

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
caption {{ text-align: left; font-weight: 600; padding: .5rem 0 }}
th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
figure {{ margin: 2rem 0 }}
svg {{ max-width: 100%; height: auto }}
figcaption {{ color: #444; font-size: .9rem }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


def page(title: str, parts: Sequence[str]) -> str:
    """One HTML page of these parts, each a piece of HTML."""
    return PAGE.format(title=markup(title), body="\n".join(parts))


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


def facts(values: Mapping[str, Any]) -> str:
    """How this was made: one line for each fact."""
    lines = "\n".join(markup(f"{name}: {value}") for name, value in values.items())
    return f"{heading('How this was made')}<pre>{lines}</pre>"


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{markup(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{markup(text)}</p>"
