// Attention of single queries, keys in the lanes of vectors: for the few queries beyond whole
// vectors of them, and for tiles of a mask that show few pairs, whose keys are gathered.
//
//   s_j = <q, k_j> for W keys at a time,   m' = max(m, s),   O' = e^(m - m') O + sum u e^(s - m')
//   v_j
//
// It costs about a sixth of a vector of queries, whose lanes are then mostly padding.
#pragma once
#include <cmath>

#include "cpu/attention/softmax.h"

namespace weft {

// Up to 64 queries of one head. One per thread.
template <typename T>
class QueryRows {
 public:
  using A = Acc<T>;
  using Lanes = Vec<A>;
  static constexpr int W = Lanes::size;
  static constexpr int64_t kRows = 64, kKeys = 128;  // keys of one step, at most

  QueryRows(const AttentionProblem<T>& problem, const BiasTiles<T>& bias, bool wanted)
      : p_(problem),
        bias_(bias),
        possible_(wanted && !problem.dropout && problem.key.col_stride == 1 &&
                  problem.value.col_stride == 1),
        depth_(round_up(problem.D, W)) {
    if (!possible_) return;
    A* base = memory_.template get<A>(kRows * (depth_ + round_up(p_.Dv, W)));
    queries_ = base, outs_ = base + kRows * depth_;
    if (!p_.mask->everything()) lists_ = list_memory_.template get<int32_t>(kRows * kList);
  }

  bool possible() const { return possible_; }
  // Bit r: query r has been used.
  uint64_t used() const { return used_; }

  void begin(int64_t b, int64_t h, int64_t q0) { b_ = b, h_ = h, q0_ = q0, used_ = 0; }

  // The pairs of a partial tile of queries [q0, q0 + nq): bit r of words[c] is query r and key
  // first + c. They may wait until `flush`.
  void add_tile(const uint64_t* words, int64_t nq, int64_t first) {
    uint64_t of_query[64];
    std::copy(words, words + 64, of_query);
    transpose_bits(of_query);
    for (int64_t r = 0; r < nq; ++r)
      if (of_query[r]) add_bits(r, of_query[r], first);
  }
  void add_bits(int64_t r, uint64_t bits, int64_t first) {
    start(r);
    int32_t* list = lists_ + r * kList;
    int64_t n = lengths_[r];
    for (; bits; bits &= bits - 1) list[n++] = int32_t(first) + __builtin_ctzll(bits);
    if (n >= kKeys) {
      add(r, list, 0, kKeys);
      std::copy(list + kKeys, list + n, list);
      n -= kKeys;
    }
    lengths_[r] = n;
  }
  void flush() {
    for (uint64_t rows = used_; rows; rows &= rows - 1) {
      const int64_t r = __builtin_ctzll(rows);
      if (lengths_[r]) add(r, lists_ + r * kList, 0, lengths_[r]);
    }
  }
  // All keys [first, last).
  void add_range(int64_t r, int64_t first, int64_t last) {
    start(r);
    int32_t steps[kKeys];
    for (int i = 0; i < kKeys; ++i) steps[i] = i;
    for (; first < last; first += kKeys) add(r, steps, first, std::min(kKeys, last - first));
  }

  // The maximum, in units of a logarithm, the sum and the weighted values of query q0 + r.
  A highest(int64_t r) const {
    return used_ >> r & 1 ? highest_[r] : -std::numeric_limits<A>::infinity();
  }
  A sum(int64_t r) const { return used_ >> r & 1 ? sums_[r] : A(0); }
  const A* out(int64_t r) const { return outs_ + r * round_up(p_.Dv, W); }

 private:
  static constexpr int64_t kList = kKeys + 64;

  void start(int64_t r) {
    if (used_ >> r & 1) return;
    used_ |= uint64_t(1) << r;
    lengths_[r] = 0;
    highest_[r] = -std::numeric_limits<A>::infinity();
    sums_[r] = 0;
    std::fill_n(outs_ + r * round_up(p_.Dv, W), round_up(p_.Dv, W), A(0));
    const Matrix<T> x = p_.query(b_, h_);
    A* row = queries_ + r * depth_;
    for (int64_t d = 0; d < p_.D; ++d) row[d] = A(*x.at(q0_ + r, d));
    std::fill(row + p_.D, row + depth_, A(0));
  }

