// Rows of the kernel matrix K_ij = 2^(F_i + H_j − k C_ij): made from costs, multiplied by a vector,
// added up. All in units of exponents (common/power.h), padded to whole vectors with H = −∞, K = 0.
#pragma once
#include "common/power.h"
#include "common/reduce.h"
#include "cpu/transport/problem.h"

namespace weft {

// Costs of a row: `vectors` whole ones, then one that was put together, or none.
template <typename A>
struct RowCosts {
  const A* whole;
  int64_t vectors;
  const A* last;
  A factor;       // −k, or k where these are −C
  int64_t ahead;  // from here to the row that memory is asked for meanwhile
};

// Reads rows in place where it can; `buffer` has room for a padded row.
template <typename T>
class CostReader {
 public:
  using A = Acc<T>;
  static constexpr int64_t W = Vec<A>::size;
  // Entries: what the processor fetches by itself ends with the page.
  static constexpr int64_t kAhead = 4096;

  CostReader(const CostMatrix<T>& cost, A k, A* buffer) : cost_(cost), k_(k), buffer_(buffer) {}

  RowCosts<A> operator()(int64_t i) const {
    // All rows are split alike, so that their sums are, wherever they lie.
    const int64_t whole = cost_.m / W * W, rest = cost_.m - whole, columns = cost_.columns();
    if (const A* row = cost_.direct(i)) {
      const A sign = cost_.similarity ? A(-1) : A(1);
      const int64_t ahead = ceil_div(kAhead, std::max<int64_t>(columns, 1)) * cost_.row_stride;
      if (whole == columns) return {row, whole / W, nullptr, -sign * k_, ahead};
      Vec<A>::load(row + whole, rest).store(buffer_);
      if (cost_.has_column) buffer_[rest] = sign * cost_.border[0];
      return {row, whole / W, buffer_, -sign * k_, ahead};
    }
    cost_.costs(i, buffer_);
    std::fill(buffer_ + columns, buffer_ + round_up(columns, W), A(0));
    return {buffer_, whole / W, whole == columns ? nullptr : buffer_ + whole, -k_, 0};
  }

 private:
  const CostMatrix<T>& cost_;
  A k_;
  A* buffer_;
};

// K_j = 2^(H_j + F + factor C_j) of whole vectors; Σ_j K_j v_j.
template <typename A>
[[gnu::noinline]] A make_kernel(const A* C, int64_t vectors, A factor, int64_t ahead, A F,
                                const A* H, const A* v, A* K) {
  using V = Vec<A>;
  constexpr int64_t W = V::size;
  const V times(factor), shift(F), most(A(126));
  const auto term = [&](int64_t j, V sum) {
    // Where F is that of the last iteration, H + F is about k C for all that matters: what is
    // rounded here is small, as it is not with F added at the end.
    __builtin_prefetch(C + j + ahead, 0, 2);
    const V x = fma(V::load(C + j), times, V::load(H + j) + shift);
    const V power = power_or_zero(min(most, x));
    power.store(K + j);
    return fma(power, V::load(v + j), sum);
  };
  V sum[4];
  int64_t j = 0;
  const int64_t count = vectors * W;
  for (; j + 4 * W <= count; j += 4 * W)
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) sum[l] = term(j + l * W, sum[l]);
  for (; j < count; j += W) sum[0] = term(j, sum[0]);
  return reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
template <typename A>
A make_kernel(const RowCosts<A>& row, A F, const A* H, const A* v, A* K) {
  A sum = make_kernel(row.whole, row.vectors, row.factor, row.ahead, F, H, v, K);
  const int64_t at = row.vectors * Vec<A>::size;
  if (row.last) sum += make_kernel(row.last, 1, row.factor, 0, F, H + at, v + at, K + at);
  return sum;
}

// max_j (H_j − k C_j): NaN if one is.
template <typename A>
A largest_exponent(const A* C, int64_t vectors, A factor, const A* H) {
  using V = Vec<A>;
  const V times(factor);
  V largest(-std::numeric_limits<A>::infinity());
  for (int64_t j = 0; j < vectors * V::size; j += V::size)
    largest = maximum(largest, fma(V::load(C + j), times, V::load(H + j)));
  return reduce_max(largest);
}
template <typename A>
A largest_exponent(const RowCosts<A>& row, const A* H) {
  const A largest = largest_exponent(row.whole, row.vectors, row.factor, H);
  if (!row.last) return largest;
  const A last = largest_exponent(row.last, 1, row.factor, H + row.vectors * int64_t(Vec<A>::size));
  return largest <= last || last != last ? last : largest;
}

// s_r = Σ_j K_rj v_j of R rows.
template <int R, typename A>
void multiply_rows(const A* K, int64_t ld, const A* v, A* s) {
  using V = Vec<A>;
  V sum[R];
  for (int64_t j = 0; j < ld; j += V::size) {
    const V x = V::load(v + j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = fma(V::load(K + r * ld + j), x, sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) s[r] = reduce_sum(sum[r]);
}

// c_j += Σ_r w_r K_rj of R rows.
template <int R, typename A>
void add_rows(const A* K, int64_t ld, const A* w, A* c) {
  using V = Vec<A>;
  V weight[R];
  for (int r = 0; r < R; ++r) weight[r] = V(w[r]);
  for (int64_t j = 0; j < ld; j += V::size) {
    V sum = V::load(c + j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum = fma(V::load(K + r * ld + j), weight[r], sum);
    sum.store(c + j);
  }
}

// f<R>(first row), R in 8, 4, 2, 1, over `count` rows.
template <int R = 8, typename F>
void groups_of_rows(int64_t count, F f, int64_t row = 0) {
  for (; row + R <= count; row += R) f.template operator()<R>(row);
  if constexpr (R > 1) groups_of_rows<R / 2>(count, f, row);
}
template <typename A>
void multiply_rows(const A* K, int64_t count, int64_t ld, const A* v, A* s) {
  groups_of_rows(count, [&]<int R>(int64_t r) { multiply_rows<R>(K + r * ld, ld, v, s + r); });
}
template <typename A>
void add_rows(const A* K, int64_t count, int64_t ld, const A* w, A* c) {
  groups_of_rows(count, [&]<int R>(int64_t r) { add_rows<R>(K + r * ld, ld, w + r, c); });
}

}  // namespace weft
