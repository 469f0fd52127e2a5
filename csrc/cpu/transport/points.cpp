// The definitions of points.h, compiled once for each element type, and the matrix of costs itself.
#include "cpu/transport/points.h"

#include <algorithm>
#include <cmath>

namespace weft {
namespace {

template <typename T>
T square_of(Matrix<T> points, int64_t i) {
  if (points.col_stride == 1) return sum_of_squares(points.at(i, 0), points.cols);
  T total = 0;
  for (int64_t d = 0; d < points.cols; ++d) total += *points.at(i, d) * *points.at(i, d);
  return total;
}

}  // namespace

template <typename T>
void PointTiles<T>::prepare(int64_t first) const {
  const int64_t count = std::min(kColumns, columns() - first);
  const Matrix<T> part = y.block(first, 0, count, depth());
  if (direct()) {
    // Coordinate d of every column of the block in row d; 0 beyond the last column.
    T* to = memory_ + first * depth();
    for (int64_t d = 0; d < depth(); ++d)
      for (int64_t j = 0; j < kColumns; ++j)
        to[d * kColumns + j] = j < count ? *part.at(j, d) : T(0);
    return;
  }
  PackedRight<T>(part.transposed(), memory_ + first * depth());
  T* of = squares() + first;
  for (int64_t j = 0; j < kColumns; ++j)
    of[j] = j < count && cost != PointCost::kDot ? square_of(part, j) : T(0);
}

template <typename T>
auto PointTiles<T>::prepare_rows(int64_t first, int64_t count, Scratch& storage) const -> Rows {
  const Matrix<T> part = x.block(first, 0, count, depth());
  if (direct()) {
    T* to = storage.get<T>(round_up(count, 4) * depth());
    for (int64_t r = 0; r < round_up(count, 4); ++r)
      for (int64_t d = 0; d < depth(); ++d) to[r * depth() + d] = r < count ? *part.at(r, d) : T(0);
    return {first, count, to, std::nullopt, nullptr};
  }
  const int64_t size = round_up(PackedLeft<T>::size(count, depth()), 16);
  T* memory = storage.get<T>(size + count);
  const PackedLeft<T> left(part, memory);
  for (int64_t r = 0; r < count && cost != PointCost::kDot; ++r)
    memory[size + r] = square_of(part, r);
  return {first, count, nullptr, left, memory + size};
}

template <typename T>
void PointTiles<T>::costs(const Rows& rows, int64_t first, int64_t count, T* out) const {
  const int64_t full = round_up(count, W);
  if (direct()) {
    differences(rows, first, count, out);
    for (int64_t r = 0; r < rows.count && cost == PointCost::kDistance; ++r)
      for (int64_t j = 0; j < full; j += W)
        sqrt(Vec<T>::load(out + r * kColumns + j)).store(out + r * kColumns + j);
    return;
  }
  const PackedRight<T> right(memory_ + first * depth(), depth(), count);
  gemm(*rows.left, right, out, kColumns);
  for (int64_t r = 0; r < rows.count; ++r) from_product(rows, r, first, count, out + r * kColumns);
}

// From inner products to costs, one row.
template <typename T>
void PointTiles<T>::from_product(const Rows& rows, int64_t r, int64_t first, int64_t count,
                                 T* u) const {
  if (cost == PointCost::kDot) {
    const Vec<T> constant(shift);
    for (int64_t j = 0; j < count; j += W)
      (constant - load_first<T>(u + j, std::min(W, count - j))).store(u + j);
    return;
  }
  // Below this part of ‖x‖² + ‖y‖² seven bits are lost.
  const Vec<T> close(T(1) / 128), two(T(2)), row(rows.squares[r]);
  const T* of_columns = squares() + first;
  for (int64_t j = 0; j < count; j += W) {
    const int64_t n = std::min(W, count - j);
    const Vec<T> sum = row + Vec<T>::load(of_columns + j);
    const Vec<T> distance = sum - two * load_first<T>(u + j, n);
    distance.store(u + j);
    if (!all(distance > close * sum)) [[unlikely]] {
      for (int64_t k = 0; k < n; ++k)
        if (!(u[j + k] > T(1) / 128 * (rows.squares[r] + of_columns[j + k])))
          u[j + k] = exactly(rows.first + r, first + j + k);
      for (int64_t k = n; k < W; ++k) u[j + k] = 0;
    }
    if (cost == PointCost::kDistance) sqrt(Vec<T>::load(u + j)).store(u + j);
  }
}

template <typename T>
[[gnu::noinline]] T PointTiles<T>::exactly(int64_t i, int64_t j) const {
  if (x.col_stride == 1 && y.col_stride == 1) {
    const T *a = x.at(i, 0), *b = y.at(j, 0);
    return sum_terms<T>(depth(), [&](int64_t d, int64_t n, Vec<T> sum) {
      const Vec<T> difference = load_first<T>(a + d, n) - load_first<T>(b + d, n);
      return fma(difference, difference, sum);
    });
  }
  T total = 0;
  for (int64_t d = 0; d < depth(); ++d) {
    const T difference = *x.at(i, d) - *y.at(j, d);
    total += difference * difference;
  }
  return total;
}

// Rows four at a time, two vectors of columns: each coordinate of y is read once for four pairs.
template <typename T>
void PointTiles<T>::differences(const Rows& rows, int64_t first, int64_t count, T* out) const {
  constexpr int64_t kVectors = 2;
  const int64_t D = depth();
  const T* block = memory_ + first * D;
  for (int64_t r = 0; r < rows.count; r += 4) {
    const T* four = rows.coordinates + r * D;
    const int64_t n = std::min<int64_t>(4, rows.count - r);
    for (int64_t j = 0; j < count; j += kVectors * W) {
      Vec<T> sum[4][kVectors];
      for (int64_t d = 0; d < D; ++d)
#pragma GCC unroll 2
        for (int64_t k = 0; k < kVectors; ++k) {
          const Vec<T> value = Vec<T>::load(block + d * kColumns + j + k * W);
#pragma GCC unroll 4
          for (int64_t i = 0; i < 4; ++i) {
            const Vec<T> difference = Vec<T>(four[i * D + d]) - value;
            sum[i][k] = fma(difference, difference, sum[i][k]);
          }
        }
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i)
        for (int64_t k = 0; k < kVectors; ++k)
          if (i < n) sum[i][k].store(out + (r + i) * kColumns + j + k * W);
    }
  }
}

