"""Grids of seconds, as their files hold them, and programs whose checkout counts as committed."""

import json
from collections.abc import Sequence

TIMED = """
[[throughput]]
depth = 32
pairs = 2
steps = 2
prefill_pairs = 2
"""
IN_MEMORY = """
[memory]
tokens = 64
decode_steps = 2
budget_gib = 1.0
"""
COMMITTED = """
import sys
from veloxbench.records import provenance
provenance.git_state = lambda: ("c" * 40, False)
"""
"""The beginning of a program of tests: their own checkout may have changes, and whose it is does not matter."""
LINES = f"""{COMMITTED}
from veloxbench.cli.app import _run
print([_run(line.split()) for line in sys.argv[1:]])
"""
"""A program whose arguments are command lines of veloxbench; it ends by printing their exit codes."""


def quality_grid(
    arms: Sequence[str], *, model: str = "smollm2-135m", layers: str = "", length: int = 32, tables: str = ""
) -> str:
    """The quality suite on 16 sequences, scored from the middle of each, and tables of other suites.

    Args:
        layers: a line of the grid's head, for a model cut short.
    """
    return f"""
summary = "seconds"
models = ["{model}"]
corpus = "bundled"
suites = ["perplexity"]
arms = {json.dumps(arms)}
{layers}

[[protocols]]
name = "chunked"
sequences = 16
length = {length}
chunk = {length // 2}
score_from = {length // 2}
{tables}"""
