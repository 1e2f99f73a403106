// Affine codes of a group of values: code = round((x - zero) / scale), clamped to 0 .. levels; value = code * scale +
// zero. scale = half((max - min) / levels) and zero = half(min), so codes absorb the rounding of what is stored. A
// group of equal values has scale 0. Two levels at most 65504 apart lie in the middle of a group that spans more. A group
// with a value that is not finite has scale NaN, zero 0 and codes 0. round is to the nearest, ties to even.

inline bool affine_finite(float value) {  // by its bits: fast math takes isfinite to be true
  return (as_type<uint>(value) & 0x7f800000u) != 0x7f800000u;
}

inline half affine_scale(float low, float high, float levels, bool finite) {
  return finite ? half(min((high - low) * (1.0f / levels), 65504.0f)) : as_type<half>(ushort(0x7e00));
}

inline half affine_zero(float low, float high, float levels, bool finite) {
  return finite ? half(low + max((high - low) - levels * 65504.0f, 0.0f) * 0.5f) : half(0.0f);
}

inline float affine_code(float value, half scale, half zero, float levels) {
  if (as_type<ushort>(scale) == 0x7e00) {
    return 0.0f;
  }
  const float step = max(float(scale), 5.9604644775390625e-8f);  // 2^-24, the least half: equal values divide 0 by it
  return clamp(rint((value - float(zero)) / step), 0.0f, levels);
}
