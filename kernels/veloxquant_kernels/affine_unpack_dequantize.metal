// Unpack and dequantize affine codes, grouped along channels or along tokens; affine.metal has the arithmetic.
//
//   words [rows, ceil(D * CODE_BITS / 32)] uint32, in packing.metal's layout
//   scales, biases fp16: [rows, D / group_size], or for PER_CHANNEL [rows / group_size, D]
//   -> x [rows, D] of type T
//
// One thread per value.
const uint head_dim = threads_per_grid.x;
const uint n_words = words_shape[1];
const uint channel = thread_position_in_grid.x;
const uint row = thread_position_in_grid.y;
const uint group_size = PER_CHANNEL ? words_shape[0] / scales_shape[0] : head_dim / scales_shape[1];
const uint group = PER_CHANNEL ? row / group_size * head_dim + channel
                               : row * scales_shape[1] + channel / group_size;
const float code = float(read_code<CODE_BITS>(words + row * n_words, channel));
x[row * head_dim + channel] = static_cast<T>(code * float(scales[group]) + float(biases[group]));
