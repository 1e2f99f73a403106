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
  int32_t n_coefficients, n_tables, n_symbols, n_contexts, precision;
};
