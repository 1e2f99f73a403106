"""The program's commands: what each is called, and what it says of itself."""

import pytest

from veloxbench.cli.app import _run


@pytest.mark.parametrize(
    ("arguments", "new"),
    [
        (["aa", "record", "--hours", "2"], "trial timing"),
        (["aa", "--help"], "trial timing"),
        (["damages", "--check", "docs/damages.md"], "trial damages"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(arguments, new, capsys):
    """Exit code 4, and a sentence that says what the command is called, whatever its options."""
    assert _run(arguments) == 4
    assert f"`veloxbench {arguments[0]}` is `veloxbench {new}` now" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        *(["compare"], ["kernels"], ["trial"], ["trial", "damages"], ["trial", "timing"]),
        *(["trial", "timing", name] for name in ("record", "live", "resample", "report")),
    ],
)
def test_help_says_what_a_command_does(command, capsys):
    """``--help`` of each command has a description."""
    assert _run([*command, "--help"]) == 0
    assert len(capsys.readouterr().out.split()) > 15
