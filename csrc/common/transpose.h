// Transposes, in registers: with W lanes, log2(W) rounds of
//   row[2i], row[2i+1] = lower, upper half of interleave(row[i], row[i + W/2])
// turn W vectors, the rows of a W x W block, into its columns.
#pragma once
#include <utility>

#include "common/simd.h"

namespace weft {

template <typename Register, int W, int... i>
inline Register interleave_lower(Register a, Register b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 2 + i % 2 * W)...);
}
template <typename Register, int W, int... i>
inline Register interleave_upper(Register a, Register b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (W / 2 + i / 2 + i % 2 * W)...);
}

template <int W, typename Register>
inline void transpose_block(Register (&row)[W]) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Register next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = interleave_lower<Register, W>(row[i], row[i + W / 2], lanes);
      next[2 * i + 1] = interleave_upper<Register, W>(row[i], row[i + W / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) row[i] = next[i];
  }
}

// target[j * target_stride + i] = source[i * source_stride + j] for i < rows, j < columns, with
// both at most Vec<T>::size; `width` >= rows elements of each target row are written, the rest as
// 0.
template <typename T, typename S>
inline void transpose_tile(const S* source, int64_t source_stride, int rows, int columns, T* target,
                           int64_t target_stride, int width) {
  constexpr int W = Vec<T>::size;
  typename Vec<T>::Register row[W];
  if (rows == W && columns == W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) row[i] = Vec<T>::load(source + i * source_stride).v;
  } else {
    for (int i = 0; i < W; ++i)
      row[i] = i < rows ? Vec<T>::load(source + i * source_stride, columns).v : Vec<T>().v;
  }
  transpose_block<W>(row);
  if (width == W && columns == W) {
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) Vec<T>(row[j]).store(target + j * target_stride);
  } else {
    for (int j = 0; j < columns; ++j) Vec<T>(row[j]).store(target + j * target_stride, width);
  }
}

// target (columns, rows) = source (rows, columns)^T, any sizes.
template <typename T, typename S>
inline void transpose(const S* source, int64_t source_stride, int64_t rows, int64_t columns,
                      T* target, int64_t target_stride) {
  constexpr int64_t W = Vec<T>::size;
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < columns; j += W) {
      const int m = int(rows - i < W ? rows - i : W);
      const int n = int(columns - j < W ? columns - j : W);
      transpose_tile(source + i * source_stride + j, source_stride, m, n,
                     target + j * target_stride + i, target_stride, m);
    }
}

}  // namespace weft
