// The randomised Hadamard rotation of a row of HEAD_DIM values in threadgroup memory, by one simdgroup.
//
// HEAD_DIM = 2^k * ORDER with ORDER 1, 12 or 20. The matrix is kron(Sylvester(2^k), Paley(ORDER)) / sqrt(HEAD_DIM),
// Paley's construction I for the primes 11 and 19: entry (0, c) is +1, (r, 0) is -1, (r, r) is +1, and (r, c) the
// quadratic character of r - c. Sums run in a fixed order, so that every target gives the same bits.

// Whether entry (row, column) of the Paley matrix is -1.
template <int ORDER>
inline bool paley_negative(uint row, uint column) {
  // bit i: i is a non-zero square modulo the prime
  const uint squares = ORDER == 12 ? 0x23au : 0x30af2u;
  if (row == 0 || row == column) {
    return false;
  }
  if (column == 0) {
    return true;
  }
  return ((squares >> ((row + (ORDER - 1) - column) % (ORDER - 1))) & 1u) == 0;
}

// Multiplies x by the unscaled Hadamard matrix (its transpose for TRANSPOSED). x and scratch hold HEAD_DIM values of
// threadgroup memory each; the result is in x. Every lane of the simdgroup must call this. It begins with a barrier of
// the simdgroup; at its end lane i % 32 may read x[i], and other lanes need a barrier first.
template <int HEAD_DIM, int ORDER, bool TRANSPOSED, typename Row>
inline void hadamard(Row x, Row scratch, uint lane) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint half_step = ORDER; half_step < HEAD_DIM; half_step *= 2) {
    for (uint pair = lane; pair < HEAD_DIM / 2; pair += 32) {
      const uint low = pair / half_step * half_step * 2 + pair % half_step;
      const float a = x[low], b = x[low + half_step];
      x[low] = a + b;
      x[low + half_step] = a - b;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (ORDER > 1) {
    for (uint i = lane; i < HEAD_DIM; i += 32) {
      const uint row = i % ORDER, block = i - row;
      float sum = 0.0f;
      for (uint column = 0; column < ORDER; ++column) {
        const bool negative =
            TRANSPOSED ? paley_negative<ORDER>(column, row) : paley_negative<ORDER>(row, column);
        sum += negative ? -x[block + column] : x[block + column];
      }
      scratch[i] = sum;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = lane; i < HEAD_DIM; i += 32) {
      x[i] = scratch[i];
    }
  }
}
