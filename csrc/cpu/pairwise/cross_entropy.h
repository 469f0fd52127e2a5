// The logits of a cross entropy over all pairs, from the inner products v of a PairTiles:
//
//   s_ij = c tanh(v_ij / c) or v_ij,   less the margin at positives,   −∞ where a pair does not
//   count p_ij = e^(s_ij − lse_i) or, sigmoid, 1 / (1 + e^−s_ij),            T_ij = share_i P_ij +
//   uniform
//
// and what a row or a column needs of them. A pair counts if it is a positive or the mask allows
// it, and is no row with itself where those are excluded.
#pragma once
#include "cpu/pairwise/gradients.h"

namespace weft {

struct BoolMatrix {
  const bool* data = nullptr;
  int64_t row_stride = 0, col_stride = 0;
  bool operator()(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
};

template <typename A>
struct PairTargets {
  const int64_t *target, *column_labels;  // labels or null: then target is a column
  BoolMatrix mask, positives;             // data may be null
  const A *row_share, *column_share;      // column_share may be null
  A softcap, margin, uniform;
  bool sigmoid, exclude_diagonal;

  // Calls f(c) for the positives (i, j0 + c), c < m.
  template <typename F>
  void each_positive(int64_t i, int64_t j0, int64_t m, F f) const {
    const int64_t own = exclude_diagonal ? i : -1;
    if (positives.data) {
      for (int64_t c = 0; c < m; ++c)
        if (positives(i, j0 + c) && j0 + c != own) f(c);
    } else if (column_labels) {
      for (int64_t c = 0; c < m; ++c)
        if (column_labels[j0 + c] == target[i] && j0 + c != own) f(c);
    } else if (target[i] >= j0 && target[i] < j0 + m && target[i] != own) {
      f(target[i] - j0);
    }
  }

  A capped(A v) const { return softcap != 0 ? softcap * std::tanh(v / softcap) : v; }

  // s (m) from v (m) of row i, from column j0 on; they may be the same memory.
  void logits(int64_t i, int64_t j0, int64_t m, const A* v, A* s) const {
    constexpr int64_t W = Vec<A>::size;
    if (mask.data) {
      for (int64_t c = 0; c < m; ++c) s[c] = counts(i, j0 + c) ? capped(v[c]) : kNone;
    } else if (softcap != 0) {
      const Vec<A> cap(softcap), inverse(1 / softcap);
      for (int64_t c = 0; c < m; c += W) {
        const int64_t n = std::min(W, m - c);
        (cap * tanh(inverse * load_first<A>(v + c, n))).store(s + c, n);
      }
    } else if (s != v) {
      convert(v, s, m);
    }
    if (margin != 0) each_positive(i, j0, m, [&](int64_t c) { s[c] -= margin; });
    if (exclude_diagonal && i >= j0 && i < j0 + m) s[i - j0] = kNone;
  }

  bool positive(int64_t i, int64_t j) const {
    if (positives.data) return positives(i, j);
    return target[i] == (column_labels ? column_labels[j] : j);
  }
  bool counts(int64_t i, int64_t j) const {
    return !(exclude_diagonal && i == j) && (!mask.data || mask(i, j) || positive(i, j));
  }

  // uniform Σ_j s_ij over the pairs that count.
  A uniform_sum(int64_t i, int64_t j0, int64_t m, const A* s) const {
    if (uniform == 0) return 0;
    if (!mask.data && !exclude_diagonal) return uniform * sum(s, m);
    A total = 0;
    for (int64_t c = 0; c < m; ++c)
      if (counts(i, j0 + c)) total += s[c];
    return uniform * total;
  }

  static constexpr A kNone = -std::numeric_limits<A>::infinity();
};

// log Σ e^s as it grows, or Σ log(1 + e^s), and the sums of T s.
template <typename A>
struct RowSums {
  A largest = PairTargets<A>::kNone, total = 0, positive = 0, uniform = 0;

  void add(const PairTargets<A>& of, int64_t i, int64_t j0, int64_t m, const A* s) {
    of.each_positive(i, j0, m, [&](int64_t c) { positive += s[c]; });
    uniform += of.uniform_sum(i, j0, m, s);
    if (of.sigmoid) {
      total += sum_terms<A>(m, [&](int64_t c, int64_t n, Vec<A> part) {
        const Vec<A> value = load_first<A>(s + c, n), zero(A(0));
        const Vec<A> term = maximum(value, zero) + log1p(exp(-abs(value)));
        if (n == Vec<A>::size) return part + term;
        alignas(64) A kept[Vec<A>::size] = {};
        term.store(kept, n);
        return part + Vec<A>::load(kept);
      });
      return;
    }
    const A before = largest, here = weft::max(s, m);
    if (here > largest || std::isnan(here)) largest = here;
    if (largest == PairTargets<A>::kNone) return;
    if (before != PairTargets<A>::kNone && before != largest) total *= std::exp(before - largest);
    total += sum_exp(s, m, largest);
  }

