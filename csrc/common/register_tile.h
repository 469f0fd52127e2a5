// The inner kernel of the products in vector registers: a tile of C, H rows by V vectors, that
// stays there while k runs,
//   for k: b[v] = B[k, v];  for i < H: c[i, v] += A[i, k] b[v]
// A step of k is one element of float or double; of bfloat16 it is a pair (k, k + 1), which one
// instruction multiplies and adds in float. Every element is one chain of them in the order of k.
//
// csrc/cpu/register_tile.cpp defines and instantiates the kernels, once for every height: the
// products of all ops call the same ones.
#pragma once
#include "common/matrix.h"
#include "common/simd.h"

namespace weft {

template <typename T>
struct RegisterTile {
  using Sum = Acc<T>;
  static constexpr int W = Vec<Sum>::size;
  static constexpr int columns = 2 * W;  // of a panel of B
  static constexpr int step = std::is_same_v<T, bfloat16> ? 2 : 1;
  // As many accumulators as the registers hold, beside the two of B and one of A.
#if defined(__AVX512F__)
  static constexpr int max_height = 14;
#elif defined(__AVX2__)
  static constexpr int max_height = 6;
#else
  static constexpr int max_height = 4;
#endif

  int64_t depth;
  const T* a;
  int64_t a_stride;
  const T* b;  // [step of k][columns][k within the step]
  Sum* c;
  int64_t ldc;
  int valid_columns;  // 1 to `columns`; the others of B are 0, those of C are not touched
  bool accumulate;
  Prefetch* prefetch;  // the region that the caller wants next: some lines are asked for

  // rows_adjacent: the step k of row i begins at a[k / step * a_stride + i * step], and B and A
  // hold whole steps; otherwise at a[i * a_stride + k], and nothing beyond `depth` is read.
  void run(int height, bool rows_adjacent) const;

  // Whether rows with contiguous k are better read as they lie. Packing pays where each element is
  // read often, and sooner where the rows of a tile share one set of the first-level cache.
  static bool reads_in_place(Matrix<T> a, int64_t cols) {
    const bool shared_set = a.rows > 8 && a.row_stride * int64_t(sizeof(T)) % 4096 == 0;
    return cols <= (shared_set ? 2 : 8) * columns;
  }
};

}  // namespace weft
