// Affine codes of a group of values: code = round((x - bias) / scale), clamped to 0 .. LEVELS; value = code * scale +
// bias. scale = half((max - min) / LEVELS) and bias = half(min), so codes absorb the rounding of what is stored. A
// group of equal values has scale 0 and codes 0. round is to the nearest, ties to even.

inline float affine_code(float value, half scale, half bias, float levels) {
  if (float(scale) == 0.0f) {
    return 0.0f;
  }
  return clamp(rint((value - float(bias)) / float(scale)), 0.0f, levels);
}
