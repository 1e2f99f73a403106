// Native path of the entropy code: interleaved rANS.
//
// The format stands at the head of veloxquant_kernels/rans_decode.metal; rans_format.py and rans_decode.py
// beside it define it in NumPy, and tests hold all of them equal. The decoder reads no word outside of the block
// that it decodes, whatever the words say. Tables come checked (Tables.check).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "codes.h"

#define VQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kLanes = 32;
constexpr uint32_t kLow = 1u << 16;
constexpr uint16_t kInactive = 0xFFFF;
constexpr int kHeader = 1;
constexpr int kLengthBits = 6;
constexpr uint32_t kFirstLevel = 1u << 13;
constexpr uint32_t kMaxGain = 1024;

inline int half_of(const VqTables& t) { return (t.n_symbols - 2) / 2; }

inline uint32_t next_level(uint32_t level, uint32_t magnitude, uint32_t weight) {
  return level - (level >> 5) + std::min(magnitude * weight, kMaxGain);
}

inline int context_of(const VqTables& t, uint32_t level) { return t.contexts[std::min<uint32_t>(level >> 7, 255)]; }

inline int bit_length(uint32_t x) { return x ? 32 - __builtin_clz(x) : 0; }

std::vector<int> active_coefficients(const VqTables& t) {
  std::vector<int> active;
  for (int j = 0; j < t.n_coefficients; ++j)
    if (t.classes[j] != kInactive) active.push_back(j);
  return active;
}

// ---- encoder ------------------------------------------------------------------------------------------------------

struct Part {  // a symbol's interval, or `width` plain bits (frequency 1)
  uint32_t start;
  uint16_t frequency;
  uint8_t width;
};

struct Escape {
  uint32_t number;
  int lane;
};

// One block, encoded backwards from its last step.
class BlockEncoder {
 public:
  BlockEncoder(const VqTables& tables, const std::vector<int>& active) : t_(tables), active_(active) {}

  // Appends the record to `out`; returns its number of words. Only the length, where `out` is null.
  size_t encode(const int32_t* symbols, int n_tokens, std::vector<uint16_t>* out) {
    const int lanes = std::min(n_tokens, kLanes), groups = (n_tokens + kLanes - 1) / kLanes;
    const size_t n_steps = size_t(groups) * active_.size();
    choose(symbols, n_tokens);
    uint32_t state[kLanes];
    std::fill(state, state + kLanes, kLow);
    reversed_.clear();
    for (size_t step = n_steps; step-- > 0;) put(step, n_tokens, state);
    const size_t n_words = kHeader + 2 * size_t(lanes) + reversed_.size();
    if (out) {
      out->push_back(uint16_t(n_tokens - 1));
      for (int l = 0; l < lanes; ++l) {
        out->push_back(uint16_t(state[l]));
        out->push_back(uint16_t(state[l] >> 16));
      }
      out->insert(out->end(), reversed_.rbegin(), reversed_.rend());
    }
    return n_words;
  }

 private:
  // Forward: the interval of every symbol, by the token's level.
  void choose(const int32_t* symbols, int n_tokens) {
    const int half = half_of(t_), groups = (n_tokens + kLanes - 1) / kLanes;
    const size_t n_active = active_.size();
    parts_.resize(size_t(groups) * n_active * kLanes);
    lows_.resize(parts_.size());
    escapes_.assign(size_t(groups) * n_active, {});
    for (int token = 0; token < n_tokens; ++token) {
      const int32_t* row = symbols + size_t(token) * t_.n_coefficients;
      uint32_t level = kFirstLevel;
      for (size_t a = 0; a < n_active; ++a) {
        const int j = active_[a], kind = t_.classes[j], shift = t_.shifts[j];
        const int32_t value = row[j];
        const size_t step = size_t(token / kLanes) * n_active + a, at = step * kLanes + token % kLanes;
        const int table = t_.class_tables[kind * t_.n_contexts + context_of(t_, level)];
        const uint16_t* c = t_.cumulative + size_t(table) * (t_.n_symbols + 1);
        const int64_t near = int64_t(value) >> shift;
        int symbol = near < -half || near > half ? t_.n_symbols - 1 : int(near) + half;
        if (c[symbol] == c[symbol + 1]) symbol = t_.n_symbols - 1;
        parts_[at] = {c[symbol], uint16_t(c[symbol + 1] - c[symbol]), uint8_t(t_.precision)};
        if (symbol == t_.n_symbols - 1) {
          escapes_[step].push_back({(uint32_t(value) << 1) ^ uint32_t(value >> 31), token % kLanes});
        } else {
          lows_[at] = shift ? uint32_t(value) & ((1u << shift) - 1) : 0;
        }
        level = next_level(level, uint32_t(std::abs(symbol - half)), t_.weights[kind]);
      }
    }
  }

