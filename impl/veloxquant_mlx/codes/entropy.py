"""An entropy code for integers with static tables: what quantized coefficients of known distribution cost.

The format is the one that ``veloxquant_kernels/rans_decode.metal`` states: blocks of tokens, each a record of 16-bit
words that decodes alone; a lane a token, 32 interleaved rANS lanes on one stream; a table for each class of
coefficients in each context, which is how large the token's coefficients have been so far. Any int32 has a code.

Here: tables, blocks, sizes. Metal decodes where kernels are launched; :mod:`veloxquant_mlx.codes.native` encodes, and
decodes on a CPU, in C++ where a compiler is; the NumPy definitions are ``veloxquant_kernels.rans_format`` and
``rans_decode``.

Cost: ``log2 1/p`` bits a number; beside it, for each block, a word, 4 bytes of length and 32 bits of state a lane, of
which 8 on average carry symbols: .06 bits a value in blocks of 32 tokens of 384 coefficients, .008 in blocks of 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from veloxquant_kernels.kernel import launches_on
from veloxquant_kernels.rans_decode import rans_decode, rans_decode_reference
from veloxquant_kernels.rans_format import (
    HEADER_WORDS,
    MAX_BLOCK_TOKENS,
    DamagedBlock,
    Symbols,
    Tables,
    Words,
    check_layout,
    rans_encode_reference,
)
from veloxquant_kernels.rans_format import INACTIVE as INACTIVE
from veloxquant_mlx.codes import native


@dataclass(frozen=True, eq=False)
class TableFamily:
    """The tables that all layers share.

    Attributes:
        cumulative: ``[n_tables, n_symbols + 1]`` uint16 cumulative frequencies.
        class_tables: ``[n_classes, n_contexts]`` uint16, the table of a class in each context.
        weights: ``[n_classes]`` uint16, what a magnitude of one adds to a token's level.
        contexts: ``[256]`` uint8, the context at each level.
        precision: frequencies of a table sum to ``2**precision``.

    Raises:
        ValueError: an array outside of the format.
    """

    cumulative: NDArray[np.uint16]
    class_tables: NDArray[np.uint16]
    weights: NDArray[np.uint16]
    contexts: NDArray[np.uint8]
    precision: int

    def __post_init__(self) -> None:
        for name, dtype in (("cumulative", "u2"), ("class_tables", "u2"), ("weights", "u2"), ("contexts", "u1")):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))
        self.tables(np.zeros(0, np.uint16), np.zeros(0, np.uint8)).check()

    def tables(self, classes: NDArray[np.uint16], shifts: NDArray[np.uint8]) -> Tables:
        """With a layer's own classes: what encoder and decoder work with."""
        arrays = (self.cumulative, self.class_tables, self.weights, self.contexts)
        return Tables(classes, shifts, *arrays, self.precision)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.to_arrays().values())

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Arrays by name, for safetensors.

        ``cumulative`` has a first axis of one, and ``form`` a one behind the precision: an older form had a choice
        there, and calibrations keep their hashes.
        """
        form = np.array([self.precision, 1], np.uint8)
        plain = {name: getattr(self, name) for name in ("class_tables", "weights", "contexts")}
        return {"cumulative": self.cumulative[None], **plain, "form": form}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike]) -> TableFamily:
        """The inverse of :meth:`to_arrays`.

        Raises:
            ValueError: a missing array, or one outside of the format.
        """
        names = ("cumulative", "class_tables", "weights", "contexts", "form")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"arrays lacks {missing[0]!r} of the entropy code's tables")
        form = np.asarray(arrays["form"]).ravel()
        cumulative, class_tables, weights, contexts = (np.asarray(arrays[name]) for name in names[:4])
        if form.size != 2 or form[1] != 1 or cumulative.shape[:1] != (1,):
            raise ValueError(f"form must be [precision, 1] and cumulative [1, ...], got {form} and {cumulative.shape}")
        return cls(cumulative[0], class_tables, weights, contexts, int(form[0]))


@dataclass(frozen=True, eq=False)
class EntropyTables:
    """A family and the class of each coefficient of one layer.

    Attributes:
        family: shared with other layers.
        classes: ``[d]`` uint16; ``INACTIVE`` for a coefficient that is always zero and costs nothing.
        shifts: ``[d]`` uint8, low bits of a coefficient's numbers that are stored plainly: for scales that would need a
            very long table. Zero where absent.

    Raises:
        ValueError: a class that the family does not have, or a shift above 16.
    """

    family: TableFamily
    classes: NDArray[np.uint16]
    shifts: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))

    def __post_init__(self) -> None:
        classes = np.ascontiguousarray(self.classes, np.uint16)
        shifts = np.ascontiguousarray(self.shifts if np.size(self.shifts) else np.zeros(classes.shape), np.uint8)
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "shifts", shifts)
        self.tables.check()

    @cached_property
    def tables(self) -> Tables:
        """What encoder and decoder work with."""
        return self.family.tables(self.classes, self.shifts)

    @property
    def active(self) -> NDArray[np.bool_]:
        """``[d]``: which coefficients are coded."""
        return np.asarray(self.classes != INACTIVE)

    @property
    def nbytes(self) -> int:
        """Bytes of classes and shifts; the family's are counted once, apart."""
        return self.classes.nbytes + self.shifts.nbytes


