// The definitions of tiles.h, compiled once for each element type.
#include "cpu/pairwise/tiles.h"

#include <algorithm>
#include <cmath>

namespace weft {
namespace {

// Calls f(d, n, v) for the coordinates of row i, n <= Vec::size at a time; lanes past n are 0.
template <typename T, typename F>
void coordinates(Matrix<T> points, int64_t i, F f) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size;
  for (int64_t d = 0; d < points.cols; d += W) {
    const int64_t n = std::min(W, points.cols - d);
    if (points.col_stride == 1) {
      f(d, n, load_first<A>(points.at(i, d), n));
    } else {
      A values[W] = {};
      for (int64_t e = 0; e < n; ++e) values[e] = A(*points.at(i, d + e));
      f(d, n, Vec<A>::load(values));
    }
  }
}

// What a walk over all tiles needs; its sizes depend on the problem alone.
struct TileSizes {
  int64_t rows, columns, chunk;  // of a tile; columns made ready at once

  template <typename T>
  explicit TileSizes(const PairTiles<T>& tiles) {
    // A tile by differences stays in the first-level cache, one by products in the second.
    rows = tiles.direct ? 16 : 128;
    // Of few rows, smaller tiles: there is something for every thread.
    rows = std::min(rows, std::max<int64_t>(16, round_up(ceil_div(tiles.rows(), 8), 16)));
    columns = tiles.direct ? 256 : 512;
    const int64_t bytes = std::max<int64_t>(tiles.columns_bytes(columns), 1);
    const int64_t most = std::max<int64_t>(1, (int64_t(16) << 20) / bytes) * columns;
    chunk = std::min(most, round_up(std::max<int64_t>(tiles.columns(), 1), columns));
  }
};

}  // namespace

template <typename T>
PairTiles<T>::PairTiles(const Pair& pair, Matrix<T> x, Matrix<T> y, const A* row_factor,
                        const A* column_factor, const A* bias, bool direct)
    : pair(pair),
      x(x),
      y(y),
      row_factor(row_factor),
      column_factor(column_factor),
      bias(bias),
      direct(direct || pair.base == Base::kL1) {
  if (this->direct || pair.base != Base::kSquared) return;
  if (moved()) find_center();
  x_squares_ = squares(x), y_squares_ = squares(y);
}

template <typename T>
auto PairTiles<T>::prepare(int64_t first, int64_t count, void* memory) const -> Columns {
  if (direct) {
    // Row d holds coordinate d of every column, the rest of the last unit repeats nothing.
    A* to = static_cast<A*>(memory);
    const int64_t ld = round_up(count, kUnit);
    for (int64_t d = 0; d < depth(); ++d) {
      for (int64_t j = 0; j < count; ++j) to[d * ld + j] = A(*y.at(first + j, d));
      std::fill(to + d * ld + count, to + (d + 1) * ld, A(0));
    }
  } else {
    static thread_local Scratch storage;
    PackedRight<T>(moved_rows(y, first, count, storage).transposed(),
                   static_cast<typename PackedRight<T>::Packed*>(memory));
  }
  return {first, count, memory};
}

template <typename T>
void PairTiles<T>::values(int64_t i0, int64_t n, const Columns& c, int64_t j0, int64_t m, A* s,
                          int64_t ld, A* v) const {
  if (direct)
    differences(i0, n, c, j0, m, s, ld);
  else
    products(i0, n, c, j0, m, s, ld);
  with_function(pair.function, [&](auto f) {
    for (int64_t r = 0; r < n; ++r)
      apply<f.value>(i0 + r, c.first + j0, m, s + r * ld, v ? v + r * ld : nullptr);
  });
}

template <typename T>
Matrix<T> PairTiles<T>::moved_rows(Matrix<T> points, int64_t first, int64_t n,
                                   Scratch& storage) const {
  const Matrix<T> part = points.block(first, 0, n, points.cols);
  if constexpr (std::is_same_v<T, A>) {
    if (center_.empty()) return part;
    A* copy = storage.get<A>(n * points.cols);
    for (int64_t i = 0; i < n; ++i)
      coordinates(points, first + i, [&](int64_t d, int64_t count, Vec<A> value) {
        (value - load_first<A>(center() + d, count)).store(copy + i * points.cols + d, count);
      });
    return row_major<T>(copy, n, points.cols);
  }
  return part;
}

template <typename T>
Acc<T> PairTiles<T>::exactly(int64_t i, int64_t j) const {
  A total = 0;
  if (pair.base == Base::kDot) {
    for (int64_t d = 0; d < depth(); ++d) total += A(*x.at(i, d)) * A(*y.at(j, d));
  } else if (pair.base == Base::kL1) {
    for (int64_t d = 0; d < depth(); ++d) total += std::abs(A(*x.at(i, d)) - A(*y.at(j, d)));
  } else if (x.col_stride == 1 && y.col_stride == 1) {
    const T *a = x.at(i, 0), *b = y.at(j, 0);
    total = sum_terms<A>(depth(), [&](int64_t d, int64_t count, Vec<A> sum) {
      const Vec<A> difference = load_first<A>(a + d, count) - load_first<A>(b + d, count);
      return fma(difference, difference, sum);
    });
  } else {
    for (int64_t d = 0; d < depth(); ++d) {
      const A difference = A(*x.at(i, d)) - A(*y.at(j, d));
      total += difference * difference;
    }
  }
  return total;
}

