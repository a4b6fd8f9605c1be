"""The site of these pages: `sphinx-build -W -c docs . build/site`. Its source is the whole repository, so that a link
works on the site as it does in a checkout."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

project = "Tandem"
author = "The Tandem authors"
copyright = "The Tandem authors"
root_doc = "docs/index"
include_patterns = ["docs/*.md", "*.md", "benchmarks/RESULTS.md", "benchmarks/results/learning.md"]
exclude_patterns = ["build"]
extensions = ["myst_parser", "sphinx_click"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "Tandem"
html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
# Blocks of shell, Python and JSON have no language of their own in these pages.
highlight_language = "none"