  // Calls f(lane, part) in encoding order: the parts of a step backwards, in each the lanes backwards.
  template <typename F>
  void each_part(size_t step, int n_tokens, F f) {
    const int group = int(step / active_.size()), here = std::min(kLanes, n_tokens - group * kLanes);
    const int shift = t_.shifts[active_[step % active_.size()]];
    const std::vector<Escape>& escapes = escapes_[step];
    for (int pass = 0; pass < 3 && !escapes.empty(); ++pass) {
      for (size_t i = escapes.size(); i-- > 0;) {
        const uint32_t number = escapes[i].number;
        const int length = bit_length(number), rest = std::max(length - 1, 0), low = std::min(rest, 16);
        const uint32_t mantissa = rest ? number & ((1u << rest) - 1) : 0;
        const Part part = pass == 0   ? Part{mantissa >> 16, 1, uint8_t(rest - low)}
                          : pass == 1 ? Part{mantissa & 0xFFFF, 1, uint8_t(low)}
                                      : Part{uint32_t(length), 1, kLengthBits};
        f(escapes[i].lane, part);
      }
    }
    if (shift) {
      size_t i = escapes.size();
      for (int l = here; l-- > 0;) {
        if (i > 0 && escapes[i - 1].lane == l) {
          --i;
        } else {
          f(l, Part{lows_[step * kLanes + l], 1, uint8_t(shift)});
        }
      }
    }
    for (int l = here; l-- > 0;) f(l, parts_[step * kLanes + l]);
  }

  void put(size_t step, int n_tokens, uint32_t* state) {
    each_part(step, n_tokens, [&](int lane, const Part& part) {
      uint32_t x = state[lane];
      if (x >= uint64_t(part.frequency) << (32 - part.width)) {
        reversed_.push_back(uint16_t(x));
        x >>= 16;
      }
      state[lane] = ((x / part.frequency) << part.width) + x % part.frequency + part.start;
    });
  }

  const VqTables& t_;
  const std::vector<int>& active_;
  std::vector<Part> parts_;
  std::vector<uint32_t> lows_;
  std::vector<std::vector<Escape>> escapes_;
  std::vector<uint16_t> reversed_;
};

// ---- decoder ------------------------------------------------------------------------------------------------------

// For every table, the first symbol of each 256th of its slots, and each symbol's start and end: small enough for the
// first-level cache, where a symbol for each slot would not be. Made for a call, then dropped.
struct Lookup {
  explicit Lookup(const VqTables& t) : bits(std::min(8, t.precision)), shift(t.precision - bits) {
    const size_t n = size_t(t.n_tables);
    firsts.resize(n << bits);
    intervals.resize(n * t.n_symbols);
    for (size_t row = 0; row < n; ++row) {
      const uint16_t* c = t.cumulative + row * (t.n_symbols + 1);
      for (int s = 0; s < t.n_symbols; ++s) intervals[row * t.n_symbols + s] = c[s] | (uint32_t(c[s + 1]) << 16);
      for (uint32_t bucket = 0, s = 0; bucket < 1u << bits; ++bucket) {
        while (c[s + 1] <= bucket << shift) ++s;
        firsts[(row << bits) + bucket] = uint16_t(s);
      }
    }
  }
  int bits, shift;
  std::vector<uint16_t> firsts;
  std::vector<uint32_t> intervals;  // start, and end in the upper half
};

struct Reader {
  uint32_t state[kLanes];
  const uint16_t* words;
  const uint16_t* end;
  bool damaged = false;

  // One word for a lane that needs it.
  void refill(int l) {
    if (state[l] < kLow) {
      if (words < end) {
        state[l] = (state[l] << 16) | *words++;
      } else {
        damaged = true;
      }
    }
  }

  uint32_t bits(int l, int width) {
    const uint32_t value = state[l] & ((1u << width) - 1);
    state[l] >>= width;
    refill(l);
    return value;
  }
};

// What follows escapes: each part for all lanes before the next one.
void read_numbers(Reader& r, const uint16_t* symbols, int escape, int here, int32_t* values) {
  int length[kLanes];
  uint32_t low[kLanes];
  for (int l = 0; l < here; ++l)
    if (symbols[l] == escape) {
      length[l] = int(r.bits(l, kLengthBits));
      r.damaged |= length[l] > 32;
      length[l] = std::min(length[l], 32);
    }
  for (int l = 0; l < here; ++l)
    if (symbols[l] == escape) low[l] = r.bits(l, std::min(std::max(length[l] - 1, 0), 16));
  for (int l = 0; l < here; ++l)
    if (symbols[l] == escape) {
      const int rest = std::max(length[l] - 1, 0);
      const uint32_t high = r.bits(l, rest - std::min(rest, 16));
      const uint32_t number = length[l] ? (1u << rest) | (high << 16) | low[l] : 0;
      values[l] = int32_t((number >> 1) ^ (0u - (number & 1)));
    }
}

