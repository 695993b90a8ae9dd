"""How Sphinx renders the site that website.py lays out."""

import re
from typing import Any

import minilora

project, author, version = "minilora", "the minilora authors", minilora.__version__
html_title = "minilora"
extensions = ["myst_nb", "sphinx_design", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx-mathjax-offline"]
nb_execution_mode = "off"  # the outputs are those that notebooks/build.py stored
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
mathjax3_config = {"chtml": {"scale": 0.92}}
default_role = "literal"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 84
html_theme = "furo"
html_theme_options = {
    f"{mode}_css_variables": dict.fromkeys(("color-brand-primary", "color-brand-content", "color-api-name"), colour)
    for mode, colour in (("light", "#0a5c94"), ("dark", "#6cb6f0"))
}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def show_examples(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Indented lines of a docstring are code."""
    lines[:] = re.sub(r"\n\n(?=    )", "\n\n.. code-block:: python\n\n", "\n".join(lines)).split("\n")


def show_defaults(app: Any, what: str, name: str, thing: Any, options: Any, signature: Any, to: Any) -> Any:
    """A default that is a function by its name; one that is made anew as `...`."""
    if signature:
        signature = re.sub(r"<(?:function )?(\w+)>", r"\1", signature.replace("<factory>", "..."))
    return signature, to


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", show_examples)
    app.connect("autodoc-process-signature", show_defaults)
