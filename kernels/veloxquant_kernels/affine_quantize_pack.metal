// Affine-quantize and pack rows, in groups of neighbouring channels of one token; affine.metal has the arithmetic.
//
//   x [rows, HEAD_DIM] fp16, bf16 or fp32
//   -> words [rows, ceil(HEAD_DIM * CODE_BITS / 32)] uint32, in packing.metal's layout
//   -> scales, zeros [rows, ceil(HEAD_DIM / GROUP_SIZE)] fp16; the last group may be shorter
//
// One simdgroup per row, SIMDGROUPS rows per threadgroup.
threadgroup float values[SIMDGROUPS * HEAD_DIM];
threadgroup half group_scales[SIMDGROUPS * ((HEAD_DIM + GROUP_SIZE - 1) / GROUP_SIZE)];
threadgroup half group_zeros[SIMDGROUPS * ((HEAD_DIM + GROUP_SIZE - 1) / GROUP_SIZE)];
const uint n_words = (HEAD_DIM * CODE_BITS + 31) / 32;
const uint n_groups = (HEAD_DIM + GROUP_SIZE - 1) / GROUP_SIZE;
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
  bool finite = affine_finite(low);
  const uint end = min(begin + GROUP_SIZE, (simdgroup + 1) * HEAD_DIM);
  for (uint i = begin + 1; i < end; ++i) {
    low = min(low, values[i]);
    high = max(high, values[i]);
    finite = finite && affine_finite(values[i]);
  }
  const half scale = affine_scale(low, high, levels, finite);
  const half zero = affine_zero(low, high, levels, finite);
  group_scales[simdgroup * n_groups + group] = scale;
  group_zeros[simdgroup * n_groups + group] = zero;
  scales[row * n_groups + group] = scale;
  zeros[row * n_groups + group] = zero;
}
simdgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = lane; i < HEAD_DIM; i += 32) {
  const uint group = simdgroup * n_groups + i / GROUP_SIZE;
  const uint at = simdgroup * HEAD_DIM + i;
  values[at] = affine_code(values[at], group_scales[group], group_zeros[group], levels);
}
simdgroup_barrier(mem_flags::mem_threadgroup);
for (uint word = lane; word < n_words; word += 32) {
  words[row * n_words + word] = packed_word<CODE_BITS>(values + simdgroup * HEAD_DIM, uint(HEAD_DIM), word);
}
