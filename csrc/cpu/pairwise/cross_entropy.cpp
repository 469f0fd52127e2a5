// Cross entropies over all pairs:  loss = Σ_i a_i (lse_i − t_i), and the same of columns, of the
// logits that cross_entropy.h defines;  ∂L/∂s_ij = a_i (p_ij − T_ij) + the same of columns.
//
// Without a gradient:  for chunks of columns, packed once > groups of rows > tiles in cache:
//   running maximum and sum of every row; of every column, those of the group's tiles, then merged.
// With the gradient in the forward:  for blocks of rows whose whole rows of logits fit a buffer:
//   V = X Yᵀ, the rows' sums (of columns too: the block is then all rows), V becomes the weights H
//   ∂X += H Y,  ∂Y += Hᵀ X      (three products in all)
// Backward:  scales what the forward kept, or computes the tiles again (gradients.h; four
// products).
#include "cpu/pairwise/cross_entropy_passes.h"

namespace weft {
namespace {

// ---- registration -------------------------------------------------------------------------------

using Optional = std::optional<Tensor>;

template <typename T>
const T* data_or_null(const Optional& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

struct Inputs {
  const Tensor &x, &y;
  const Optional &factor, &bias;
  const Tensor& target;
  const Optional &column_labels, &mask, &positives;
  const Tensor& row_share;
  const Optional &column_share, &row_weight, &column_weight;
  double scale, softcap, margin, uniform;
  bool sigmoid, exclude_diagonal;

  void check() const {
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) &&
                        x.scalar_type() == y.scalar_type(),
                    "cross_entropy: x must be (N, D) and y (M, D) of one dtype");
    const int64_t N = x.size(0), M = y.size(0);
    const auto wide =
        x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const auto vector = [&](const Tensor& t, int64_t n, ScalarType type) {
      STD_TORCH_CHECK(t.numel() == n && t.scalar_type() == type && t.is_contiguous(),
                      "cross_entropy: a vector has another size, dtype or stride");
    };
    const auto pairs = [&](const Optional& t) {
      STD_TORCH_CHECK(!t || (t->dim() == 2 && t->size(0) == N && t->size(1) == M &&
                             t->scalar_type() == ScalarType::Bool),
                      "cross_entropy: mask and positives must be (N, M) bool");
    };
    vector(target, N, ScalarType::Long), vector(row_share, N, wide);
    if (column_labels) vector(*column_labels, M, ScalarType::Long);
    if (factor) vector(*factor, 1, wide);
    if (bias) vector(*bias, M, wide);
    if (column_share) vector(*column_share, M, wide);
    if (row_weight) vector(*row_weight, N, wide);
    if (column_weight) vector(*column_weight, M, wide);
    pairs(mask), pairs(positives);
    STD_TORCH_CHECK(!column_share || (uniform == 0 && !sigmoid),
                    "cross_entropy: columns go with neither smoothing nor sigmoid");
    STD_TORCH_CHECK(!row_weight || column_share.has_value() == column_weight.has_value(),
                    "cross_entropy: columns need weights where rows have them");
  }

