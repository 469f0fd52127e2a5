// Up to 16 rows or columns (index) by up to 32 k of a bfloat16 operand, as 16 vectors of 32-bit
// words, the pairs (k, k + 1): the form in which AMX and AVX512_BF16 multiply. What is missing
// becomes 0, so the half of a pair beyond an odd depth adds nothing; a float source is rounded to
// nearest even, its denormals to 0.
#pragma once
#if defined(__AVX512BF16__)
#include <immintrin.h>

#include <algorithm>

#include "common/matrix.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace weft {

class Bfloat16Pairs {
 public:
  using Words = Registers<float>::Bits;

  // word[pair of k], lanes the index, if pairs_first; otherwise word[index], lanes the pair of k.
  template <bool pairs_first, typename S>
  __attribute__((always_inline)) static void load(Matrix<S> x, Words (&word)[16]) {
    const int n = int(x.rows), depth = int(x.cols);
    if (x.col_stride == 1) {
      n == 16 && depth == 32 ? load_rows<true>(x.data, x.row_stride, n, depth, word)
                             : load_rows<false>(x.data, x.row_stride, n, depth, word);
      if constexpr (pairs_first) transpose_block<16>(word);
    } else if (x.row_stride == 1) {
      n == 16 && depth == 32 ? load_columns<true>(x.data, x.col_stride, n, depth, word)
                             : load_columns<false>(x.data, x.col_stride, n, depth, word);
      if constexpr (!pairs_first) transpose_block<16>(word);
    } else {
      alignas(64) bfloat16 part[16][32] = {};
      for (int i = 0; i < n; ++i)
        for (int k = 0; k < depth; ++k) part[i][k] = bfloat16(float(*x.at(i, k)));
      load_rows<true>(part[0], 32, 16, 32, word);
      if constexpr (pairs_first) transpose_block<16>(word);
    }
  }

 private:
  // From memory where k is contiguous: a vector is one index, all k.
  template <bool whole, typename S>
  static void load_rows(const S* x, int64_t stride, int n, int depth, Words (&word)[16]) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      word[i] = whole || i < n ? (Words)load32<whole>(x + i * stride, depth) : Words{};
  }

  // From memory where the index is contiguous: a vector is one pair of k, all indices.
  template <bool whole, typename S>
  static void load_columns(const S* x, int64_t stride, int n, int depth, Words (&word)[16]) {
    // 0, 16, 1, 17, ...: the 16 of k and the 16 of k + 1 in turn.
    const __m512i in_turn = _mm512_add_epi32(
        _mm512_set1_epi32(0x100000),
        _mm512_mullo_epi32(
            _mm512_set1_epi32(0x10001),
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
      const S* even = x + 2 * g * stride;
      const int left = whole ? 2 : std::clamp(depth - 2 * g, 0, 2);
      word[g] = left == 0 ? Words{}
                          : (Words)_mm512_maskz_permutexvar_epi16(
                                ~__mmask32(0), in_turn,
                                load16x2<whole>(even, left == 2 ? even + stride : nullptr, n));
    }
  }

  static __mmask32 first(int n) { return __mmask32((uint64_t(1) << n) - 1); }

  // 32 consecutive elements as bfloat16: all of them, or the first n.
  template <bool whole>
  static __m512i load32(const bfloat16* p, int n) {
    return whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first(n), p);
  }
  template <bool whole>
  static __m512i load32(const float* p, int n) {
    const VecF low = whole ? VecF::load(p) : VecF::load(p, std::min(n, 16));
    const VecF high = whole ? VecF::load(p + 16) : VecF::load(p + 16, std::max(n - 16, 0));
    return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  }

  // 16 from p and 16 from q, or the first n of each; 0 for a null q.
  template <bool whole>
  static __m512i load16x2(const bfloat16* p, const bfloat16* q, int n) {
    const auto load16 = [n](const bfloat16* x) {
      return whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))
                   : _mm256_maskz_loadu_epi16(first_lanes(n), x);
    };
    const __m256i high = whole || q ? load16(q) : _mm256_setzero_si256();
    return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(load16(p)), high, 1);
  }
  template <bool whole>
  static __m512i load16x2(const float* p, const float* q, int n) {
    const VecF low = whole ? VecF::load(p) : VecF::load(p, n);
    const VecF high = whole ? VecF::load(q) : q ? VecF::load(q, n) : VecF();
    return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  }
};

}  // namespace weft
#endif
