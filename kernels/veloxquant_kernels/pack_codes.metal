// Pack rows of codes into 32-bit words; the layout is packing.metal's.
//
//   codes [rows, D] uint8 or uint32 -> words [rows, ceil(D * CODE_BITS / 32)] uint32
//
// One thread writes one word. Bits of a code above CODE_BITS are dropped.
const uint n_codes = codes_shape[1];
const uint n_words = (n_codes * CODE_BITS + 31) / 32;
const uint word = thread_position_in_grid.x;
const uint row = thread_position_in_grid.y;
words[row * n_words + word] = packed_word<CODE_BITS>(codes + row * n_codes, n_codes, word);
