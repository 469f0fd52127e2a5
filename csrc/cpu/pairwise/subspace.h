// The operands of the subspace ops: features x (B, D), normalised if asked for, and the bases of
// C subspaces as the rows of one matrix W (C·k × D).
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/gemm.h"
#include "common/scratch.h"
#include "cpu/registration.h"

namespace weft {

// û_b = scale_b · x'_b with x' = x · 2^-e and 2^e ≈ ‖x_b‖_∞: no square overflows or vanishes, and
// the scaling by a power of two is exact in every dtype.
template <typename T>
struct UnitRows {
  Matrix<T> rows;               // x', or x itself where nothing is normalised
  std::vector<Acc<T>> scale;    // 1/max(‖x'‖, eps · 2^-e); 0 for a zero row without eps
  std::vector<Acc<T>> inverse;  // 1/max(‖x‖, eps), likewise
  std::vector<char> inside;     // ‖x‖ <= eps: the divisor is a constant

  UnitRows(Matrix<T> x, bool normalize, double eps) : rows(x) {
    if (!normalize) return;
    scale.resize(x.rows), inverse.resize(x.rows), inside.resize(x.rows);
    T* out = storage_.get<T>(x.rows * x.cols);
    parallel_for(0, x.rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) normalize_row(x, b, eps, out + b * x.cols);
    });
    rows = row_major(out, x.rows, x.cols);
  }

 private:
  static Vec<Acc<T>> load(const T* p, int64_t n) {
    return n >= Vec<Acc<T>>::size ? Vec<Acc<T>>::load(p) : Vec<Acc<T>>::load(p, n);
  }
  void normalize_row(const Matrix<T>& x, int64_t b, double eps, T* out) {
    using A = Acc<T>;
    const T* in = x.at(b, 0);
    if (x.col_stride != 1) {
      for (int64_t d = 0; d < x.cols; ++d) out[d] = in[d * x.col_stride];
      in = out;
    }
    constexpr int64_t W = Vec<A>::size;
    Vec<A> sizes;
    for (int64_t d = 0; d < x.cols; d += W)  // a NaN is passed over here and kept below
      sizes = max(abs(load(in + d, x.cols - d)), sizes);
    const A largest = reduce_max(sizes);
    constexpr int most = std::numeric_limits<A>::max_exponent - 2;
    const int e = largest > 0 && std::isfinite(largest) ? std::ilogb(largest) : 0;
    const A down = std::ldexp(A(1), -std::clamp(e, -most, most));
    Vec<A> squares;
    for (int64_t d = 0; d < x.cols; d += W) {
      const Vec<A> v = load(in + d, x.cols - d) * Vec<A>(down);
      x.cols - d >= W ? v.store(out + d) : v.store(out + d, x.cols - d);
      squares = fma(v, v, squares);
    }
    const A square = reduce_sum(squares);
    const A length = std::sqrt(square), floor = A(eps) * down;
    inside[b] = length <= floor;
    const A divisor = inside[b] ? floor : length;
    scale[b] = divisor == 0 ? A(0) : A(1) / divisor;
    inverse[b] = scale[b] * down;
  }

  Scratch storage_;
};

// Row c·k + j of W is column j of S_c, and zero from dims[c] on.
template <typename T>
struct Bases {
  const T* data;
  int64_t C, D, k, stride_c, stride_d, stride_k;
  const int64_t* dims;

  int64_t dim(int64_t c) const { return dims ? std::clamp<int64_t>(dims[c], 0, k) : k; }
  // All rows lie one stride apart, and none is padding.
  bool is_matrix() const { return !dims && (stride_c == k * stride_k || C == 1); }

  // The rows of the classes [c0, c1), copied where they are not a matrix as they lie.
  Matrix<T> rows(int64_t c0, int64_t c1, Scratch& storage) const {
    if (is_matrix()) return {data + c0 * stride_c, (c1 - c0) * k, D, stride_k, stride_d};
    T* out = storage.get<T>((c1 - c0) * k * D);
    const Matrix<T> copy = row_major<T>(out, (c1 - c0) * k, D);
    for (int64_t c = c0; c < c1; ++c)
      for (int64_t j = 0; j < k; ++j, out += D)
        for (int64_t d = 0; d < D; ++d)
          out[d] = j < dim(c) ? data[c * stride_c + j * stride_k + d * stride_d] : T(0);
    return copy;
  }
};

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {data<T>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

template <typename T>
Bases<T> bases_of(const Tensor& bases, const std::optional<Tensor>& dims = std::nullopt) {
  return {data<T>(bases),  bases.size(0),   bases.size(1),   bases.size(2),
          bases.stride(0), bases.stride(1), bases.stride(2), dims ? data<int64_t>(*dims) : nullptr};
}

// An uninitialised gradient of the bases: in memory (C, k, D) where they have D as their unit
// stride, else (C, D, k); gradient_like of the public function.
struct BasesResult {
  int64_t stride_d, stride_k;
  Tensor tensor;

  explicit BasesResult(const Tensor& bases)
      : stride_d(bases.stride(1) == 1 ? 1 : bases.size(2)),
        stride_k(bases.stride(1) == 1 ? bases.size(1) : 1),
        tensor(bases.stride(1) == 1 ? torch::stable::transpose(
                                          torch::stable::new_empty(
                                              bases, {bases.size(0), bases.size(2), bases.size(1)}),
                                          1, 2)
                                    : torch::stable::new_empty(
                                          bases, {bases.size(0), bases.size(1), bases.size(2)})) {}
};

}  // namespace weft
