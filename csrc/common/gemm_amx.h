// C (+)= A B for bfloat16 in AMX tiles, with float sums.
//
// A 32 x 32 tile of C stays in four tile registers while k runs, 32 at a time:
//   for k: c[i][j] += A[i] B[j], i, j in {0, 1}
// Both operands are packed as 1 KB tiles of 16 rows by 64 bytes, [16 rows or columns][k /
// 32][tile]. A row of an A tile is 32 consecutive k; a row of a B tile is the pair (k, k + 1) of 16
// columns. In 32-bit words (pairs along k) one is the transpose of the other (bfloat16_pairs.h).
// AMX takes denormals as zero.
#pragma once
#if defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "common/bfloat16_pairs.h"
#include "common/matrix.h"

namespace weft {

struct AmxProduct {
  using Packed = bfloat16;
  using Sum = float;

  static constexpr int64_t columns = 32;
  static constexpr int64_t depth_unit = 32;
  static constexpr int64_t tile_elements = 512;
  static constexpr int64_t block_panels = 8;
  static constexpr int64_t block_depth = 2048;
  static constexpr int64_t block_columns = 2048;
  static constexpr int64_t group_panels = 2;

  // The tile configuration, from the outermost Session of a thread to its end. A kernel that makes
  // many small products holds one around them all.
  class Session {
   public:
    Session() {
      if (depth()++ == 0) configure();
    }
    ~Session() {
      if (--depth() == 0) _tile_release();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    static int& depth() {
      static thread_local int value = 0;
      return value;
    }
    static void configure() {
      // The kernel grants the tile registers to a process that asks (ARCH_REQ_XCOMP_PERM).
      static const long granted = syscall(SYS_arch_prctl, 0x1023, 18);
      (void)granted;
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      // gcc 12 does not know that the instruction reads the structure, and drops its stores.
      asm volatile("" ::"r"(&config) : "memory");
      _tile_loadconfig(&config);
    }
  };

  // Whether a left operand with contiguous rows is not packed: whole tiles only.
  static bool reads_in_place(Matrix<bfloat16> a, int64_t cols) {
    return cols <= 8 * columns && a.rows % 16 == 0 && a.cols % 32 == 0;
  }

  static int64_t panels(int64_t rows) { return ceil_div(rows, 32); }
  static int64_t panel_start(int64_t rows, int64_t i) { return std::min(32 * i, rows); }
  static int64_t left_size(int64_t rows, int64_t depth) {
    return round_up(rows, 16) * round_up(depth, 32);
  }
  static int64_t right_size(int64_t depth, int64_t cols) {
    return round_up(cols, columns) * round_up(depth, 32);
  }

  // Within a packed panel of `depth`: where k begins, and from the first 16 columns to the others.
  static int64_t right_offset(int64_t k) { return k * 16; }
  static int64_t right_stride(int64_t depth) { return round_up(depth, 32) * 16; }

  // The left operand: packed tiles of `depth`, or rows in place (col_stride 1; whole tiles only).
  struct Left {
    const bfloat16* data;
    int64_t rows, depth;
    int64_t row_stride = 0, col_stride = 0;  // both 0: packed
  };

  template <typename S>
  static void pack_left(Matrix<S> a, bfloat16* target) {
    for (int64_t i = 0; i < a.rows; i += 16)
      for (int64_t k = 0; k < a.cols; k += 32, target += tile_elements)
        pack_tile<false>(
            a.block(i, k, std::min<int64_t>(16, a.rows - i), std::min<int64_t>(32, a.cols - k)),
            target);
  }

  // Rows of one panel `depth` deep: the source is (rows, up to 32 columns); the missing columns
  // become 0.
  template <typename S>
  static void pack_right(Matrix<S> b, bfloat16* target, int64_t depth) {
    const Matrix<S> bt = b.transposed();
    for (int64_t j = 0; j < 32; j += 16)
      for (int64_t k = 0; k < b.rows; k += 32)
        pack_tile<true>(bt.block(std::min(j, b.cols), k, std::clamp<int64_t>(b.cols - j, 0, 16),
                                 std::min<int64_t>(32, b.rows - k)),
                        target + j / 16 * right_stride(depth) + right_offset(k));
  }

