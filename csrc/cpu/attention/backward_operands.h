// Operands of the five products of the backward on a tile of queries and keys, for every engine.
#pragma once
#include <cstring>
#include <vector>

#include "common/convert.h"
#include "common/gemm.h"

namespace weft {

inline constexpr int64_t kTile = 64;  // queries and keys of a tile; rows of scores are as long

// Lines of memory that the next tile reads or writes, asked for between parts of the products.
class ReadAhead {
 public:
  void clear() { count_ = next_ = 0; }
  // Rows [first, first + n) of x.
  template <typename T>
  void add(Matrix<T> x, int64_t first, int64_t n) {
    if (x.col_stride != 1 || count_ == kRegions) return;
    constexpr int64_t size = sizeof(T);
    regions_[count_++] = {x.at(first, 0), x.cols * size, std::min(n, x.rows - first),
                          x.row_stride * size};
  }
  void ask() {
    constexpr int kLines = 32;
    for (int i = 0; i < kLines && next_ < count_;)
      if (regions_[next_].next())
        ++i;
      else
        ++next_;
  }

 private:
  static constexpr int kRegions = 8;
  Prefetch regions_[kRegions];
  int count_ = 0, next_ = 0;
};

// As convert, for rows that are too short to call a function for.
template <typename From, typename To>
inline void copy_row(const From* x, To* y, int64_t n) {
  if constexpr (std::is_same_v<From, To>) {
    constexpr int64_t kChunk = 32 / int64_t(sizeof(To));
    int64_t i = 0;
    for (; i + kChunk <= n; i += kChunk) std::memcpy(static_cast<void*>(y + i), x + i, 32);
    for (; i < n; ++i) y[i] = x[i];
  } else {
    convert(x, y, n);
  }
}

template <typename T>
struct TileProducts {
  using Engine = Product<T>;
  using E = typename Engine::Packed;
  using A = Acc<T>;
  using Left = typename Engine::Left;
  static constexpr bool by_vectors = std::is_same_v<Engine, VectorProduct<A>>;
  static constexpr bool by_tiles = Engine::depth_unit == 32;  // AMX reads whole tiles
  // Scores of queries that do not exist fill up to this many lanes.
  static constexpr int64_t lane_unit = by_tiles ? 32 : Vec<A>::size;

  static int64_t right_size(int64_t depth, int64_t cols) { return Engine::right_size(depth, cols); }
  static void pack_right(Matrix<E> b, E* target, int64_t depth) {
    product::pack_columns<Engine>(b, target, depth);
  }

  // C (rows, cols) (+)= A B, for B in panels packed as `packed_depth` deep.
  static void multiply(const Left& a, const E* b, int64_t packed_depth, int64_t depth, int64_t cols,
                       A* c, int64_t ldc, bool accumulate, ReadAhead& ahead) {
    if (a.rows == 0) return;
    if (depth == 0) {
      for (int64_t i = 0; i < a.rows && !accumulate; ++i) std::fill_n(c + i * ldc, cols, A(0));
      return;
    }
    Prefetch none;
    for (int64_t j = 0; j < cols; j += Engine::columns)
      for (int64_t i = 0; i < Engine::panels(a.rows); ++i) {
        Engine::multiply(a, i, i + 1, 0, depth, b + right_size(packed_depth, j),
                         Engine::right_stride(packed_depth),
                         int(std::min<int64_t>(Engine::columns, cols - j)), c + j, ldc, accumulate,
                         none);
        ahead.ask();
      }
  }
};

// Rows of keys or values as left operands: in place where the engine can read them so, otherwise
// copied one after the other.
template <typename T>
class TokenRows {
 public:
  using P = TileProducts<T>;
  using E = typename P::E;

  // Rows j with seen[j] = 0, if given, are read as 0.
  void load(Matrix<T> x, Scratch& memory, const uint8_t* seen = nullptr) {
    rows_ = x.rows, cols_ = x.cols;
    if constexpr (std::is_same_v<T, E>) {
      const bool whole = !P::by_tiles || (rows_ % 16 == 0 && cols_ % 32 == 0);
      if (!seen && x.col_stride == 1 && x.row_stride <= 2 * x.cols && whole) {
        data_ = x.data, stride_ = x.row_stride;
        return;
      }
    }
    stride_ = P::by_tiles ? round_up(cols_, 32) : cols_;
    E* copy = memory.template get<E>(round_up(rows_, 16) * stride_);
    for (int64_t j = 0; j < rows_; ++j) copy_row(x, j, !seen || seen[j], copy + j * stride_);
    std::fill(copy + rows_ * stride_, copy + round_up(rows_, 16) * stride_, E(0));
    data_ = copy;
  }

