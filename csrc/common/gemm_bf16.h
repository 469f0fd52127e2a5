// C (+)= A B for bfloat16 in vector registers, with float sums: processors with AVX512_BF16.
//
// The tiles of VectorProduct (register_tile.h), but a step of k is a pair (k, k + 1) in a 32-bit
// word, which VDPBF16PS multiplies and adds. B is packed in panels of two vectors, [panel][pair of
// k][column][2]; A in panels of H rows, [panel][pair of k][row][2], or read as it lies where k is
// contiguous. The instruction takes denormals as zero and rounds to nearest even, whatever the
// mode of the thread.
#pragma once
#if defined(__AVX512BF16__)
#include <algorithm>

#include "common/bfloat16_pairs.h"
#include "common/matrix.h"
#include "common/register_tile.h"

namespace weft {

struct Bf16Product {
  using Packed = bfloat16;
  using Sum = float;
  using Tile = RegisterTile<bfloat16>;

  static constexpr int64_t columns = Tile::columns;
  static constexpr int64_t depth_unit = 2;

  // Cache blocks: those of A fill half of the second-level cache.
  static constexpr int64_t block_panels = 20;
  static constexpr int64_t block_depth = 1024;
  static constexpr int64_t block_columns = 2048;
  static constexpr int64_t group_panels = 4;

  // Nothing to set up (see the AMX product).
  struct Session {
    Session() {}
  };

  // Whether a left operand with contiguous rows is not packed.
  static bool reads_in_place(Matrix<bfloat16> a, int64_t cols) {
    return Tile::reads_in_place(a, cols);
  }

  static int64_t panels(int64_t rows) { return ceil_div(rows, Tile::max_height); }
  static int64_t panel_start(int64_t rows, int64_t i) {
    const int64_t n = panels(rows);
    return i * (rows / n) + std::min(i, rows % n);
  }
  static int64_t left_size(int64_t rows, int64_t depth) { return rows * round_up(depth, 2); }
  static int64_t right_size(int64_t depth, int64_t cols) {
    return round_up(cols, columns) * round_up(depth, 2);
  }

  // Within a packed panel: where k (even) begins, and from one k to the next.
  static int64_t right_offset(int64_t k) { return k * columns; }
  static int64_t right_stride(int64_t) { return columns; }

  // The left operand: packed panels of `depth`, or rows in place (col_stride 1).
  struct Left {
    const bfloat16* data;
    int64_t rows, depth;
    int64_t row_stride = 0, col_stride = 0;  // both 0: packed
  };

  template <typename S>
  static void pack_left(Matrix<S> a, bfloat16* target) {
    const int64_t n = panels(a.rows), depth = round_up(a.cols, 2);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = panel_start(a.rows, i), height = panel_start(a.rows, i + 1) - row;
      pack(a.block(row, 0, height, a.cols), target + row * depth, height, int(height));
    }
  }

  // One panel: the source is (depth, up to `columns` columns); the missing columns become 0.
  template <typename S>
  static void pack_right(Matrix<S> b, bfloat16* target, int64_t) {
    if constexpr (std::is_same_v<S, bfloat16>)
      if (b.col_stride == 1) return pack_rows(b, target);
    const Matrix<S> bt = b.transposed();
    for (int64_t j = 0; j < columns; j += 16)
      pack(bt.block(std::min(j, b.cols), 0, std::clamp<int64_t>(b.cols - j, 0, 16), b.rows),
           target + 2 * j, columns, 16);
  }

  // C[rows of the panels, 0..n) (+)= A[those rows, k0..k0+depth) B, for one packed panel of B.
  static void multiply(const Left& a, int64_t first_panel, int64_t last_panel, int64_t k0,
                       int64_t depth, const bfloat16* b, int64_t, int n, float* c, int64_t ldc,
                       bool accumulate, Prefetch& prefetch) {
    const bool packed = a.col_stride != 1;
    for (int64_t i = first_panel; i < last_panel; ++i) {
      const int64_t row = panel_start(a.rows, i), height = panel_start(a.rows, i + 1) - row;
      Tile t{depth, nullptr, 0, b, c + row * ldc, ldc, n, accumulate, &prefetch};
      if (packed) {
        t.a = a.data + row * round_up(a.depth, 2) + k0 * height;
        t.a_stride = 2 * height;
      } else {
        t.a = a.data + row * a.row_stride + k0;
        t.a_stride = a.row_stride;
      }
      t.run(int(height), packed);
    }
  }

 private:
  // A panel whose rows are contiguous: whole lines, each read once.
  static void pack_rows(Matrix<bfloat16> b, bfloat16* target) {
    const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    // 0, 32, 1, 33, ...: columns of k and of k + 1 in turn; then those from 16 on.
    const __m512i low = _mm512_add_epi32(_mm512_mullo_epi32(ramp, _mm512_set1_epi32(0x10001)),
                                         _mm512_set1_epi32(0x200000));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x100010));
    const auto valid = __mmask32((uint64_t(1) << b.cols) - 1);
    for (int64_t k = 0; k < b.rows; k += 2, target += 2 * columns) {
      const __m512i even = _mm512_maskz_loadu_epi16(valid, b.at(k, 0));
      const __m512i odd =
          k + 1 < b.rows ? _mm512_maskz_loadu_epi16(valid, b.at(k + 1, 0)) : _mm512_setzero_si512();
      _mm512_storeu_si512(target, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(target + columns, _mm512_permutex2var_epi16(even, high, odd));
    }
  }

  // Words of x, up to 16 indices by any number of k, [pair of k][index]: `width` of the indices
  // are written, and from one pair to the next are `stride` words.
  template <typename S>
  static void pack(Matrix<S> x, bfloat16* target, int64_t stride, int width) {
    for (int64_t k = 0; k < x.cols; k += 32) {
      Bfloat16Pairs::Words word[16];
      const int64_t depth = std::min<int64_t>(32, x.cols - k);
      Bfloat16Pairs::load<true>(x.block(0, k, x.rows, depth), word);
      if (width == 16 && depth == 32) {
#pragma GCC unroll 16
        for (int g = 0; g < 16; ++g, target += 2 * stride)
          _mm512_storeu_si512(target, (__m512i)word[g]);
      } else {
        for (int64_t g = 0; g < ceil_div(depth, 2); ++g, target += 2 * stride)
          _mm512_mask_storeu_epi32(target, first_lanes(width), (__m512i)word[g]);
      }
    }
  }
};

}  // namespace weft
#endif
