// Powers and logarithms for softmax-like kernels, whose weights are powers of 2 in float, and of e
// in double, where speed does not matter: x units of a natural logarithm are kBase x of these.
#pragma once
#include "common/math.h"

namespace weft {

template <typename A>
inline constexpr A kBase = std::is_same_v<A, double> ? A(1) : A(1.4426950408889634);

// 2^x for x <= 127, and 0 for x <= -126; at most 1.5 ulp off, and NaN of NaN. 2^x = 2^(n - 1) p
// with n = round(x) and p = 2^(x - n + 1): the exponent n - 1 is that of 0 where n = -126, so no
// step makes a denormal.
[[gnu::always_inline]] inline VecF power_or_zero(VecF x) {
  const VecF shift(12582912.0f + 126.0f);
  const VecF bounded = max(VecF(-126.0f), x);
  const VecF shifted = bounded + shift;
  constexpr float c[] = {2.652945463e-3f, 1.934302598e-2f, 1.110146716e-1f,
                         4.804448485e-1f, 1.386294007f,    2.0f};
  const VecF p = math::polynomial(bounded - (shifted - shift), c);
  return p * VecF::from_bits(shifted.bits() << 23);
}
[[gnu::noinline]] inline VecD power_or_zero(VecD x) {
  return math::by_lane(x, [](double v) { return std::exp(v); });
}

// The x of which it is the power.
template <typename A>
inline Vec<A> logarithm(Vec<A> power) {
  return log(power) * Vec<A>(kBase<A>);
}

}  // namespace weft