  bool finite() const {
    using A = typename P::A;
    constexpr int64_t W = Vec<A>::size;
    Vec<A> total[2];  // x - x is 0 or NaN
    for (int64_t j = 0; j < rows_; ++j)
      for (int64_t d = 0; d < cols_; d += W) {
        const E* p = data_ + j * stride_ + d;
        const Vec<A> x = cols_ - d >= W ? Vec<A>::load(p) : Vec<A>::load(p, cols_ - d);
        total[d / W % 2] += x - x;
      }
    return !any(is_nan(total[0] + total[1]));
  }

  // The rows [first, first + n).
  typename P::Left rows(int64_t first, int64_t n) const {
    return {data_ + first * stride_, n, cols_, stride_, 1};
  }
  Matrix<E> matrix(int64_t first, int64_t n) const {
    return row_major(data_ + first * stride_, n, cols_, stride_);
  }

 private:
  void copy_row(Matrix<T> x, int64_t j, bool seen, E* target) const {
    int64_t d = 0;
    if (seen && x.col_stride == 1)
      weft::copy_row(x.at(j, 0), target, d = cols_);
    else if (seen)
      for (; d < cols_; ++d) target[d] = E(*x.at(j, d));
    std::fill(target + d, target + stride_, E(0));
  }

  const E* data_ = nullptr;
  int64_t rows_ = 0, cols_ = 0, stride_ = 0;
};

// The keys as dQ += dS K reads them, in blocks of kTile: in vectors a right operand beside dS, rows
// of queries; elsewhere transposed, a left operand beside dS as a right one.
template <typename T>
class KeyColumns {
 public:
  using P = TileProducts<T>;
  using E = typename P::E;

  void load(const TokenRows<T>& keys, int64_t Nk, int64_t D, Scratch& memory) {
    depth_ = D;
    size_ = P::by_vectors ? P::right_size(kTile, D) : P::Engine::left_size(D, kTile);
    packed_ = memory.template get<E>(ceil_div(Nk, kTile) * size_);
    for (int64_t k = 0; k < Nk; k += kTile) {
      const Matrix<E> block = keys.matrix(k, std::min(kTile, Nk - k));
      if constexpr (P::by_vectors)
        P::pack_right(block, packed_ + k / kTile * size_, kTile);
      else
        P::Engine::pack_left(block.transposed(), packed_ + k / kTile * size_);
    }
  }

  // sums (+)= the part of the keys [first, first + nk), a whole block; of gradients [key][kTile]
  // for nq queries, or packed as a right operand for `lanes` of them. Sums are [query][D], or
  // [D][kTile].
  void multiply(int64_t first, int64_t nk, int64_t nq, int64_t lanes, const E* gradients,
                const E* gradient_panels, typename P::A* sums, bool accumulate,
                ReadAhead& ahead) const {
    const E* keys = packed_ + first / kTile * size_;
    if constexpr (P::by_vectors)
      P::multiply({gradients, nq, nk, 1, kTile}, keys, kTile, nk, depth_, sums, depth_, accumulate,
                  ahead);
    else
      P::multiply({keys, depth_, nk}, gradient_panels, kTile, nk, lanes, sums, kTile, accumulate,
                  ahead);
  }

 private:
  E* packed_ = nullptr;
  int64_t depth_ = 0, size_ = 0;
};

// Rows of queries, or of the gradient of the output, in both forms of a right operand: transposed,
// (width, queries), and as they are, (queries, width). Rows whose bit is not set are read as 0.
template <typename T>
class QueryTile {
 public:
  using P = TileProducts<T>;
  using E = typename P::E;

  void load(Matrix<T> x, int64_t first, int64_t n, uint64_t live, Scratch& memory) {
    const int64_t width = x.cols, deep = round_up(width, P::Engine::depth_unit);
    const int64_t size = P::right_size(deep, kTile), plain = P::right_size(kTile, width);
    E* base = memory.template get<E>(size + plain + kTile * width);
    transposed = base, rows = base + size, depth = deep;
    E* copy = base + size + plain;
    for (int64_t r = 0; r < n; ++r) {
      E* row = copy + r * width;
      if (!(live >> r & 1))
        std::fill_n(row, width, E(0));
      else if (x.col_stride == 1)
        copy_row(x.at(first + r, 0), row, width);
      else
        for (int64_t d = 0; d < width; ++d) row[d] = E(*x.at(first + r, d));
    }
    const auto compact = row_major<E>(copy, n, width);
    P::pack_right(compact.transposed(), base, deep);
    P::pack_right(compact, base + size, kTile);
  }

  const E *transposed = nullptr, *rows = nullptr;
  int64_t depth = 0;  // of `transposed`, as packed
};

}  // namespace weft
