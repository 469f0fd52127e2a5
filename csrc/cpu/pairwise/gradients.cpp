// The definitions of gradients.h, compiled once for each element type.
#include "cpu/pairwise/gradients.h"

#include "common/transpose.h"

namespace weft {

template <typename T>
PairBackward<T>::PairBackward(const PairTiles<T>& tiles, PairGradients<T> out)
    : p_(tiles), out_(out) {
  // Differences are summed as they are; products sum into the accumulation type.
  x_.init(out.x, p_.rows(), p_.depth());
  y_.init(out.y, p_.columns(), p_.depth());
  if (!p_.direct) unusual_x_ = unusual(p_.x), unusual_y_ = unusual(p_.y);
  const int64_t N = p_.rows(), M = p_.columns();
  if (out.row_factor) std::fill_n(out.row_factor, N, A(0));
  if (out.column_factor) std::fill_n(out.column_factor, M, A(0));
  if (out.bias) std::fill_n(out.bias, M, A(0));
}

template <typename T>
PairBackward<T>::PairBackward(const PairTiles<T>& tiles, A* x, A* y) : p_(tiles), out_{} {
  x_.sum = x, y_.sum = y;
  std::fill_n(x, p_.rows() * p_.depth(), A(0));
  std::fill_n(y, p_.columns() * p_.depth(), A(0));
  unusual_x_ = unusual(p_.x), unusual_y_ = unusual(p_.y);
}

template <typename T>
void PairBackward<T>::add_rows(int64_t i0, Matrix<H> h) {
  for (int64_t j = 0; j < h.cols; j += kGroupColumns) {
    const Matrix<H> group = h.block(0, j, h.rows, std::min(kGroupColumns, h.cols - j));
    add_products(p_.y, unusual_y_, j, group, i0, x_.sum);
    add_products(p_.x, unusual_x_, i0, group.transposed(), j, y_.sum);
  }
}

template <typename T>
void PairBackward<T>::run(const PairWeights<T>& weights) {
  static thread_local Scratch h_storage;
  const int64_t N = p_.rows(), M = p_.columns();
  H* h = h_storage.get<H>(std::min(N, kGroupRows) * std::min(M, kGroupColumns));
  for (int64_t j = 0; j < M; j += kGroupColumns)
    for (int64_t i = 0; i < N; i += kGroupRows) {
      const int64_t n = std::min(kGroupRows, N - i), m = std::min(kGroupColumns, M - j);
      fill(weights, i, n, j, m, h);
      const Matrix<H> group{h, n, m, m, 1};
      if (p_.direct) {
        if (out_.x) add_differences(p_.x, p_.y, j, group, i, x_.sum);
        if (out_.y) add_differences(p_.y, p_.x, i, group.transposed(), j, y_.sum);
      } else {
        if (out_.x) add_products(p_.y, unusual_y_, j, group, i, x_.sum);
        if (out_.y) add_products(p_.x, unusual_x_, i, group.transposed(), j, y_.sum);
      }
    }
  const auto divide = [](A* sums, const A* factors, int64_t n) {
    for (int64_t i = 0; sums && i < n; ++i) sums[i] /= factors[i];
  };
  divide(out_.row_factor, p_.row_factor, N);
  divide(out_.column_factor, p_.column_factor, M);
  if (out_.x) finish(p_.x, x_, out_.x);
  if (out_.y) finish(p_.y, y_, out_.y);
}

// H of a group, and the sums that need no products.
template <typename T>
void PairBackward<T>::fill(const PairWeights<T>& weights, int64_t i0, int64_t rows, int64_t j0,
                           int64_t cols, H* h) {
  constexpr int64_t kTileColumns = 256;
  static thread_local Scratch column_storage;
  static thread_local Scratch partial_storage;
  const auto columns = prepare_columns(p_, j0, cols, kTileColumns, column_storage);
  const int64_t tasks = ceil_div(rows, kTileRows);
  // Three sums over each task's rows, for every column: h, g and g v.
  A* partial = partial_storage.get<A>(tasks * 3 * cols);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch tile;
    A* s = tile.get<A>(3 * kTileRows * kTileColumns);
    const ProductSession<T> session;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r0 = task * kTileRows, n = std::min(kTileRows, rows - r0);
      A* sums = partial + task * 3 * cols;
      std::fill_n(sums, 3 * cols, A(0));
      for (const auto& block : columns) {
        const int64_t m = block.count, c0 = block.first - j0;
        A *v = s + kTileRows * kTileColumns, *w = v + kTileRows * kTileColumns;
        p_.values(i0 + r0, n, block, 0, m, s, m, v);
        weights(i0 + r0, n, block.first, m, static_cast<const A*>(s), w);
        with_function(p_.pair.function, [&](auto f) {
          for (int64_t r = 0; r < n; ++r)
            slopes<f.value>(i0 + r0 + r, block.first, m, s + r * m, v + r * m, w + r * m,
                            h + (r0 + r) * cols + c0, sums + c0, cols);
        });
      }
    }
  });
  for (int64_t task = 0; task < tasks; ++task) {
    const A* sums = partial + task * 3 * cols;
    for (int64_t j = 0; j < cols; ++j) {
      if (out_.y) y_.weight[size_t(j0 + j)] += sums[j];
      if (out_.bias) out_.bias[j0 + j] += sums[cols + j];
      if (out_.column_factor) out_.column_factor[j0 + j] += sums[2 * cols + j];
    }
  }
}