  template <typename T, typename A = Acc<T>>
  PairTiles<T> tiles(const A* row_factor = nullptr) const {
    Pair pair;
    pair.scale = scale * (factor && !row_factor ? double(*data<A>(*factor)) : 1.0);
    const auto matrix = [](const Tensor& t) {
      return Matrix<T>{data<T>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
    };
    return {pair, matrix(x), matrix(y), row_factor, nullptr, data_or_null<A>(bias), false};
  }
  template <typename A>
  PairTargets<A> targets() const {
    const auto pairs = [](const Optional& t) {
      return t ? BoolMatrix{data<bool>(*t), t->stride(0), t->stride(1)} : BoolMatrix{};
    };
    return {data<int64_t>(target),
            data_or_null<int64_t>(column_labels),
            pairs(mask),
            pairs(positives),
            data<A>(row_share),
            data_or_null<A>(column_share),
            A(softcap),
            A(margin),
            A(uniform),
            sigmoid,
            exclude_diagonal};
  }
};

Tensor wide_empty(const Tensor& x, std::initializer_list<int64_t> shape) {
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(x, shape, wide);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results pairwise_cross_entropy(const Tensor& x, const Tensor& y, const Optional& factor,
                               const Optional& bias, const Tensor& target,
                               const Optional& column_labels, const Optional& mask,
                               const Optional& positives, const Tensor& row_share,
                               const Optional& column_share, const Optional& row_weight,
                               const Optional& column_weight, double scale, double softcap,
                               double margin, double uniform, bool sigmoid, bool exclude_diagonal,
                               bool save) {
  const Inputs in{x,     y,         factor,    bias,         target,     column_labels,
                  mask,  positives, row_share, column_share, row_weight, column_weight,
                  scale, softcap,   margin,    uniform,      sigmoid,    exclude_diagonal};
  in.check();
  STD_TORCH_CHECK(!save || row_weight, "cross_entropy: a saved gradient needs weights");
  const int64_t N = x.size(0), M = y.size(0), D = x.size(1), C = column_share ? M : 0;
  Tensor loss = wide_empty(x, {}), row_lse = wide_empty(x, {N}), row_target = wide_empty(x, {N});
  Tensor column_lse = wide_empty(x, {C}), column_target = wide_empty(x, {C});
  Tensor saved_x = save ? wide_empty(x, {N, D}) : wide_empty(x, {0});
  Tensor saved_y = save ? wide_empty(x, {M, D}) : wide_empty(x, {0});
  Tensor saved_factor = save && factor ? wide_empty(x, {}) : wide_empty(x, {0});
  Tensor saved_bias = wide_empty(x, {save && bias ? M : 0});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const PairTiles<T> tiles = in.template tiles<T>();
    const PairTargets<A> of = in.template targets<A>();
    Sums<A> sums{std::vector<RowSums<A>>(size_t(N)), std::vector<RowSums<A>>(size_t(C))};
    const A *a = data_or_null<A>(row_weight), *b = data_or_null<A>(column_weight);
    if (save)
      sums_and_gradients(tiles, of, a, b, data_or_null<A>(factor), sums,
                         Kept<A>{mutable_data<A>(saved_x), mutable_data<A>(saved_y),
                                 factor ? mutable_data<A>(saved_factor) : nullptr,
                                 bias ? mutable_data<A>(saved_bias) : nullptr});
    else
      tile_sums(tiles, of, sums);
    double total = 0;
    const auto finish = [&](const std::vector<RowSums<A>>& side, const A* share, const A* weight,
                            Tensor& lse, Tensor& t) {
      for (size_t i = 0; i < side.size(); ++i) {
        mutable_data<A>(lse)[i] = side[i].lse(sigmoid);
        mutable_data<A>(t)[i] = side[i].target(share[i]);
        if (weight && weight[i] != 0) total += double(weight[i]) * side[i].loss(sigmoid, share[i]);
      }
    };
    finish(sums.rows, of.row_share, a, row_lse, row_target);
    finish(sums.columns, of.column_share, b, column_lse, column_target);
    *mutable_data<A>(loss) = A(total);
  });
  return {loss,    row_lse, row_target,   column_lse, column_target,
          saved_x, saved_y, saved_factor, saved_bias};
}

template <typename A>
std::vector<A> upstream(const Optional& loss, const Optional& weight, const Optional& own,
                        int64_t n, A sign) {
  std::vector<A> result(static_cast<size_t>(n), A(0));
  for (size_t i = 0; i < size_t(n); ++i)
    result[i] = loss                    ? sign * *data<A>(*loss) * data<A>(*weight)[i]
                : own->const_data_ptr() ? data<A>(*own)[int64_t(i) * own->stride(0)]
                                        : A(0);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_cross_entropy_backward(
    const Tensor& x, const Tensor& y, const Optional& factor, const Optional& bias,
    const Tensor& target, const Optional& column_labels, const Optional& mask,
    const Optional& positives, const Tensor& row_share, const Optional& column_share,
    const Optional& row_weight, const Optional& column_weight, double scale, double softcap,
    double margin, double uniform, bool sigmoid, bool exclude_diagonal, const Tensor& row_lse,
    const Tensor& column_lse, const Tensor& saved_x, const Tensor& saved_y,
    const Tensor& saved_factor, const Tensor& saved_bias, const Optional& grad_loss,
    const Optional& grad_row_lse, const Optional& grad_row_target, const Optional& grad_column_lse,
    const Optional& grad_column_target) {
  const Inputs in{x,     y,         factor,    bias,         target,     column_labels,
                  mask,  positives, row_share, column_share, row_weight, column_weight,
                  scale, softcap,   margin,    uniform,      sigmoid,    exclude_diagonal};
  in.check();
  const int64_t N = x.size(0), M = y.size(0), D = x.size(1);
  const bool of_columns = column_share.has_value(), saved = saved_x.dim() == 2;
  STD_TORCH_CHECK(grad_loss ? row_weight.has_value() : grad_row_lse && grad_row_target,
                  "cross_entropy: the upstream gradient is of the loss or of the rows");
  STD_TORCH_CHECK(!saved || grad_loss, "cross_entropy: a saved gradient is that of the loss");
  STD_TORCH_CHECK(row_lse.numel() == N && (!of_columns || column_lse.numel() == M),
                  "cross_entropy: lse must be (N,) and (M,)");
  Tensor grad_x = torch::stable::new_empty(x, {N, D}), grad_y = torch::stable::new_empty(y, {M, D});
  Tensor grad_factor = factor ? wide_empty(x, {}) : wide_empty(x, {0});
  Tensor grad_bias = wide_empty(x, {bias ? M : 0});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    if (saved) {
      const A g = *data<A>(*grad_loss);
      const auto scaled = [g](const A* from, auto* to, int64_t n) {
        using To = std::remove_pointer_t<decltype(to)>;
        constexpr int64_t kBlock = 4096;
        parallel_for(0, ceil_div(n, kBlock), 1, [&](int64_t begin, int64_t end) {
          for (int64_t k = begin * kBlock; k < std::min(end * kBlock, n); ++k)
            to[k] = To(g * from[k]);
        });
      };
      scaled(data<A>(saved_x), mutable_data<T>(grad_x), N * D);
      scaled(data<A>(saved_y), mutable_data<T>(grad_y), M * D);
      if (factor) scaled(data<A>(saved_factor), mutable_data<A>(grad_factor), 1);
      if (bias) scaled(data<A>(saved_bias), mutable_data<A>(grad_bias), M);
      return;
    }
    const auto row_p = upstream<A>(grad_loss, row_weight, grad_row_lse, N, 1);
    const auto row_t = upstream<A>(grad_loss, row_weight, grad_row_target, N, -1);
    const int64_t C = of_columns ? M : 0;
    const auto column_p = upstream<A>(grad_loss, column_weight, grad_column_lse, C, 1);
    const auto column_t = upstream<A>(grad_loss, column_weight, grad_column_target, C, -1);
    const PairUpstream<A> up{data<A>(row_lse),
                             nullptr,
                             data<A>(column_lse),
                             nullptr,
                             row_p.data(),
                             row_t.data(),
                             of_columns ? column_p.data() : nullptr,
                             of_columns ? column_t.data() : nullptr};
    const PairTargets<A> of = in.template targets<A>();
    const std::vector<A> factors(size_t(factor ? N : 0), factor ? *data<A>(*factor) : A(1));
    std::vector<A> of_factors(size_t(factor ? N : 0), A(0));
    const PairTiles<T> tiles = in.template tiles<T>(factor ? factors.data() : nullptr);
    pair_gradients(
        tiles,
        [&](int64_t i0, int64_t n, int64_t j0, int64_t m, const A* s, A* w) {
          for (int64_t r = 0; r < n; ++r)
            cross_entropy_weights(of, up, i0 + r, j0, m, s + r * m, w + r * m);
        },
        PairGradients<T>{mutable_data<T>(grad_x), mutable_data<T>(grad_y),
                         factor ? of_factors.data() : nullptr, nullptr,
                         bias ? mutable_data<A>(grad_bias) : nullptr});
    double total = 0;
    for (const A part : of_factors) total += double(part);
    if (factor) *mutable_data<A>(grad_factor) = A(total);
  });
  return {grad_x, grad_y, grad_factor, grad_bias};
}

}  // namespace

