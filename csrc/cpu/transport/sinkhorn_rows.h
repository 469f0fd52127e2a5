// The row half of an iteration over some rows, and in the same pass over them what they add to the
// columns:  s_i = Σ_j K_ij v_j,   log u_i ← (1 − ω) log u_i + ω log u*_i,   c_j += a_i u_i K_ij.
//
// Blocks of a few rows: K is made, or read, and its block is in the nearest cache when the weights
// of the rows are known. One exponential for each entry, and none where K is kept.
#pragma once
#include "cpu/transport/sinkhorn_state.h"

namespace weft {

struct RowsResult {
  double error = 0;    // of these rows, if they are relaxed
  int64_t alive = 0;   // rows with mass
  bool moved = false;  // some F are new: neither K nor c belongs to them
};

template <typename T>
class RowUpdate {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int64_t W = V::size, kBlock = SinkhornState<T>::kBlock;
  static constexpr int64_t kLanes = std::max(W, kBlock);

  // `relax`: rows count in the error; their factor is `omega`.
  RowUpdate(SinkhornState<T>& state, bool relax, double omega)
      : s_(state), relax_(relax), omega_(A(omega)), plain_(!state.damps_a && omega == 1) {}

  RowsResult run(int64_t part) const {
    static thread_local Scratch storage;
    A* buffer = storage.get<A>((1 + (s_.K ? 0 : kBlock)) * s_.ld);
    const CostReader<T> read(s_.cost, s_.k, buffer);
    A* c = s_.c + part * s_.ld;
    std::fill_n(c, s_.ld, A(0));
    RowsResult result;
    const int64_t last = s_.part_row(part + 1), step = s_.block_rows();
    for (int64_t i = s_.part_row(part); i < last; i += step) {
      const int64_t count = std::min(step, last - i);
      A* K = s_.K ? s_.K + i * s_.ld : buffer + s_.ld;
      alignas(64) A sum[kLanes], weight[kLanes], before[kLanes];
      std::copy_n(s_.F + i, count, before);
      if (s_.built) {
        multiply_rows(K, count, s_.ld, s_.v, sum);
      } else {
        absorb(i, count);
        for (int64_t r = 0; r < count; ++r)
          sum[r] = s_.F[i + r] == -kInfinity
                       ? A(0)
                       : make_kernel(read(i + r), s_.F[i + r], s_.H, s_.v, K + r * s_.ld);
      }
      for (int64_t r = 0; r < count; ++r)
        if (!(sum[r] >= A(kLeastSum) && sum[r] <= A(1 / kLeastSum)))
          sum[r] = from_maximum(read, i + r, K + r * s_.ld);
      if (plain_)
        scale(i, count, sum, weight);
      else
        move(i, count, sum, before, weight, result);
      for (int64_t r = 0; r < count; ++r) {
        if (sum[r] == 0 && relax_) result.error += double(s_.a[i + r]);
        result.alive += weight[r] > 0;
      }
      add_rows(K, count, s_.ld, weight, c);
    }
    return result;
  }

 private:
  static constexpr A kInfinity = SinkhornState<T>::kInfinity;

  void absorb(int64_t i, int64_t count) const {
    for (int64_t r = 0; r < count; r += W) {
      const int64_t n = std::min(W, count - r);
      A* F = s_.F + i + r;
      (load_first<A>(F, n) + logarithm(load_first<A>(s_.u + i + r, n))).store(F, n);
    }
  }

  // A row whose shift is of no use: it becomes that of the largest exponent.
  [[gnu::noinline]] A from_maximum(const CostReader<T>& read, int64_t i, A* K) const {
    if (s_.built && s_.F[i] == -kInfinity) return A(0);  // as when K was made
    const RowCosts<A> row = read(i);
    const A largest = largest_exponent(row, s_.H);
    s_.F[i] = -largest;
    if (largest != -kInfinity) return make_kernel(row, -largest, s_.H, s_.v, K);
    s_.F[i] = -kInfinity;  // nothing to go to
    std::fill_n(K, s_.ld, A(0));
    return A(0);
  }

  void scale(int64_t i, int64_t count, const A* sum, A* weight) const {
    for (int64_t r = 0; r < count; r += W) {
      const int64_t n = std::min(W, count - r);
      const V s = load_first<A>(sum + r, n);
      const V u = select(s == V(A(0)), V(A(0)), V(A(1)) / s);
      u.store(s_.u + i + r, n);
      (load_first<A>(s_.a + i + r, n) * u).store(weight + r);
    }
  }

  // −λ log s + (λ − 1)(F + T): in double, as these large numbers leave a small one.
  V damped(int64_t i, const A* sum, int64_t count) const {
    alignas(64) A next[W] = {};
    for (int64_t r = 0; r < count; ++r) {
      if (sum[r] == 0) continue;
      const double damp = double(s_.damp_a[i + r]);
      const double potential = double(s_.F[i + r]) + s_.translation;
      next[r] = A((damp - 1) * potential - damp * s_.log_weight(sum[r]));
    }
    return V::load(next);
  }

  // Damped, or over-relaxed from where a row was: log u + before.
  [[gnu::noinline]] void move(int64_t i, int64_t count, const A* sum, const A* before, A* weight,
                              RowsResult& result) const {
    const V none(-kInfinity), zero(A(0)), one(A(1)), omega(omega_);
    for (int64_t r = 0; r < count; r += W) {
      const int64_t n = std::min(W, count - r);
      const V s = load_first<A>(sum + r, n), F = load_first<A>(s_.F + i + r, n);
      const auto empty = s == zero;
      V next = s_.damps_a ? damped(i + r, sum + r, n) : -logarithm(s);
      if (omega_ != 1) {
        const V old =
            logarithm(load_first<A>(s_.u + i + r, n)) + (load_first<A>(before + r, n) - F);
        const V best = next;
        next = old + omega * (best - old);
        next = select(old == none, best, next);
        const V a = load_first<A>(s_.a + i + r, n), apart = min(V(A(126)), next - best);
        result.error +=
            double(reduce_sum(select(empty, zero, a * abs(power_or_zero(apart) - one))));
      }
      next = select(empty, zero, next);
      const V drift{A(kRowDrift)};
      if (any(abs(next) > drift)) {
        result.moved = true;
        const V shift = select(empty, F, F + next);
        next -= select(empty, zero, shift - F);
        shift.store(s_.F + i + r, n);
      }
      const V u = select(empty, zero, power_or_zero(next));
      u.store(s_.u + i + r, n);
      (load_first<A>(s_.a + i + r, n) * u).store(weight + r);
    }
  }

  SinkhornState<T>& s_;
  bool relax_;
  A omega_;
  bool plain_;
};

}  // namespace weft