// h of m columns of row i, and their parts of the sums.
template <typename T>
template <Function f>
void PairBackward<T>::slopes(int64_t i, int64_t j0, int64_t m, const A* s, const A* v, const A* w,
                             H* h, A* sums, int64_t stride) {
  constexpr int64_t W = Vec<A>::size;
  const A factor = A(p_.pair.scale) * (p_.row_factor ? p_.row_factor[i] : A(1));
  const Vec<A> scale(factor), shift(A(p_.pair.shift));
  const bool of_factors = out_.row_factor || out_.column_factor;
  Vec<A> total_h, total_gv;
  for (int64_t j = 0; j < m; j += W) {
    const int64_t count = std::min(W, m - j);
    const auto at = [&](const A* p) { return load_first<A>(p, count); };
    const Vec<A> value = at(v + j), weight = at(w + j), zero(A(0));
    // A weight of 0 is a pair that does not count, whatever its slope is.
    const Vec<A> slope = function_slope<f>(value, at(s + j), A(p_.pair.parameter));
    const Vec<A> g =
        f == Function::kIdentity ? weight : select(weight == zero, zero, weight * slope);
    const Vec<A> factors = p_.column_factor ? scale * at(p_.column_factor + j0 + j) : scale;
    const Vec<A> part = g * factors;
    part.store(h + j, count);
    const Vec<A> kept = Vec<A>::load(h + j, count);  // the sum is of what the product sees
    total_h += kept;
    (at(sums + j) + kept).store(sums + j, count);
    if (out_.bias) (at(sums + stride + j) + g).store(sums + stride + j, count);
    if (!of_factors) continue;
    const Vec<A> bias = p_.bias ? shift + at(p_.bias + j0 + j) : shift;
    const Vec<A> gv = select(weight == zero, zero, g * (value - bias));
    total_gv += gv;
    (at(sums + 2 * stride + j) + gv).store(sums + 2 * stride + j, count);
  }
  if (out_.x) x_.weight[size_t(i)] += reduce_sum(total_h);
  if (out_.row_factor) out_.row_factor[i] += reduce_sum(total_gv);
}

// The points with a coordinate that is not finite.
template <typename T>
std::vector<int64_t> PairBackward<T>::unusual(Matrix<T> points) {
  std::vector<char> found(size_t(points.rows), 0);
  parallel_for(0, points.rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A total = 0;  // 0 · v is NaN where v is not finite
      for (int64_t d = 0; d < points.cols; ++d) total += A(0) * A(*points.at(i, d));
      found[size_t(i)] = total != 0;
    }
  });
  std::vector<int64_t> result;
  for (int64_t i = 0; i < points.rows; ++i)
    if (found[size_t(i)]) result.push_back(i);
  return result;
}

// sum_i += Σ_j h_ij y_j for the rows i of h, from row `first` on, and the points y from j0 on.
template <typename T>
void PairBackward<T>::add_products(Matrix<T> points, const std::vector<int64_t>& unusual,
                                   int64_t j0, Matrix<H> h, int64_t first, A* sum) {
  const int64_t D = p_.depth(), n = h.rows, m = h.cols;
  constexpr int64_t kRows = 256, kDepth = 512;
  const int64_t parts = ceil_div(D, kDepth);
  static thread_local Scratch storage;
  using Panel = PackedRight<T>;
  const int64_t size = Panel::size(m, std::min(kDepth, D));
  auto* memory = storage.get<typename Panel::Packed>(parts * size);
  const auto begin_unusual = std::lower_bound(unusual.begin(), unusual.end(), j0);
  const auto end_unusual = std::lower_bound(begin_unusual, unusual.end(), j0 + m);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch moved, usual;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t d = part * kDepth, count = std::min(kDepth, D - d);
      Matrix<T> block = p_.moved_rows(points, j0, m, moved).block(0, d, m, count);
      if (begin_unusual != end_unusual) {
        T* copy = usual.get<T>(m * count);
        for (int64_t j = 0; j < m; ++j)
          for (int64_t e = 0; e < count; ++e) copy[j * count + e] = *block.at(j, e);
        for (auto j = begin_unusual; j != end_unusual; ++j)
          std::fill_n(copy + (*j - j0) * count, count, T(0));
        block = row_major<T>(copy, m, count);
      }
      Panel(block, memory + part * size);
    }
  });
  parallel_for(0, parts * ceil_div(n, kRows), 1, [&](int64_t begin, int64_t end) {
    const ProductSession<T> session;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t d = task % parts, r = task / parts * kRows;
      const Panel right(memory + d * size, m, std::min(kDepth, D - d * kDepth));
      gemm(h.block(r, 0, std::min(kRows, n - r), m), right, sum + (first + r) * D + d * kDepth, D,
           true);
    }
  });
  for (auto j = begin_unusual; j != end_unusual; ++j)
    parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const A weight = A(*h.at(r, *j - j0));
        for (int64_t d = 0; d < D && weight != 0; ++d)
          sum[(first + r) * D + d] += weight * A(*points.at(*j, d));
      }
    });
}

