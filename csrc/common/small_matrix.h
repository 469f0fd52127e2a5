// Functions of k × k matrices in double, row-major, for k up to a few dozen: the small half of the
// tall-skinny algorithms. They run on one CPU thread or on a block of GPU threads: a `Team` says
// which elements are ours and waits for the others, so both processors share one code.
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define WEFT_HOST_DEVICE __host__ __device__
#else
#define WEFT_HOST_DEVICE
#endif

namespace weft::small_matrix {

// A team of one.
struct OneThread {
  static constexpr bool alone = true;
  WEFT_HOST_DEVICE int rank() const { return 0; }
  WEFT_HOST_DEVICE int size() const { return 1; }
  WEFT_HOST_DEVICE void sync() const {}
};

// c = a b; c is neither of them.
template <typename Team>
WEFT_HOST_DEVICE void multiply(Team team, int k, const double* __restrict a,
                               const double* __restrict b, double* __restrict c) {
  if constexpr (Team::alone) {
    for (int i = 0; i < k; ++i) {
      double* row = c + i * k;
      for (int j = 0; j < k; ++j) row[j] = 0;
      for (int l = 0; l < k; ++l)
        for (int j = 0; j < k; ++j) row[j] += a[i * k + l] * b[l * k + j];
    }
  } else {
    for (int e = team.rank(); e < k * k; e += team.size()) {
      double sum = 0;
      for (int l = 0; l < k; ++l) sum += a[e / k * k + l] * b[l * k + e % k];
      c[e] = sum;
    }
  }
  team.sync();
}

WEFT_HOST_DEVICE inline double trace(int k, const double* a) {
  double sum = 0;
  for (int i = 0; i < k; ++i) sum += a[i * k + i];
  return sum;
}

// out (+)= c0 I + c1 a + c2 b.
template <typename Team>
WEFT_HOST_DEVICE void linear(Team team, int k, double c0, double c1, const double* a, double c2,
                             const double* b, double* out, bool accumulate) {
  for (int e = team.rank(); e < k * k; e += team.size()) {
    const double value = (e / k == e % k ? c0 : 0.0) + c1 * a[e] + c2 * b[e];
    out[e] = accumulate ? out[e] + value : value;
  }
  team.sync();
}

constexpr double inverse_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return 1 / product;
}

// (−1)^n / (2n + shift)!: the coefficients of cos √a (shift 0) and of sin √a / √a (shift 1).
template <int shift, int n>
inline constexpr double kSeries = (n % 2 ? -1 : 1) * inverse_factorial(2 * n + shift);

// sum (+ I c0) = Σ_{n=0..8} series_n Aⁿ by Paterson and Stockmeyer: two products, given A² and A³.
template <int shift, typename Team>
WEFT_HOST_DEVICE void series(Team team, int k, double sign, bool constant, const double* a,
                             const double* a2, const double* a3, double* sum, double* work) {
  constexpr double s0 = kSeries<shift, 0>, s1 = kSeries<shift, 1>, s2 = kSeries<shift, 2>,
                   s3 = kSeries<shift, 3>, s4 = kSeries<shift, 4>, s5 = kSeries<shift, 5>,
                   s6 = kSeries<shift, 6>, s7 = kSeries<shift, 7>, s8 = kSeries<shift, 8>;
  linear(team, k, sign * s6, sign * s7, a, sign * s8, a2, sum, false);
  multiply(team, k, a3, sum, work);
  linear(team, k, sign * s3, sign * s4, a, sign * s5, a2, work, true);
  multiply(team, k, a3, work, sum);
  linear(team, k, constant ? sign * s0 : 0.0, sign * s1, a, sign * s2, a2, sum, true);
}

constexpr int kVersineSincWork = 4;  // matrices of scratch

// versine = I − cos √A and sinc = sin √A / √A of a symmetric A >= 0, which is overwritten. Both are
// entire functions of A, so no eigenvalue is needed: Taylor series of degree 8 of A/4^s with
// ‖A/4^s‖ <= 1 (remainder 1/18!, below double's rounding), then s times the double angle,
//     versine ← 2 versine (2 I − versine),     sinc ← sinc (I − versine).
// The versine, not the cosine, is doubled: it is small where angles are, and keeps their digits.
// Doubling multiplies rounding errors by 4 at most, so the error is about ε ‖A‖.
template <typename Team>
WEFT_HOST_DEVICE void versine_sinc(Team team, int k, double* a, double* versine, double* sinc,
                                   double* work) {
  double *a2 = work, *a3 = work + k * k, *x = work + 2 * k * k, *y = work + 3 * k * k;
  int doublings = 0;
  double down = 1;
  for (double bound = trace(k, a); bound > 1 && doublings < 64; bound /= 4) {
    down /= 4;
    ++doublings;
  }
  team.sync();  // all have read the trace
  if (doublings) {
    for (int e = team.rank(); e < k * k; e += team.size()) a[e] *= down;
    team.sync();
  }
  multiply(team, k, a, a, a2);
  multiply(team, k, a, a2, a3);
  series<0>(team, k, -1.0, false, a, a2, a3, versine, x);
  series<1>(team, k, 1.0, true, a, a2, a3, sinc, x);
  for (int i = 0; i < doublings; ++i) {
    multiply(team, k, sinc, versine, x);
    multiply(team, k, versine, versine, y);
    for (int e = team.rank(); e < k * k; e += team.size()) {
      sinc[e] -= x[e];
      versine[e] = 4 * versine[e] - 2 * y[e];
    }
    team.sync();
  }
}