  // Up to kKeys keys first + keys[i].
  void add(int64_t r, const int32_t* keys, int64_t first, int64_t n) {
    alignas(64) A s[kKeys];
    Lanes most(-std::numeric_limits<A>::infinity());
    for (int64_t j = 0; j < n; j += W) {
      const int64_t m = std::min<int64_t>(W, n - j);
      Lanes x = products(queries_ + r * depth_, keys + j, first, m) * Lanes(p_.scale);
      if (p_.softcap != 0) x = tanh(x / Lanes(p_.softcap)) * Lanes(p_.softcap);
      x.store(s + j);
      if (bias_.kind() != BiasKind::none) {
        alignas(64) A bias[W] = {};
        bias_.gather(b_, h_, q0_ + r, first, keys + j, m, bias);
        const Lanes hidden(-std::numeric_limits<A>::infinity()), b = Lanes::load(bias);
        select(b <= Lanes(bias_.masked()), hidden, x + b).store(s + j);
      }
      for (int64_t i = m; i < W; ++i) s[j + i] = -std::numeric_limits<A>::infinity();
      most = max(most, Lanes::load(s + j));
    }
    const A before = highest_[r], highest = std::max(before, reduce_max(most));
    const A shift = highest == -std::numeric_limits<A>::infinity() ? A(0) : highest;
    const Lanes base(kBase<A>);
    const A keep = power_or_zero((Lanes(before) - Lanes(shift)) * base).v[0];
    Lanes total;
    for (int64_t j = 0; j < n; j += W) {
      Lanes e = power_or_zero((Lanes::load(s + j) - Lanes(shift)) * base);
      if (p_.key_weight) {
        alignas(64) A weight[W] = {};
        const A* all = p_.key_weight(b_, h_) + first;
        for (int64_t i = 0; i < std::min<int64_t>(W, n - j); ++i) weight[i] = all[keys[j + i]];
        e *= Lanes::load(weight);
      }
      e.store(s + j);
      total += e;
    }
    highest_[r] = highest;
    sums_[r] = std::fma(sums_[r], keep, reduce_sum(total));
    A* out = outs_ + r * round_up(p_.Dv, W);
    int64_t d = 0;
    for (; d + 4 * W <= p_.Dv; d += 4 * W) add_values<4>(s, keys, first, n, d, keep, out);
    for (; d + 2 * W <= p_.Dv; d += 2 * W) add_values<2>(s, keys, first, n, d, keep, out);
    for (; d < p_.Dv; d += W) add_values<1>(s, keys, first, n, d, keep, out);
  }

  // The products of a query with m <= W keys, one in each lane.
  Lanes products(const A* query, const int32_t* keys, int64_t first, int64_t m) const {
    const Matrix<T> x = p_.key(b_, h_ / p_.group);
    const T* row[W];
    for (int i = 0; i < W; ++i) row[i] = x.at(first + keys[i < m ? i : 0], 0);
    Lanes part[W];
    int64_t d = 0;
    for (; d + W <= p_.D; d += W) {
      const Lanes q = Lanes::load(query + d);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) part[i] = fma(q, Lanes::load(row[i] + d), part[i]);
    }
    if (d < p_.D) {
      const Lanes q = Lanes::load(query + d);
      for (int i = 0; i < W; ++i) part[i] = fma(q, Lanes::load(row[i] + d, p_.D - d), part[i]);
    }
    return sums_of_lanes<W>(part);
  }

  // Lane i: the sum of the lanes of x[i], by the rounds of a transpose.
  template <int n>
  static Lanes sums_of_lanes(Lanes* x) {
    constexpr auto lanes = std::make_integer_sequence<int, W>{};
    using Register = typename Lanes::Register;
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i)
      x[i] = Lanes(interleave_lower<Register, W>(x[i].v, x[i + n / 2].v, lanes)) +
             Lanes(interleave_upper<Register, W>(x[i].v, x[i + n / 2].v, lanes));
    if constexpr (n > 2)
      return sums_of_lanes<n / 2>(x);
    else
      return x[0];
  }

  // out[d ... d + V W) = keep out + sum weight v.
  template <int V>
  void add_values(const A* weight, const int32_t* keys, int64_t first, int64_t n, int64_t d, A keep,
                  A* out) const {
    const Matrix<T> x = p_.value(b_, h_ / p_.group);
    const int64_t width = std::min<int64_t>(W, p_.Dv - d - (V - 1) * W);
    const auto load = [&](const T* row, int v) {
      return V > 1 || width == W ? Lanes::load(row + v * W) : Lanes::load(row, width);
    };
    Lanes total[2][V];
    for (int v = 0; v < V; ++v) total[0][v] = Lanes::load(out + d + v * W) * Lanes(keep);
    int64_t j = 0;
    for (; j + 2 <= n; j += 2)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const T* row = x.at(first + keys[j + i], d);
        const Lanes e(weight[j + i]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) total[i][v] = fma(e, load(row, v), total[i][v]);
      }
    if (j < n) {
      const T* row = x.at(first + keys[j], d);
      for (int v = 0; v < V; ++v) total[0][v] = fma(Lanes(weight[j]), load(row, v), total[0][v]);
    }
    for (int v = 0; v < V; ++v) (total[0][v] + total[1][v]).store(out + d + v * W);
  }

  const AttentionProblem<T>& p_;
  const BiasTiles<T>& bias_;
  const bool possible_;
  const int64_t depth_;
  uint64_t used_ = 0;
  int64_t b_ = 0, h_ = 0, q0_ = 0;
  A *queries_ = nullptr, *outs_ = nullptr;  // [row][D], [row][Dv], padded to vectors
  int32_t* lists_ = nullptr;                // [row][kList], keys that wait
  int64_t lengths_[kRows];
  A highest_[kRows], sums_[kRows];
  inline static thread_local Scratch memory_, list_memory_;
};

}  // namespace weft