  static A sum_exp(const A* s, int64_t m, A shift) {
    return sum_terms<A>(m, [&](int64_t c, int64_t n, Vec<A> part) {
      if (n == Vec<A>::size) return part + exp_or_zero(Vec<A>::load(s + c) - Vec<A>(shift));
      alignas(64) A kept[Vec<A>::size];
      std::fill_n(kept, Vec<A>::size, PairTargets<A>::kNone);
      std::copy_n(s + c, n, kept);
      return part + exp_or_zero(Vec<A>::load(kept) - Vec<A>(shift));
    });
  }

  A lse(bool sigmoid) const {
    if (sigmoid) return total;
    return largest == PairTargets<A>::kNone ? largest : largest + std::log(total);
  }
  // p is this times e^(s − largest).
  A factor(bool sigmoid) const { return sigmoid || total == 0 ? A(1) : 1 / total; }
  A target(A share) const { return (share == 0 ? A(0) : share * positive) + uniform; }
  // lse − t with the digits of double.
  double loss(bool sigmoid, A share) const {
    const double of_target = share == 0 ? double(uniform) : double(share) * positive + uniform;
    if (sigmoid) return double(total) - of_target;
    return (double(largest) - of_target) + std::log(double(total));
  }
};

// Gradients of the loss in lse and t, of rows and of columns; those of columns may be null. p is
// factor e^(s − shift): the largest logit and 1 / Σ have more digits than lse, where they are
// known.
template <typename A>
struct PairUpstream {
  const A *row_shift, *row_factor, *column_shift, *column_factor;  // a factor may be null, for 1
  const A *row_p, *row_t, *column_p, *column_t;
};

// w = ∂L/∂v of m columns of row i, from j0 on.
template <typename A>
void cross_entropy_weights(const PairTargets<A>& of, const PairUpstream<A>& up, int64_t i,
                           int64_t j0, int64_t m, const A* v, A* w) {
  constexpr int64_t W = Vec<A>::size, kSegment = 512;
  constexpr A none = PairTargets<A>::kNone;
  const A a = up.row_p[i], b = up.row_t[i];
  const bool columns = up.column_p != nullptr;
  if (a == 0 && b == 0 && !columns) {
    std::fill_n(w, m, A(0));
    return;
  }
  alignas(64) A s[kSegment], slope[kSegment];
  for (int64_t first = 0; first < m; first += kSegment) {
    const int64_t n = std::min(kSegment, m - first), j = j0 + first;
    A* to = w + first;
    of.logits(i, j, n, v + first, s);
    if (of.softcap != 0) {  // 1 − tanh², before w, which may lie over v, is written
      const Vec<A> one(A(1)), inverse(1 / of.softcap);
      for (int64_t c = 0; c < n; c += W) {
        const Vec<A> t = tanh(inverse * load_first<A>(v + first + c, std::min(W, n - c)));
        (one - t * t).store(slope + c);
      }
    }
    const Vec<A> row_a(a * (up.row_factor ? up.row_factor[i] : A(1))),
        row_shift(up.row_shift[i] == none ? A(0) : up.row_shift[i]);
    const Vec<A> one(A(1)), zero(A(0)), nothing(none);
    for (int64_t c = 0; c < n; c += W) {
      const int64_t count = std::min(W, n - c);
      const Vec<A> value = load_first<A>(s + c, count);
      const Vec<A> p = of.sigmoid ? one / (one + exp(-value)) : exp_or_zero(value - row_shift);
      Vec<A> weight = a == 0 ? zero : row_a * p;
      if (columns) {
        const Vec<A> shift = load_first<A>(up.column_shift + j + c, count);
        const Vec<A> q = exp_or_zero(value - select(shift == nothing, zero, shift));
        Vec<A> of_column = load_first<A>(up.column_p + j + c, count);
        if (up.column_factor) of_column *= load_first<A>(up.column_factor + j + c, count);
        weight += select(of_column == zero, zero, of_column * q);
      }
      weight.store(to + c, count);
    }
    if (of.uniform != 0 && b != 0)
      for (int64_t c = 0; c < n; ++c)
        if (of.counts(i, j + c)) to[c] += b * of.uniform;
    of.each_positive(i, j, n, [&](int64_t c) {
      if (of.row_share[i] != 0) to[c] += b * of.row_share[i];
      if (columns && of.column_share[j + c] != 0)
        to[c] += up.column_t[j + c] * of.column_share[j + c];
    });
    if (of.softcap != 0)
      for (int64_t c = 0; c < n; ++c) to[c] = to[c] == 0 ? A(0) : to[c] * slope[c];
  }
}

}  // namespace weft
