// Rotate, quantize and pack rows: vectors become the codes of a TurboQuant cache.
//
//   x [rows, HEAD_DIM] fp16, bf16 or fp32
//   signs [HEAD_DIM] fp32, the diagonal of the rotation
//   edges [2^CODE_BITS - 1] fp32, ascending: the boundaries between neighbouring centroids
//   -> words [rows, ceil(HEAD_DIM * CODE_BITS / 32)] uint32, in packing.metal's layout
//   -> norms [rows] fp16, the root mean square of x
//
// code = number of edges below the rotated value of x / norm. One simdgroup per row, SIMDGROUPS rows per threadgroup.
// The square sum runs in a fixed order (lanes' own values, then a butterfly over lanes), so codes are bit-exact.
threadgroup float values[SIMDGROUPS * HEAD_DIM];
threadgroup float scratch[SIMDGROUPS * HEAD_DIM];
const uint n_words = (HEAD_DIM * CODE_BITS + 31) / 32;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint row = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup;
if (row >= uint(x_shape[0])) {
  return;
}
float sum = 0.0f;
for (uint i = lane; i < HEAD_DIM; i += 32) {
  const float value = float(x[row * HEAD_DIM + i]);
  values[simdgroup * HEAD_DIM + i] = value;
  sum += value * value;
}
for (uint distance = 16; distance > 0; distance /= 2) {
  sum += simd_shuffle_xor(sum, distance);
}
const float norm = sqrt(sum / float(HEAD_DIM));
const float inverse = 1.0f / max(norm, 1e-12f);
for (uint i = lane; i < HEAD_DIM; i += 32) {
  values[simdgroup * HEAD_DIM + i] = values[simdgroup * HEAD_DIM + i] * inverse * signs[i];
}
hadamard<HEAD_DIM, ORDER, false>(values + simdgroup * HEAD_DIM, scratch + simdgroup * HEAD_DIM, lane);
const float scale = 1.0f / sqrt(float(HEAD_DIM));
for (uint i = lane; i < HEAD_DIM; i += 32) {
  const float value = values[simdgroup * HEAD_DIM + i] * scale;
  uint code = 0;
  for (uint step = 1u << (CODE_BITS - 1); step > 0; step /= 2) {
    if (value > edges[code + step - 1]) {
      code += step;
    }
  }
  scratch[simdgroup * HEAD_DIM + i] = float(code);
}
simdgroup_barrier(mem_flags::mem_threadgroup);
for (uint word = lane; word < n_words; word += 32) {
  words[row * n_words + word] = packed_word<CODE_BITS>(scratch + simdgroup * HEAD_DIM, uint(HEAD_DIM), word);
}
if (lane == 0) {
  norms[row] = half(norm);
}
