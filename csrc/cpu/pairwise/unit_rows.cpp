// Rows of length 1:  û = x / max(‖x‖, eps),   ∂x = (∂û − û⟨û, ∂û⟩)/‖x‖,  or ∂û/eps where ‖x‖ <=
// eps; at x = 0 without eps, û and ∂x are 0.
//
// Loop order: rows > columns in registers. One pass takes the largest |x| and the sum of squares,
// and the second, in cache, writes. Where squares overflow or vanish the row is summed once more,
// divided by its largest |x|.
#include <cmath>

#include "common/reduce.h"
#include "cpu/registration.h"

namespace weft {
namespace {

constexpr int64_t kRows = 64;  // of a task

// What is in the range has squares whose sum neither overflows nor loses what counts.
template <typename A>
constexpr A kSmallest = std::is_same_v<A, double> ? A(1e-140) : A(1e-15);
template <typename A>
constexpr A kLargest = std::is_same_v<A, double> ? A(1e140) : A(1e15);

template <typename A>
struct Divisor {
  A scale, value;  // û = x / scale / value
  bool constant;   // eps, which does not depend on x
};

template <typename T>
Divisor<Acc<T>> divisor_of(const T* x, int64_t D, double eps) {
  using A = Acc<T>;
  Vec<A> most;
  const A squares = sum_terms<A>(D, [&](int64_t i, int64_t n, Vec<A> s) {
    const Vec<A> v = load_first<A>(x + i, n);
    most = max(most, abs(v));
    return fma(v, v, s);
  });
  const A largest = reduce_max(most);
  A scale = 1, length = std::sqrt(squares);
  if (!(largest >= kSmallest<A> && largest <= kLargest<A>)) {
    if (largest > 0 && largest < std::numeric_limits<A>::infinity()) scale = largest;
    const Vec<A> by(scale);
    length = std::sqrt(sum_terms<A>(D, [&](int64_t i, int64_t n, Vec<A> s) {
      const Vec<A> v = load_first<A>(x + i, n) / by;
      return fma(v, v, s);
    }));
  }
  const A bound = A(eps) / scale;
  const bool constant = length <= bound;  // a NaN is none
  return {scale, constant ? bound : length, constant};
}

template <typename F>
void for_rows(int64_t B, F of_row) {
  parallel_for(0, ceil_div(B, kRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin * kRows; b < std::min(B, end * kRows); ++b) of_row(b);
  });
}

// to_i = f(i, n) for vectors of columns, n of each used.
template <typename A, typename T, typename F>
void write_row(T* to, int64_t D, F f) {
  constexpr int64_t W = Vec<A>::size;
  int64_t d = 0;
  for (; d + W <= D; d += W) f(d, W).store(to + d);
  if (d < D) f(d, D - d).store(to + d, D - d);
}

template <typename T>
void forward(const T* x, int64_t B, int64_t D, int64_t stride, double eps, T* out) {
  using A = Acc<T>;
  for_rows(B, [&](int64_t b) {
    const T* row = x + b * stride;
    const Divisor<A> by = divisor_of(row, D, eps);
    // 0 / 1 where x = 0.
    const Vec<A> scale(by.scale), value(by.value == 0 ? A(1) : by.value);
    write_row<A>(out + b * D, D, [&](int64_t d, int64_t n) {
      const Vec<A> v = load_first<A>(row + d, n);
      return by.scale == 1 ? v / value : v / scale / value;
    });
  });
}

template <typename T>
void backward(const T* grad, const T* x, int64_t B, int64_t D, int64_t stride, double eps, T* out) {
  using A = Acc<T>;
  for_rows(B, [&](int64_t b) {
    const T *row = x + b * stride, *of_row = grad + b * D;
    T* to = out + b * D;
    const Divisor<A> by = divisor_of(row, D, eps);
    if (by.value == 0) {
      std::fill_n(to, D, T(0));
      return;
    }
    const Vec<A> scale(by.scale), value(by.value);
    const auto unit = [&](int64_t d, int64_t n) {
      const Vec<A> v = load_first<A>(row + d, n);
      return by.scale == 1 ? v / value : v / scale / value;
    };
    const A along = by.constant ? A(0) : sum_terms<A>(D, [&](int64_t d, int64_t n, Vec<A> s) {
      return fma(unit(d, n), load_first<A>(of_row + d, n), s);
    });
    write_row<A>(to, D, [&](int64_t d, int64_t n) {
      const Vec<A> g = load_first<A>(of_row + d, n);
      const Vec<A> tangent = by.constant ? g : g - unit(d, n) * Vec<A>(along);
      return by.scale == 1 ? tangent / value : tangent / value / scale;
    });
  });
}

void check(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1),
                  "unit_rows: x must be (B, D) with adjacent columns");
}

Tensor unit_rows(const Tensor& x, double eps) {
  check(x);
  const int64_t B = x.size(0), D = x.size(1);
  Tensor out = torch::stable::new_empty(x, {B, D});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    forward<T>(data<T>(x), B, D, x.stride(0), eps, mutable_data<T>(out));
  });
  return out;
}

Tensor unit_rows_backward(const Tensor& grad, const Tensor& x, double eps) {
  check(x);
  const int64_t B = x.size(0), D = x.size(1);
  STD_TORCH_CHECK(
      grad.numel() == B * D && grad.is_contiguous() && grad.scalar_type() == x.scalar_type(),
      "unit_rows_backward: grad must be (B, D), contiguous, in the dtype of x");
  Tensor out = torch::stable::new_empty(x, {B, D});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    backward<T>(data<T>(grad), data<T>(x), B, D, x.stride(0), eps, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("unit_rows(Tensor x, float eps) -> Tensor");
  m.def("unit_rows_backward(Tensor grad, Tensor x, float eps) -> Tensor");
}
WEFT_CPU_KERNELS(m) {
  m.impl("unit_rows", TORCH_BOX(&unit_rows));
  m.impl("unit_rows_backward", TORCH_BOX(&unit_rows_backward));
}

}  // namespace weft
