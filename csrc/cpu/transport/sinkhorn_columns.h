// The column half of an iteration: from c = Σ_i a_i u_i K_ij to v, with ε log of the ratios
//
//   log v_j ← (1 − ω) log v_j + ω log(b_j / c_j),   damped:  λ log(b_j / c_j) + (λ − 1)(…),
//
// and the error, Σ_j |c_j v_j − b_j| with the v before: what the columns were off. Where c has lost
// its digits, the logarithm of the sum is made from the costs.
#pragma once
#include "cpu/transport/sinkhorn_state.h"

namespace weft {

template <typename T>
class ColumnUpdate {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int64_t W = V::size, kChunk = 512;

  // `omega`: of relaxation; `lost`: c belongs to no potential; `threads`: a sweep may use them.
  ColumnUpdate(SinkhornState<T>& state, double omega, bool lost, bool threads)
      : s_(state), omega_(A(omega)), lost_(lost), threads_(threads) {}

  // `rows`: how many have mass. Returns the error.
  double run(int64_t rows) {
    revived_ = rows != s_.swept_rows;
    add_parts();
    double error = 0;
    const bool plain = !s_.damps_b && !s_.translates && omega_ == 1 && !lost_;
    if (plain && scale(error)) return error;
    return move(rows);
  }

  // −log Σ_i a_i 2^(F_i + log u_i − k C_ij) of columns [first, last), +∞ where nothing is summed.
  static void soft_minima(const SinkhornState<T>& s, int64_t first, int64_t last, A* out) {
    static thread_local Scratch storage;
    const int64_t count = last - first, size = round_up(count, W);
    A *largest = storage.get<A>(3 * size), *total = largest + size, *costs = total + size;
    std::fill_n(largest, size, -kInfinity), std::fill_n(total, 2 * size, A(0));
    const V times(-s.k), none(-kInfinity), zero(A(0));
    const auto each_row = [&](auto f) {
      for (int64_t i = 0; i < s.rows; ++i) {
        if (s.u[i] == 0 || s.a[i] == 0) continue;
        const V shift(A(double(s.F[i]) + s.log_weight(s.u[i]) + s.log_weight(s.a[i])));
        s.cost.costs(i, first, last, costs);
        for (int64_t j = 0; j < size; j += W) f(j, fma(V::load(costs + j), times, shift));
      }
    };
    each_row([&](int64_t j, V x) { maximum(V::load(largest + j), x).store(largest + j); });
    each_row([&](int64_t j, V x) {
      const V most = V::load(largest + j);
      (V::load(total + j) + power_or_zero(x - select(most == none, zero, most))).store(total + j);
    });
    for (int64_t j = 0; j < size; j += W)
      (-logarithm(V::load(total + j)) - V::load(largest + j)).store(total + j);
    for (int64_t j = 0; j < count; ++j) out[j] = largest[j] == -kInfinity ? kInfinity : total[j];
  }

 private:
  static constexpr A kInfinity = SinkhornState<T>::kInfinity;

  void add_parts() const {
    for (int64_t part = 1; part < s_.parts(); ++part)
      for (int64_t j = 0; j < s_.ld; j += W)
        (V::load(s_.c + j) + V::load(s_.c + part * s_.ld + j)).store(s_.c + j);
  }

  // Columns whose c says nothing. Those that no row reached before are asked again when more do.
  Mask<A> lost_columns(int64_t j) const {
    const V c = V::load(s_.c + j), none(-kInfinity), zero(A(0));
    const auto weighted = V::load(s_.b + j) > zero;
    const auto off = weighted & ((c < V(A(kLeastColumn))) | (c > V(A(1 / kLeastColumn))));
    const auto dead = V::load(s_.H + j) == none;
    return lost_ ? (revived_ ? weighted : weighted & ~dead) : (revived_ ? off : off & ~dead);
  }

  // v = b / c; false if columns are lost.
  bool scale(double& error) {
    const V zero(A(0)), none(-kInfinity);
    const V low(A(s_.power(-kColumnDrift))), high(A(s_.power(kColumnDrift)));
    V missed;
    bool near = true;
    for (int64_t j = 0; j < s_.ld; j += W) {
      if (any(lost_columns(j))) return false;
      const V c = V::load(s_.c + j), b = V::load(s_.b + j);
      const auto dead = V::load(s_.H + j) == none;
      const V next = select(dead, zero, b / c);
      near = near && all(dead | ((next >= low) & (next <= high)));
      missed += abs(c * V::load(s_.v + j) - b);
      next.store(s_.L + j);
    }
    error = double(reduce_sum(missed));
    if (s_.K && near) {
      std::swap(s_.v, s_.L);
    } else {
      for (int64_t j = 0; j < s_.ld; j += W) logarithm(V::load(s_.L + j)).store(s_.L + j);
      absorb();
    }
    return true;
  }