PointArguments::PointArguments(const Tensor& x, const Tensor& y, const Tensor& epsilon,
                               const OptionalTensor& rows, const OptionalTensor& columns,
                               const std::string& cost)
    : x(x), y(y), epsilon(epsilon) {
  const bool known =
      cost == "sqeuclidean" || cost == "euclidean" || cost == "cosine" || cost == "dot";
  STD_TORCH_CHECK(known, "weft: unknown cost ", cost);
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) &&
                      x.size(2) == y.size(2) && x.scalar_type() == y.scalar_type(),
                  "weft: x and y must be (B, N, D) and (B, M, D) of one dtype");
  B = x.size(0), N = x.size(1), M = y.size(1), D = x.size(2);
  STD_TORCH_CHECK(
      epsilon.dim() == 1 && epsilon.size(0) == B && epsilon.scalar_type() == x.scalar_type(),
      "weft: epsilon must be (B) in the dtype of x");
  cosine_ = cost == "cosine";
  cost_ = cost == "sqeuclidean" ? PointCost::kSquared
          : cost == "euclidean" ? PointCost::kDistance
                                : PointCost::kDot;
  rows_ = lengths(rows), columns_ = lengths(columns);
}

OptionalTensor PointArguments::lengths(const OptionalTensor& t) const {
  if (!t) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == B && t->scalar_type() == ScalarType::Long,
                  "weft: lengths must be (B) int64");
  return torch::stable::contiguous(*t);
}

Tensor PointArguments::like(const Tensor& t, int64_t count, const char* name) const {
  STD_TORCH_CHECK((t.dim() == 2 || t.dim() == 3) && t.size(0) == B && t.size(1) == count &&
                      t.scalar_type() == x.scalar_type(),
                  "weft: ", name, " must have one entry for each point, in the dtype of x");
  return torch::stable::contiguous(t);
}

template <typename T>
std::vector<PointTiles<T>> PointArguments::problems(bool swapped) const {
  std::vector<PointTiles<T>> all(static_cast<size_t>(B));
  const auto part = [](const Tensor& t, int64_t b, int64_t n) {
    return Matrix<T>{data<T>(t) + b * t.stride(0), n, t.size(2), t.stride(1), t.stride(2)};
  };
  for (int64_t b = 0; b < B; ++b) {
    // What lies outside of x and y, where values are not checked, does not exist.
    const int64_t n = rows_ ? std::clamp<int64_t>(data<int64_t>(*rows_)[b], 0, N) : N;
    const int64_t m = columns_ ? std::clamp<int64_t>(data<int64_t>(*columns_)[b], 0, M) : M;
    auto& p = all[size_t(b)];
    p.x = part(x, b, n), p.y = part(y, b, m);
    if (swapped) std::swap(p.x, p.y);
    p.cost = cost_;
    p.shift = T(cosine_ ? 1 : 0);
    p.epsilon = data<T>(epsilon)[b * epsilon.stride(0)];
  }
  return all;
}

template class PointTiles<float>;
template class PointTiles<double>;
template std::vector<PointTiles<float>> PointArguments::problems<float>(bool) const;
template std::vector<PointTiles<double>> PointArguments::problems<double>(bool) const;

namespace {

Tensor points_cost(const Tensor& x, const Tensor& y, std::string cost) {
  const Tensor epsilon = torch::stable::new_empty(x, {x.size(0)});  // not looked at
  const PointArguments arguments(x, y, epsilon, std::nullopt, std::nullopt, cost);
  const int64_t N = arguments.N, M = arguments.M;
  Tensor out = torch::stable::new_empty(x, {arguments.B, N, M});
  with_wide(x, [&](auto type) {
    using T = decltype(type);
    using Tiles = PointTiles<T>;
    T* to = mutable_data<T>(out);
    auto problems = arguments.problems<T>(false);
    for_each_rows(problems, Tiles::kRows * Tiles::kColumns,
                  [&](const Tiles& p, int64_t b, const typename Tiles::Rows& rows, T* tile) {
                    for (int64_t j = 0; j < M; j += Tiles::kColumns) {
                      const int64_t m = std::min(Tiles::kColumns, M - j);
                      p.costs(rows, j, m, tile);
                      for (int64_t r = 0; r < rows.count; ++r)
                        std::copy_n(tile + r * Tiles::kColumns, m,
                                    to + (b * N + rows.first + r) * M + j);
                    }
                  });
  });
  return out;
}

}  // namespace

WEFT_CPU_SCHEMAS(m) { m.def("points_cost(Tensor x, Tensor y, str cost) -> Tensor"); }
WEFT_CPU_KERNELS(m) { m.impl("points_cost", TORCH_BOX(&points_cost)); }

}  // namespace weft
