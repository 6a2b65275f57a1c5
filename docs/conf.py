"""Sphinx: furo, MyST, and the docstrings of the public names."""

import fanwise

project = "fanwise"
author = "the fanwise authors"
copyright = author
version = release = fanwise.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fanwise {release}"
myst_heading_anchors = 3

default_role = "py:obj"  # single backquotes in docstrings
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88

# Made by a function, never by their constructors.
MADE = {"fanwise.Watch", "fanwise.AsyncWatch"}


def hide_constructor(app, what, name, obj, options, signature, returns):
    return ("", None) if name in MADE else (signature, returns)


# In docstrings an indented block is code, also where no "::" says so.
def blocks_are_code(app, what, name, obj, options, lines):
    inside = False
    out = []
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        if indented and not inside and not before.strip():
            out += [".. code-block:: python", ""]
            inside = True
        elif line.strip() and not indented:
            inside = False
        out.append(line)
    lines[:] = out


def setup(app):
    app.connect("autodoc-process-signature", hide_constructor)
    app.connect("autodoc-process-docstring", blocks_are_code)
