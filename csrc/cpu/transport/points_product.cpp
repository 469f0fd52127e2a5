// Products with e_ij = e^((f_i + g_j − c_ij) / ε), tile by tile, and all derivatives of
// Q = Σ_ij e_ij ⟨L_i, R_j⟩. With W_ij = e_ij ⟨L_i, R_j⟩ and of each row i
//
//   Σ_j e_ij R_j,   Σ_j W_ij,   Σ_j W_ij (f_i + g_j − c_ij) / ε,   Σ_j W'_ij y_j,   Σ_j W'_ij
//
// where W' is W, for distances W / c. The columns' sums are those of the rows with x and y in each
// other's place: computed twice, they need neither atomics nor an order of blocks.
#include <cmath>
#include <limits>

#include "common/math.h"
#include "cpu/transport/points.h"

namespace weft {
namespace {

constexpr int64_t kNarrow = 4;  // values for each point, summed without a product

// One side: for the rows of one problem. Null results are not computed.
template <typename T>
struct Sums {
  T* product;    // (n, E)
  T* weights;    // (n), Σ W
  T* exponents;  // (n), Σ W (f + g − c) / ε
  T* points;     // (n, D), Σ W' (x_i − y_j), or Σ W y_j of inner products
};

template <typename T>
struct Side {
  using Tiles = PointTiles<T>;
  static constexpr int64_t W = Vec<T>::size, kColumns = Tiles::kColumns, kRows = Tiles::kRows;
  static constexpr T kLargest = sizeof(T) == 4 ? T(80) : T(700);

  int64_t E;
  const T* f;              // of the rows
  const T* g;              // padded
  const T* right;          // R (m, E)
  const T* right_columns;  // R transposed and padded, (E, room), of few values
  const T* left;           // L (n, E), or null: then only products
  int64_t room;

  bool narrow() const { return E <= kNarrow; }
  // Of a tile: costs or W, e, and ⟨L, R⟩ of wide values; sums of a block of rows.
  static int64_t scratch(int64_t D, int64_t E) {
    return kRows * (3 * kColumns + round_up(E, W) + round_up(D, W) + 3);
  }

  void run(const Tiles& p, const typename Tiles::Rows& rows, T* memory, const Sums<T>& out) const {
    const int64_t D = p.depth();
    T* tile = memory;
    T* e = tile + kRows * kColumns;
    T* inner = e + kRows * kColumns;
    T* product = inner + kRows * kColumns;
    T* points = product + kRows * round_up(E, W);
    T* weight = points + kRows * round_up(D, W);
    T *exponent = weight + kRows, *pulled = exponent + kRows;
    std::fill_n(product, rows.count * E, T(0));
    std::fill_n(weight, 3 * kRows, T(0));
    if (p.columns() == 0 || p.direct()) std::fill_n(points, rows.count * D, T(0));
    for (int64_t j = 0; j < p.columns(); j += kColumns) {
      const int64_t m = std::min(kColumns, p.columns() - j);
      p.costs(rows, j, m, tile);
      if (left && !narrow())
        gemm(row_major(left + rows.first * E, rows.count, E),
             row_major(right + j * E, m, E).transposed(), inner, kColumns);
      for (int64_t r = 0; r < rows.count; ++r)
        row(p, rows.first + r, j, m, tile + r * kColumns, e + r * kColumns, inner + r * kColumns,
            product + r * E, weight + r, exponent + r, pulled + r);
      if (!narrow())
        gemm(row_major(e, rows.count, m, kColumns), row_major(right + j * E, m, E), product, E,
             true);
      if (left && p.direct())
        differences(p, rows, j, m, tile, points);
      else if (left)
        gemm(row_major(tile, rows.count, m, kColumns), p.y.block(j, 0, m, D), points, D, j > 0);
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t i = rows.first + r;
      std::copy_n(product + r * E, E, out.product + i * E);
      if (!left) continue;
      out.weights[i] = weight[r], out.exponents[i] = exponent[r];
      for (int64_t d = 0; d < D; ++d) {
        const T moved = points[r * D + d];
        const bool done = p.direct() || p.cost == PointCost::kDot;
        out.points[i * D + d] = done ? moved : pulled[r] * *p.x.at(i, d) - moved;
      }
    }
  }

