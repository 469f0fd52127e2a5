// C (+)= A B in vector registers, for float and double, at every instruction-set level.
//
// Tiles of C stay in registers while k runs (register_tile.h). B is packed in panels of two
// vectors, [panel][k][columns]; A in panels of H rows, [panel][k][rows]. The rows are split evenly
// over the panels (64 = 4 x 13 + 12), so none is padding. Every element is one chain of
// multiply-adds in the order of k: no split of the rows or columns changes its bits.
#pragma once
#include <algorithm>

#include "common/matrix.h"
#include "common/register_tile.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace weft {

template <typename T>
struct VectorProduct {
  using Packed = T;
  using Sum = T;

  using Tile = RegisterTile<T>;
  static constexpr int W = Tile::W;
  static constexpr int max_height = Tile::max_height;
  static constexpr int64_t columns = Tile::columns;
  static constexpr int64_t depth_unit = 1;

  // Cache blocks: 18 panels of A, block_depth deep, fill half of the second-level cache.
  static constexpr int64_t block_panels = 20;
  static constexpr int64_t block_depth = 2048 / int64_t(sizeof(T));
  static constexpr int64_t block_columns = 2048;
  static constexpr int64_t group_panels = 4;

  // Nothing to set up (see the AMX product).
  struct Session {
    Session() {}
  };

  // Whether a left operand with contiguous rows is not packed.
  static bool reads_in_place(Matrix<T> a, int64_t cols) { return Tile::reads_in_place(a, cols); }

  static int64_t panels(int64_t rows) { return ceil_div(rows, max_height); }
  static int64_t panel_start(int64_t rows, int64_t i) {
    const int64_t n = panels(rows);
    return i * (rows / n) + std::min(i, rows % n);
  }
  static int64_t left_size(int64_t rows, int64_t depth) { return rows * depth; }
  static int64_t right_size(int64_t depth, int64_t cols) { return round_up(cols, columns) * depth; }

  // Within a packed panel: where row k begins, and from one k to the next.
  static int64_t right_offset(int64_t k) { return k * columns; }
  static int64_t right_stride(int64_t) { return columns; }

  // The left operand: packed panels of `depth`, or in place with one of its strides 1.
  struct Left {
    const T* data;
    int64_t rows, depth;
    int64_t row_stride = 0, col_stride = 0;  // both 0: packed
  };

  template <typename S>
  static void pack_left(Matrix<S> a, T* target) {
    const int64_t n = panels(a.rows);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = panel_start(a.rows, i);
      const int height = int(panel_start(a.rows, i + 1) - row);
      pack_panel(a.block(row, 0, height, a.cols).transposed(), target + row * a.cols, height);
    }
  }

  // One panel: source is (depth, up to `columns` columns); the missing columns become 0.
  template <typename S>
  static void pack_right(Matrix<S> b, T* target, int64_t) {
    pack_panel(b, target, int(columns));
  }

  // C[rows of the panels, 0..n) (+)= A[those rows, k0..k0+depth) B, for one packed panel of B.
  static void multiply(const Left& a, int64_t first_panel, int64_t last_panel, int64_t k0,
                       int64_t depth, const T* b, int64_t, int n, T* c, int64_t ldc,
                       bool accumulate, Prefetch& prefetch) {
    for (int64_t i = first_panel; i < last_panel; ++i) {
      const int64_t row = panel_start(a.rows, i);
      const int height = int(panel_start(a.rows, i + 1) - row);
      Tile t{depth, nullptr, 0, b, c + row * ldc, ldc, n, accumulate, &prefetch};
      if (a.col_stride == 1) {
        t.a = a.data + row * a.row_stride + k0;
        t.a_stride = a.row_stride;
      } else if (a.row_stride == 1) {
        t.a = a.data + row + k0 * a.col_stride;
        t.a_stride = a.col_stride;
      } else {
        t.a = a.data + row * a.depth + k0 * height;
        t.a_stride = height;
      }
      t.run(height, a.col_stride != 1);
    }
  }

 private:
  // target[k * width + j] = source[k, j], with zeros up to width.
  template <typename S>
  static void pack_panel(Matrix<S> source, T* target, int width) {
    const int64_t depth = source.rows;
    const int n = int(source.cols);
    if (source.col_stride == 1) {
      for (int64_t k = 0; k < depth; ++k)
        for (int j = 0; j < width; j += W) {
          const S* from = source.at(k, j);
          T* to = target + k * width + j;
          if (n - j >= W) {
            Vec<T>::load(from).store(to);
          } else {
            Vec<T>::load(from, std::max(n - j, 0)).store(to, std::min(width - j, W));
          }
        }
    } else if (source.row_stride == 1) {
      for (int j = 0; j < width; j += W)
        for (int64_t k = 0; k < depth; k += W)
          transpose_tile(source.at(k, j), source.col_stride, std::clamp(n - j, 0, W),
                         int(std::min<int64_t>(W, depth - k)), target + k * width + j, width,
                         std::min(width - j, W));
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int j = 0; j < width; ++j) target[k * width + j] = j < n ? T(*source.at(k, j)) : T(0);
    }
  }
};

}  // namespace weft
