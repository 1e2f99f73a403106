// Decode attention over a packed TurboQuant cache, second pass: the splits of one query become its output.
//
//   partial_values [rows, splits, HEAD_DIM] fp32, partial_stats [rows, splits, 2] fp32: see fused_attention.metal
//   value_signs [HEAD_DIM] fp32, the diagonal of the values' rotation
//   counts [4] uint32: see fused_attention.metal
//   -> out [rows, HEAD_DIM] of type T
//
// The splits of packed tokens are summed in the rotated basis and rotated back, once. A query that sees no token gets
// zeros. One simdgroup per row, SIMDGROUPS rows per threadgroup.
const int SIMDGROUPS = 4;
const int CHANNELS = (HEAD_DIM + 31) / 32;
threadgroup float values[SIMDGROUPS * HEAD_DIM];
threadgroup float scratch[SIMDGROUPS * HEAD_DIM];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint row = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup;
if (row >= uint(partial_values_shape[0])) {
  return;
}
const uint n_splits = partial_values_shape[1];
const uint n_packed_splits = (counts[0] + counts[3] - 1) / counts[3];
float top = -MAXFLOAT;
for (uint split = lane; split < n_splits; split += 32) {
  top = max(top, partial_stats[(row * n_splits + split) * 2]);
}
top = simd_max(top);

float rotated[CHANNELS];
float plain[CHANNELS];
for (uint k = 0; k < CHANNELS; ++k) {
  rotated[k] = 0.0f;
  plain[k] = 0.0f;
}
float total = 0.0f;
for (uint begin = 0; begin < n_splits; begin += 32) {
  float weight = 0.0f;
  if (begin + lane < n_splits) {
    const uint at = (row * n_splits + begin + lane) * 2;
    weight = exp(partial_stats[at] - top);
    total += weight * partial_stats[at + 1];
  }
  const uint n = min(32u, n_splits - begin);
  for (uint i = 0; i < n; ++i) {
    const uint split = begin + i;
    const float share = simd_broadcast(weight, i);
    for (uint k = 0; k < CHANNELS; ++k) {
      const uint channel = k * 32 + lane;
      if (channel < HEAD_DIM) {
        const float value = share * partial_values[(row * n_splits + split) * HEAD_DIM + channel];
        if (split < n_packed_splits) {
          rotated[k] += value;
        } else {
          plain[k] += value;
        }
      }
    }
  }
}
total = simd_sum(total);
for (uint k = 0; k < CHANNELS; ++k) {
  const uint channel = k * 32 + lane;
  if (channel < HEAD_DIM) {
    values[simdgroup * HEAD_DIM + channel] = rotated[k];
  }
}
hadamard<HEAD_DIM, ORDER, true>(values + simdgroup * HEAD_DIM, scratch + simdgroup * HEAD_DIM, lane);
const float unit = 1.0f / sqrt(float(HEAD_DIM));
for (uint k = 0; k < CHANNELS; ++k) {
  const uint channel = k * 32 + lane;
  if (channel < HEAD_DIM) {
    const float sum = values[simdgroup * HEAD_DIM + channel] * unit * value_signs[channel] + plain[k];
    out[row * HEAD_DIM + channel] = static_cast<T>(total > 0.0f ? sum / total : 0.0f);
  }
}