  // C[rows of the panels, 0..n) (+)= A[those rows, k0..k0+depth) B, for one packed panel of B whose
  // second 16 columns begin b_stride elements after the first.
  static void multiply(const Left& a, int64_t first_panel, int64_t last_panel, int64_t k0,
                       int64_t depth, const bfloat16* b, int64_t b_stride, int n, float* c,
                       int64_t ldc, bool accumulate, Prefetch& prefetch) {
    const int64_t steps = ceil_div(depth, 32);
    alignas(64) float edge[32 * 32];
    for (int64_t i = first_panel; i < last_panel; ++i) {
      const int64_t row = 32 * i;
      const int height = int(std::min<int64_t>(32, a.rows - row));
      Operand left;
      if (a.col_stride == 1) {
        left = {a.data + row * a.row_stride + k0, 16 * a.row_stride, 2 * a.row_stride, 32};
      } else {
        const int64_t tile_row = round_up(a.depth, 32) * 16;
        left = {a.data + row / 16 * tile_row + k0 * 16, tile_row, 64, tile_elements};
      }
      float* out = c + row * ldc;
      float* target = out;
      int64_t stride = ldc;
      if (height % 16 != 0 || n % 16 != 0) {
        target = edge, stride = 32;
        if (accumulate) copy(out, ldc, height, n, edge, 32);
      }
      if (height > 16) {
        n > 16 ? tile<2, 2>(steps, left, b, b_stride, target, stride, accumulate, prefetch)
               : tile<2, 1>(steps, left, b, b_stride, target, stride, accumulate, prefetch);
      } else {
        n > 16 ? tile<1, 2>(steps, left, b, b_stride, target, stride, accumulate, prefetch)
               : tile<1, 1>(steps, left, b, b_stride, target, stride, accumulate, prefetch);
      }
      if (target == edge) copy(edge, 32, height, n, out, ldc);
    }
  }

 private:
  // Where the tiles of A lie: the second 16 rows, bytes between rows, elements between k steps.
  struct Operand {
    const bfloat16* data;
    int64_t second, row_bytes, step;
  };

  template <int M, int N>
  static void tile(int64_t steps, Operand a, const bfloat16* b, int64_t b_stride, float* c,
                   int64_t ldc, bool accumulate, Prefetch& walk) {
    const int64_t c_bytes = ldc * 4;
    float* c1 = c + 16 * ldc;
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      if constexpr (N == 2) _tile_loadd(1, c + 16, c_bytes);
      if constexpr (M == 2) _tile_loadd(2, c1, c_bytes);
      if constexpr (M == 2 && N == 2) _tile_loadd(3, c1 + 16, c_bytes);
    } else {
      _tile_zero(0);
      if constexpr (N == 2) _tile_zero(1);
      if constexpr (M == 2) _tile_zero(2);
      if constexpr (M == 2 && N == 2) _tile_zero(3);
    }
    // Memory is asked for between the multiplications: the lines of C, which are written at the
    // end, a share at each step, and four lines of the region that the caller wants next.
    Prefetch prefetch = walk;
    float* own = c;
    const int64_t rows_per_step = ceil_div(16 * M, steps);
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t end = std::min<int64_t>((s + 1) * rows_per_step, 16 * M), r = s * rows_per_step;
           r < end; ++r, own += ldc) {
        __builtin_prefetch(own, 1, 3);
        if constexpr (N == 2) __builtin_prefetch(own + 16, 1, 3);
      }
      for (int line = 0; line < 4 && prefetch.next(); ++line) {
      }
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a.data, a.row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N == 2) {
        _tile_loadd(7, b + b_stride, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (M == 2) {
        _tile_loadd(5, a.data + a.second, a.row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
      }
      a.data += a.step;
      b += tile_elements;
    }
    walk = prefetch;
    _tile_stored(0, c, c_bytes);
    if constexpr (N == 2) _tile_stored(1, c + 16, c_bytes);
    if constexpr (M == 2) _tile_stored(2, c1, c_bytes);
    if constexpr (M == 2 && N == 2) _tile_stored(3, c1 + 16, c_bytes);
  }

  static void copy(const float* from, int64_t from_stride, int rows, int n, float* to,
                   int64_t to_stride) {
    for (int i = 0; i < rows; ++i)
      std::memcpy(to + i * to_stride, from + i * from_stride, size_t(n) * 4);
  }

  // One 1 KB tile from x, up to 16 rows or columns (index) by up to 32 k; the rest becomes 0.
  // pairs_first: words stored [pair of k][index], otherwise [index][pair of k].
  template <bool pairs_first, typename S>
  static void pack_tile(Matrix<S> x, bfloat16* target) {
    Bfloat16Pairs::Words word[16];
    Bfloat16Pairs::load<pairs_first>(x, word);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(target + 32 * i, (__m512i)word[i]);
  }
};

}  // namespace weft
#endif
