// Reductions of arrays: sum x, sum x^2, sum x y, max x. Elements of any type, sums in Acc<T>.
//
// Four vectors of partial sums over blocks of 4096 elements, then the blocks one after the other:
// the rounding error grows with n / 4096 and not with n, and the order, so the bits, depends on n
// alone. An empty sum is 0, an empty max is -infinity; a NaN anywhere is the result.
#pragma once
#include <algorithm>
#include <limits>

#include "common/simd.h"

namespace weft {

// The total of term(i, n) over blocks of up to Vec<A>::size elements: the term of elements
// i ... i + n, whose lanes past n are 0.
template <typename A, typename F>
inline A sum_terms(int64_t n, F term) {
  constexpr int64_t W = Vec<A>::size, kBlock = 4096;
  A total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = std::min(n, first + kBlock);
    Vec<A> part[4];
    int64_t i = first;
    for (; i + 4 * W <= last; i += 4 * W)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) part[j] = term(i + j * W, W, part[j]);
    for (int j = 0; i < last; ++j, i += W) part[j] = term(i, std::min(W, last - i), part[j]);
    total += reduce_sum((part[0] + part[1]) + (part[2] + part[3]));
  }
  return total;
}

// A full vector by the plain load, the end of an array by the partial one.
template <typename A, typename T>
inline Vec<A> load_first(const T* p, int64_t n) {
  return n == Vec<A>::size ? Vec<A>::load(p) : Vec<A>::load(p, n);
}

template <typename T>
inline Acc<T> sum(const T* x, int64_t n) {
  using A = Acc<T>;
  return sum_terms<A>(n,
                      [&](int64_t i, int64_t m, Vec<A> s) { return s + load_first<A>(x + i, m); });
}

template <typename T>
inline Acc<T> sum_of_squares(const T* x, int64_t n) {
  using A = Acc<T>;
  return sum_terms<A>(n, [&](int64_t i, int64_t m, Vec<A> s) {
    const Vec<A> v = load_first<A>(x + i, m);
    return fma(v, v, s);
  });
}

template <typename T, typename U>
inline Acc<T> dot(const T* x, const U* y, int64_t n) {
  using A = Acc<T>;
  return sum_terms<A>(n, [&](int64_t i, int64_t m, Vec<A> s) {
    return fma(load_first<A>(x + i, m), load_first<A>(y + i, m), s);
  });
}

template <typename T>
inline Acc<T> max(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  Vec<A> part[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) part[j] = maximum(part[j], Vec<A>::load(x + i + j * W));
  A result = reduce_max(maximum(maximum(part[0], part[1]), maximum(part[2], part[3])));
  for (; i < n; ++i) {
    const A v = A(x[i]);
    if (v > result || v != v) result = v;
    if (result != result) break;
  }
  return result;
}

}  // namespace weft