  // The same with logarithms, of all that is not plain.
  [[gnu::noinline]] double move(int64_t rows) {
    const V zero(A(0)), one(A(1)), none(-kInfinity), infinity(kInfinity), drift{A(kColumnDrift)};
    bool any_lost = false;
    for (int64_t j = 0; j < s_.ld; j += W) {
      const auto lost = lost_columns(j), dead = V::load(s_.H + j) == none;
      any_lost = any_lost || any(lost);
      logarithm(V::load(s_.v + j)).store(s_.L + j);
      const V ratio =
          s_.damps_b ? damped_ratios(j) : logarithm(V::load(s_.b + j) / V::load(s_.c + j));
      select(lost, infinity, select(dead, zero, ratio)).store(s_.c + j);
    }
    if (any_lost) find_lost(rows);
    const V omega(omega_);
    bool near = !any_lost;
    for (int64_t j = 0; j < s_.ld; j += W) {
      const V old = V::load(s_.L + j), H = V::load(s_.H + j);
      const V best = V::load(s_.c + j);
      V next = best;
      if (omega_ != 1) next = select(old == infinity, best, old + omega * (best - old));
      next = select(H == none, zero, next);
      near = near && all(abs(next) <= drift);
      next.store(s_.L + j);
      (old - best).store(s_.c + j);
    }
    if (s_.K && near)
      for (int64_t j = 0; j < s_.ld; j += W)
        select(V::load(s_.H + j) == none, zero, power_or_zero(V::load(s_.L + j))).store(s_.v + j);
    else
      absorb();
    const V shift(A(s_.translates ? s_.translate() : 0));
    V missed;
    for (int64_t j = 0; j < s_.ld; j += W) {
      const V b = V::load(s_.b + j), apart = min(V(A(126)), V::load(s_.c + j) + shift);
      const V change = select(V::load(s_.H + j) == none, one, abs(power_or_zero(apart) - one));
      missed += select(b > zero, b * change, zero);
    }
    return double(reduce_sum(missed));
  }

  // λ log_ratio + (λ − 1)(H_j − log b_j − T): in double, as these large numbers leave a small one.
  A damped(int64_t j, double log_ratio) const {
    const double damp = double(s_.damp_b[j]);
    const double potential = double(s_.H[j]) - s_.log_weight(s_.b[j]) - s_.translation;
    return A(damp * log_ratio + (damp - 1) * potential);
  }
  V damped_ratios(int64_t j) const {
    alignas(64) A best[W];
    for (int64_t n = 0; n < W; ++n) {
      const double ratio = s_.log_weight(s_.b[j + n]) - s_.log_weight(s_.c[j + n]);
      best[n] = s_.H[j + n] == -kInfinity ? A(0) : damped(j + n, ratio);
    }
    return V::load(best);
  }

  // Lost columns, those with c = ∞, get a new shift, from which c and L are measured.
  void find_lost(int64_t rows) {
    const auto chunk = [&](int64_t number) {
      alignas(64) A found[kChunk];
      const int64_t first = number * kChunk, last = std::min(first + kChunk, s_.columns);
      if (std::count(s_.c + first, s_.c + last, kInfinity) == 0) return;
      soft_minima(s_, first, last, found);
      for (int64_t j = first; j < last; ++j) {
        if (s_.c[j] != kInfinity) continue;
        const A before = s_.H[j], now = found[j - first];
        s_.H[j] = now == kInfinity ? -kInfinity : now + s_.log_b[j];
        s_.L[j] = before == -kInfinity ? kInfinity : s_.L[j] + (before - s_.H[j]);
        s_.c[j] = s_.damps_b ? damped(j, 0) : A(0);
      }
    };
    const int64_t chunks = ceil_div(s_.columns, kChunk);
    if (threads_)
      parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t number = begin; number < end; ++number) chunk(number);
      });
    else
      for (int64_t number = 0; number < chunks; ++number) chunk(number);
    s_.swept_rows = rows;
  }

  // L into H, so far as H can hold it; v is the rest.
  void absorb() {
    const V none(-kInfinity), zero(A(0));
    for (int64_t j = 0; j < s_.ld; j += W) {
      const V H = V::load(s_.H + j), L = V::load(s_.L + j);
      const auto dead = H == none;
      const V next = select(dead, none, H + L);
      select(dead, zero, power_or_zero(L - (next - H))).store(s_.v + j);
      next.store(s_.H + j);
    }
    s_.built = false;
  }

  SinkhornState<T>& s_;
  A omega_;
  bool lost_, threads_, revived_ = true;
};

}  // namespace weft
