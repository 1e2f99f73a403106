// Affine codes of a group of values: code = round((x - zero) / scale), clamped to 0 .. levels; value = code * scale +
// zero. scale = half((max - min) / levels) and zero = half(min), so codes absorb the rounding of what is stored. A
// group of equal values has scale 0. round is to the nearest, ties to even.

inline half affine_scale(float low, float high, float levels) {
  return half((high - low) * (1.0f / levels));
}

inline float affine_code(float value, half scale, half zero, float levels) {
  const float step = max(float(scale), 5.9604644775390625e-8f);  // 2^-24, the least half: equal values divide 0 by it
  return clamp(rint((value - float(zero)) / step), 0.0f, levels);
}
