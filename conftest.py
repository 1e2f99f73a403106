"""Root conftest: the suites' options exist without installing the entry point."""

pytest_plugins = ["veloxbench.pytest_plugin"]
