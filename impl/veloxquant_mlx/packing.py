"""The byte format by the implementation's name; it is defined, with its kernels, in ``veloxquant_kernels.packing``."""

from veloxquant_kernels.packing import (
    MAX_CODE_BITS,
    check_code_bits,
    pack_codes,
    pack_trits,
    packed_words,
    trit_bytes,
    unpack_codes,
    unpack_trits,
)

__all__ = [
    "MAX_CODE_BITS",
    "check_code_bits",
    "pack_codes",
    "pack_trits",
    "packed_words",
    "trit_bytes",
    "unpack_codes",
    "unpack_trits",
]
