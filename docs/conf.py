"""Sphinx configuration: Markdown pages, one theme, warnings as errors (see the Makefile)."""

import bolza

project = "bolza"
author = "The bolza contributors"
copyright = author
version = release = bolza.__version__

extensions = ["myst_parser", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = "bolza"
