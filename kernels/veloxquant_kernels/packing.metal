// Codes in a row of 32-bit words: code j lies in bits [j * CODE_BITS, (j + 1) * CODE_BITS), counted from the lowest
// bit of word 0. A code may straddle two words. The bits behind the last code are zero.

template <int CODE_BITS, typename Words>
inline uint read_code(Words words, uint j) {
  const uint bit = j * CODE_BITS;
  const uint word = bit / 32, shift = bit % 32;
  uint code = words[word] >> shift;
  if (shift + CODE_BITS > 32) {
    code |= words[word + 1] << (32 - shift);
  }
  return code & ((1u << CODE_BITS) - 1u);
}

// Word `word` of the row whose n codes are codes[0], codes[1], ...
template <int CODE_BITS, typename Codes>
inline uint packed_word(Codes codes, uint n, uint word) {
  const uint begin = word * 32;
  uint packed = 0;
  for (uint j = begin / CODE_BITS; j < n && j * CODE_BITS < begin + 32; ++j) {
    const uint code = uint(codes[j]) & ((1u << CODE_BITS) - 1u);
    const uint bit = j * CODE_BITS;
    packed |= bit >= begin ? code << (bit - begin) : code >> (begin - bit);
  }
  return packed;
}
