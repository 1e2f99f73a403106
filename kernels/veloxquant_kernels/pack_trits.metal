// Pack trits (0, 1, 2) five to a byte, 1.6 bits each: byte = t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4. Missing trits are 0.
//
//   trits [rows, D] uint8 -> bytes [rows, ceil(D / 5)] uint8
//
// One thread writes one byte.
const uint n_trits = trits_shape[1];
const uint n_bytes = (n_trits + 4) / 5;
const uint at = thread_position_in_grid.x;
const uint row = thread_position_in_grid.y;
uint packed = 0;
for (uint digit = 5; digit-- > 0;) {
  const uint j = at * 5 + digit;
  packed = packed * 3 + (j < n_trits ? uint(trits[row * n_trits + j]) : 0u);
}
bytes[row * n_bytes + at] = uint8_t(packed);
