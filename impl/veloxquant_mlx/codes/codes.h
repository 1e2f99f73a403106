// What native.py hands to codes.cpp, field for field.
#pragma once
#include <cstdint>

struct VqTables {  // veloxquant_kernels.rans_format.Tables
  const uint16_t* classes;
  const uint8_t* shifts;
  const uint16_t* cumulative;
  const uint16_t* class_tables;
  const uint16_t* weights;
  const uint8_t* contexts;
  int32_t n_coefficients, n_tables, n_symbols, n_contexts, precision, n_states;
};

struct VqOutput {
  int32_t* symbols;
  float* values;
  const float* levels;
  float step, outer;
  int64_t token_stride, coefficient_stride;
};

struct VqFixed {  // fixed.FixedCode
  const uint8_t* widths;
  const float* scales;
  const int32_t* first_levels;
  const float* books;
  int32_t n_coefficients, n_words;
};