  // Σ_j W'_ij (x_i − y_j) of a tile, for few coordinates: x_i Σ W' − Σ W' y_j would lose digits.
  static void differences(const Tiles& p, const typename Tiles::Rows& rows, int64_t j0, int64_t m,
                          const T* weights, T* points) {
    const int64_t D = p.depth();
    for (int64_t r = 0; r < rows.count; ++r)
      for (int64_t d = 0; d < D; ++d) {
        const T* columns = p.coordinates(j0) + d * kColumns;
        const Vec<T> point(rows.coordinates[r * D + d]);
        Vec<T> sum;
        for (int64_t j = 0; j < m; j += W)
          sum =
              fma(Vec<T>::load(weights + r * kColumns + j), point - Vec<T>::load(columns + j), sum);
        points[r * D + d] += reduce_sum(sum);
      }
  }

  // Of one row of a tile: c becomes W'.
  void row(const Tiles& p, int64_t i, int64_t j0, int64_t m, T* c, T* e, const T* inner, T* product,
           T* weight, T* exponent, T* pulled) const {
    const T of_row = f[i];
    if (of_row == -std::numeric_limits<T>::infinity()) {
      std::fill_n(c, round_up(m, W), T(0));
      std::fill_n(e, round_up(m, W), T(0));
      return;
    }
    const Vec<T> row_f(of_row), inverse(T(1) / p.epsilon), largest(kLargest), zero(T(0));
    const Vec<T> none(-std::numeric_limits<T>::infinity());
    const bool distance = p.cost == PointCost::kDistance;
    Vec<T> sums[kNarrow], of_weight, of_exponent, of_pulled;
    for (int64_t j = 0; j < m; j += W) {
      const Vec<T> cost = Vec<T>::load(c + j);
      const Vec<T> v = ((Vec<T>::load(g + j0 + j) + row_f) - cost) * inverse;
      const Vec<T> power = exp_or_zero(min(largest, v));
      if (narrow()) {
        Vec<T> dot;
        for (int64_t k = 0; k < E; ++k) {
          const Vec<T> value = Vec<T>::load(right_columns + k * room + j0 + j);
          sums[k] = fma(power, value, sums[k]);
          if (left) dot = fma(Vec<T>(left[i * E + k]), value, dot);
        }
        if (!left) continue;
        const Vec<T> w = power * dot;
        of_weight += w;
        of_exponent += select(v == none, zero, w * v);
        const Vec<T> w_over = distance ? select(cost > zero, w / cost, zero) : w;
        of_pulled += w_over;
        w_over.store(c + j);
      } else {
        power.store(e + j);
        if (!left) continue;
        const Vec<T> w = power * load_first<T>(inner + j, std::min(W, m - j));
        of_weight += w;
        of_exponent += select(v == none, zero, w * v);
        const Vec<T> w_over = distance ? select(cost > zero, w / cost, zero) : w;
        of_pulled += w_over;
        w_over.store(c + j);
      }
    }
    if (narrow())
      for (int64_t k = 0; k < E; ++k) product[k] += reduce_sum(sums[k]);
    *weight += reduce_sum(of_weight);
    *exponent += reduce_sum(of_exponent);
    *pulled += reduce_sum(of_pulled);
  }
};

// Runs one side of all problems; the results are (B, n, ...), 0 beyond the lengths.
template <typename T>
void run_side(const PointArguments& arguments, bool swapped, const Tensor& f, const Tensor& g,
              const Tensor& right, const Tensor* left, const Sums<T>& out) {
  using Tiles = PointTiles<T>;
  const int64_t B = arguments.B, D = arguments.D, E = right.size(2);
  const int64_t n = f.size(1), m = g.size(1), room = round_up(m, Tiles::kColumns);
  auto problems = arguments.problems<T>(swapped);
  std::vector<int64_t> real;
  for (const auto& p : problems) real.push_back(p.columns());
  const auto potentials = padded(data<T>(g), B, m, real, -std::numeric_limits<T>::infinity());
  std::vector<T> columns;
  for (int64_t k = 0; k < E && E <= kNarrow; ++k) {
    const auto one = padded(data<T>(right) + k, B, m, real, T(0), E);
    columns.insert(columns.end(), one.begin(), one.end());
  }
  std::fill_n(out.product, B * n * E, T(0));
  if (left) {
    std::fill_n(out.weights, B * n, T(0));
    std::fill_n(out.exponents, B * n, T(0));
    std::fill_n(out.points, B * n * D, T(0));
  }
  for_each_rows(problems, Side<T>::scratch(D, E),
                [&](const Tiles& p, int64_t b, const typename Tiles::Rows& rows, T* memory) {
                  const Side<T> side{E,
                                     data<T>(f) + b * n,
                                     potentials.data() + b * room,
                                     data<T>(right) + b * m * E,
                                     columns.data() + b * room,
                                     left ? data<T>(*left) + b * n * E : nullptr,
                                     B * room};
                  Sums<T> here{out.product + b * n * E, nullptr, nullptr, nullptr};
                  if (left)
                    here.weights = out.weights + b * n, here.exponents = out.exponents + b * n,
                    here.points = out.points + b * n * D;
                  side.run(p, rows, memory, here);
                });
}

Tensor points_product(const Tensor& x, const Tensor& y, const Tensor& epsilon,
                      const OptionalTensor& rows, const OptionalTensor& columns, std::string cost,
                      std::string, const Tensor& f, const Tensor& g, const Tensor& values) {
  const PointArguments arguments(x, y, epsilon, rows, columns, cost);
  const Tensor of_rows = arguments.like(f, arguments.N, "f");
  const Tensor of_columns = arguments.like(g, arguments.M, "g");
  const Tensor right = arguments.like(values, arguments.M, "values");
  Tensor out = torch::stable::new_empty(x, {arguments.B, arguments.N, right.size(2)});
  with_wide(x, [&](auto type) {
    using T = decltype(type);
    run_side<T>(arguments, false, of_rows, of_columns, right, nullptr,
                {mutable_data<T>(out), nullptr, nullptr, nullptr});
  });
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients points_product_backward(const Tensor& x, const Tensor& y, const Tensor& epsilon,
                                  const OptionalTensor& rows, const OptionalTensor& columns,
                                  std::string cost, std::string, const Tensor& f, const Tensor& g,
                                  const Tensor& right, const Tensor& left) {
  const PointArguments arguments(x, y, epsilon, rows, columns, cost);
  const int64_t B = arguments.B, N = arguments.N, M = arguments.M, D = arguments.D;
  const Tensor of_rows = arguments.like(f, N, "f"), of_columns = arguments.like(g, M, "g");
  const Tensor R = arguments.like(right, M, "right"), L = arguments.like(left, N, "left");
  STD_TORCH_CHECK(R.size(2) == L.size(2), "weft: left and right must have as many values");
  const int64_t E = R.size(2);
  const auto empty = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(x, std::vector<int64_t>(sizes));
  };
  Tensor grad_x = empty({B, N, D}), grad_y = empty({B, M, D}), grad_epsilon = empty({B});
  Tensor grad_f = empty({B, N}), grad_g = empty({B, M});
  Tensor grad_right = empty({B, M, E}), grad_left = empty({B, N, E});
  with_wide(x, [&](auto type) {
    using T = decltype(type);
    std::vector<T> of_x(size_t(B * N)), of_y(size_t(B * M));
    run_side<T>(arguments, false, of_rows, of_columns, R, &L,
                {mutable_data<T>(grad_left), mutable_data<T>(grad_f), of_x.data(),
                 mutable_data<T>(grad_x)});
    run_side<T>(arguments, true, of_columns, of_rows, L, &R,
                {mutable_data<T>(grad_right), mutable_data<T>(grad_g), of_y.data(),
                 mutable_data<T>(grad_y)});
    for (int64_t b = 0; b < B; ++b) {
      const T eps = data<T>(epsilon)[b * epsilon.stride(0)];
      // ∂c/∂x is −y of inner products, twice the difference of squares.
      const T factor = (cost == "sqeuclidean" ? T(-2) : cost == "euclidean" ? T(-1) : T(1)) / eps;
      double total = 0;
      for (int64_t i = 0; i < N; ++i) total += double(of_x[size_t(b * N + i)]);
      mutable_data<T>(grad_epsilon)[b] = T(-total / double(eps));
      const auto scale = [&](const Tensor& t, int64_t count, T by) {
        T* values = mutable_data<T>(t) + b * count;
        for (int64_t k = 0; k < count; ++k) values[k] *= by;
      };
      scale(grad_x, N * D, factor), scale(grad_y, M * D, factor);
      scale(grad_f, N, 1 / eps), scale(grad_g, M, 1 / eps);
    }
  });
  return {grad_x, grad_y, grad_epsilon, grad_f, grad_g, grad_right, grad_left};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("points_product(" WEFT_POINTS_SCHEMA ", Tensor f, Tensor g, Tensor values) -> Tensor");
  m.def("points_product_backward(" WEFT_POINTS_SCHEMA
        ", Tensor f, Tensor g, Tensor right, Tensor left) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("points_product", TORCH_BOX(&points_product));
  m.impl("points_product_backward", TORCH_BOX(&points_product_backward));
}

}  // namespace weft
