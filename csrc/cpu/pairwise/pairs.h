// Pair functions:  v = scale α_i β_j u_ij + bias_j + shift,  s = f(v),  of  u = ⟨x_i, y_j⟩,
// ‖x_i − y_j‖² or ‖x_i − y_j‖₁; weft/reference/pairwise/pairs.py says it in PyTorch.
#pragma once
#include <string>

#include "common/math.h"
#include "cpu/registration.h"

namespace weft {

enum class Base { kDot, kSquared, kL1 };
enum class Function { kIdentity, kRoot, kExp, kLogRatio, kArcosh };

struct Pair {
  Base base = Base::kDot;
  Function function = Function::kIdentity;
  double scale = 1, shift = 0, parameter = 0;
};

inline Pair pair_from(const std::string& base, const std::string& function, double scale,
                      double shift, double parameter) {
  Pair pair{Base::kDot, Function::kIdentity, scale, shift, parameter};
  if (base == "sqeuclidean")
    pair.base = Base::kSquared;
  else if (base == "l1")
    pair.base = Base::kL1;
  else
    STD_TORCH_CHECK(base == "dot", "weft: no pair function has the base ", base);
  if (function == "root")
    pair.function = Function::kRoot;
  else if (function == "exp")
    pair.function = Function::kExp;
  else if (function == "log_ratio")
    pair.function = Function::kLogRatio;
  else if (function == "arcosh")
    pair.function = Function::kArcosh;
  else
    STD_TORCH_CHECK(function == "identity", "weft: no pair function is called ", function);
  return pair;
}

// Calls f with the function as a compile-time constant.
template <typename F>
void with_function(Function function, F f) {
  switch (function) {
    case Function::kIdentity:
      return f(std::integral_constant<Function, Function::kIdentity>{});
    case Function::kRoot:
      return f(std::integral_constant<Function, Function::kRoot>{});
    case Function::kExp:
      return f(std::integral_constant<Function, Function::kExp>{});
    case Function::kLogRatio:
      return f(std::integral_constant<Function, Function::kLogRatio>{});
    case Function::kArcosh:
      return f(std::integral_constant<Function, Function::kArcosh>{});
  }
}

// log(1 + w) for w >= 0 with the relative accuracy of log, by the ratio that cancels the rounding
// of 1 + w.
template <typename A>
Vec<A> log1p(Vec<A> w) {
  const Vec<A> one(1), sum = w + one, difference = sum - one;
  const auto exact =
      (difference == Vec<A>(A(0))) | (w == Vec<A>(std::numeric_limits<A>::infinity()));
  return select(exact, w, log(sum) * (w / select(exact, one, difference)));
}

template <Function f, typename A>
Vec<A> function_value(Vec<A> v, A parameter) {
  const Vec<A> zero(A(0));
  if constexpr (f == Function::kIdentity) return v;
  if constexpr (f == Function::kRoot) return select(v <= zero, zero, sqrt(v));
  if constexpr (f == Function::kExp) return exp(-v);
  if constexpr (f == Function::kLogRatio) return log((v + Vec<A>(A(1))) / (v + Vec<A>(parameter)));
  if constexpr (f == Function::kArcosh) {
    const Vec<A> distance = Vec<A>(parameter) * log1p(v + sqrt(v * (v + Vec<A>(A(2)))));
    return select(v <= zero, zero, distance);
  }
}

// f'(v), with s = f(v) where that spares work.
template <Function f, typename A>
Vec<A> function_slope(Vec<A> v, Vec<A> s, A parameter) {
  const Vec<A> zero(A(0)), one(A(1));
  if constexpr (f == Function::kIdentity) return one;
  if constexpr (f == Function::kRoot) return select(v <= zero, zero, Vec<A>(A(0.5)) / s);
  if constexpr (f == Function::kExp) return -s;
  if constexpr (f == Function::kLogRatio) return one / (v + one) - one / (v + Vec<A>(parameter));
  if constexpr (f == Function::kArcosh)
    return select(v <= zero, zero, Vec<A>(parameter) / sqrt(v * (v + Vec<A>(A(2)))));
}

}  // namespace weft
