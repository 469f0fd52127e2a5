// What a problem is between two of Sinkhorn's iterations.
//
// Potentials are kept in units of exponents, as sums of a shift and a logarithm,
//
//   k f_i = F_i + log u_i + T          k g_j + log b_j = H_j + log v_j − T          k = kBase / ε
//
// with K_ij = 2^(F_i + H_j − k C_ij) the part that is made from costs: P_ij = a_i u_i K_ij v_j. An
// iteration is then s = K v, u = 1 / s, c = Kᵀ(a u), v = b / c, the scaling form; where K does not
// stay in cache it is made anew with u and v absorbed in F and H, the log form, which is the same
// with u and v near 1. T is the translation of an unbalanced problem: it leaves K as it is.
#pragma once
#include "common/scratch.h"
#include "cpu/transport/kernel_rows.h"

namespace weft {

// A sum or a ratio beyond these has lost digits to underflow: it is made again from its maximum.
inline constexpr double kLeastSum = 0x1p-60, kLeastColumn = 0x1p-80;
// |log u| and |log v| up to which K serves.
inline constexpr double kRowDrift = 20, kColumnDrift = 12;

template <typename T>
struct SinkhornState {
  using A = Acc<T>;
  static constexpr int64_t W = Vec<A>::size, kBlock = 8;
  static constexpr int64_t kKernelBytes = 512 << 10;  // of a K that is kept: half of an L2 cache
  static constexpr int64_t kBlockBytes = 40 << 10;    // of rows of one that is not
  static constexpr int64_t kPartEntries = 1 << 15;    // of rows with column sums of their own
  static constexpr int64_t kPartsBytes = 512 << 10;   // of column sums
  static constexpr int64_t kMostParts = 32;
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();

  CostMatrix<T> cost;
  int64_t rows, columns, ld;  // ld: columns of whole vectors
  A k;
  double rho_a, rho_b;
  bool translates;  // both marginals are penalties, and there is no dustbin
  bool damps_a, damps_b;
  A *a, *damp_a, *F, *u;              // of rows; damp: λ
  A *b, *log_b, *damp_b, *H, *v, *L;  // of columns; L: room for the next log v
  A* c;                               // column sums of each part
  A* K;                               // or null: made a block at a time
  bool built = false;                 // K belongs to F and H
  double translation = 0;
  int64_t swept_rows = -1;  // that had mass when the columns without any were last looked at

  // Of shape alone, as all that the order of sums depends on.
  SinkhornState(const CostMatrix<T>& cost, double rho_a, double rho_b, Scratch& storage)
      : cost(cost),
        rows(cost.rows()),
        columns(cost.columns()),
        ld(round_up(columns, W)),
        k(A(double(kBase<A>) / double(cost.epsilon))),
        rho_a(rho_a),
        rho_b(rho_b),
        translates(std::isfinite(rho_a) && std::isfinite(rho_b) && !cost.has_row &&
                   !cost.has_column),
        damps_a(std::isfinite(rho_a)),
        damps_b(std::isfinite(rho_b)) {
    const int64_t padded = round_up(rows, std::max<int64_t>(W, kBlock)), size = rows * ld;
    const bool keeps = size * int64_t(sizeof(A)) <= kKernelBytes;
    A* next = storage.get<A>(4 * padded + (6 + parts()) * ld + (keeps ? size : 0));
    const auto take = [&](A*& array, int64_t count) { array = next, next += count; };
    for (A** array : {&a, &damp_a, &F, &u}) take(*array, padded);
    for (A** array : {&b, &log_b, &damp_b, &H, &v, &L}) take(*array, ld);
    take(c, parts() * ld);
    K = keeps ? next : nullptr;
  }

  int64_t parts() const {
    if (rows * ld * int64_t(sizeof(A)) <= kKernelBytes) return 1;
    const int64_t fit = kPartsBytes / (ld * int64_t(sizeof(A)));
    const int64_t most = std::clamp<int64_t>(fit, 2, kMostParts);
    return std::clamp<int64_t>(std::min(rows, rows * ld / kPartEntries), 1, most);
  }
  // Rows [first, last) of a part.
  int64_t part_row(int64_t part) const {
    return std::min(rows, ceil_div(ceil_div(rows, kBlock) * part, parts()) * kBlock);
  }
  int64_t block_rows() const {
    const int64_t fit = kBlockBytes / std::max<int64_t>(ld * int64_t(sizeof(A)), 1);
    return fit >= 8 ? 8 : fit >= 4 ? 4 : 2;
  }

  // Weights and the start: `g` is a potential, or null for 0.
  void start(const A* weight_a, int64_t stride_a, const A* weight_b, int64_t stride_b, const A* g,
             int64_t stride_g) {
    const double eps = double(cost.epsilon);
    for (int64_t i = 0; i < rows; ++i) {
      a[i] = weight_a[cost.row_at(i) * stride_a];
      damp_a[i] = i < cost.n ? A(damping(rho_a, eps)) : A(1);
      F[i] = -kInfinity, u[i] = A(0);
    }
    for (int64_t j = 0; j < ld; ++j) {
      const bool real = j < columns;
      b[j] = real ? weight_b[cost.column_at(j) * stride_b] : A(0);
      damp_b[j] = j < cost.m ? A(damping(rho_b, eps)) : A(1);
      log_b[j] = A(log_weight(b[j]));
      const double potential = g && real ? double(g[cost.column_at(j) * stride_g]) * k : 0;
      const double whole = potential + log_weight(b[j]);
      H[j] = A(whole);
      v[j] = H[j] == -kInfinity ? A(0) : A(power(whole - double(H[j])));
    }
  }

  static double log_weight(A weight) { return std::log(double(weight)) * double(kBase<A>); }
  static double power(double x) { return std::exp(x / double(kBase<A>)); }

  // The best (f + t, g − t) of a problem with two penalties: t is added to `translation`.
  double translate() {
    const double x = mass(rho_a, rows, a, F, u, nullptr, translation);
    const double y = mass(rho_b, columns, b, H, v, log_b, -translation);
    const double by = rho_a * rho_b / (rho_a + rho_b) * (x - y) * double(k);
    if (!std::isfinite(by)) return 0;
    translation += by;
    return by;
  }

  // f_i and g_j, of columns without weight those of the last sweep.
  A row_potential(int64_t i) const {
    if (u[i] == 0) return -kInfinity;
    return A((double(F[i]) + log_weight(u[i]) + translation) / double(k));
  }
  A column_potential(int64_t j) const {
    if (H[j] == -kInfinity) return -kInfinity;
    return A((double(H[j]) + log_weight(v[j]) - log_weight(b[j]) - translation) / double(k));
  }

 private:
  // log Σ w e^(−p / ρ) of the potentials p, which are 0 for this where they are −∞.
  double mass(double rho, int64_t count, const A* w, const A* shift, const A* power, const A* log_w,
              double offset) const {
    const auto exponent = [&](int64_t i) {
      if (shift[i] == -kInfinity) return 0.0;
      const double p = double(shift[i]) + log_weight(power[i]) - (log_w ? double(log_w[i]) : 0);
      return -(p + offset) / (double(k) * rho);
    };
    double largest = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t i = 0; i < count; ++i)
      if (w[i] > 0) largest = std::max(largest, exponent(i));
    for (int64_t i = 0; i < count; ++i)
      if (w[i] > 0) total += double(w[i]) * std::exp(exponent(i) - largest);
    return std::log(total) + largest;
  }
};

}  // namespace weft
