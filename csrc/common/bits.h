// Bits in words of 64, the lowest first: ranges, bytes to bits, and the transpose of 64 words.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/simd.h"

namespace weft {

// Bits [0, n); none for n <= 0, all from n = 64 on.
inline uint64_t bits_below(int64_t n) {
  const uint64_t some = (uint64_t(1) << (n & 63)) - 1;
  return n <= 0 ? 0 : n >= 64 ? ~uint64_t(0) : some;
}
// Bits [begin, end), of which those from 0 to 63 exist.
inline uint64_t bit_range(int64_t begin, int64_t end) {
  return bits_below(end) & ~bits_below(begin);
}

// Bit i says whether byte i is not 0, for the n <= 64 bytes at p; the other bits are 0.
inline uint64_t bytes_to_bits(const uint8_t* p, int64_t n) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_maskz_loadu_epi8(bits_below(n), p);
  return _mm512_test_epi8_mask(bytes, bytes);
#else
  uint8_t part[64];
  if (n < 64) {
    std::memset(part, 0, sizeof part);
    std::memcpy(part, p, size_t(n));
    p = part;
  }
#if defined(__AVX2__)
  const auto zeros = [p](int at) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + at));
    return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
  };
  return ~(uint64_t(zeros(32)) << 32 | zeros(0));
#else
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t x;
    std::memcpy(&x, p + 8 * i, 8);
    x = (((x & kLow) + kLow) | x) >> 7 & 0x0101010101010101;  // 1 in each byte that is not 0
    bits |= (x * 0x0102040810204080 >> 56) << (8 * i);
  }
  return bits;
#endif
#endif
}

namespace bits {

typedef uint64_t Words __attribute__((vector_size(kVectorBytes), may_alias));
inline constexpr int kWords = kVectorBytes / 8, kVectors = 64 / kWords;

// The word at distance kStep in each pair.
template <int kStep, int... lane>
inline Words swap_lanes(const Words& a, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, a, (lane ^ kStep)...);
}
template <int... lane>
inline Words lanes_without(int step, std::integer_sequence<int, lane...>) {
  return Words{(lane & step ? uint64_t(0) : ~uint64_t(0))...};
}

// Exchanges the blocks of kStep x kStep bits right of and below the diagonal in each block of twice
// the size.
template <int kStep>
inline void transpose_round(Words* v) {
  constexpr uint64_t kLow = ~uint64_t(0) / ((uint64_t(1) << kStep) + 1);
  if constexpr (kStep >= kWords) {
    constexpr int kDistance = kStep / kWords;
#pragma GCC unroll 32
    for (int i = 0; i < kVectors; ++i) {
      if (i & kDistance) continue;
      Words &upper = v[i], &lower = v[i + kDistance];
      const Words t = ((upper >> kStep) ^ lower) & kLow;
      lower ^= t;
      upper ^= t << kStep;
    }
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kWords>{};
    const Words upper = lanes_without(kStep, lanes), kept = ~(upper ^ kLow);
#pragma GCC unroll 32
    for (int i = 0; i < kVectors; ++i) {
      const Words other = swap_lanes<kStep>(v[i], lanes);
      const Words moved = (other << kStep & upper) | (other >> kStep & ~upper);
      v[i] = (v[i] & kept) | (moved & ~kept);
    }
  }
  if constexpr (kStep > 1) transpose_round<kStep / 2>(v);
}

}  // namespace bits

// Bit c of word r becomes bit r of word c.
inline void transpose_bits(uint64_t* words) {
  bits::Words v[bits::kVectors];
  std::memcpy(v, words, sizeof v);
  bits::transpose_round<32>(v);
  std::memcpy(words, v, sizeof v);
}

// Lane i is bit i of the word.
template <typename T>
Mask<T> lanes_from_bits(uint64_t word) {
#if defined(__AVX512F__)
  return {typename Mask<T>::Lanes(word)};
#else
  using Int = typename Vec<T>::Int;
  typename Vec<T>::Bits bit;
  for (int i = 0; i < Vec<T>::size; ++i) bit[i] = Int(1) << i;
  return {(bit & Int(word)) == bit};
#endif
}

}  // namespace weft
