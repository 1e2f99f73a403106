"""The byte format by the implementation's name; it is defined, with its kernels, in ``veloxquant_kernels.packing``."""

from veloxquant_kernels.packing import pack_codes, pack_trits, packed_words, trit_bytes, unpack_codes, unpack_trits

__all__ = ["pack_codes", "pack_trits", "packed_words", "trit_bytes", "unpack_codes", "unpack_trits"]