@dataclass(frozen=True, eq=False)
class EntropyBlocks:
    """Coded tokens: records one after another.

    Attributes:
        words: ``[n_words]`` uint16.
        lengths: ``[n_blocks]`` uint32, words of each record.

    Raises:
        DamagedBlock: lengths that do not add up to the words.
    """

    words: Words
    lengths: NDArray[np.uint32]

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", np.ascontiguousarray(self.words, np.uint16).reshape(-1))
        object.__setattr__(self, "lengths", np.ascontiguousarray(self.lengths, np.uint32).reshape(-1))
        if int(self.lengths.sum(dtype=np.uint64)) != self.words.size:
            raise DamagedBlock(f"lengths add up to {self.lengths.sum(dtype=np.uint64)} words of {self.words.size}")
        if self.lengths.size and self.lengths.min() <= HEADER_WORDS:
            raise DamagedBlock(f"a record has {self.lengths.min()} words, which cannot hold a token")

    @classmethod
    def empty(cls) -> EntropyBlocks:
        """No tokens."""
        return cls(np.zeros(0, np.uint16), np.zeros(0, np.uint32))

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """``[n_blocks + 1]``: where each record begins in ``words``."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """``[n_blocks]``: tokens of each block, from its record.

        Raises:
            DamagedBlock: a record that claims more than 256.
        """
        tokens = self.words[self.starts[:-1]].astype(np.int64) + 1
        if tokens.size and tokens.max() > MAX_BLOCK_TOKENS:
            raise DamagedBlock(f"a block claims {tokens.max()} tokens; the format holds {MAX_BLOCK_TOKENS}")
        return tokens

    @property
    def first_tokens(self) -> NDArray[np.int64]:
        """``[n_blocks + 1]``: the first token of each block, and the number of all."""
        return np.concatenate([[0], np.cumsum(self.tokens)]).astype(np.int64)

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return self.lengths.size

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all blocks."""
        return int(self.tokens.sum())

    @property
    def nbytes(self) -> int:
        """Bytes held: words and lengths."""
        return self.words.nbytes + self.lengths.nbytes

    def append(self, other: EntropyBlocks) -> EntropyBlocks:
        """These blocks, then the others."""
        words, lengths = (np.concatenate([getattr(x, name) for x in (self, other)]) for name in ("words", "lengths"))
        return EntropyBlocks(words, lengths)

    def take(self, first: int, last: int | None = None) -> EntropyBlocks:
        """Blocks ``first`` to ``last`` (exclusive), counted as in a slice: copies, so that the rest can be freed."""
        first, last, _ = slice(first, last).indices(self.n_blocks)
        last = max(first, last)
        words = self.words[self.starts[first] : self.starts[last]]
        return EntropyBlocks(words.copy(), self.lengths[first:last].copy())


def encode_reference(symbols: Symbols, tables: EntropyTables, block_tokens: int) -> EntropyBlocks:
    """The definition of :func:`encode_blocks`."""
    records = rans_encode_reference(symbols, tables.tables, block_tokens)
    if not records:
        return EntropyBlocks.empty()
    return EntropyBlocks(np.concatenate(records), np.array([len(record) for record in records], np.uint32))


# ---- what a cache calls --------------------------------------------------------------------------


