// The matrix of all pairs, out_ij = s_ij: tile by tile, from the cache to the result. Its gradient
// is the shared backward of gradients.h, whose weights are the upstream gradient itself.
#include "cpu/pairwise/operands.h"

namespace weft {
namespace {

Tensor pairwise_matrix(const Tensor& x, const Tensor& y, const OptionalTensor& row_factor,
                       const OptionalTensor& column_factor, const OptionalTensor& bias,
                       std::string base, std::string function, double scale, double shift,
                       double parameter, bool direct) {
  const PairOperands operands(x, y, row_factor, column_factor, bias, base, function, scale, shift,
                              parameter);
  const int64_t M = y.size(0);
  Tensor out = torch::stable::new_empty(x, {x.size(0), M});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    T* to = mutable_data<T>(out);
    for_each_tile(operands.tiles<T>(direct),
                  [&](int64_t i0, int64_t n, int64_t j0, int64_t m, const A* s) {
                    for (int64_t r = 0; r < n; ++r) convert(s + r * m, to + (i0 + r) * M + j0, m);
                  });
  });
  return out;
}

GradientTensors pairwise_matrix_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                         const OptionalTensor& row_factor,
                                         const OptionalTensor& column_factor,
                                         const OptionalTensor& bias, std::string base,
                                         std::string function, double scale, double shift,
                                         double parameter, int64_t wanted, bool direct) {
  const PairOperands operands(x, y, row_factor, column_factor, bias, base, function, scale, shift,
                              parameter);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == y.size(0) &&
                      grad.scalar_type() == x.scalar_type(),
                  "pairwise_matrix_backward: grad must be (N, M) in the dtype of x");
  GradientTensors out = operands.new_gradients(wanted);
  with_float(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Matrix<T> g = matrix_of<T>(grad);
    const auto weights = [&](int64_t i0, int64_t n, int64_t j0, int64_t m, const A*, A* w) {
      for (int64_t r = 0; r < n; ++r)
        if (g.col_stride == 1)
          convert(g.at(i0 + r, j0), w + r * m, m);
        else
          for (int64_t j = 0; j < m; ++j) w[r * m + j] = A(*g.at(i0 + r, j0 + j));
    };
    pair_gradients(operands.tiles<T>(direct), weights, operands.pointers<T>(out, wanted));
  });
  return out;
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("pairwise_matrix(" WEFT_PAIR_SCHEMA ", bool direct) -> Tensor");
  m.def("pairwise_matrix_backward(Tensor grad, " WEFT_PAIR_SCHEMA
        ", int wanted, bool direct) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("pairwise_matrix", TORCH_BOX(&pairwise_matrix));
  m.impl("pairwise_matrix_backward", TORCH_BOX(&pairwise_matrix_backward));
}

}  // namespace weft
