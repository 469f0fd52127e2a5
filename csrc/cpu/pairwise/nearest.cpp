// Nearest rows:  indices_i = the first k columns j in the order of w_ij, a tie going to the lower
// j,
//                w_ij = ± (scale α_i β_j u_ij + bias_j),   values = f of the chosen pairs.
// Backward:      ∂v = g f'(v),  ∂u = ∂v scale α β,  ∂x_i += ∂u y_j | 2 ∂u (x_i − y_j) | ∂u sign(·)
//
// The forward is the search of search.h. Backward: ∂x by rows; ∂y by columns, the pairs in the
// order of a counting sort. No sum depends on the number of threads.
#include "common/segments.h"
#include "cpu/pairwise/search.h"

namespace weft {
namespace {

// ---- backward -----------------------------------------------------------------------------------

template <typename T>
struct Gradients {
  T *x, *y;
  Acc<T>*row_factor, *column_factor, *bias;  // null: there is none
};

// sum += du · (∂u/∂ the first of two rows)
template <typename T>
void add_row(Base base, Acc<T> du, const T* mine, int64_t my_stride, const T* other,
             int64_t other_stride, int64_t D, Acc<T>* sum) {
  using A = Acc<T>;
  for (int64_t d = 0; d < D; ++d) {
    const A a = A(mine[d * my_stride]), b = A(other[d * other_stride]);
    if (base == Base::kDot) {
      sum[d] += du * b;
    } else if (base == Base::kSquared) {
      sum[d] += 2 * du * (a - b);
    } else {
      sum[d] += a > b ? du : a < b ? -du : du * (a - b);  // 0, or NaN
    }
  }
}

template <typename T>
void backward(const ExactPairs<T>& pairs, const T* grad, const int64_t* indices, int64_t k,
              Gradients<T> out) {
  using A = Acc<T>;
  const Matrix<T>&x = pairs.x, &y = pairs.y;
  const Pair& pair = pairs.pair;
  const int64_t N = x.rows, M = y.rows, D = x.cols;
  static thread_local Scratch storage, order_storage, start_storage;
  A* du = storage.get<A>(2 * N * k);
  A* dv_u = du + N * k;  // ∂v scale u, of the factors
  std::vector<A> dv(pairs.bias ? size_t(N * k) : 0);
  const bool plain =
      pair.function == Function::kIdentity && !pairs.row_factor && !pairs.column_factor;
  parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
    static thread_local Scratch sums;
    A* sum = sums.get<A>(D);
    for (int64_t i = begin; i < end; ++i) {
      std::fill_n(sum, D, A(0));
      double of_factor = 0;
      for (int64_t e = i * k; e < (i + 1) * k; ++e) {
        const int64_t j = indices[e];
        du[e] = dv_u[e] = 0;
        if (j < 0) continue;
        double u = 0, slope = double(A(grad[e]));
        if (!plain) {
          u = pairs.base(i, j);
          slope *= exact_slope(pair, pairs.argument(i, j, u) + pair.shift);
        }
        if (pairs.bias) dv[size_t(e)] = A(slope);
        slope *= pair.scale;
        du[e] = A(slope * pairs.alpha(i) * pairs.beta(j));
        dv_u[e] = A(slope * u);
        of_factor += slope * pairs.beta(j) * u;
        add_row(pair.base, du[e], x.at(i, 0), x.col_stride, y.at(j, 0), y.col_stride, D, sum);
      }
      convert(sum, out.x + i * D, D);
      if (out.row_factor) out.row_factor[i] = A(of_factor);
    }
  });
  // The pairs of each column, in the order of their rows.
  const Segments columns(indices, N * k, M, order_storage, start_storage);
  parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    static thread_local Scratch sums;
    A* sum = sums.get<A>(D);
    for (int64_t j = begin; j < end; ++j) {
      std::fill_n(sum, D, A(0));
      double of_factor = 0, of_bias = 0;
      for (const int64_t* entry = columns.begin(j); entry < columns.end(j); ++entry) {
        const int64_t e = *entry, i = e / k;
        of_factor += double(dv_u[e]) * pairs.alpha(i);
        if (pairs.bias) of_bias += double(dv[size_t(e)]);
        add_row(pair.base, du[e], y.at(j, 0), y.col_stride, x.at(i, 0), x.col_stride, D, sum);
      }
      convert(sum, out.y + j * D, D);
      if (out.column_factor) out.column_factor[j] = A(of_factor);
      if (out.bias) out.bias[j] = A(of_bias);
    }
  });
}

// ---- registration -------------------------------------------------------------------------------

using Optional = std::optional<Tensor>;

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {data<T>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

Tensor contiguous(const Optional& t) { return torch::stable::contiguous(*t); }

void check(const Tensor& x, const Tensor& y, const Optional& row_factor,
           const Optional& column_factor, const Optional& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1),
                  "pairwise_select: x must be (N, D) and y (M, D)");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "pairwise_select: dtypes differ");
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto fits = [&](const Optional& t, int64_t n) {
    return !t || (t->scalar_type() == wide && t->numel() == n && t->dim() == 1);
  };
  STD_TORCH_CHECK(
      fits(row_factor, x.size(0)) && fits(column_factor, y.size(0)) && fits(bias, y.size(0)),
      "pairwise_select: factors and bias must be (N,) and (M,) in the dtype of sums");
}