// The mean of y's finite coordinates, over 4096 of its rows.
template <typename T>
void PairTiles<T>::find_center() {
  const int64_t step = std::max<int64_t>(1, columns() / 4096), D = depth();
  std::vector<A> count(size_t(D), A(0));
  center_.assign(size_t(D), A(0));
  for (int64_t j = 0; j < columns(); j += step)
    coordinates(y, j, [&](int64_t d, int64_t n, Vec<A> value) {
      const Vec<A> zero(A(0)), one(A(1));
      const auto finite = abs(value) < Vec<A>(A(1e15));
      A *sum = center_.data() + d, *terms = count.data() + d;
      (load_first<A>(sum, n) + select(finite, value, zero)).store(sum, n);
      (load_first<A>(terms, n) + select(finite, one, zero)).store(terms, n);
    });
  for (size_t d = 0; d < size_t(D); ++d) center_[d] /= std::max(count[d], A(1));
}

template <typename T>
std::vector<Acc<T>> PairTiles<T>::squares(Matrix<T> points) const {
  std::vector<A> result(size_t(points.rows));
  parallel_for(0, points.rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Vec<A> sum;
      coordinates(points, i, [&](int64_t d, int64_t n, Vec<A> value) {
        if (center()) value -= load_first<A>(center() + d, n);
        sum = fma(value, value, sum);
      });
      result[size_t(i)] = reduce_sum(sum);
    }
  });
  return result;
}

template <typename T>
void PairTiles<T>::products(int64_t i0, int64_t n, const Columns& c, int64_t j0, int64_t m, A* u,
                            int64_t ld) const {
  static thread_local Scratch storage;
  const auto* packed = static_cast<const typename PackedRight<T>::Packed*>(c.memory);
  const PackedRight<T> right(packed, depth(), c.count);
  gemm(moved_rows(x, i0, n, storage), right.block(0, j0, depth(), m), u, ld);
  if (pair.base != Base::kSquared) return;
  for (int64_t r = 0; r < n; ++r) squared_distances(i0 + r, c.first + j0, m, u + r * ld);
}

// From inner products to squared distances.
template <typename T>
void PairTiles<T>::squared_distances(int64_t i, int64_t j0, int64_t m, A* u) const {
  constexpr int64_t W = Vec<A>::size;
  // Below this part of ‖x‖² + ‖y‖² seven bits are lost. A NaN comes here too: of an infinity.
  const Vec<A> close(A(1) / 128), two(A(2)), row(x_squares_[size_t(i)]);
  for (int64_t j = 0; j < m; j += W) {
    const int64_t count = std::min(W, m - j);
    const Vec<A> sum = row + load_first<A>(y_squares_.data() + j0 + j, count);
    const Vec<A> distance = sum - two * load_first<A>(u + j, count);
    if (count == W)
      distance.store(u + j);
    else
      distance.store(u + j, count);
    if (all(distance > close * sum)) continue;
    for (int64_t k = 0; k < count; ++k)
      if (!(u[j + k] > A(1) / 128 * (x_squares_[size_t(i)] + y_squares_[size_t(j0 + j + k)])))
        u[j + k] = exactly(i, j0 + j + k);
  }
}

// Rows four at a time, two vectors of columns: each coordinate of y is read once for four pairs.
template <typename T>
void PairTiles<T>::differences(int64_t i0, int64_t n, const Columns& c, int64_t j0, int64_t m, A* u,
                               int64_t ld) const {
  static thread_local Scratch storage;
  const int64_t D = depth(), stride = round_up(c.count, kUnit);
  const A* columns = static_cast<const A*>(c.memory) + j0;
  A* points = storage.get<A>(round_up(n, 4) * D);
  for (int64_t r = 0; r < round_up(n, 4); ++r)
    for (int64_t d = 0; d < D; ++d) points[r * D + d] = r < n ? A(*x.at(i0 + r, d)) : A(0);
  for (int64_t r = 0; r < n; r += 4) {
    const A* four = points + r * D;
    A* to = u + r * ld;
    const int64_t count = std::min<int64_t>(4, n - r);
    if (pair.base == Base::kSquared)
      strip<Base::kSquared>(four, D, columns, stride, m, count, to, ld);
    else if (pair.base == Base::kL1)
      strip<Base::kL1>(four, D, columns, stride, m, count, to, ld);
    else
      strip<Base::kDot>(four, D, columns, stride, m, count, to, ld);
  }
}

