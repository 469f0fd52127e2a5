// From the arguments of an op's schema to PairTiles, and from the gradients that are wanted to the
// tensors that hold them.
#pragma once
#include "cpu/pairwise/gradients.h"

// The part of a schema that says what a pair of rows is (weft/ops/pairwise/pairs.py).
#define WEFT_PAIR_SCHEMA                                                                        \
  "Tensor x, Tensor y, Tensor? row_factor, Tensor? column_factor, Tensor? bias, str base, str " \
  "function, float scale, float shift, float parameter"

namespace weft {

using OptionalTensor = std::optional<Tensor>;
using GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Matrix<T> matrix_of(const Tensor& t) {
  return {data<T>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

inline ScalarType sum_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

class PairOperands {
 public:
  Tensor x, y;
  Pair pair;

  PairOperands(const Tensor& x, const Tensor& y, const OptionalTensor& row_factor,
               const OptionalTensor& column_factor, const OptionalTensor& bias,
               const std::string& base, const std::string& function, double scale, double shift,
               double parameter)
      : x(x), y(y), pair(pair_from(base, function, scale, shift, parameter)) {
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1),
                    "weft: x must be (N, D) and y (M, D)");
    STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "weft: dtypes of x and y differ");
    row_factor_ = vector(row_factor, x.size(0));
    column_factor_ = vector(column_factor, y.size(0));
    bias_ = vector(bias, y.size(0));
  }

  template <typename T>
  PairTiles<T> tiles(bool direct) const {
    const auto of = [](const OptionalTensor& t) { return t ? data<Acc<T>>(*t) : nullptr; };
    return {pair,      matrix_of<T>(x), matrix_of<T>(y), of(row_factor_), of(column_factor_),
            of(bias_), direct};
  }

  // Bit p of `wanted` asks for the p-th gradient; the others are empty.
  GradientTensors new_gradients(int64_t wanted) const {
    const auto one = [&](int p, bool is_there, std::vector<int64_t> shape, ScalarType type) {
      const bool made = is_there && (wanted >> p & 1);
      return torch::stable::new_empty(x, made ? shape : std::vector<int64_t>{0},
                                      made ? type : x.scalar_type());
    };
    const int64_t N = x.size(0), M = y.size(0), D = x.size(1);
    const ScalarType type = x.scalar_type(), wide = sum_type(x);
    return {one(0, true, {N, D}, type), one(1, true, {M, D}, type),
            one(2, row_factor_.has_value(), {N}, wide),
            one(3, column_factor_.has_value(), {M}, wide), one(4, bias_.has_value(), {M}, wide)};
  }

  template <typename T>
  PairGradients<T> pointers(const GradientTensors& tensors, int64_t wanted) const {
    using A = Acc<T>;
    const auto of = [&](int p, const OptionalTensor& t, const Tensor& result) {
      return t && (wanted >> p & 1) ? mutable_data<A>(result) : nullptr;
    };
    const auto& [of_x, of_y, of_row, of_column, of_bias] = tensors;
    return {wanted & 1 ? mutable_data<T>(of_x) : nullptr,
            wanted & 2 ? mutable_data<T>(of_y) : nullptr, of(2, row_factor_, of_row),
            of(3, column_factor_, of_column), of(4, bias_, of_bias)};
  }

 private:
  OptionalTensor vector(const OptionalTensor& t, int64_t n) const {
    if (!t) return std::nullopt;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == n && t->scalar_type() == sum_type(x),
                    "weft: factors and bias must be (N,) and (M,) in the dtype of sums");
    return torch::stable::contiguous(*t);
  }

  OptionalTensor row_factor_, column_factor_, bias_;
};

}  // namespace weft