// `symbols` is the block's own, a row of n_coefficients for each token.
template <bool kContexts>
bool decode_block(const VqTables& t, const Lookup& lookup, const std::vector<int>& active, const uint16_t* words,
                  const uint16_t* end, int n_tokens, int32_t* symbols_of_block) {
  const int lanes = std::min(n_tokens, kLanes), half = half_of(t), escape = t.n_symbols - 1;
  if (end - words < kHeader + 2 * lanes || words[0] + 1 != n_tokens) return false;
  Reader r;
  r.end = end;
  for (int l = 0; l < lanes; ++l) {
    r.state[l] = words[kHeader + 2 * l] | (uint32_t(words[kHeader + 2 * l + 1]) << 16);
    if (r.state[l] < kLow) return false;
  }
  r.words = words + kHeader + 2 * lanes;
  const uint32_t mask = (1u << t.precision) - 1;
  uint16_t symbols[kLanes];
  int32_t values[kLanes];
  uint32_t rows[kLanes], level[kLanes];
  for (int begin = 0; begin < n_tokens; begin += kLanes) {
    const int here = std::min(kLanes, n_tokens - begin);
    std::fill(level, level + kLanes, kFirstLevel);
    for (int j : active) {
      const int kind = t.classes[j], shift = t.shifts[j];
      const uint16_t* class_tables = t.class_tables + size_t(kind) * t.n_contexts;
      const uint32_t weight = t.weights[kind];
      const uint16_t* next_word = r.words;
      const bool plenty = r.end - next_word >= kLanes;
      bool escapes = false;
      for (int l = 0; l < here; ++l) {
        rows[l] = class_tables[kContexts ? context_of(t, level[l]) : 0];
        const uint32_t x = r.state[l], slot = x & mask;
        const uint32_t* intervals = lookup.intervals.data() + rows[l] * t.n_symbols;
        uint32_t symbol = lookup.firsts[(rows[l] << lookup.bits) + (slot >> lookup.shift)];
        symbol += slot >= intervals[symbol] >> 16;  // most slots are in the bucket's first symbol or its second
        while (slot >= intervals[symbol] >> 16) ++symbol;
        const uint32_t start = intervals[symbol] & 0xFFFF, frequency = (intervals[symbol] >> 16) - start;
        uint32_t y = frequency * (x >> t.precision) + slot - start;
        if (plenty) {
          const bool wants = y < kLow;
          const uint32_t filled = (y << 16) | *next_word;
          y = wants ? filled : y;
          next_word += wants;
        }
        r.state[l] = y;
        symbols[l] = uint16_t(symbol);
        values[l] = int32_t(symbol) - half;
        escapes |= symbol == uint32_t(escape);
        if (kContexts) level[l] = next_level(level[l], uint32_t(std::abs(values[l])), weight);
      }
      if (plenty) {
        r.words = next_word;
      } else {
        for (int l = 0; l < here; ++l) r.refill(l);
      }
      if (shift)
        for (int l = 0; l < here; ++l)
          if (symbols[l] != escape) values[l] = int32_t((uint32_t(values[l]) << shift) | r.bits(l, shift));
      if (escapes) read_numbers(r, symbols, escape, here, values);
      if (r.damaged) return false;
      for (int l = 0; l < here; ++l) symbols_of_block[size_t(begin + l) * t.n_coefficients + j] = values[l];
    }
  }
  for (int l = 0; l < lanes; ++l)
    if (r.state[l] != kLow) return false;
  return r.words == r.end;
}

}  // namespace

// Lengths of the records of ceil(n_tokens / block_tokens) blocks; their words too where `words` is not null, at most
// `capacity` of them. Returns the number of words.
VQ_EXPORT int64_t vq_encode(const VqTables* tables, const int32_t* symbols, int64_t n_tokens, int32_t block_tokens,
                            uint16_t* words, int64_t capacity, uint32_t* lengths) {
  const std::vector<int> active = active_coefficients(*tables);
  BlockEncoder encoder(*tables, active);
  std::vector<uint16_t> record;
  int64_t total = 0;
  for (int64_t first = 0, block = 0; first < n_tokens; first += block_tokens, ++block) {
    const int here = int(std::min<int64_t>(block_tokens, n_tokens - first));
    record.clear();
    const size_t length = encoder.encode(symbols + first * tables->n_coefficients, here, words ? &record : nullptr);
    lengths[block] = uint32_t(length);
    if (words && total + int64_t(length) <= capacity) memcpy(words + total, record.data(), 2 * length);
    total += int64_t(length);
  }
  return total;
}

VQ_EXPORT void vq_decode(const VqTables* tables, const uint16_t* words, const int64_t* starts,
                         const int64_t* first_tokens, int64_t n_blocks, int32_t* symbols, uint32_t* status) {
  const VqTables& t = *tables;
  const std::vector<int> active = active_coefficients(t);
  const Lookup lookup(t);
  const auto decode = t.n_contexts > 1 ? decode_block<true> : decode_block<false>;
  for (int64_t b = 0; b < n_blocks; ++b)
    status[b] = !decode(t, lookup, active, words + starts[b], words + starts[b + 1],
                        int(first_tokens[b + 1] - first_tokens[b]), symbols + first_tokens[b] * t.n_coefficients);
}