template <typename T>
template <Base base>
void PairTiles<T>::strip(const A* four, int64_t D, const A* columns, int64_t stride, int64_t m,
                         int64_t count, A* u, int64_t ld) {
  constexpr int64_t W = Vec<A>::size, kVectors = 2;
  for (int64_t j = 0; j < m; j += kVectors * W) {
    Vec<A> sum[4][kVectors];
    for (int64_t d = 0; d < D; ++d)
#pragma GCC unroll 2
      for (int64_t k = 0; k < kVectors; ++k) {
        const Vec<A> value = Vec<A>::load(columns + d * stride + j + k * W);
#pragma GCC unroll 4
        for (int64_t r = 0; r < 4; ++r) {
          const Vec<A> point(four[r * D + d]);
          if constexpr (base == Base::kDot) {
            sum[r][k] = fma(point, value, sum[r][k]);
          } else {
            const Vec<A> difference = point - value;
            sum[r][k] = base == Base::kSquared ? fma(difference, difference, sum[r][k])
                                               : sum[r][k] + abs(difference);
          }
        }
      }
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r)
      for (int64_t k = 0; k < kVectors; ++k) {
        const int64_t left = m - j - k * W;
        if (r >= count || left <= 0) continue;
        if (left >= W)
          sum[r][k].store(u + r * ld + j + k * W);
        else
          sum[r][k].store(u + r * ld + j + k * W, left);
      }
  }
}

// In place, from u to v to s, for m columns of row i.
template <typename T>
template <Function f>
void PairTiles<T>::apply(int64_t i, int64_t j0, int64_t m, A* s, A* v) const {
  constexpr int64_t W = Vec<A>::size;
  const bool plain = !row_factor && !column_factor && !bias && pair.scale == 1 && pair.shift == 0;
  if (f == Function::kIdentity && plain && !v) return;
  const Vec<A> scale(A(pair.scale) * (row_factor ? row_factor[i] : A(1))), shift(A(pair.shift));
  const A parameter = A(pair.parameter);
  for (int64_t j = 0; j < m; j += W) {
    const int64_t count = std::min(W, m - j);
    const auto at = [&](const A* p) { return load_first<A>(p, count); };
    Vec<A> value = at(s + j);
    if (!plain) {
      const Vec<A> factor = column_factor ? scale * at(column_factor + j0 + j) : scale;
      value = fma(factor, value, bias ? shift + at(bias + j0 + j) : shift);
    }
    const Vec<A> result = function_value<f>(value, parameter);
    if (count == W) {
      if (v) value.store(v + j);
      result.store(s + j);
    } else {
      if (v) value.store(v + j, count);
      result.store(s + j, count);
    }
  }
}

template <typename T>
std::vector<typename PairTiles<T>::Columns> prepare_columns(const PairTiles<T>& tiles,
                                                            int64_t first, int64_t count,
                                                            int64_t size, Scratch& storage) {
  const int64_t blocks = ceil_div(count, size), bytes = round_up(tiles.columns_bytes(size), 64);
  char* memory = storage.get<char>(blocks * bytes);
  std::vector<typename PairTiles<T>::Columns> columns(static_cast<size_t>(blocks));
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      columns[size_t(b)] =
          tiles.prepare(first + b * size, std::min(size, count - b * size), memory + b * bytes);
  });
  return columns;
}

template <typename T>
void for_each_tile(const PairTiles<T>& tiles, const TileVisit<T>& visit) {
  using A = Acc<T>;
  const TileSizes size(tiles);
  static thread_local Scratch storage;
  for (int64_t first = 0; first < tiles.columns(); first += size.chunk) {
    const int64_t count = std::min(size.chunk, tiles.columns() - first);
    const auto columns = prepare_columns(tiles, first, count, size.columns, storage);
    parallel_for(0, ceil_div(tiles.rows(), size.rows), 1, [&](int64_t begin, int64_t end) {
      static thread_local Scratch tile;
      A* s = tile.get<A>(size.rows * size.columns);
      const ProductSession<T> session;
      for (int64_t i0 = begin * size.rows; i0 < std::min(end * size.rows, tiles.rows());
           i0 += size.rows) {
        const int64_t n = std::min(size.rows, tiles.rows() - i0);
        for (const auto& block : columns) {
          tiles.values(i0, n, block, 0, block.count, s, block.count);
          visit(i0, n, block.first, block.count, s);
        }
      }
    });
  }
}

template class PairTiles<double>;
template class PairTiles<float>;
template class PairTiles<bfloat16>;
template class PairTiles<half>;

#define WEFT_TILES(T)                                                                       \
  template std::vector<PairTiles<T>::Columns> prepare_columns(const PairTiles<T>&, int64_t, \
                                                              int64_t, int64_t, Scratch&);  \
  template void for_each_tile(const PairTiles<T>&, const TileVisit<T>&);
WEFT_TILES(double)
WEFT_TILES(float)
WEFT_TILES(bfloat16)
WEFT_TILES(half)
#undef WEFT_TILES

}  // namespace weft
