// Interleaved rANS with 32-bit states and 16-bit words; rans_decode.metal has the format.
//
// Every function is called by all lanes of a simdgroup.
constant uint RANS_LOW = 65536u;
constant uint RANS_INACTIVE = 65535u;
constant uint RANS_LEVEL = 8192u;

// Where a simdgroup stands in a block's words.
struct RansReader {
  uint state;  // of the lane
  uint at;     // next word, the same in all lanes
  uint end;
  bool damaged;  // a word was missing, or a value impossible
};

// One word for each lane of `active` whose state has fallen below RANS_LOW, in the order of the lanes.
template <typename Words>
inline void rans_refill(thread RansReader& reader, bool active, Words words) {
  const bool wants = active && reader.state < RANS_LOW;
  const uint before = simd_prefix_exclusive_sum(uint(wants));
  if (wants) {
    if (reader.at + before < reader.end) {
      reader.state = (reader.state << 16) | uint(words[reader.at + before]);
    } else {
      reader.damaged = true;
    }
  }
  reader.at += simd_sum(uint(wants));
}

// `width` plain bits, 0 to 16 of them, of each lane of `active`; a width may differ from lane to lane.
template <typename Words>
inline uint rans_bits(thread RansReader& reader, bool active, uint width, Words words) {
  const uint value = reader.state & ((1u << width) - 1u);
  if (active) {
    reader.state >>= width;
  }
  rans_refill(reader, active, words);
  return value;
}

// The symbol whose interval of `cumulative` [n_symbols + 1] holds the state's low bits.
template <int PRECISION, typename Words, typename Table>
inline uint rans_symbol(thread RansReader& reader, bool active, Table cumulative, uint n_symbols, Words words) {
  const uint slot = reader.state & ((1u << PRECISION) - 1u);
  uint low = 0, high = n_symbols;
  while (high - low > 1) {
    const uint middle = (low + high) / 2;
    if (uint(cumulative[middle]) <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  if (active) {
    const uint start = uint(cumulative[low]);
    reader.state = (uint(cumulative[low + 1]) - start) * (reader.state >> PRECISION) + slot - start;
  }
  rans_refill(reader, active, words);
  return low;
}

// A number of any size: its length in bits (6 bits), then what follows its leading one, the low 16 bits first.
template <typename Words>
inline uint rans_number(thread RansReader& reader, bool active, Words words) {
  uint length = rans_bits(reader, active, 6, words);
  if (active && length > 32) {
    reader.damaged = true;
  }
  length = min(length, 32u);
  const uint rest = length > 1 ? length - 1 : 0;
  const uint low = rans_bits(reader, active, min(rest, 16u), words);
  const uint high = rans_bits(reader, active, rest - min(rest, 16u), words);
  return length > 0 ? (1u << rest) | (high << 16) | low : 0u;
}
