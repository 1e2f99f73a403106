"""What the user sees of a long step."""

import io

import pytest
from rich.console import Console

from veloxbench.inputs.transfer_progress import LineReporter, RichReporter, default_reporter, step


def test_lines_where_there_is_no_terminal(capsys):
    """In a log, a step is one line with its size in MB; a licence is a line of its own."""
    reporter = default_reporter()
    assert isinstance(reporter, LineReporter)
    reporter.message("licence: MIT")
    with step(reporter, "weights", 1_500_000):
        reporter.advance(1_500_000)
    assert capsys.readouterr().err.splitlines() == ["licence: MIT", "weights (1.5 MB)"]


def test_bar_on_a_terminal():
    """On a terminal the bar shows the label and how much is done."""
    screen = io.StringIO()
    reporter = RichReporter(Console(file=screen, force_terminal=True, width=100))
    with step(reporter, "weights", 2_000_000):
        reporter.advance(1_000_000)
    assert "weights" in screen.getvalue()
    assert "1.0/2.0 MB" in screen.getvalue()


def test_bar_ends_after_a_failure():
    """A step that fails leaves no live bar behind: another can start."""
    reporter = RichReporter(Console(file=io.StringIO(), force_terminal=True))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"), step(reporter, "weights", None):
            raise RuntimeError("broken")
