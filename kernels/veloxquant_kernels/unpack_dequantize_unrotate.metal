// Unpack, dequantize and rotate back: the codes of a TurboQuant cache become vectors.
//
//   words [rows, ceil(HEAD_DIM * CODE_BITS / 32)] uint32, in packing.metal's layout
//   norms [rows] fp16
//   centroids [2^CODE_BITS] fp32, of unit variance
//   signs [HEAD_DIM] fp32, the diagonal of the rotation
//   -> x [rows, HEAD_DIM] of type T
//
// One simdgroup per row, SIMDGROUPS rows per threadgroup.
threadgroup float values[SIMDGROUPS * HEAD_DIM];
threadgroup float scratch[SIMDGROUPS * HEAD_DIM];
const uint n_words = (HEAD_DIM * CODE_BITS + 31) / 32;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint row = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup;
if (row >= uint(words_shape[0])) {
  return;
}
for (uint i = lane; i < HEAD_DIM; i += 32) {
  values[simdgroup * HEAD_DIM + i] = centroids[read_code<CODE_BITS>(words + row * n_words, i)];
}
hadamard<HEAD_DIM, ORDER, true>(values + simdgroup * HEAD_DIM, scratch + simdgroup * HEAD_DIM, lane);
const float scale = 1.0f / sqrt(float(HEAD_DIM));
const float norm = float(norms[row]);
for (uint i = lane; i < HEAD_DIM; i += 32) {
  x[row * HEAD_DIM + i] = static_cast<T>(values[simdgroup * HEAD_DIM + i] * scale * signs[i] * norm);
}
