// One pair at a time, in double: what decides between candidates, and the values of the chosen.
#pragma once
#include <cmath>

#include "common/matrix.h"
#include "cpu/pairwise/pairs.h"

namespace weft {

// u of two rows, `a_stride` and `b_stride` elements between coordinates; eight partial sums.
template <Base base, typename T>
double exact_base(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t D) {
  constexpr int kParts = 8;
  double part[kParts] = {};
  const auto term = [](double x, double y) {
    if constexpr (base == Base::kDot) return x * y;
    if constexpr (base == Base::kSquared) return (x - y) * (x - y);
    return std::abs(x - y);
  };
  const auto value = [](T t) { return double(Acc<T>(t)); };
  int64_t d = 0;
  if (a_stride == 1 && b_stride == 1) {
    for (; d + kParts <= D; d += kParts)
      for (int p = 0; p < kParts; ++p) part[p] += term(value(a[d + p]), value(b[d + p]));
  }
  for (; d < D; ++d) part[d % kParts] += term(value(a[d * a_stride]), value(b[d * b_stride]));
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

template <typename T>
double exact_base(Base base, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                  int64_t D) {
  if (base == Base::kDot) return exact_base<Base::kDot>(a, a_stride, b, b_stride, D);
  if (base == Base::kSquared) return exact_base<Base::kSquared>(a, a_stride, b, b_stride, D);
  return exact_base<Base::kL1>(a, a_stride, b, b_stride, D);
}

inline double exact_function(const Pair& pair, double v) {
  switch (pair.function) {
    case Function::kIdentity:
      return v;
    case Function::kRoot:
      return v <= 0 ? 0 : std::sqrt(v);
    case Function::kExp:
      return std::exp(-v);
    case Function::kLogRatio:
      return std::log((v + 1) / (v + pair.parameter));
    case Function::kArcosh:
      return v <= 0 ? 0 : pair.parameter * std::log1p(v + std::sqrt(v * (v + 2)));
  }
  return v;
}

// f'(v), 0 at v = 0 where f has none.
inline double exact_slope(const Pair& pair, double v) {
  switch (pair.function) {
    case Function::kIdentity:
      return 1;
    case Function::kRoot:
      return v <= 0 ? 0 : 0.5 / std::sqrt(v);
    case Function::kExp:
      return -std::exp(-v);
    case Function::kLogRatio:
      return 1 / (v + 1) - 1 / (v + pair.parameter);
    case Function::kArcosh:
      return v <= 0 ? 0 : pair.parameter / std::sqrt(v * (v + 2));
  }
  return 1;
}

// A problem's operands as single pairs see them.
template <typename T>
struct ExactPairs {
  Pair pair;
  Matrix<T> x, y;
  const Acc<T>*row_factor, *column_factor, *bias;

  double alpha(int64_t i) const { return row_factor ? double(row_factor[i]) : 1.0; }
  double beta(int64_t j) const { return column_factor ? double(column_factor[j]) : 1.0; }
  double base(int64_t i, int64_t j) const {
    return exact_base(pair.base, x.at(i, 0), x.col_stride, y.at(j, 0), y.col_stride, x.cols);
  }
  // v without the shift, which decides nothing.
  double argument(int64_t i, int64_t j, double u) const {
    const double v = pair.scale * alpha(i) * beta(j) * u;
    return bias ? v + double(bias[j]) : v;
  }
};

}  // namespace weft
