// The potentials of each of Sinkhorn's plain iterations, which its unrolled gradient goes back
// through:
//
//   F_i = −ε log Σ_j b_j e^((g_j − C_ij) / ε)    f_i = λ_i F_i
//   G_j = −ε log Σ_i a_i e^((f_i − C_ij) / ε)    g_j = λ_j G_j
//
// One exponential for each entry: E_ij = e^((F'_i + g_j − C_ij) / ε) with F' of the iteration
// before gives s_i = Σ_j b_j E_ij and F_i = F'_i − ε log s_i, then c_j = Σ_i a_i e^((f_i − F'_i) /
// ε) E_ij and G_j = g_j − ε log c_j. A row or column whose sum is too large or too small for that
// starts from its largest exponent instead.
#pragma once
#include "cpu/transport/rows.h"

namespace weft {

template <typename T>
class UnrolledHistory {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  // g0 is null for zeros.
  UnrolledHistory(const Extended<T>& p, const RowBlocks& blocks, double rho_a, double rho_b,
                  int64_t iterations, const A* g0)
      : p_(p), blocks_(blocks), size_(p.rows + p.columns), ld_(round_up(p.columns, V::size)) {
    static thread_local Scratch storage, sums;
    potentials_ = storage.get<A>((iterations + 3) * size_);
    damping_ = potentials_ + (iterations + 1) * size_;
    log_weights_ = damping_ + size_;
    c_ = sums.get<A>(blocks.count() * ld_);
    const double of_rows = damping(rho_a, double(p.cost.epsilon));
    const double of_columns = damping(rho_b, double(p.cost.epsilon));
    for (int64_t i = 0; i < size_; ++i) {
      const bool row = i < p.rows;
      const bool exact =
          row ? p.cost.has_row && i + 1 == p.rows : p.cost.has_column && i + 1 == size_;
      damping_[i] = A(exact ? 1.0 : row ? of_rows : of_columns);
      const A weight = row ? p.a[i] : p.b[i - p.rows];
      log_weights_[i] = weight != 0 ? std::log(weight) : -kInfinity;
    }
    for (int64_t j = 0; j < p.columns; ++j) g(0)[j] = g0 ? g0[j] : A(0);
    for (int64_t t = 1; t <= iterations; ++t) iterate(t);
  }

  // f of iterations 1, 2, ...; g of 0, 1, ...
  A* f(int64_t t) const { return potentials_ + t * size_; }
  A* g(int64_t t) const { return f(t) + p_.rows; }
  const A* row_damping() const { return damping_; }
  const A* column_damping() const { return damping_ + p_.rows; }
  const A* log_a() const { return log_weights_; }
  const A* log_b() const { return log_weights_ + p_.rows; }

 private:
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();
  static constexpr int64_t kChunk = 256;  // columns
  // A sum of what has a shift near its own; of others, digits may be lost.
  static bool good(double sum) { return sum >= 1e-20 && sum <= 1e20; }

  void iterate(int64_t t) {
    A *f_now = f(t), *g_now = g(t);
    const A *g_old = g(t - 1), *f_old = t > 1 ? f(t - 1) : nullptr;
    blocks_.run([&](int64_t k, int64_t first, int64_t last) {
      static thread_local Scratch buffers;
      A *buffer = buffers.get<A>(2 * ld_), *E = buffer + ld_, *c = c_ + k * ld_;
      std::fill_n(c, ld_, A(0));
      for (int64_t i = first; i < last; ++i) {
        A sign;
        const A* C = p_.costs(i, buffer, sign);
        A shift = f_old ? f_old[i] / damping_[i] : -kInfinity;
        A sum = shift > -kInfinity ? ratios(C, sign, shift, g_old, E) : A(0);
        if (!good(double(sum))) {
          shift = from_largest(C, sign, g_old);
          sum = shift > -kInfinity ? ratios(C, sign, shift, g_old, E), A(1) : A(1);
        }
        const A F = shift - p_.cost.epsilon * std::log(sum);
        f_now[i] = damping_[i] * F;
        if (p_.a[i] == 0 || f_now[i] == -kInfinity) continue;
        const V weight(p_.a[i] * std::exp((f_now[i] - shift) * p_.inverse));
        for_vectors<A>(p_.columns, [&](int64_t j, int64_t n) {
          store_first(fma(load_first<A>(E + j, n), weight, load_first<A>(c + j, n)), c + j, n);
        });
      }
    });
    bool any_bad = false;
    for (int64_t j = 0; j < p_.columns; ++j) {
      double c = 0;
      for (int64_t k = 0; k < blocks_.count(); ++k) c += double(c_[k * ld_ + j]);
      const bool bad = !good(c);
      any_bad = any_bad || bad;
      const A G = A(double(g_old[j]) - double(p_.cost.epsilon) * std::log(c));
      g_now[j] = bad ? kInfinity : column_damping()[j] * G;
    }
    if (any_bad) columns_from_largest(f_now, g_now);
  }

