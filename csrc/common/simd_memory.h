// Loads and stores of part of a vector, and of vectors that are bfloat16 or half in memory.
// Included by simd.h, which declares them.
#pragma once

namespace weft {

// ---- parts of a vector ----

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1); }
template <>
inline VecF VecF::load(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
template <>
inline VecD VecD::load(const double* p, int64_t n) {
  return _mm512_maskz_loadu_pd(__mmask8(first_lanes(n)), p);
}
template <>
inline void VecF::store(float* p, int64_t n) const {
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
template <>
inline void VecD::store(double* p, int64_t n) const {
  _mm512_mask_storeu_pd(p, __mmask8(first_lanes(n)), v);
}
#elif defined(__AVX2__)
inline __m256i first_lanes_float(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_lanes_double(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <>
inline VecF VecF::load(const float* p, int64_t n) {
  return VecF(_mm256_maskload_ps(p, first_lanes_float(n)));
}
template <>
inline VecD VecD::load(const double* p, int64_t n) {
  return VecD(_mm256_maskload_pd(p, first_lanes_double(n)));
}
template <>
inline void VecF::store(float* p, int64_t n) const {
  _mm256_maskstore_ps(p, first_lanes_float(n), v);
}
template <>
inline void VecD::store(double* p, int64_t n) const {
  _mm256_maskstore_pd(p, first_lanes_double(n), v);
}
#else
template <typename T>
Vec<T> Vec<T>::load(const T* p, int64_t n) {
  Vec r;
  std::memcpy(&r.v, p, size_t(n) * sizeof(T));
  return r;
}
template <typename T>
void Vec<T>::store(T* p, int64_t n) const {
  std::memcpy(p, &v, size_t(n) * sizeof(T));
}
#endif

// ---- half-precision memory ----

// bfloat16 is the upper half of float. Round to nearest even; a NaN stays one (quiet).
inline VecF::Bits rounded_to_bfloat16(VecF a) {
  const VecF::Bits u = a.bits();
  const VecF::Bits rounded = u + 0x7fff + ((u >> 16) & 1);
  return select(is_nan(a), VecF::from_bits(u | 0x400000), VecF::from_bits(rounded)).bits();
}

#if defined(__AVX512F__)
template <>
inline VecF VecF::load(const bfloat16* p) {
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(
      _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, u), 16));
}
template <>
inline void VecF::store(bfloat16* p) const {
  const __m512i u = _mm512_maskz_srli_epi32(0xffff, (__m512i)rounded_to_bfloat16(*this), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, u));
}
template <>
inline VecF VecF::load(const half* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <>
inline void VecF::store(half* p) const {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
template <>
inline VecF VecF::load(const bfloat16* p) {
  const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return VecF(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16)));
}
template <>
inline void VecF::store(bfloat16* p) const {
  const __m256i u = _mm256_srli_epi32((__m256i)rounded_to_bfloat16(*this), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
template <>
inline VecF VecF::load(const half* p) {
  return VecF(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <>
inline void VecF::store(half* p) const {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
template <>
inline VecF VecF::load(const bfloat16* p) {
  Bits u;
  for (int i = 0; i < size; ++i) u[i] = int32_t(uint32_t(p[i].x) << 16);
  return from_bits(u);
}
template <>
inline void VecF::store(bfloat16* p) const {
  const Bits u = rounded_to_bfloat16(*this);
  for (int i = 0; i < size; ++i) p[i].x = uint16_t(uint32_t(u[i]) >> 16);
}
template <>
inline VecF VecF::load(const half* p) {
  VecF r;
  for (int i = 0; i < size; ++i) r.v[i] = float(p[i]);
  return r;
}
template <>
inline void VecF::store(half* p) const {
  for (int i = 0; i < size; ++i) p[i] = half(float(v[i]));
}
#endif

}  // namespace weft
