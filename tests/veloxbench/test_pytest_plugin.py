"""The pytest plugin in somebody else's project, where it is loaded because the package is installed."""

import pytest

pytest_plugins = ["pytester"]

STRANGERS_TESTS = """
import pytest

@pytest.fixture
def record():
    return "theirs"

@pytest.fixture
def gated_subject():
    return "theirs too"

def test_names(record, gated_subject):
    assert (record, gated_subject) == ("theirs", "theirs too")

def test_timed(benchmark):
    assert benchmark(sum, [1, 2]) == 3
    assert benchmark.stats.stats.rounds > 1
"""


@pytest.mark.parametrize(("options", "passed"), [((), 2), (("--benchmark-only",), 1)])
def test_a_strangers_fixtures_and_benchmarks_are_their_own(pytester, monkeypatch, options, passed):
    """Fixtures of the suites' names are left alone, and pytest-benchmark times as it does without the plugin."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under which pytest-benchmark times nothing
    pytester.makepyfile(STRANGERS_TESTS)
    result = pytester.runpytest("-p", "veloxbench.pytest_plugin", *options)
    result.assert_outcomes(passed=passed, skipped=2 - passed)
