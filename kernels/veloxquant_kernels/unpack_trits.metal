// Unpack trits, five to a byte, the first in the lowest base-3 digit.
//
//   bytes [rows, W] uint8 -> trits [rows, D] uint8
//
// One thread reads one trit.
const uint n_bytes = bytes_shape[1];
const uint n_trits = threads_per_grid.x;
const uint j = thread_position_in_grid.x;
const uint row = thread_position_in_grid.y;
uint digits = bytes[row * n_bytes + j / 5];
for (uint digit = 0; digit < j % 5; ++digit) {
  digits /= 3;
}
trits[row * n_trits + j] = uint8_t(digits % 3);
