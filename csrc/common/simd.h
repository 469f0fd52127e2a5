// One vector type for every instruction set: kernels are written once against Vec<float> and
// Vec<double>. A Vec fills one register (64 bytes with AVX-512, 32 with AVX2, 16 otherwise) and is
// built on the compiler's vector extension, so that arithmetic and bit operations need no
// intrinsics; those appear only where the extension has no word for the instruction.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/types.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace weft {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct Registers;
template <>
struct Registers<float> {
  using Int = int32_t;
  typedef float Float __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
};
template <>
struct Registers<double> {
  using Int = int64_t;
  typedef double Float __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
};

template <typename T>
struct Vec {
  using Int = typename Registers<T>::Int;
  using Register = typename Registers<T>::Float;
  using Bits = typename Registers<T>::Bits;
  static constexpr int size = kVectorBytes / int(sizeof(T));

  Register v;

  Vec() : v{} {}
  Vec(Register r) : v(r) {}
  // x - 0 is x also for -0, and the compiler makes it one broadcast.
  Vec(T x) : v(x - Register{}) {}

  static Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  void store(T* p) const { std::memcpy(p, &v, sizeof v); }

  // The first n lanes (0 <= n <= size); the other lanes of a load are 0.
  static Vec load(const T* p, int64_t n);
  void store(T* p, int64_t n) const;

  // Half-precision memory (Vec<float> only); stores round to nearest even and keep NaN.
  static Vec load(const bfloat16* p);
  static Vec load(const half* p);
  void store(bfloat16* p) const;
  void store(half* p) const;
  template <typename H>
  static Vec load(const H* p, int64_t n) {
    alignas(32) H part[size] = {};
    std::memcpy(static_cast<void*>(part), p, size_t(n) * sizeof(H));
    return load(part);
  }
  template <typename H>
  void store(H* p, int64_t n) const {
    alignas(32) H part[size];
    store(part);
    std::memcpy(static_cast<void*>(p), part, size_t(n) * sizeof(H));
  }

  Bits bits() const { return (Bits)v; }
  static Vec from_bits(Bits b) { return Vec((Register)b); }

  friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend Vec operator-(Vec a) { return -a.v; }
  Vec& operator+=(Vec b) { return *this = *this + b; }
  Vec& operator-=(Vec b) { return *this = *this - b; }
  Vec& operator*=(Vec b) { return *this = *this * b; }
};

using VecF = Vec<float>;
using VecD = Vec<double>;

// ---- comparisons: a mask per lane, combined with & | ~ and used by select, any and all ----

#if defined(__AVX512F__)
template <typename T>
struct Mask {
  using Lanes = std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>;
  Lanes m;
  friend Mask operator&(Mask a, Mask b) { return {Lanes(a.m & b.m)}; }
  friend Mask operator|(Mask a, Mask b) { return {Lanes(a.m | b.m)}; }
  friend Mask operator~(Mask a) { return {Lanes(~a.m)}; }
};
template <int kPredicate>
Mask<float> compare(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, kPredicate)};
}
template <int kPredicate>
Mask<double> compare(VecD a, VecD b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, kPredicate)};
}
template <typename T>
Mask<T> operator<(Vec<T> a, Vec<T> b) {
  return compare<_CMP_LT_OQ>(a, b);
}
template <typename T>
Mask<T> operator<=(Vec<T> a, Vec<T> b) {
  return compare<_CMP_LE_OQ>(a, b);
}
template <typename T>
Mask<T> operator==(Vec<T> a, Vec<T> b) {
  return compare<_CMP_EQ_OQ>(a, b);
}
inline VecF select(Mask<float> m, VecF a, VecF b) { return _mm512_mask_blend_ps(m.m, b.v, a.v); }
inline VecD select(Mask<double> m, VecD a, VecD b) { return _mm512_mask_blend_pd(m.m, b.v, a.v); }
template <typename T>
bool any(Mask<T> a) {
  return a.m != 0;
}
template <typename T>
bool all(Mask<T> a) {
  return a.m == typename Mask<T>::Lanes(~0);
}
#else
template <typename T>
struct Mask {
  typename Vec<T>::Bits m;
  friend Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
  friend Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
  friend Mask operator~(Mask a) { return {~a.m}; }
};
template <typename T>
Mask<T> operator<(Vec<T> a, Vec<T> b) {
  return {a.v < b.v};
}
template <typename T>
Mask<T> operator<=(Vec<T> a, Vec<T> b) {
  return {a.v <= b.v};
}
template <typename T>
Mask<T> operator==(Vec<T> a, Vec<T> b) {
  return {a.v == b.v};
}
template <typename T>
Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) {
  return m.m ? a.v : b.v;
}
template <typename T>
bool any(Mask<T> a) {
  typename Vec<T>::Int bits = 0;
  for (int i = 0; i < Vec<T>::size; ++i) bits |= a.m[i];
  return bits != 0;
}
template <typename T>
bool all(Mask<T> a) {
  return !any(~a);
}
#endif
template <typename T>
Mask<T> operator>(Vec<T> a, Vec<T> b) {
  return b < a;
}
template <typename T>
Mask<T> operator>=(Vec<T> a, Vec<T> b) {
  return b <= a;
}
template <typename T>
Mask<T> is_nan(Vec<T> a) {
  return ~(a == a);
}