def _checked(symbols: ArrayLike, tables: EntropyTables) -> Symbols:
    array = np.asarray(symbols)
    if array.ndim != 2 or array.shape[1] != len(tables.classes):
        raise ValueError(f"symbols must be [T, {len(tables.classes)}], got {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"symbols must be integers, got {array.dtype}")
    if array.dtype != np.int32:
        if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
            raise ValueError("symbols must fit 32 bits with their sign")
        array = array.astype(np.int32)
    lost = np.flatnonzero(~tables.active & (array != 0).any(axis=0))
    if lost.size:
        raise ValueError(f"symbols[:, {lost[0]}] must be zero: the tables say that this coefficient is not coded")
    return np.ascontiguousarray(array)


def _check_block_tokens(block_tokens: int) -> None:
    if not 1 <= block_tokens <= MAX_BLOCK_TOKENS:
        raise ValueError(f"block_tokens must lie in 1..{MAX_BLOCK_TOKENS}, got {block_tokens}")


def encode_blocks(symbols: ArrayLike, tables: EntropyTables, block_tokens: int = 32) -> EntropyBlocks:
    """Code tokens in blocks, each of which decodes alone.

    Args:
        symbols: ``[T, d]`` integers of 32 bits.
        tables: the family and the classes of the d coefficients.
        block_tokens: tokens in a block, 1..256; the last block may be shorter. Larger blocks cost fewer states.

    Returns:
        ``ceil(T / block_tokens)`` blocks.

    Raises:
        ValueError: a wrong shape, a block length outside 1..256, or a number other than 0 where none is coded.
        TypeError: symbols that are not integers.
    """
    _check_block_tokens(block_tokens)
    array = _checked(symbols, tables)
    library = native.library()
    if library is None:
        return encode_reference(array, tables, block_tokens)
    words, lengths = native.encode(library, array, tables.tables, block_tokens)
    return EntropyBlocks(words, lengths)


def decode_blocks(blocks: EntropyBlocks, tables: EntropyTables, first: int = 0, last: int | None = None) -> Symbols:
    """The inverse of :func:`encode_blocks`, for blocks ``first`` to ``last`` (exclusive).

    Returns:
        ``[T, d]`` int32.

    Raises:
        DamagedBlock: words that no encoder wrote; nothing is read outside of the block.
    """
    first, last, starts, tokens = decoding_range(blocks, first, last)
    if last == first:
        return np.zeros((0, len(tables.classes)), np.int32)
    library = native.library()
    where = launches_on(None)
    if where is not None:
        records = (mx.array(blocks.words), mx.array(starts.astype(np.uint32)), mx.array(tokens.astype(np.uint32)))
        planes, status = map(np.array, rans_decode(*records, tables.tables, backend=where))
        symbols = np.ascontiguousarray(planes.T)
    elif library is None:
        planes, status = rans_decode_reference(blocks.words, starts, tokens, tables.tables)
        symbols = np.ascontiguousarray(planes.T)
    else:
        symbols, status = native.decode(library, blocks.words, starts, tokens, tables.tables)
    check_decoded(status, first)
    return symbols


def decoding_range(
    blocks: EntropyBlocks, first: int, last: int | None
) -> tuple[int, int, NDArray[np.int64], NDArray[np.int64]]:
    """A slice of blocks as first, last, and where their words and their tokens begin."""
    first, last, _ = slice(first, last).indices(blocks.n_blocks)
    last = max(first, last)
    starts = blocks.starts[first : last + 1]
    tokens = np.concatenate([[0], np.cumsum(blocks.tokens[first:last])]).astype(np.int64)
    if last > first:
        check_layout(starts, tokens, blocks.words.size)
    return first, last, starts, tokens


def check_decoded(status: NDArray[np.uint32], first: int) -> None:
    """Raise DamagedBlock unless every block from ``first`` on was intact."""
    damaged = np.flatnonzero(status)
    if damaged.size:
        raise DamagedBlock(f"block {first + damaged[0]} is damaged ({damaged.size} of {status.size} blocks)")


def coded_nbytes(symbols: ArrayLike, tables: EntropyTables, block_tokens: int = 32) -> int:
    """Bytes that :func:`encode_blocks` holds for these symbols: the lanes' states are followed, no word is stored."""
    _check_block_tokens(block_tokens)
    array = _checked(symbols, tables)
    library = native.library()
    if library is None:
        return encode_reference(array, tables, block_tokens).nbytes
    lengths = native.coded_lengths(library, array, tables.tables, block_tokens)
    return int(2 * lengths.sum(dtype=np.int64)) + lengths.nbytes
