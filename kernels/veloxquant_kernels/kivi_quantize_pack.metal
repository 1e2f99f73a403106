// Affine-quantize and pack rows, in groups of GROUP_SIZE tokens of one channel (KIVI's keys); affine.metal has the
// arithmetic.
//
//   x [blocks * GROUP_SIZE, HEAD_DIM] fp16, bf16 or fp32: GROUP_SIZE rows make a block
//   -> words [blocks * GROUP_SIZE, ceil(HEAD_DIM * CODE_BITS / 32)] uint32, in packing.metal's layout
//   -> scales, zeros [blocks, HEAD_DIM] fp16
//
// One threadgroup of HEAD_DIM threads per block; a thread owns a channel and reads it twice.
threadgroup uchar codes[GROUP_SIZE * HEAD_DIM];
const uint n_words = (HEAD_DIM * CODE_BITS + 31) / 32;
const float levels = float((1u << CODE_BITS) - 1u);
const uint channel = thread_position_in_threadgroup.x;
const uint block = threadgroup_position_in_grid.x;
const uint begin = block * GROUP_SIZE * HEAD_DIM + channel;
float low = float(x[begin]), high = low;
bool finite = affine_finite(low);
for (uint token = 1; token < GROUP_SIZE; ++token) {
  const float value = float(x[begin + token * HEAD_DIM]);
  low = min(low, value);
  high = max(high, value);
  finite = finite && affine_finite(value);
}
const half scale = affine_scale(low, high, levels, finite);
const half zero = affine_zero(low, high, levels, finite);
scales[block * HEAD_DIM + channel] = scale;
zeros[block * HEAD_DIM + channel] = zero;
for (uint token = 0; token < GROUP_SIZE; ++token) {
  const float value = float(x[begin + token * HEAD_DIM]);
  codes[token * HEAD_DIM + channel] = uchar(affine_code(value, scale, zero, levels));
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = channel; i < GROUP_SIZE * n_words; i += HEAD_DIM) {
  const uint token = i / n_words;
  words[block * GROUP_SIZE * n_words + i] =
      packed_word<CODE_BITS>(codes + token * HEAD_DIM, uint(HEAD_DIM), i % n_words);
}