// ---- a b + c with one rounding where the processor has it; min, max, sqrt, abs ----

#if defined(__AVX512F__)
// The zero-masked forms, with every lane on, are the same instructions; of the plain ones gcc 12
// warns that they read an uninitialised register.
inline VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
inline VecF sqrt(VecF a) { return _mm512_maskz_sqrt_ps(0xffff, a.v); }
inline VecD sqrt(VecD a) { return _mm512_maskz_sqrt_pd(0xff, a.v); }
inline VecF min(VecF a, VecF b) { return _mm512_maskz_min_ps(0xffff, a.v, b.v); }
inline VecD min(VecD a, VecD b) { return _mm512_maskz_min_pd(0xff, a.v, b.v); }
inline VecF max(VecF a, VecF b) { return _mm512_maskz_max_ps(0xffff, a.v, b.v); }
inline VecD max(VecD a, VecD b) { return _mm512_maskz_max_pd(0xff, a.v, b.v); }
#elif defined(__AVX2__)
inline VecF fma(VecF a, VecF b, VecF c) { return VecF(_mm256_fmadd_ps(a.v, b.v, c.v)); }
inline VecD fma(VecD a, VecD b, VecD c) { return VecD(_mm256_fmadd_pd(a.v, b.v, c.v)); }
inline VecF sqrt(VecF a) { return VecF(_mm256_sqrt_ps(a.v)); }
inline VecD sqrt(VecD a) { return VecD(_mm256_sqrt_pd(a.v)); }
inline VecF min(VecF a, VecF b) { return VecF(_mm256_min_ps(a.v, b.v)); }
inline VecD min(VecD a, VecD b) { return VecD(_mm256_min_pd(a.v, b.v)); }
inline VecF max(VecF a, VecF b) { return VecF(_mm256_max_ps(a.v, b.v)); }
inline VecD max(VecD a, VecD b) { return VecD(_mm256_max_pd(a.v, b.v)); }
#else
template <typename T>
Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a.v * b.v + c.v;
}
template <typename T>
Vec<T> sqrt(Vec<T> a) {
  for (int i = 0; i < Vec<T>::size; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
}
// As on x86: where either is NaN, the second operand.
template <typename T>
Vec<T> min(Vec<T> a, Vec<T> b) {
  return select(a < b, a, b);
}
template <typename T>
Vec<T> max(Vec<T> a, Vec<T> b) {
  return select(a > b, a, b);
}
#endif
// min and max above return b where either operand is NaN; these are NaN there.
template <typename T>
Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return select(is_nan(a), a, min(a, b));
}
template <typename T>
Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return select(is_nan(a), a, max(a, b));
}
template <typename T>
Vec<T> abs(Vec<T> a) {
  using Int = typename Vec<T>::Int;
  return Vec<T>::from_bits(a.bits() & Int(~(Int(1) << (8 * sizeof(T) - 1))));
}
template <typename T>
Vec<T> copy_sign(Vec<T> magnitude, Vec<T> sign) {
  using Int = typename Vec<T>::Int;
  const Int bit = Int(1) << (8 * sizeof(T) - 1);
  return Vec<T>::from_bits((magnitude.bits() & ~bit) | (sign.bits() & bit));
}

// ---- across the lanes, halving: the order, and so the bits, never change ----

template <typename T, int distance, int... lane>
inline Vec<T> rotate_lanes(Vec<T> a, std::integer_sequence<int, lane...>) {
  return Vec<T>(__builtin_shufflevector(a.v, a.v, ((lane + distance) % Vec<T>::size)...));
}
template <typename T, int distance = Vec<T>::size / 2, typename F>
inline T fold(Vec<T> a, F f) {
  constexpr auto lanes = std::make_integer_sequence<int, Vec<T>::size>{};
  a = f(a, rotate_lanes<T, distance>(a, lanes));
  if constexpr (distance > 1) {
    return fold<T, distance / 2>(a, f);
  } else {
    return a.v[0];
  }
}
template <typename T>
T reduce_sum(Vec<T> a) {
  return fold(a, [](Vec<T> x, Vec<T> y) { return x + y; });
}
// NaN if any lane is.
template <typename T>
T reduce_max(Vec<T> a) {
  return fold(a, [](Vec<T> x, Vec<T> y) { return maximum(x, y); });
}
template <typename T>
T reduce_min(Vec<T> a) {
  return fold(a, [](Vec<T> x, Vec<T> y) { return minimum(x, y); });
}

}  // namespace weft

#include "common/simd_memory.h"
