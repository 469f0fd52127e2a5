// Operands of the products of attention, on one thread, through the engine of the element type
// (common/gemm.h). A product is
//
//   C (rows, up to `columns`) (+)= A (rows, depth) B (depth, columns)        multiply
//
// with a left operand A, read in place where the engine can, a right operand B, one packed panel of
// `columns` columns, and sums C, row-major. Scores and their gradients are kept transposed, keys in
// rows and `columns` queries in the lanes of the vectors:
//
//   Sᵀ = K Qᵀ        left keys(K)         right pack_right(Qᵀ)
//   Oᵀ += Vᵀ Pᵀ      left columns_of(V)   right written by store_rows
//   dV += Pᵀ dO      left written by store_left    right pack_right(dO)
//
// Packed is what the products read: T, float for half, and for bfloat16 where the processor does
// not multiply it. A right panel holds rows in units of `depth_unit`: what is beyond the depth is
// 0.
#pragma once
#include "common/gemm.h"

namespace weft {

template <typename T>
struct Panels {
  using Engine = Product<T>;
  using Packed = typename Engine::Packed;
  using Sum = Acc<T>;
  using Lanes = Vec<Sum>;
  using Left = typename Engine::Left;

  static constexpr int W = Lanes::size;
  static constexpr int64_t columns = Engine::columns;
  static constexpr int vectors = int(columns) / W;  // of a row of a panel
  static constexpr int64_t depth_unit = Engine::depth_unit > 2 ? Engine::depth_unit : 2;

  // ---- right operands ----

  // Elements of a panel; `depth` as given to all that reads or writes it.
  static int64_t right_size(int64_t depth) {
    return Engine::right_size(round_up(depth, depth_unit), columns);
  }

  // b: (depth, up to `columns` columns), any strides; the missing columns become 0.
  template <typename S>
  static void pack_right(Matrix<S> b, Packed* panel) {
    Engine::pack_right(b, panel, round_up(b.rows, depth_unit));
  }

  // Columns [v W, (v + 1) W) of rows k and k + 1 of a panel, k even.
  static void store_rows(Packed* panel, int64_t depth, int64_t k, int v, Lanes first,
                         Lanes second) {
    if constexpr (!std::is_same_v<Packed, bfloat16>) {
      first.store(panel + k * columns + v * W);
      second.store(panel + (k + 1) * columns + v * W);
    } else {
#if defined(__AVX512BF16__)
      // 0, 16, 1, 17, ...: the two rows in turn.
      const __m512i in_turn = _mm512_set_epi32(
          0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
          0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
      const auto both = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
      Packed* to = panel + k * (Engine::depth_unit == 2 ? columns : 16) +
                   v * (Engine::depth_unit == 2 ? 32 : Engine::right_stride(depth));
      _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi16(~__mmask32(0), in_turn, both));
#endif
    }
  }

  // Rows from `rows` (even) to the end of a panel become 0: they are read, whatever the depth.
  static void clear_rest(Packed* panel, int64_t depth, int64_t rows) {
    for (int64_t k = rows; k < round_up(depth, Engine::depth_unit); k += 2)
      for (int v = 0; v < vectors; ++v) store_rows(panel, depth, k, v, Lanes(), Lanes());
  }

  // ---- left operands ----

  // Elements that keys and columns_of may want, for `rows` rows of `width` elements.
  static int64_t left_size(int64_t rows, int64_t width) {
    return std::max(Engine::left_size(rows, width), Engine::left_size(width, rows));
  }

  // A = x, rows of x by its columns; `memory` is not touched where x is read in place.
  static bool in_place(Matrix<T> x) {
    if constexpr (std::is_same_v<T, Packed>)
      return x.col_stride == 1 && Engine::reads_in_place(x, 64);
    return false;
  }
  static Left keys(Matrix<T> x, Packed* memory) {
    if constexpr (std::is_same_v<T, Packed>)
      if (in_place(x)) return {x.data, x.rows, x.cols, x.row_stride, 1};
    Engine::pack_left(x, memory);
    return packed(memory, x.rows, x.cols);
  }

  // A = xᵀ: row d is column d of x.
  static bool columns_in_place(Matrix<T> x) {
    return std::is_same_v<Engine, VectorProduct<T>> && x.col_stride == 1;
  }
  static Left columns_of(Matrix<T> x, Packed* memory) {
    if constexpr (std::is_same_v<Engine, VectorProduct<T>>)
      if (columns_in_place(x)) return {x.data, x.cols, x.rows, 1, x.row_stride};
    Engine::pack_left(x.transposed(), memory);
    return packed(memory, x.cols, x.rows);
  }

  // What either of them packed before.
  static Left packed(const Packed* memory, int64_t rows, int64_t depth) {
    return {memory, rows, depth};
  }

  // A row-major array that store_left wrote, in place: (rows, depth), rows ld elements apart. ld is
  // a multiple of 32, as many elements of each row and round_up(rows, 16) rows are finite numbers,
  // 0 beyond the depth.
  static Left stored(const Packed* array, int64_t rows, int64_t depth, int64_t ld) {
    if constexpr (Engine::depth_unit == 32)
      return {array, round_up(rows, 16), round_up(depth, 32), ld, 1};
    return {array, rows, depth, ld, 1};
  }
  static void store_left(Packed* to, Lanes x) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Packed, bfloat16>) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          (__m256i)_mm512_maskz_cvtneps_pbh(0xffff, x.v));
      return;
    }
#endif
    x.store(to);
  }

  // ---- the product ----

  // C has as many rows as the left operand, and n columns are written; `depth` is that of the left
  // operand. Hold a ProductSession<T> around it.
  static void multiply(const Left& a, const Packed* right, int64_t depth, int n, Sum* c,
                       int64_t ldc, bool accumulate) {
    if (depth == 0) {
      for (int64_t i = 0; i < a.rows && !accumulate; ++i) std::fill_n(c + i * ldc, n, Sum(0));
      return;
    }
    Prefetch nothing;
    Engine::multiply(a, 0, Engine::panels(a.rows), 0, depth, right,
                     Engine::right_stride(round_up(depth, depth_unit)), n, c, ldc, accumulate,
                     nothing);
  }
};

}  // namespace weft
