"""No name of a kernel collides with the headers that MLX puts before it on Metal.

MLX compiles a custom kernel behind ``mlx/backend/metal/kernels/utils.h`` and what that includes. A macro there would
rewrite any word of a body; a function or type there would clash with one at file scope. The marked run reads the
headers from the macOS wheel of the installed MLX (45 MB from the package index, kept in pytest's cache).
"""

import importlib.metadata
import re
import subprocess
import sys
import zipfile

import pytest

from veloxquant_kernels.kernel import metal_text, shipped_kernels
from veloxquant_kernels.lint import _functions, _without_comments
from veloxquant_kernels.signature import ATTRIBUTES, METAL_TYPES

UTILS = "mlx/backend/metal/kernels/utils.h"
BUILT_IN = {"bool", "float", *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def words_of(text):
    return set(re.findall(r"\b[A-Za-z_]\w*", text))


def ours():
    """Every word of the generated sources, and the names that they define at file scope."""
    words, file_scope = set(ATTRIBUTES), set()
    for kernel in shipped_kernels():
        texts = [_without_comments(metal_text(stem)) for stem in (*kernel.headers, kernel.stem)]
        words |= words_of(" ".join([*texts, *kernel.inputs, *kernel.outputs]))
        file_scope |= {name for text in texts[:-1] for name, _, _ in _functions(text)}
        file_scope.add(f"custom_kernel_{kernel.stem}")
    return words | file_scope, file_scope


def with_includes(read, path, seen=None):
    """A header and all of MLX's own that it includes, comments left out; ``read`` gives a path's text."""
    seen = set() if seen is None else seen
    if path in seen:
        return ""
    seen.add(path)
    text = _without_comments(read(path))
    inner = re.findall(r'#\s*include\s*"([^"]+)"', text)
    return "\n".join([*(with_includes(read, name, seen) for name in inner), text])


def collisions(headers):
    """Words of ours that the headers define as a macro, and file-scope names of ours that they use at all."""
    words, file_scope = ours()
    macros = set(re.findall(r"#\s*define\s+(\w+)", headers))
    return {*(words & macros), *(file_scope & words_of(headers))}


@pytest.mark.parametrize("text", ["#define lane 3", "void hadamard(thread float* x);", "struct read_code;"])
def test_a_collision_is_found(text):
    """A macro of a local name, a function and a type of a file-scope name."""
    headers = with_includes({UTILS: '#include "more.h"', "more.h": text}.__getitem__, UTILS)
    assert len(collisions(headers)) == 1


def test_a_local_name_may_repeat_a_function():
    """Inside the kernel a variable hides what the headers declare outside."""
    assert collisions(with_includes({UTILS: "void lane(); // #define scratch"}.__getitem__, UTILS)) == set()


@pytest.fixture
def wheel(request):
    version = importlib.metadata.version("mlx")
    folder = request.config.cache.mkdir(f"mlx-metal-{version}")
    if not list(folder.glob("*.whl")):
        target = ["--only-binary=:all:", "--platform", "macosx_14_0_arm64", "--python-version", "3.11"]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), *target]
        done = subprocess.run([*command, f"mlx-metal=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"the macOS wheel of mlx {version} cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_no_name_collides_with_mlxs_headers(wheel, record_property):
    """The shipped bodies, helpers, arguments and generated names against the headers of the installed MLX version."""
    with zipfile.ZipFile(wheel) as archive:
        headers = with_includes(lambda path: archive.read(f"mlx/include/{path}").decode(), UTILS)
    words, file_scope = ours()
    record_property("words", len(words))
    record_property("names at file scope", len(file_scope))
    record_property("macros before them", len(set(re.findall(r"#\s*define\s+(\w+)", headers))))
    assert collisions(headers) == set()
    assert {"affine_code", "hadamard", "packed_word", "paley_negative", "read_code"} <= file_scope
    defined = set(re.findall(r"typedef\s+\w+\s+(\w+)\s*;", headers))
    assert set(METAL_TYPES.values()) - BUILT_IN <= defined  # the element types that MLX itself names
