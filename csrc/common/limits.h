// What this core can do at most, measured: the rate of multiply-adds between registers, of
// bfloat16 products, and of copying memory. Benchmarks give their results as a fraction of these.
#pragma once
#include <algorithm>
#include <cstring>
#include <ctime>

#include "common/gemm.h"
#include "common/simd.h"

namespace weft {

// The processor time of this thread: neighbours that take the core do not count.
inline double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// Seconds of one call of f, the shortest of several.
template <typename F>
inline double fastest(int repeats, F f) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const double start = thread_seconds();
    f();
    best = std::min(best, thread_seconds() - start);
  }
  return best;
}

// Operations per second of fma, two for each lane. Enough chains to hide the latency. Not inlined:
// in the caller, which runs once, the compiler would make the loop short and not fast.
template <typename T>
__attribute__((noinline)) double fma_rate() {
  constexpr int kChains = kVectorBytes == 64 ? 24 : 12;
  constexpr int64_t kSteps = 100000;
  Vec<T> sum[kChains];
  const Vec<T> factor(T(1)), term(T(1e-9));
  const double seconds = fastest(5, [&] {
    for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 24
      for (int j = 0; j < kChains; ++j) sum[j] = fma(sum[j], factor, term);
    }
  });
  Vec<T> total;
  for (auto& s : sum) total += s;
  volatile T kept = reduce_sum(total);
  (void)kept;
  return 2.0 * kSteps * kChains * Vec<T>::size / seconds;
}

// Operations per second of bfloat16 products; 0 where they run in float.
__attribute__((noinline)) inline double bfloat16_rate() {
#if defined(__AMX_BF16__)
  constexpr int64_t kSteps = 50000;
  const ProductSession<bfloat16> session;
  alignas(64) static const bfloat16 zeros[512] = {};
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const double seconds = fastest(5, [] {
    for (int64_t i = 0; i < kSteps; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  });
  return 2.0 * kSteps * 4 * 16 * 16 * 32 / seconds;
#elif defined(__AVX512BF16__)
  constexpr int kChains = 24;
  constexpr int64_t kSteps = 100000;
  VecF sum[kChains];
  const __m512bh factor = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  const double seconds = fastest(5, [&] {
    for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 24
      for (int j = 0; j < kChains; ++j) sum[j] = _mm512_dpbf16_ps(sum[j].v, factor, factor);
    }
  });
  VecF total;
  for (auto& s : sum) total += s;
  volatile float kept = reduce_sum(total);
  (void)kept;
  return 2.0 * kSteps * kChains * 32 / seconds;
#else
  return 0.0;
#endif
}

// Bytes per second read plus written by one core copying `bytes` (take more than the caches hold).
inline double copy_bandwidth(const void* from, void* to, int64_t bytes) {
  return 2.0 * double(bytes) / fastest(5, [&] { std::memcpy(to, from, size_t(bytes)); });
}

}  // namespace weft
