// Sums and log-sum-exps of pairs of rows: reductions.h on the tensors of the schema.
#include "cpu/pairwise/operands.h"
#include "cpu/pairwise/reductions.h"

namespace weft {
namespace {

template <typename A>
std::optional<SumValues<A>> values_of(const OptionalTensor& values, const PairMask& mask) {
  if (!values) return std::nullopt;
  return std::optional<SumValues<A>>(std::in_place, matrix_of<A>(*values), mask);
}

template <typename A>
const SumValues<A>* pointer(const std::optional<SumValues<A>>& values) {
  return values ? &*values : nullptr;
}

void check_values(const Tensor& x, const Tensor& y, const OptionalTensor& values) {
  STD_TORCH_CHECK(!values || (values->dim() == 2 && values->size(0) == y.size(0) &&
                              values->scalar_type() == sum_type(x)),
                  "pairwise_sum: values must be (M, E) in the dtype of sums");
}

Tensor pairwise_sum(const Tensor& x, const Tensor& y, const OptionalTensor& row_factor,
                    const OptionalTensor& column_factor, const OptionalTensor& bias,
                    std::string base, std::string function, double scale, double shift,
                    double parameter, const OptionalTensor& mask, const OptionalTensor& x_labels,
                    const OptionalTensor& y_labels, bool same, bool off_diagonal,
                    const OptionalTensor& values, bool direct) {
  const PairOperands operands(x, y, row_factor, column_factor, bias, base, function, scale, shift,
                              parameter);
  const PairMask allowed(mask, x_labels, y_labels, same, off_diagonal, x.size(0), y.size(0));
  check_values(x, y, values);
  std::vector<int64_t> shape{x.size(0)};
  if (values) shape.push_back(values->size(1));
  Tensor out = torch::stable::new_empty(x, shape, sum_type(x));
  with_float(x, [&](auto type) {
    using T = decltype(type);
    const auto v = values_of<Acc<T>>(values, allowed);
    pair_sum(operands.tiles<T>(direct), allowed, pointer(v), mutable_data<Acc<T>>(out));
  });
  return out;
}

GradientTensors pairwise_sum_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const OptionalTensor& row_factor,
    const OptionalTensor& column_factor, const OptionalTensor& bias, std::string base,
    std::string function, double scale, double shift, double parameter, const OptionalTensor& mask,
    const OptionalTensor& x_labels, const OptionalTensor& y_labels, bool same, bool off_diagonal,
    const OptionalTensor& values, int64_t wanted, bool direct) {
  const PairOperands operands(x, y, row_factor, column_factor, bias, base, function, scale, shift,
                              parameter);
  const PairMask allowed(mask, x_labels, y_labels, same, off_diagonal, x.size(0), y.size(0));
  check_values(x, y, values);
  STD_TORCH_CHECK(grad.dim() == 1 + values.has_value() && grad.size(0) == x.size(0) &&
                      (!values || grad.size(1) == values->size(1)) &&
                      grad.scalar_type() == sum_type(x),
                  "pairwise_sum_backward: grad must have the shape and dtype of the result");
  GradientTensors out = operands.new_gradients(wanted);
  with_float(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const auto v = values_of<A>(values, allowed);
    Matrix<A> g{data<A>(grad), grad.size(0), 1, grad.stride(0), 1};
    if (values) g = matrix_of<A>(grad);
    pair_sum_gradients(operands.tiles<T>(direct), allowed, g, pointer(v),
                       operands.pointers<T>(out, wanted));
  });
  return out;
}

Tensor pairwise_logsumexp(const Tensor& x, const Tensor& y, const OptionalTensor& row_factor,
                          const OptionalTensor& column_factor, const OptionalTensor& bias,
                          std::string base, std::string function, double scale, double shift,
                          double parameter, const OptionalTensor& mask,
                          const OptionalTensor& x_labels, const OptionalTensor& y_labels, bool same,
                          bool off_diagonal, bool direct) {
  const PairOperands operands(x, y, row_factor, column_factor, bias, base, function, scale, shift,
                              parameter);
  const PairMask allowed(mask, x_labels, y_labels, same, off_diagonal, x.size(0), y.size(0));
  Tensor out = torch::stable::new_empty(x, {x.size(0)}, sum_type(x));
  with_float(x, [&](auto type) {
    using T = decltype(type);
    pair_logsumexp(operands.tiles<T>(direct), allowed, mutable_data<Acc<T>>(out));
  });
  return out;
}

GradientTensors pairwise_logsumexp_backward(
    const Tensor& grad, const Tensor& out, const Tensor& x, const Tensor& y,
    const OptionalTensor& row_factor, const OptionalTensor& column_factor,
    const OptionalTensor& bias, std::string base, std::string function, double scale, double shift,
    double parameter, const OptionalTensor& mask, const OptionalTensor& x_labels,
    const OptionalTensor& y_labels, bool same, bool off_diagonal, int64_t wanted, bool direct) {
  const PairOperands operands(x, y, row_factor, column_factor, bias, base, function, scale, shift,
                              parameter);
  const PairMask allowed(mask, x_labels, y_labels, same, off_diagonal, x.size(0), y.size(0));
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 1 && t.size(0) == x.size(0) && t.scalar_type() == sum_type(x);
  };
  STD_TORCH_CHECK(fits(grad) && fits(out),
                  "pairwise_logsumexp_backward: grad and out must be (N,) in the dtype of sums");
  GradientTensors grads = operands.new_gradients(wanted);
  const Tensor total = torch::stable::contiguous(out);
  with_float(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    pair_logsumexp_gradients(operands.tiles<T>(direct), allowed,
                             Matrix<A>{data<A>(grad), grad.size(0), 1, grad.stride(0), 1},
                             data<A>(total), operands.pointers<T>(grads, wanted));
  });
  return grads;
}

}  // namespace

#define WEFT_MASK_SCHEMA \
  "Tensor? mask, Tensor? x_labels, Tensor? y_labels, bool same, bool off_diagonal"
#define WEFT_FIVE "(Tensor, Tensor, Tensor, Tensor, Tensor)"

WEFT_CPU_SCHEMAS(m) {
  m.def("pairwise_sum(" WEFT_PAIR_SCHEMA ", " WEFT_MASK_SCHEMA
        ", Tensor? values, bool direct) -> Tensor");
  m.def("pairwise_sum_backward(Tensor grad, " WEFT_PAIR_SCHEMA ", " WEFT_MASK_SCHEMA
        ", Tensor? values, int wanted, bool direct) -> " WEFT_FIVE);
  m.def("pairwise_logsumexp(" WEFT_PAIR_SCHEMA ", " WEFT_MASK_SCHEMA ", bool direct) -> Tensor");
  m.def("pairwise_logsumexp_backward(Tensor grad, Tensor out, " WEFT_PAIR_SCHEMA
        ", " WEFT_MASK_SCHEMA ", int wanted, bool direct) -> " WEFT_FIVE);
}
WEFT_CPU_KERNELS(m) {
  m.impl("pairwise_sum", TORCH_BOX(&pairwise_sum));
  m.impl("pairwise_sum_backward", TORCH_BOX(&pairwise_sum_backward));
  m.impl("pairwise_logsumexp", TORCH_BOX(&pairwise_logsumexp));
  m.impl("pairwise_logsumexp_backward", TORCH_BOX(&pairwise_logsumexp_backward));
}

}  // namespace weft
