// Decode attention over a packed TurboQuant cache, first pass: one split of the tokens of one KV head.
//
//   queries [B, n_heads, 1, HEAD_DIM] fp16, bf16 or fp32; GROUP = n_heads / n_kv_heads queries share each load
//   key_words [B, n_kv_heads, slots, K_WORDS] uint32 in packing.metal's layout, key_norms [B, n_kv_heads, slots, 1]
//     fp16, key_centroids [2^K_BITS] fp32, key_signs [HEAD_DIM] fp32; the same for values, with V_BITS
//   sink_keys, sink_values, tail_keys, tail_values [B, n_kv_heads, n, HEAD_DIM] fp16: tokens kept uncompressed, before
//     and behind the packed ones
//   mask [B, tokens]: unused for MASK_KIND 0, bool for 1 (false hides a token), added to the scores for 2
//   counts [4] uint32: packed tokens in use, sinks, tail, tokens of a split; scale: of the scores
//   -> partial_values [B * n_heads, splits, HEAD_DIM] fp32: sum of weight * value, in the rotated basis for packed splits
//   -> partial_stats [B * n_heads, splits, 2] fp32: the largest score, and the sum of weights relative to it
//
// q . k = norm * rotate(q) . centroids, so the query is rotated instead of every key; values stay rotated until the
// second pass. Splits of packed tokens come first, splits of uncompressed ones (sinks, then tail) last. A threadgroup
// of 4 simdgroups walks its split in tiles of 32 tokens. Each packed word is loaded by one thread, once. Scores: a lane
// owns a token, a simdgroup a quarter of the channels. Values: a lane owns channels, a simdgroup every fourth token.
const int SIMDGROUPS = 4;
const int THREADS = 32 * SIMDGROUPS;
const int TILE = 32;
const int K_WORDS = (HEAD_DIM * K_BITS + 31) / 32;
const int V_WORDS = (HEAD_DIM * V_BITS + 31) / 32;
const int STRIDE = (K_WORDS > V_WORDS ? K_WORDS : V_WORDS) | 1;  // odd: lanes that read rows meet no bank conflict
const int SLICE = HEAD_DIM / SIMDGROUPS;
const int CHANNELS = (HEAD_DIM + 31) / 32;
const int OWNED = (GROUP + SIMDGROUPS - 1) / SIMDGROUPS;
threadgroup float query[GROUP * HEAD_DIM];
threadgroup float scratch[ORDER > 1 ? SIMDGROUPS * HEAD_DIM : 1];
threadgroup float key_codebook[1 << K_BITS];
threadgroup float value_codebook[1 << V_BITS];
threadgroup uint tile[TILE * STRIDE];
threadgroup float key_norm[TILE];
threadgroup float value_norm[TILE];
threadgroup float bias[TILE];
threadgroup float partial_scores[SIMDGROUPS * GROUP * TILE];
threadgroup float weights[GROUP * TILE];
threadgroup float rescale[GROUP];
const uint index = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint head = threadgroup_position_in_grid.y;
const uint split = threadgroup_position_in_grid.x;
const uint n_splits = threadgroups_per_grid.x;
const uint n_packed = counts[0], n_sinks = counts[1], n_tail = counts[2], split_tokens = counts[3];
const uint n_packed_splits = (n_packed + split_tokens - 1) / split_tokens;
const bool packed = split < n_packed_splits;
const uint begin = (packed ? split : split - n_packed_splits) * split_tokens;
const uint end = min(begin + split_tokens, packed ? n_packed : n_sinks + n_tail);
const uint slots = key_words_shape[2];

