"""A user's locale is the user's: no file is read in its encoding; the same bytes are the same text, and the same
hash, on every machine.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import veloxbench
import veloxquant_kernels
import veloxquant_mlx

PACKAGES = (veloxbench, veloxquant_mlx, veloxquant_kernels)
TEXT_CALLS = {"read_text", "write_text"}


def texts_without_encoding(tree):
    """Lines of calls that read or write text, or ask a process for text, and name no encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        text = keywords.get("text") if name in ("run", "Popen", "check_output") else None
        modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        opens = name in ("open", "fdopen") and any(set(mode) <= set("rwax+t") for mode in modes)
        named = name in TEXT_CALLS and not (name == "write_text" and isinstance(node.func, ast.Name))
        if (opens or named or text is not None) and "encoding" not in keywords:
            yield node.lineno


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_read_and_write_names_its_encoding(package):
    """``read_text``, ``write_text``, ``open`` in a text mode and children asked for text say ``encoding=``."""
    root = Path(package.__file__).parent
    missing = [
        f"{file.relative_to(root)}:{line}"
        for file in sorted(root.rglob("*.py"))
        for line in texts_without_encoding(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert missing == []


def test_the_codes_hash_is_the_same_in_an_ascii_locale():
    """A record's key does not depend on LC_ALL."""
    code = "from veloxbench.records.provenance import harness_hash; print(harness_hash())"
    hashes = {
        subprocess.check_output(
            [sys.executable, "-c", code],
            env={"LC_ALL": locale, "PATH": "/usr/bin:/bin", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8},
        )
        for locale, utf8 in (("C", "0"), ("C", "1"))
    }
    assert len(hashes) == 1
