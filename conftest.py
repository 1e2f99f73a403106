"""Root conftest: the suites' options exist without installing the entry point; a run ends with what it measured."""

import pytest

pytest_plugins = ["veloxbench.pytest_plugin"]


def pytest_configure(config: pytest.Config) -> None:
    """Kernel timings (pytest-benchmark) run once as plain tests unless measuring."""
    if not config.getoption("--benchmark") and hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that tests measured (``record_property``), one line each."""
    passed = [report for report in terminalreporter.stats.get("passed", []) if report.user_properties]
    if passed:
        terminalreporter.write_sep("=", "figures")
    for report in passed:
        figures = ", ".join(f"{name} {value}" for name, value in report.user_properties)
        terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {figures}")