#define WEFT_CROSS_ENTROPY_INPUTS                                                            \
  "Tensor x, Tensor y, Tensor? factor, Tensor? bias, Tensor target, Tensor? column_labels, " \
  "Tensor? mask, Tensor? positives, Tensor row_share, Tensor? column_share, "                \
  "Tensor? row_weight, Tensor? column_weight, float scale, float softcap, float margin, "    \
  "float uniform, bool sigmoid, bool exclude_diagonal, "

WEFT_CPU_SCHEMAS(m) {
  m.def("pairwise_cross_entropy(" WEFT_CROSS_ENTROPY_INPUTS
        "bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("pairwise_cross_entropy_backward(" WEFT_CROSS_ENTROPY_INPUTS
        "Tensor row_lse, Tensor column_lse, Tensor saved_x, Tensor saved_y, Tensor saved_factor, "
        "Tensor saved_bias, Tensor? grad_loss, Tensor? grad_row_lse, Tensor? grad_row_target, "
        "Tensor? grad_column_lse, Tensor? grad_column_target) -> (Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("pairwise_cross_entropy", TORCH_BOX(&pairwise_cross_entropy));
  m.impl("pairwise_cross_entropy_backward", TORCH_BOX(&pairwise_cross_entropy_backward));
}

}  // namespace weft
