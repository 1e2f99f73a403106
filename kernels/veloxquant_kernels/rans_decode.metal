// Decode blocks of entropy-coded integers: 32 interleaved rANS lanes on one stream of words a block, one lane a token.
//
//   words [n_words] uint16: the blocks one after another, each a record of
//     n_tokens - 1, with n_tokens within 1..256
//     the states of L = min(32, n_tokens) lanes, low half and high half of each
//     the words that refill the lanes' states
//   starts [n_blocks + 1] uint32: where each record begins in words, and where the last one ends
//   first_tokens [n_blocks + 1] uint32: the first token of each block, and the number of all
//   classes [n_coefficients] uint16: the class of each coefficient; 65535: always zero, not coded
//   shifts [n_coefficients] uint8: low bits of a coefficient that its tables do not code
//   cumulative [n_tables, n_symbols + 1] uint16: cumulative frequencies, from 0 to 2**PRECISION; symbol s is the
//     number s - (n_symbols - 2) / 2, the last symbol an escape
//   class_tables [n_classes, n_contexts] uint16: the table of a class in each context
//   weights [n_classes] uint16: what one step of a class adds to a token's level
//   contexts [256] uint8: the context at each level
//   -> symbols [n_coefficients, n_tokens] int32
//   -> status [n_blocks] uint32: 0, or 1 for a damaged block
//
// Lane l codes tokens l, l + 32, ... of a block, each from its first coefficient to its last; a step codes one coefficient
// of 32 tokens. A symbol takes PRECISION bits of the lane's state x by its table: x = frequency * (x >> PRECISION) +
// (x mod 2**PRECISION) - start. `shift` plain low bits follow, or after an escape the zigzag number of any size
// (rans_number), each by its width w: x >>= w. Whenever states have fallen below 2**16, the lanes in their order take
// one word each: x = x * 2**16 + word.
// The table follows from what the token has shown so far. Its level starts at 2**13; symbol s adds
// min(weight * |s - (n_symbols - 2) / 2|, 1024) after 1/32 of the level has been taken away; contexts[min(level / 128,
// 255)] is the context.
// An intact block ends with all states 2**16 and all words taken.
//
// One simdgroup per block.
const uint lane = thread_index_in_simdgroup;
const uint block = threadgroup_position_in_grid.x;
const uint n_coefficients = classes_shape[0];
const uint n_contexts = class_tables_shape[1];
const uint n_symbols = cumulative_shape[1] - 1;
const uint all_tokens = first_tokens[first_tokens_shape[0] - 1];
const uint first = first_tokens[block];
const uint n_tokens = first_tokens[block + 1] - first;
const uint n_lanes = min(n_tokens, 32u);
const uint begin = starts[block];
const uint end = min(starts[block + 1], uint(words_shape[0]));
if (end < begin + 1 + 2 * n_lanes || uint(words[begin]) + 1 != n_tokens) {
  if (lane == 0) {
    status[block] = 1;
  }
  return;
}
RansReader reader;
reader.state = RANS_LOW;
reader.at = begin + 1 + 2 * n_lanes;
reader.end = end;
if (lane < n_lanes) {
  reader.state = uint(words[begin + 1 + 2 * lane]) | (uint(words[begin + 2 + 2 * lane]) << 16);
}
reader.damaged = reader.state < RANS_LOW;
for (uint group = 0; group < n_tokens; group += 32) {
  const bool active = group + lane < n_tokens;
  uint level = RANS_LEVEL;
  for (uint j = 0; j < n_coefficients; ++j) {
    const uint kind = classes[j];
    int value = 0;
    if (kind != RANS_INACTIVE) {
      const uint table = class_tables[kind * n_contexts + contexts[min(level >> 7, 255u)]];
      const uint symbol = rans_symbol<PRECISION>(reader, active, cumulative + table * (n_symbols + 1), n_symbols, words);
      const bool escapes = active && symbol == n_symbols - 1;
      const uint shift = shifts[j];
      value = int(symbol) - int((n_symbols - 2) / 2);
      level = level - (level >> 5) + min(uint(abs(value)) * weights[kind], 1024u);
      if (shift > 0) {
        const uint low = rans_bits(reader, active && !escapes, shift, words);
        value = int((uint(value) << shift) | low);
      }
      if (simd_any(escapes)) {
        const uint number = rans_number(reader, escapes, words);
        value = escapes ? int((number >> 1) ^ (0u - (number & 1u))) : value;
      }
    }
    if (active) {
      symbols[j * all_tokens + first + group + lane] = value;
    }
  }
}
const bool wrong = reader.damaged || reader.state != RANS_LOW || reader.at != end;
const bool any_wrong = simd_any(wrong);
if (lane == 0) {
  status[block] = any_wrong ? 1 : 0;
}
