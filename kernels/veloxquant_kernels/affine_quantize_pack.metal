// Affine-quantize and pack rows, in groups of neighbouring channels of one token; affine.metal has the arithmetic.
//
//   x [rows, HEAD_DIM] fp16, bf16 or fp32
//   -> words [rows, ceil(HEAD_DIM * CODE_BITS / 32)] uint32, in packing.metal's layout
//   -> scales, biases [rows, HEAD_DIM / GROUP_SIZE] fp16
//
// One simdgroup per row, SIMDGROUPS rows per threadgroup.
threadgroup float values[SIMDGROUPS * HEAD_DIM];
threadgroup half group_scales[SIMDGROUPS * (HEAD_DIM / GROUP_SIZE)];
threadgroup half group_biases[SIMDGROUPS * (HEAD_DIM / GROUP_SIZE)];
const uint n_words = (HEAD_DIM * CODE_BITS + 31) / 32;
const uint n_groups = HEAD_DIM / GROUP_SIZE;
const float levels = float((1u << CODE_BITS) - 1u);
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint row = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup;
if (row >= uint(x_shape[0])) {
  return;
}
for (uint i = lane; i < HEAD_DIM; i += 32) {
  values[simdgroup * HEAD_DIM + i] = float(x[row * HEAD_DIM + i]);
}
simdgroup_barrier(mem_flags::mem_threadgroup);
for (uint group = lane; group < n_groups; group += 32) {
  const uint begin = simdgroup * HEAD_DIM + group * GROUP_SIZE;
  float low = values[begin], high = values[begin];
  for (uint i = 1; i < GROUP_SIZE; ++i) {
    low = min(low, values[begin + i]);
    high = max(high, values[begin + i]);
  }
  const half scale = half((high - low) / levels);
  const half bias = half(low);
  group_scales[simdgroup * n_groups + group] = scale;
  group_biases[simdgroup * n_groups + group] = bias;
  scales[row * n_groups + group] = scale;
  biases[row * n_groups + group] = bias;
}
simdgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = lane; i < HEAD_DIM; i += 32) {
  const uint group = simdgroup * n_groups + i / GROUP_SIZE;
  const uint at = simdgroup * HEAD_DIM + i;
  values[at] = affine_code(values[at], group_scales[group], group_biases[group], levels);
}
simdgroup_barrier(mem_flags::mem_threadgroup);
for (uint word = lane; word < n_words; word += 32) {
  words[row * n_words + word] = packed_word<CODE_BITS>(values + simdgroup * HEAD_DIM, uint(HEAD_DIM), word);
}
