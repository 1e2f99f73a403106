"""The command line: one module for each group of commands, thin doors to the rooms below, and nothing that measures or
judges. ``app.py`` holds the program itself and turns every problem into one sentence and an exit code.
"""

from veloxbench.cli.app import main

__all__ = ["main"]