struct Factors {
  Optional row_factor, column_factor, bias;

  Factors(const Optional& row, const Optional& column, const Optional& b) {
    if (row) row_factor = contiguous(row);
    if (column) column_factor = contiguous(column);
    if (b) bias = contiguous(b);
  }
  template <typename T>
  ExactPairs<T> pairs(const Pair& pair, const Tensor& x, const Tensor& y) const {
    const auto of = [](const Optional& t) { return t ? data<Acc<T>>(*t) : nullptr; };
    return {pair, matrix<T>(x), matrix<T>(y), of(row_factor), of(column_factor), of(bias)};
  }
};

std::tuple<Tensor, Tensor> pairwise_select(const Tensor& x, const Tensor& y,
                                           const Optional& row_factor,
                                           const Optional& column_factor, const Optional& bias,
                                           std::string base, std::string function, double scale,
                                           double shift, double parameter, const Optional& mask,
                                           const Optional& x_labels, const Optional& y_labels,
                                           bool same, bool off_diagonal, int64_t k, bool largest) {
  check(x, y, row_factor, column_factor, bias);
  STD_TORCH_CHECK(k >= 1, "pairwise_select: k must be >= 1");
  const Pair pair = pair_from(base, function, scale, shift, parameter);
  const bool falls = pair.function == Function::kExp ||
                     (pair.function == Function::kLogRatio && pair.parameter < 1);
  const int64_t N = x.size(0);
  Tensor values = torch::stable::new_empty(x, {N, k});
  Tensor indices = torch::stable::new_empty(x, {N, k}, ScalarType::Long);
  const PairMask allowed(mask, x_labels, y_labels, same, off_diagonal, N, y.size(0));
  const Factors factors(row_factor, column_factor, bias);
  with_float(x, [&](auto type) {
    using T = decltype(type);
    const auto pairs = factors.pairs<T>(pair, x, y);
    Search<T> found(pairs, allowed, k, largest != falls);
    if (largest) found.fill = -found.fill;
    found.run(mutable_data<T>(values), mutable_data<int64_t>(indices));
  });
  return {values, indices};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pairwise_select_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Optional& row_factor,
    const Optional& column_factor, const Optional& bias, std::string base, std::string function,
    double scale, double shift, double parameter, const Tensor& indices) {
  check(x, y, row_factor, column_factor, bias);
  const int64_t N = x.size(0), M = y.size(0), D = x.size(1);
  STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == N && indices.is_contiguous() &&
                      indices.scalar_type() == ScalarType::Long,
                  "pairwise_select_backward: indices must be (N, k) int64 and contiguous");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == N && grad.size(1) == indices.size(1) &&
                      grad.scalar_type() == x.scalar_type(),
                  "pairwise_select_backward: grad must be (N, k) in the dtype of x");
  const Tensor upstream = torch::stable::contiguous(grad);
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto empty = [&](const Optional& t, int64_t n) {
    return t ? torch::stable::new_empty(x, {n}, wide) : torch::stable::new_empty(x, {0});
  };
  Tensor grad_x = torch::stable::new_empty(x, {N, D}), grad_y = torch::stable::new_empty(x, {M, D});
  Tensor grad_row = empty(row_factor, N), grad_column = empty(column_factor, M);
  Tensor grad_bias = empty(bias, M);
  const Factors factors(row_factor, column_factor, bias);
  const Pair pair = pair_from(base, function, scale, shift, parameter);
  with_float(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const auto of = [](const Optional& t, const Tensor& result) {
      return t ? mutable_data<A>(result) : nullptr;
    };
    backward<T>(factors.pairs<T>(pair, x, y), data<T>(upstream), data<int64_t>(indices),
                indices.size(1),
                {mutable_data<T>(grad_x), mutable_data<T>(grad_y), of(row_factor, grad_row),
                 of(column_factor, grad_column), of(bias, grad_bias)});
  });
  return {grad_x, grad_y, grad_row, grad_column, grad_bias};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "pairwise_select(Tensor x, Tensor y, Tensor? row_factor, Tensor? column_factor, "
      "Tensor? bias, str base, str function, float scale, float shift, float parameter, "
      "Tensor? mask, Tensor? x_labels, Tensor? y_labels, bool same, bool off_diagonal, SymInt k, "
      "bool largest) -> (Tensor, Tensor)");
  m.def(
      "pairwise_select_backward(Tensor grad, Tensor x, Tensor y, Tensor? row_factor, "
      "Tensor? column_factor, Tensor? bias, str base, str function, float scale, float shift, "
      "float parameter, Tensor indices) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("pairwise_select", TORCH_BOX(&pairwise_select));
  m.impl("pairwise_select_backward", TORCH_BOX(&pairwise_select_backward));
}

}  // namespace weft
