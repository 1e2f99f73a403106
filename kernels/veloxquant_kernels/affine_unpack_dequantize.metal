// Unpack and dequantize affine codes, grouped along channels or along tokens; affine.metal has the arithmetic.
//
//   words [rows, ceil(D * CODE_BITS / 32)] uint32, in packing.metal's layout
//   scales, zeros fp16: [rows, ceil(D / GROUP_SIZE)], or for PER_CHANNEL [rows / GROUP_SIZE, D]
//   -> x [rows, D] of type T
//
// One thread per value.
const uint head_dim = threads_per_grid.x;
const uint n_words = words_shape[1];
const uint channel = thread_position_in_grid.x;
const uint row = thread_position_in_grid.y;
const uint group = PER_CHANNEL ? row / GROUP_SIZE * head_dim + channel
                               : row * scales_shape[1] + channel / GROUP_SIZE;
const float code = float(read_code<CODE_BITS>(words + row * n_words, channel));
x[row * head_dim + channel] = static_cast<T>(code * float(scales[group]) + float(zeros[group]));
