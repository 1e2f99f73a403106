"""``python -m veloxbench.cli``."""

from veloxbench.cli import main

main()
