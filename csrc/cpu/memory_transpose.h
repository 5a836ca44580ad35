// Transposes a matrix of 16-bit elements, in tiles of 8 x 8 that stay in registers.
#pragma once
#include <stdint.h>
#include <string.h>

#include "parallel.h"

namespace rk {
namespace {

constexpr int64_t kTransposeSide = 8;
// Rows of a source tile column: 64 bytes of a row of the result, a whole cache line.
constexpr int64_t kTransposeRows = 32;
// Columns of the source that a thread takes at a time.
constexpr int64_t kTransposeColumns = 128;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define RK_HAVE_SHUFFLE
#endif
#endif

template <class T, class U>
inline T as(const U& x) {
  T y;
  memcpy(&y, &x, sizeof y);
  return y;
}

inline void transpose_tile(const uint16_t* x, int64_t x_stride, uint16_t* y, int64_t y_stride) {
#ifdef RK_HAVE_SHUFFLE
  typedef uint16_t U16 __attribute__((vector_size(16)));
  typedef uint32_t U32 __attribute__((vector_size(16)));
  typedef uint64_t U64 __attribute__((vector_size(16)));
  U16 rows[8], pairs[8];
  for (int i = 0; i < 8; ++i) memcpy(&rows[i], x + i * x_stride, 16);
  // Rows 2i and 2i + 1: their columns 0 to 3, and 4 to 7.
  for (int i = 0; i < 4; ++i) {
    const U16 a = rows[2 * i], b = rows[2 * i + 1];
    pairs[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    pairs[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
  // Four rows: two columns of them in each.
  U32 fours[8];
  for (int g = 0; g < 2; ++g) {
    for (int h = 0; h < 2; ++h) {
      const U32 a = as<U32>(pairs[4 * g + h]);
      const U32 b = as<U32>(pairs[4 * g + 2 + h]);
      fours[4 * g + 2 * h] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      fours[4 * g + 2 * h + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    }
  }
  // All eight rows of a column.
  for (int h = 0; h < 4; ++h) {
    const U64 a = as<U64>(fours[h]), b = as<U64>(fours[4 + h]);
    const U64 first = __builtin_shufflevector(a, b, 0, 2);
    const U64 second = __builtin_shufflevector(a, b, 1, 3);
    memcpy(y + 2 * h * y_stride, &first, 16);
    memcpy(y + (2 * h + 1) * y_stride, &second, 16);
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) y[j * y_stride + i] = x[i * x_stride + j];
#endif
}

// y [cols, rows] = x [rows, cols], transposed; both of unit stride along their rows.
inline void transpose(const uint16_t* x, int64_t x_stride, uint16_t* y, int64_t y_stride,
                      int64_t rows, int64_t cols, int32_t threads) {
  const auto by_element = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t i = i0; i < i1; ++i) y[j * y_stride + i] = x[i * x_stride + j];
  };
  parallel_for((cols + kTransposeColumns - 1) / kTransposeColumns, threads, [&](int64_t item) {
    const int64_t begin = item * kTransposeColumns;
    const int64_t end = cols - begin < kTransposeColumns ? cols : begin + kTransposeColumns;
    const int64_t whole = end - (end - begin) % kTransposeSide;
    int64_t i = 0;
    for (; i + kTransposeRows <= rows; i += kTransposeRows) {
      for (int64_t j = begin; j < whole; j += kTransposeSide)
        for (int64_t k = i; k < i + kTransposeRows; k += kTransposeSide)
          transpose_tile(x + k * x_stride + j, x_stride, y + j * y_stride + k, y_stride);
      by_element(i, i + kTransposeRows, whole, end);
    }
    by_element(i, rows, begin, end);
  });
}

}  // namespace
}  // namespace rk
