// exp, log and tanh of vectors. The largest error found, one float in seven against double:
// exp 1.01 ulp, log 0.82, tanh 1.33. Infinities, NaN, zeros and denormals give what IEEE arithmetic
// asks for. Doubles go lane by lane to the C library: they serve gradient checks, where speed does
// not matter.
//
// No step makes a denormal in floating point. The processor would handle each in microcode, at a
// hundred cycles and more: small results are put together from integers.
#pragma once
#include <cmath>
#include <limits>

#include "common/simd.h"

namespace weft {

namespace math {

// c[0] x^n-1 + ... + c[n-1]
template <int n>
inline VecF polynomial(VecF x, const float (&c)[n]) {
  VecF p(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < n; ++i) p = fma(p, x, VecF(c[i]));
  return p;
}

// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2.
struct Exponential {
  VecF::Bits n;
  VecF significand;  // e^r, in [0.70, 1.42]
};
inline Exponential reduced_exp(VecF x) {
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum.
  const VecF shift(12582912.0f);
  const VecF shifted = fma(x, VecF(1.44269504088896341f), shift);
  const VecF n = shifted - shift;
  // ln 2 in two parts; the first has few bits, so that n times it is exact without fma too.
  VecF r = fma(n, VecF(-0.693359375f), x);
  r = fma(n, VecF(2.12194440e-4f), r);
  constexpr float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const VecF tail = polynomial(r, c);
  return {shifted.bits() - shift.bits(), fma(tail, r * r, r) + VecF(1.0f)};
}

inline constexpr float kExpOverflow = 88.7228394f;    // the largest x with a finite e^x
inline constexpr float kExpUnderflow = -87.3365479f;  // e^x of anything less is denormal

template <typename F>
inline VecD by_lane(VecD x, F f) {
  for (int i = 0; i < VecD::size; ++i) x.v[i] = f(x.v[i]);
  return x;
}

}  // namespace math

inline VecF exp(VecF x) {
  // The bounds keep n in range; a NaN passes through min and max, which return their second
  // operand.
  const VecF bounded = min(VecF(89.0f), max(VecF(-104.0f), x));
  const auto [n, p] = math::reduced_exp(bounded);
  const VecF normal = VecF::from_bits(p.bits() + (n << 23));
  // A denormal's bits are the result in units of 2^-149, rounded: that of p 2^(n + 149) + 2^23.
  const VecF scaled = p * VecF::from_bits((n + (149 + 127)) << 23);
  const VecF unit(8388608.0f);
  const VecF small = VecF::from_bits((scaled + unit).bits() - unit.bits());
  const VecF y = select(x < VecF(math::kExpUnderflow), small, normal);
  // Too large: infinity; NaN: NaN.
  return select(x <= VecF(math::kExpOverflow), y, x * VecF(std::numeric_limits<float>::infinity()));
}

// e^x for x <= 88 with denormal results taken as 0, as softmax wants it: without the work for them.
inline VecF exp_or_zero(VecF x) {
  const VecF bounded = max(VecF(math::kExpUnderflow), x);
  const auto [n, p] = math::reduced_exp(bounded);
  const VecF y = VecF::from_bits(p.bits() + (n << 23));
  // Of -infinity and what underflows, 0; of NaN, NaN.
  return select(x >= VecF(math::kExpUnderflow), y, select(is_nan(x), x, VecF(0.0f)));
}

// log x = e ln 2 + log m with m in [sqrt(1/2), sqrt 2):
// log(1 + f) = f - f^2 / 2 + f^3 P(f)
inline VecF log(VecF x) {
  const VecF::Bits bits = x.bits();
  // The bits of a denormal, as an integer, are its value in units of 2^-149.
  const auto denormal = x < VecF(std::numeric_limits<float>::min());
  const VecF magnitude = select(denormal, VecF(__builtin_convertvector(bits, VecF::Register)), x);
  const VecF exponent_offset = select(denormal, VecF(-149.0f), VecF(0.0f));
  // Subtracting sqrt(1/2) before the shift puts m in the wanted interval.
  const VecF::Bits root = VecF(0.707106781186547524f).bits();
  const VecF::Bits e = (magnitude.bits() - root) >> 23;
  const VecF m = VecF::from_bits(magnitude.bits() - (e << 23));
  const VecF exponent = VecF(__builtin_convertvector(e, VecF::Register)) + exponent_offset;
  const VecF f = m - VecF(1.0f);
  constexpr float c[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                         -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                         2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  const VecF square = f * f;
  VecF tail = math::polynomial(f, c) * f * square;
  tail = fma(exponent, VecF(-2.12194440e-4f), tail);
  tail = fma(square, VecF(-0.5f), tail);
  const VecF y = fma(exponent, VecF(0.693359375f), f + tail);
  // 0: -infinity; infinity: itself; below 0 or NaN: NaN.
  const VecF infinity(std::numeric_limits<float>::infinity());
  const VecF edge =
      select(x == VecF(0.0f), -infinity, select(x == infinity, infinity, VecF(std::nanf(""))));
  return select((x > VecF(0.0f)) & (x < infinity), y, edge);
}

// tanh x = x + x^3 P(x^2) near 0, else 1 - 2 / (e^2|x| + 1) with the sign of x.
inline VecF tanh(VecF x) {
  const VecF magnitude = abs(x);
  constexpr float c[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                         1.33314422036e-1f, -3.33332819422e-1f};
  const VecF square = magnitude * magnitude;
  const VecF near = fma(math::polynomial(square, c) * square, x, x);
  // Beyond 10 the result is 1; the bound keeps e^2|x| finite, and a NaN is the second operand.
  const VecF doubled = min(VecF(20.0f), magnitude + magnitude);
  const auto [n, p] = math::reduced_exp(doubled);
  const VecF e = VecF::from_bits(p.bits() + (n << 23));
  const VecF far = copy_sign(VecF(1.0f) - VecF(2.0f) / (e + VecF(1.0f)), x);
  return select(is_nan(x), x, select(magnitude < VecF(0.625f), near, far));
}

inline VecD exp(VecD x) {
  return math::by_lane(x, [](double v) { return std::exp(v); });
}
inline VecD exp_or_zero(VecD x) {
  return math::by_lane(x, [](double v) { return std::exp(v); });
}
inline VecD log(VecD x) {
  return math::by_lane(x, [](double v) { return std::log(v); });
}
inline VecD tanh(VecD x) {
  return math::by_lane(x, [](double v) { return std::tanh(v); });
}

}  // namespace weft
