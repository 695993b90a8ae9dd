"""How Sphinx renders the site that website.py lays out."""

import re
from pathlib import Path
from typing import Any

import minilora

project, author, version = "minilora", "the minilora authors", minilora.__version__
html_title = "minilora"
extensions = [
    "myst_nb", "sphinx_design", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx-mathjax-offline",
]  # fmt: skip
nb_execution_mode = "off"  # the outputs are those that notebooks/build.py stored
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
mathjax3_config = {"chtml": {"scale": 0.92}}
default_role = "literal"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 84
pygments_dark_style = "github-dark"
html_theme = "furo"
html_theme_options = {
    f"{mode}_css_variables": {
        f"color-{name}": colour for name in ("brand-primary", "brand-content", "api-name", "api-pre-name")
    }
    for mode, colour in (("light", "#0a5c94"), ("dark", "#6cb6f0"))
}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/icon.svg"
html_copy_source = False
html_show_sphinx = html_show_copyright = False


def show_examples(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Indented lines of a docstring are code; a bar in its text is a norm's."""
    text = re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", "\n".join(lines))
    lines[:] = re.sub(r"\n\n(?=    )", "\n\n.. code-block:: python\n\n", text).split("\n")


def show_defaults(app: Any, what: str, name: str, thing: Any, options: Any, signature: Any, to: Any) -> Any:
    """A default that is a function by its name; one that is made anew as `...`."""
    if signature:
        signature = re.sub(r"<(?:function )?(\w+)>", r"\1", signature.replace("<factory>", "..."))
    return signature, to


READABLE = (  # for keyboards and screen readers: what scrolls can be reached, what is there twice has a name
    (r"<pre>", '<pre tabindex="0">'),
    (r'<div class="table-wrapper', r'<div tabindex="0" class="table-wrapper'),
    (r'<aside class="sidebar-drawer"', r'<aside aria-label="Pages" class="sidebar-drawer"'),
    (r'<aside class="toc-drawer', r'<aside aria-label="On this page" class="toc-drawer'),
    (r'role="heading">', 'role="heading" aria-level="2">'),
    (r'<summary aria-label="[^"]*">', "<summary>"),
)


def make_readable(app: Any, error: Exception | None) -> None:
    """Mend in every page what axe finds in the HTML of Sphinx and Furo."""
    for file in Path(app.outdir).rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        for pattern, new in READABLE:
            text = re.sub(pattern, new, text)
        parameters = re.compile(r'<dt class="sig.*?</dt>', re.S)  # a list in a term
        text = parameters.sub(lambda term: re.sub(r"<(/?)d[ld]>", r"<\1div>", term[0]), text)
        file.write_text(text, encoding="utf-8")


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", show_examples)
    app.connect("autodoc-process-signature", show_defaults)
    app.connect("build-finished", make_readable)