for (uint channel = index; channel < HEAD_DIM; channel += THREADS) {
  const float factor = packed ? key_signs[channel] * scale : scale;
  for (uint g = 0; g < GROUP; ++g) {
    query[g * HEAD_DIM + channel] = float(queries[(head * GROUP + g) * HEAD_DIM + channel]) * factor;
  }
}
if (packed) {
  for (uint i = index; i < (1 << K_BITS); i += THREADS) {
    key_codebook[i] = key_centroids[i];
  }
  for (uint i = index; i < (1 << V_BITS); i += THREADS) {
    value_codebook[i] = value_centroids[i];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (packed) {
  for (uint g = simdgroup; g < GROUP; g += SIMDGROUPS) {
    hadamard<HEAD_DIM, ORDER, false>(
        query + g * HEAD_DIM, scratch + (ORDER > 1 ? simdgroup * HEAD_DIM : 0), lane);
  }
}
const float unit = packed ? 1.0f / sqrt(float(HEAD_DIM)) : 1.0f;

float sums[GROUP * CHANNELS];
for (uint i = 0; i < GROUP * CHANNELS; ++i) {
  sums[i] = 0.0f;
}
float top[OWNED];  // of the queries simdgroup, simdgroup + SIMDGROUPS, ...: the same in every lane
float total[OWNED];
for (uint i = 0; i < OWNED; ++i) {
  top[i] = -MAXFLOAT;  // finite, so that a tile without visible tokens leaves zero weights and no NaN
  total[i] = 0.0f;
}

for (uint start = begin; start < end; start += TILE) {
  const uint n = min(uint(TILE), end - start);
  if (packed) {
    for (uint i = index; i < n * K_WORDS; i += THREADS) {
      tile[i / K_WORDS * STRIDE + i % K_WORDS] = key_words[(head * slots + start) * K_WORDS + i];
    }
    if (index < n) {
      key_norm[index] = float(key_norms[head * slots + start + index]) * unit;
      value_norm[index] = float(value_norms[head * slots + start + index]);
    }
  }
  if (MASK_KIND > 0 && index < n) {
    const uint token = start + index;
    const uint position = packed ? n_sinks + token : (token < n_sinks ? token : token + n_packed);
    const uint at = head / (queries_shape[1] / GROUP) * (n_packed + n_sinks + n_tail) + position;
    bias[index] = MASK_KIND == 2 ? float(mask[at]) : (mask[at] ? 0.0f : -INFINITY);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (lane < n) {
    float dot[GROUP];
    for (uint g = 0; g < GROUP; ++g) {
      dot[g] = 0.0f;
    }
    const uint token = start + lane;
    for (uint channel = simdgroup * SLICE; channel < (simdgroup + 1) * SLICE; ++channel) {
      float key;
      if (packed) {
        key = key_codebook[read_code<K_BITS>(tile + lane * STRIDE, channel)];
      } else if (token < n_sinks) {
        key = float(sink_keys[(head * n_sinks + token) * HEAD_DIM + channel]);
      } else {
        key = float(tail_keys[(head * n_tail + token - n_sinks) * HEAD_DIM + channel]);
      }
      for (uint g = 0; g < GROUP; ++g) {
        dot[g] += query[g * HEAD_DIM + channel] * key;
      }
    }
    for (uint g = 0; g < GROUP; ++g) {
      partial_scores[(simdgroup * GROUP + g) * TILE + lane] = dot[g];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (packed) {  // the keys of the tile are spent: values take their place
    for (uint i = index; i < n * V_WORDS; i += THREADS) {
      tile[i / V_WORDS * STRIDE + i % V_WORDS] = value_words[(head * slots + start) * V_WORDS + i];
    }
  }
  for (uint owned = 0, g = simdgroup; g < GROUP; ++owned, g += SIMDGROUPS) {
    float score = -INFINITY;
    if (lane < n) {
      score = 0.0f;
      for (uint s = 0; s < SIMDGROUPS; ++s) {
        score += partial_scores[(s * GROUP + g) * TILE + lane];
      }
      if (packed) {
        score *= key_norm[lane];
      }
      if (MASK_KIND > 0) {
        score += bias[lane];
      }
    }
    const float before = top[owned];
    top[owned] = max(before, simd_max(score));
    const float weight = exp(score - top[owned]);
    const float shrink = exp(before - top[owned]);
    total[owned] = total[owned] * shrink + simd_sum(weight);
    if (lane < n) {
      weights[g * TILE + lane] = packed ? weight * value_norm[lane] : weight;
    }
    if (lane == 0) {
      rescale[g] = shrink;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint g = 0; g < GROUP; ++g) {
    for (uint k = 0; k < CHANNELS; ++k) {
      sums[g * CHANNELS + k] *= rescale[g];
    }
  }
  for (uint t = simdgroup; t < n; t += SIMDGROUPS) {
    const uint token = start + t;
    for (uint k = 0; k < CHANNELS; ++k) {
      const uint channel = k * 32 + lane;
      if (channel < HEAD_DIM) {
        float value;
        if (packed) {
          value = value_codebook[read_code<V_BITS>(tile + t * STRIDE, channel)];
        } else if (token < n_sinks) {
          value = float(sink_values[(head * n_sinks + token) * HEAD_DIM + channel]);
        } else {
          value = float(tail_values[(head * n_tail + token - n_sinks) * HEAD_DIM + channel]);
        }
        for (uint g = 0; g < GROUP; ++g) {
          sums[g * CHANNELS + k] += weights[g * TILE + t] * value;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

for (uint s = 0; s < SIMDGROUPS; ++s) {  // query is spent: the simdgroups add their sums there, in turn
  if (simdgroup == s) {
    for (uint g = 0; g < GROUP; ++g) {
      for (uint k = 0; k < CHANNELS; ++k) {
        const uint channel = k * 32 + lane;
        if (channel < HEAD_DIM) {
          const float others = s == 0 ? 0.0f : query[g * HEAD_DIM + channel];
          query[g * HEAD_DIM + channel] = others + sums[g * CHANNELS + k];
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (uint i = index; i < GROUP * HEAD_DIM; i += THREADS) {
  const uint row = head * GROUP + i / HEAD_DIM;
  partial_values[(row * n_splits + split) * HEAD_DIM + i % HEAD_DIM] = query[i];
}
for (uint owned = 0, g = simdgroup; g < GROUP; ++owned, g += SIMDGROUPS) {
  if (lane == 0) {
    const uint at = ((head * GROUP + g) * n_splits + split) * 2;
    partial_stats[at] = top[owned];
    partial_stats[at + 1] = total[owned];
  }
}
