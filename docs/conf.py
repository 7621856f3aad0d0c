"""Sphinx configuration: pages in MyST Markdown, the reference from docstrings."""

import re

from undrift import __version__

project = "undrift"
author = "The undrift developers"
copyright = "2026, The undrift developers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "undrift"


def literal_shapes(app, what, name, obj, options, lines):
    """Show shapes such as (batch, *event) as code, and keep lone stars and bars from opening markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``|:math:`.*?`)", line)
        for j in range(0, len(parts), 2):
            text = re.sub(r"\([^()`]*\*[a-z][^()`]*\)", r"``\g<0>``", parts[j])
            pieces = re.split(r"(``.*?``)", text)
            pieces[::2] = [re.sub(r"\*(?=\S)", r"\*", p) if p.count("*") == 1 else p for p in pieces[::2]]
            pieces[::2] = [p.replace("|", r"\|") for p in pieces[::2]]
            parts[j] = "".join(pieces)
        lines[i] = "".join(parts)


def fields_once(app, what, name, obj, skip, options):
    """The fields of a named tuple stand in its docstring, under Attributes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("autodoc-skip-member", fields_once)
    app.connect("autodoc-process-docstring", literal_shapes)
