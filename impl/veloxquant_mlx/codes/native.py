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
            "n_coefficients", "n_tables", "n_symbols", "n_contexts", "precision", "n_states"
        )),
    )  # fmt: skip


class _Output(ctypes.Structure):
    _fields_ = (
        ("symbols", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("coefficient_stride", ctypes.c_int64),
    )


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
        return ctypes.CDLL(str(target))
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


def _pointer(array: NDArray[np.generic] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _tables(tables: Tables) -> _Tables:
    t = tables
    arrays = (t.classes, t.shifts, t.cumulative, t.class_tables, t.weights, t.contexts)
    assert all(array.flags.c_contiguous for array in arrays)
    n_tables, n_symbols = t.cumulative.shape[1], t.cumulative.shape[2] - 1
    sizes = (len(t.classes), n_tables, n_symbols, t.class_tables.shape[1], t.precision, t.n_states)
    pointers = [_pointer(array) for array in arrays]
    return _Tables(*pointers, *sizes)


def _n_blocks(n_tokens: int, block_tokens: int) -> int:
    return -(-n_tokens // block_tokens)


def coded_lengths(library: ctypes.CDLL, symbols: Symbols, tables: Tables, block_tokens: int) -> NDArray[np.uint32]:
    """Words of each block's record."""
    lengths = np.zeros(_n_blocks(len(symbols), block_tokens), np.uint32)
    library.vq_encode(
        ctypes.byref(_tables(tables)), ctypes.c_void_p(_pointer(symbols)), ctypes.c_int64(len(symbols)),
        ctypes.c_int32(block_tokens), None, ctypes.c_int64(0), ctypes.c_void_p(_pointer(lengths)),
    )  # fmt: skip
    return lengths


def encode(
    library: ctypes.CDLL, symbols: Symbols, tables: Tables, block_tokens: int
) -> tuple[Words, NDArray[np.uint32]]:
    """Words of all records, and the words of each."""
    lengths = np.zeros(_n_blocks(len(symbols), block_tokens), np.uint32)
    call = library.vq_encode
    call.restype = ctypes.c_int64
    capacity = 64 * (len(lengths) + 1) + len(symbols) * (8 + len(tables.classes) // 2)
    while True:
        words = np.empty(capacity, np.uint16)
        n_words = call(
            ctypes.byref(_tables(tables)), ctypes.c_void_p(_pointer(symbols)), ctypes.c_int64(len(symbols)),
            ctypes.c_int32(block_tokens), ctypes.c_void_p(_pointer(words)), ctypes.c_int64(capacity),
            ctypes.c_void_p(_pointer(lengths)),
        )  # fmt: skip
        if n_words <= capacity:
            return words[:n_words].copy(), lengths
        capacity = n_words


def decode(
    library: ctypes.CDLL,
    words: Words,
    starts: NDArray[np.int64],
    first_tokens: NDArray[np.int64],
    tables: Tables,
) -> tuple[Symbols, NDArray[np.uint32]]:
    """Symbols ``[T, d]`` and a status for each block."""
    symbols = np.zeros((int(first_tokens[-1]), len(tables.classes)), np.int32)
    output = _Output(symbols=_pointer(symbols), token_stride=symbols.shape[1], coefficient_stride=1)
    return symbols, _decode(library, words, starts, first_tokens, tables, output)


def _decode(
    library: ctypes.CDLL,
    words: Words,
    starts: NDArray[np.int64],
    first_tokens: NDArray[np.int64],
    tables: Tables,
    output: _Output,
) -> NDArray[np.uint32]:
    starts, first_tokens = (np.ascontiguousarray(x, np.int64) for x in (starts, first_tokens))
    status = np.zeros(len(starts) - 1, np.uint32)
    library.vq_decode(
        ctypes.byref(_tables(tables)), ctypes.c_void_p(_pointer(words)), ctypes.c_void_p(_pointer(starts)),
        ctypes.c_void_p(_pointer(first_tokens)), ctypes.c_int64(len(status)), ctypes.byref(output),
        ctypes.c_void_p(_pointer(status)),
    )  # fmt: skip
    return status
