"""``codes.cpp``, compiled with the system's compiler into the cache that the kernels' emulator uses, and its calls.

Without a compiler the callers take their NumPy definitions, fifty times slower; :func:`why_not_native` says why, and a
warning says it once. ``VELOXQUANT_NATIVE=0`` asks for the definitions.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels.emulator import build
from veloxquant_kernels.rans_format import Symbols, Tables, Words

HERE: Final = Path(__file__).parent
NATIVE_VARIABLE: Final = "VELOXQUANT_NATIVE"
_FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-shared")


class _Tables(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "classes", "shifts", "cumulative", "class_tables", "weights", "contexts"
        )),
        *((name, ctypes.c_int32) for name in (
            "n_coefficients", "n_tables", "n_symbols", "n_contexts", "precision"
        )),
    )  # fmt: skip


_TABLES: Final = ctypes.POINTER(_Tables)
_POINTER: Final = ctypes.c_void_p
_INT: Final = ctypes.c_int64


@functools.cache
def _build() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        compiler, version = build.find_compiler()
        texts = [(HERE / name).read_text(encoding="utf-8") for name in ("codes.cpp", "codes.h")]
        directory = build.cache_directory()
        target = directory / f"codes-{build.digest(*texts, *_FLAGS, version, platform.machine())}.so"
        if not target.exists():
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as folder:
                produced = Path(folder) / target.name
                command = [compiler, *_FLAGS, str(HERE / "codes.cpp"), "-o", str(produced)]
                build.compile_library([command], produced, target)
        library = ctypes.CDLL(str(target))
        library.vq_encode.argtypes = (_TABLES, _POINTER, _INT, ctypes.c_int32, _POINTER, _INT, _POINTER)
        library.vq_encode.restype = _INT
        library.vq_decode.argtypes = (_TABLES, *3 * (_POINTER,), _INT, _POINTER, _POINTER)
        return library
    except (build.CompilerNotFound, build.CompilationFailed, OSError) as problem:
        return str(problem).splitlines()[0]


def why_not_native() -> str | None:
    """Why the NumPy definitions run here, or None where the compiled path does."""
    if os.environ.get(NATIVE_VARIABLE) == "0":
        return f"{NATIVE_VARIABLE}=0"
    built = _build()
    return built if isinstance(built, str) else None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"the codes run in NumPy, about 50 times slower than compiled: {reason}", RuntimeWarning, stacklevel=4
    )


def library() -> ctypes.CDLL | None:
    """The compiled library, or None, after one warning, where there is no compiler."""
    reason = why_not_native()
    if reason is not None:
        if not reason.startswith(NATIVE_VARIABLE):
            _warn(reason)
        return None
    built = _build()
    assert isinstance(built, ctypes.CDLL)
    return built


def _tables(tables: Tables) -> _Tables:
    t = tables
    arrays = (t.classes, t.shifts, t.cumulative, t.class_tables, t.weights, t.contexts)
    assert all(array.flags.c_contiguous for array in arrays)
    n_tables, n_symbols = t.cumulative.shape[0], t.cumulative.shape[1] - 1
    sizes = (len(t.classes), n_tables, n_symbols, t.class_tables.shape[1], t.precision)
    pointers = [array.ctypes.data for array in arrays]
    return _Tables(*pointers, *sizes)


def coded_lengths(library: ctypes.CDLL, symbols: Symbols, tables: Tables, block_tokens: int) -> NDArray[np.uint32]:
    """Words of each block's record."""
    return _encode(library, symbols, tables, block_tokens, np.zeros(0, np.uint16))[1]


def encode(
    library: ctypes.CDLL, symbols: Symbols, tables: Tables, block_tokens: int
) -> tuple[Words, NDArray[np.uint32]]:
    """Words of all records, and the words of each."""
    n_words = 64 * (-(-len(symbols) // block_tokens) + 1) + len(symbols) * (8 + len(tables.classes) // 2)
    while True:
        words = np.empty(n_words, np.uint16)
        n_words, lengths = _encode(library, symbols, tables, block_tokens, words)
        if n_words <= words.size:
            return words[:n_words].copy(), lengths


def _encode(
    library: ctypes.CDLL, symbols: Symbols, tables: Tables, block_tokens: int, words: Words
) -> tuple[int, NDArray[np.uint32]]:
    """How many words the records take, and each of them; written to ``words`` as far as it reaches, if it has any."""
    lengths = np.zeros(-(-len(symbols) // block_tokens), np.uint32)
    written = words.ctypes.data if words.size else None
    of_tables, of_lengths = ctypes.byref(_tables(tables)), lengths.ctypes.data
    n_words = library.vq_encode(
        of_tables, symbols.ctypes.data, len(symbols), block_tokens, written, words.size, of_lengths
    )
    return n_words, lengths


def decode(
    library: ctypes.CDLL,
    words: Words,
    starts: NDArray[np.int64],
    first_tokens: NDArray[np.int64],
    tables: Tables,
) -> tuple[Symbols, NDArray[np.uint32]]:
    """Symbols ``[T, d]`` and a status for each block."""
    symbols = np.zeros((int(first_tokens[-1]), len(tables.classes)), np.int32)
    starts, first_tokens = (np.ascontiguousarray(x, np.int64) for x in (starts, first_tokens))
    status = np.zeros(len(starts) - 1, np.uint32)
    read, written = (words, starts, first_tokens), (symbols, status)
    pointers = [[array.ctypes.data for array in arrays] for arrays in (read, written)]
    library.vq_decode(ctypes.byref(_tables(tables)), *pointers[0], len(status), *pointers[1])
    return symbols, status