// sum_i += Σ_j h_ij ∂u_ij/∂x_i for the rows i of h, which are those of `own` from `first` on.
template <typename T>
void PairBackward<T>::add_differences(Matrix<T> own, Matrix<T> points, int64_t j0, Matrix<H> h,
                                      int64_t first, A* sum) {
  constexpr int64_t W = Vec<A>::size, kRows = 16;
  const int64_t D = p_.depth(), n = h.rows, m = h.cols, stride = round_up(m, W);
  static thread_local Scratch storage;
  A* other = storage.get<A>(D * stride);  // coordinate by coordinate
  parallel_for(0, D, 1, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d)
      for (int64_t j = 0; j < stride; ++j)
        other[d * stride + j] = j < m ? A(*points.at(j0 + j, d)) : A(0);
  });
  parallel_for(0, ceil_div(n, kRows), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch row_storage;
    A* weights = row_storage.get<A>(kRows * stride);
    for (int64_t r0 = begin * kRows; r0 < std::min(end * kRows, n); r0 += kRows) {
      const int64_t count = std::min(kRows, n - r0);
      std::fill_n(weights, kRows * stride, A(0));
      if (h.col_stride == 1)
        for (int64_t r = 0; r < count; ++r) convert(h.at(r0 + r, 0), weights + r * stride, m);
      else
        transpose<A>(h.at(r0, 0), h.col_stride, m, count, weights, stride);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < D; ++d) {
          const Vec<A> point(A(*own.at(first + r0 + r, d)));
          const A *w = weights + r * stride, *coordinates = other + d * stride;
          Vec<A> total[2];
          for (int64_t j = 0, k = 0; j < stride; j += W, k ^= 1)
            total[k] += term(Vec<A>::load(w + j), point, Vec<A>::load(coordinates + j));
          sum[(first + r0 + r) * D + d] += reduce_sum(total[0] + total[1]);
        }
    }
  });
}

// ∂u/∂(own coordinate) of a pair times its h, without the 2 of squares.
template <typename T>
Vec<Acc<T>> PairBackward<T>::term(Vec<A> h, Vec<A> own, Vec<A> other) const {
  const Vec<A> zero(A(0));
  const auto none = h == zero;  // masked: the other point may be anything
  if (p_.pair.base == Base::kDot) return select(none, zero, h * other);
  const Vec<A> difference = own - other;
  if (p_.pair.base == Base::kSquared) return select(none, zero, h * difference);
  const Vec<A> sign = select(difference > zero, h, select(difference < zero, -h, zero));
  return select(is_nan(difference), select(none, zero, difference), sign);
}

// From the sums to the gradient: of squares, 2 (x Σ h − Σ h y) in moved coordinates.
template <typename T>
void PairBackward<T>::finish(Matrix<T> points, Side& side, T* out) {
  const int64_t D = p_.depth();
  const bool squared = p_.pair.base == Base::kSquared;
  parallel_for(0, points.rows, 64, [&](int64_t begin, int64_t end) {
    static thread_local Scratch moved;
    for (int64_t i = begin; i < end; ++i) {
      A* sum = side.sum + i * D;
      if (squared && p_.direct) {
        for (int64_t d = 0; d < D; ++d) sum[d] *= 2;
      } else if (squared) {
        const Matrix<T> point = p_.moved_rows(points, i, 1, moved);
        const A weight = side.weight[size_t(i)];
        for (int64_t d = 0; d < D; ++d)
          sum[d] = 2 * ((weight == 0 ? A(0) : weight * A(*point.at(0, d))) - sum[d]);
      }
      if constexpr (!std::is_same_v<T, A>) convert(sum, out + i * D, D);
    }
  });
}

template class PairBackward<double>;
template class PairBackward<float>;
template class PairBackward<bfloat16>;
template class PairBackward<half>;

}  // namespace weft
