// Products of k columns of length D with k × k matrices, for k up to a few dozen and D in the
// thousands. A column is a row in memory: a panel holds `rows` columns (a multiple of 4) by `width`
// elements of each, so that the panels of all operands of a step stay in the first-level cache, and
// vectors run along D whatever k is.
//
//   gram      sums_ij += Σ_d a_i[d] b_j[d]            kept as vectors until `reduce`
//   combine   out_j (+)= Σ_i a_i c_ij (+ Σ_i b_i s_ij)
#pragma once
#include <algorithm>

#include "common/simd.h"

namespace weft::tall_skinny {

constexpr int kWidth = 128;                                // elements of a column in a panel
constexpr int kTile = 4;                                   // columns of a register tile
constexpr int kVectorsAlong = kVectorBytes == 64 ? 4 : 2;  // and its vectors along D, in `combine`

// A walk over the cache lines of rows that a later step reads.
class Lines {
 public:
  Lines() = default;
  Lines(const void* first, int64_t row_bytes, int64_t rows, int64_t stride_bytes)
      : at_(static_cast<const char*>(first)),
        per_row_(ceil_div(row_bytes, 64)),
        left_(per_row_),
        rows_(row_bytes > 0 ? rows : 0),
        jump_(stride_bytes - 64 * per_row_) {}

  int64_t count() const { return rows_ * per_row_; }
  // Asks for the next n, into the second-level cache.
  void fetch(int n) {
    for (; n > 0 && rows_ > 0; --n, at_ += 64) {
      __builtin_prefetch(at_, 0, 2);
      if (--left_ == 0) left_ = per_row_, at_ += jump_, --rows_;
    }
  }

 private:
  const char* at_ = nullptr;
  int64_t per_row_ = 0, left_ = 0, rows_ = 0, jump_ = 0;
};

inline int padded(int64_t k) { return int(round_up(k, kTile)); }

// Elements of the vector sums of a Gram matrix.
template <typename R>
int64_t sums_size(int rows) {
  return int64_t(rows) * rows * Vec<R>::size;
}

// Symmetric sums (a == b) fill only the tiles on and above the diagonal.
template <typename R>
void gram(const R* a, const R* b, int rows, bool symmetric, R* sums) {
  using V = Vec<R>;
  constexpr int I = kVectorBytes == 64 ? kTile : kTile / 2;
  for (int i = 0; i < rows; i += I)
    for (int j = symmetric ? i / kTile * kTile : 0; j < rows; j += kTile) {
      V acc[I][kTile];
      R* at = sums + (int64_t(i) * rows + int64_t(j) * I) * V::size;
#pragma GCC unroll 4
      for (int r = 0; r < I; ++r)
#pragma GCC unroll 4
        for (int s = 0; s < kTile; ++s) acc[r][s] = V::load(at + (r * kTile + s) * V::size);
      const R *left = a + i * kWidth, *right = b + j * kWidth;
      for (int d = 0; d < kWidth; d += V::size) {
        V column[kTile];
#pragma GCC unroll 4
        for (int s = 0; s < kTile; ++s) column[s] = V::load(right + s * kWidth + d);
#pragma GCC unroll 4
        for (int r = 0; r < I; ++r) {
          const V value = V::load(left + r * kWidth + d);
#pragma GCC unroll 4
          for (int s = 0; s < kTile; ++s) acc[r][s] = fma(value, column[s], acc[r][s]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < I; ++r)
#pragma GCC unroll 4
        for (int s = 0; s < kTile; ++s) acc[r][s].store(at + (r * kTile + s) * V::size);
    }
}

// The k × k Gram matrix from its vector sums, the lanes added in double.
template <typename R>
void reduce(const R* sums, int rows, int k, bool symmetric, double* out) {
  using V = Vec<R>;
  constexpr int I = kVectorBytes == 64 ? kTile : kTile / 2;
  for (int i = 0; i < k; ++i)
    for (int j = symmetric ? i : 0; j < k; ++j) {
      const int i0 = i / I * I, j0 = j / kTile * kTile;
      const R* lane =
          sums + (int64_t(i0) * rows + int64_t(j0) * I + (i - i0) * kTile + (j - j0)) * V::size;
      double part[V::size];
      for (int l = 0; l < V::size; ++l) part[l] = lane[l];
      for (int width = V::size / 2; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) part[l] += part[l + width];
      out[i * k + j] = part[0];
      if (symmetric) out[j * k + i] = part[0];
    }
}

// Register tiles of `combine` per panel.
template <typename R>
int combine_tiles(int rows) {
  return rows / kTile * (kWidth / (kVectorsAlong * Vec<R>::size));
}

// A k × k matrix as coefficients of `combine`: rows × rows, zero beyond k, times `factor`.
template <typename R>
void coefficients(const double* matrix, int k, double factor, int rows, R* out) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < rows; ++j)
      out[i * rows + j] = i < k && j < k ? R(factor * matrix[i * k + j]) : R(0);
}

// out is no operand. `fetch` is called once per register tile, to spread the prefetching of memory.
template <bool kAccumulate, typename R, typename Fetch>
void combine(const R* a, const R* c, const R* b, const R* s, int rows, R* out, Fetch&& fetch) {
  using V = Vec<R>;
  constexpr int N = kVectorsAlong;
  for (int j = 0; j < rows; j += kTile)
    for (int d = 0; d < kWidth; d += N * V::size) {
      V acc[kTile][N];
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
          acc[r][n] = kAccumulate ? V::load(out + (j + r) * kWidth + d + n * V::size) : V();
      const auto add = [&](const R* operand, const R* coefficient) {
        for (int i = 0; i < rows; ++i) {
          V value[N];
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) value[n] = V::load(operand + i * kWidth + d + n * V::size);
#pragma GCC unroll 4
          for (int r = 0; r < kTile; ++r) {
            const V factor(coefficient[i * rows + j + r]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[r][n] = fma(factor, value[n], acc[r][n]);
          }
        }
      };
      add(a, c);
      if (b) add(b, s);
      fetch();
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n].store(out + (j + r) * kWidth + d + n * V::size);
    }
}

}  // namespace weft::tall_skinny
