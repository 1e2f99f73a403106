// Unpack rows of 32-bit words into codes; the layout is packing.metal's.
//
//   words [rows, W] uint32 -> codes [rows, D] uint8
//
// One thread reads one code.
const uint n_words = words_shape[1];
const uint n_codes = threads_per_grid.x;
const uint j = thread_position_in_grid.x;
const uint row = thread_position_in_grid.y;
codes[row * n_codes + j] = uint8_t(read_code<CODE_BITS>(words + row * n_words, j));