  // E_j = e^((shift + g_j − C_j) / ε); returns Σ b_j E_j.
  A ratios(const A* C, A sign, A shift, const A* g, A* E) const {
    V sum(A(0));
    for_vectors<A>(p_.columns, [&](int64_t j, int64_t n) {
      const V x = p_.scaled(V(shift) + load_first<A>(g + j, n), C, sign, j, n);
      const V e = exp(x);
      store_first(e, E + j, n);
      sum = fma(load_first<A>(E + j, n), load_first<A>(p_.b + j, n), sum);
    });
    return reduce_sum(sum);
  }

  // F of a row; −∞ of nothing.
  [[gnu::noinline]] A from_largest(const A* C, A sign, const A* g) const {
    const auto each = [&](auto f) {
      for_vectors<A>(p_.columns, [&](int64_t j, int64_t n) {
        const V x = p_.scaled(load_first<A>(g + j, n), C, sign, j, n);
        const auto none = load_first<A>(p_.b + j, n) == V(A(0));  // the lanes past the end too
        f(select(none, V(-kInfinity), x + load_first<A>(log_b() + j, n)));
      });
    };
    V most(-kInfinity), total(A(0));
    each([&](V x) { most = maximum(most, x); });
    const A largest = reduce_max(most);
    if (largest == -kInfinity) return -kInfinity;
    each([&](V x) { total += exp_or_zero(x - V(largest)); });
    const A sum = reduce_sum(total);
    return -p_.cost.epsilon * (std::log(sum) + largest);
  }

  // Columns with g = ∞ by a maximum and a sum over the rows; −∞ of nothing.
  [[gnu::noinline]] void columns_from_largest(const A* f_now, A* g_now) const {
    parallel_for(0, ceil_div(p_.columns, kChunk), 1, [&](int64_t begin, int64_t end) {
      alignas(64) A largest[kChunk], sum[kChunk], costs[kChunk];
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kChunk, last = std::min(first + kChunk, p_.columns);
        if (std::count(g_now + first, g_now + last, kInfinity) == 0) continue;
        const int64_t count = last - first;
        const auto each = [&](auto f) {
          for (int64_t i = 0; i < p_.rows; ++i) {
            if (p_.a[i] == 0 || f_now[i] == -kInfinity) continue;
            p_.cost.costs(i, first, last, costs);
            for_vectors<A>(count, [&](int64_t j, int64_t n) {
              f(j, n, V(log_a()[i]) + p_.scaled(V(f_now[i]), costs, A(1), j, n));
            });
          }
        };
        std::fill_n(largest, kChunk, -kInfinity), std::fill_n(sum, kChunk, A(0));
        each([&](int64_t j, int64_t n, V x) {
          store_first(maximum(load_first<A>(largest + j, n), x), largest + j, n);
        });
        each([&](int64_t j, int64_t n, V x) {
          const V most = load_first<A>(largest + j, n);
          const V e = select(most == V(-kInfinity), V(A(0)), exp_or_zero(x - most));
          store_first(load_first<A>(sum + j, n) + e, sum + j, n);
        });
        for (int64_t j = 0; j < count; ++j) {
          A& g = g_now[first + j];
          if (g != kInfinity) continue;
          const A G = -p_.cost.epsilon * (std::log(sum[j]) + largest[j]);
          g = largest[j] == -kInfinity ? -kInfinity : column_damping()[first + j] * G;
        }
      }
    });
  }

  const Extended<T>& p_;
  const RowBlocks& blocks_;
  int64_t size_, ld_;
  A *potentials_, *damping_, *log_weights_, *c_;
};

}  // namespace weft
