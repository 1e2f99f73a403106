"""The documentation site: ``make docs`` builds it from the pages as they stand in the repository, warnings are errors.

The source folder is the repository itself, so that a link from one page to another leads to the same place here and
where the pages are read as files.
"""

project = "VeloxBench"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "BENCHMARK_RESULTS.md",
    "CHANGELOG.md",
    "docs/**",
    "examples/thirdparty/README.md",
]
exclude_patterns = ["docs/conf.py"]
html_theme = "furo"
html_title = "VeloxBench"
html_copy_source = False
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
nitpicky = False