// R⁻¹, upper triangular, of W = RᵀR with a positive diagonal. W is overwritten; where it is not
// positive definite the result is not finite.
template <typename Team>
WEFT_HOST_DEVICE void inverse_cholesky(Team team, int k, double* w, double* inverse) {
  for (int j = 0; j < k; ++j) {
    const double pivot = sqrt(w[j * k + j]);
    team.sync();
    for (int i = j + team.rank(); i < k; i += team.size())
      w[i * k + j] = i == j ? pivot : w[i * k + j] / pivot;
    team.sync();
    for (int i = j + 1 + team.rank(); i < k; i += team.size())
      for (int l = j + 1; l <= i; ++l) w[i * k + l] -= w[i * k + j] * w[l * k + j];
    team.sync();
  }
  for (int j = team.rank(); j < k; j += team.size()) {  // row j of L⁻ᵀ is column j of L⁻¹
    double* row = inverse + j * k;
    for (int i = 0; i < k; ++i) {
      double sum = i == j ? 1.0 : 0.0;
      for (int l = j; l < i; ++l) sum -= w[i * k + l] * row[l];
      row[i] = i < j ? 0.0 : sum / w[i * k + i];
    }
  }
  team.sync();
}

constexpr int kInverseSqrtWork = 3;

// W^(-1/2) of a symmetric W > 0, which is overwritten, by the coupled Newton iteration
//     T = (3 I − Z Y)/2,   Y ← Y T,   Z ← T Z,     from Y = W/c, Z = I,  c >= ‖W‖.
template <typename Team>
WEFT_HOST_DEVICE void inverse_sqrt(Team team, int k, double* w, double* z, double* work) {
  double *t = work, *x = work + k * k, *u = work + 2 * k * k;
  double norm = 0;
  for (int i = 0; i < k; ++i) {
    double sum = 0;
    for (int j = 0; j < k; ++j) sum += fabs(w[i * k + j]);
    norm = sum > norm ? sum : norm;
  }
  team.sync();
  for (int e = team.rank(); e < k * k; e += team.size()) {
    w[e] /= norm;
    z[e] = e / k == e % k ? 1.0 : 0.0;
  }
  team.sync();
  for (int round = 0; round < 100; ++round) {
    multiply(team, k, z, w, t);
    for (int e = team.rank(); e < k * k; e += team.size())
      t[e] = (e / k == e % k ? 1.5 : 0.0) - 0.5 * t[e];
    team.sync();
    const double rest = trace(k, t) - k;  // >= 0, and 0 where all eigenvalues have arrived
    multiply(team, k, w, t, x);
    multiply(team, k, t, z, u);
    for (int e = team.rank(); e < k * k; e += team.size()) {
      w[e] = x[e];
      z[e] = u[e];
    }
    team.sync();
    if (!(rest > 1e-15 * k)) break;
  }
  const double factor = 1 / sqrt(norm);
  for (int e = team.rank(); e < k * k; e += team.size()) z[e] *= factor;
  team.sync();
}

// The sign that Householder's QR gives to each column of Q, relative to the QR with a positive
// diagonal of R whose first k rows are `top` (overwritten): a column is reflected away from its
// pivot, unless nothing is left below it, in rows (`square`, last column) or in length (pivot ±1).
template <typename Team>
WEFT_HOST_DEVICE void householder_signs(Team team, int k, double* top, bool square, double* sign) {
  for (int j = 0; j < k; ++j) {
    const double at = top[j * k + j], away = at >= 0 ? -1.0 : 1.0;
    const bool nothing_below = (square && j == k - 1) || fabs(at) >= 1 - 1e-15;
    const double pivot = at - away;
    team.sync();
    if (team.rank() == 0) sign[j] = nothing_below ? -away : away;
    if (!nothing_below) {
      for (int i = j + 1 + team.rank(); i < k; i += team.size()) {
        const double factor = top[i * k + j] / pivot;
        for (int l = j + 1; l < k; ++l) top[i * k + l] -= factor * top[j * k + l];
      }
    }
    team.sync();
  }
}

}  // namespace weft::small_matrix
