// Matrices of at most 8 x 8, one in each lane: all iterations run in registers.
//
// Rows come first here; for rows last the matrix is read transposed. Without a stabilizer
//
//     Q_ij = u_i v_j A_ij,   A_ij = exp(y_ij − max_i y_ij),   y_ij = x_ij / epsilon − max_j x_ij /
//     epsilon
//
// with v_j = exp(max_i y_ij) to begin with, so that no sum vanishes; with stabilizer s
// A = a softmax(x / epsilon) + s, u = v = 1, and the first step is done. Then in turn
//
//     u_i <- 1 / Σ_j A_ij v_j                        v_j <- 1 / Σ_i A_ij u_i
//     u_i <- a u_i / (u_i Σ_j A_ij v_j + s)          v_j <- v_j / (v_j Σ_i A_ij u_i + s)
//
// The backward keeps u and v of every iteration, some kilobytes, and goes back through them: of
// z' = a z / (z σ + s) with σ = Σ A w it is σ̄ = −z̄' z'² / a, z̄ = z̄' (z'/z)² s / a, and σ̄ adds to
// the gradients of A and of w.
#pragma once
#include <algorithm>

#include "common/math.h"
#include "common/scratch.h"
#include "common/transpose.h"
#include "cpu/transport/temperature.h"

namespace weft {

inline constexpr int kSmallest = 8;

// 1 / x for x in the range of what is summed here; correct to the last place or the one before.
inline VecF fast_reciprocal(VecF x) {
#if defined(__AVX512F__)
  const VecF r(_mm512_maskz_rcp14_ps(0xffff, x.v));
  return fma(fma(-x, r, VecF(1.0f)), r, r);
#else
  return VecF(1.0f) / x;
#endif
}
inline VecD fast_reciprocal(VecD x) { return VecD(1.0) / x; }

// kN = kM = 0: sizes that the compiler does not know.
template <typename A, int kN, int kM>
class SmallNormalizer {
  using V = Vec<A>;
  static constexpr int64_t W = V::size;

 public:
  SmallNormalizer(int N, int M, Temperature<A> temperature, int64_t iterations, bool transposed,
                  A stabilizer)
      : rows_(transposed ? M : N),
        columns_(transposed ? N : M),
        row_step_(transposed ? 1 : M),
        column_step_(transposed ? M : 1),
        iterations_(iterations),
        temperature_(temperature),
        s_(stabilizer),
        size_(A(columns_) / A(rows_)) {}

  // Entry e of the matrices is the vector at e W, and becomes the result.
  void forward(A* matrices) const {
    V a[kEntries], u[kLine], v[kLine];
    start(matrices, a, u, v);
    for (int64_t t = 0; t < iterations_; ++t) iterate(a, u, v, t == 0);
    each([&](int i, int j) { (a[at(i, j)] * u[i] * v[j]).store(place(matrices, i, j)); });
  }

  // From `grad` and scores x to the gradient in x.
  void backward(const A* grad, A* x) const {
    V a[kEntries], u[kLine], v[kLine];
    static thread_local Scratch scratch;
    A* history = scratch.get<A>((iterations_ + 1) * 2 * kLine * W);
    start(x, a, u, v);
    keep(u, v, history);
    for (int64_t t = 0; t < iterations_; ++t) {
      iterate(a, u, v, t == 0);
      keep(u, v, history + (t + 1) * 2 * kLine * W);
    }
    V of_a[kEntries], of_u[kLine], of_v[kLine];
    for (int i = 0; i < n(); ++i) of_u[i] = V();
    for (int j = 0; j < m(); ++j) of_v[j] = V();
    each([&](int i, int j) {
      const V g = V::load(place(grad, i, j)), ga = g * a[at(i, j)];
      of_a[at(i, j)] = g * u[i] * v[j];
      of_u[i] = fma(ga, v[j], of_u[i]);
      of_v[j] = fma(ga, u[i], of_v[j]);
    });
    const V s(s_), size(A(1) / size_);
    for (int64_t t = iterations_; t > 0; --t) {
      const A* now = history + t * 2 * kLine * W;
      const A* before = now - 2 * kLine * W;
      for (int i = 0; i < n(); ++i) u[i] = V::load(now + i * W);
      for (int j = 0; j < m(); ++j) {
        const V after = V::load(now + (kLine + j) * W);
        V sum = -(of_v[j] * after) * after;
        v[j] = V::load(before + (kLine + j) * W);
        of_v[j] = s_ ? s * of_v[j] * (after / v[j]) * (after / v[j]) : V();
        for (int i = 0; i < n(); ++i) {
          of_a[at(i, j)] = fma(sum, u[i], of_a[at(i, j)]);
          of_u[i] = fma(sum, a[at(i, j)], of_u[i]);
        }
      }
      if (s_ && t == 1) break;
      for (int i = 0; i < n(); ++i) {
        V sum = -(of_u[i] * u[i]) * u[i];
        if (s_) {
          const V ratio = u[i] / V::load(before + i * W);
          sum *= size;
          of_u[i] *= s * size * ratio * ratio;
        } else {
          of_u[i] = V();
        }
        for (int j = 0; j < m(); ++j) {
          of_a[at(i, j)] = fma(sum, v[j], of_a[at(i, j)]);
          of_v[j] = fma(sum, a[at(i, j)], of_v[j]);
        }
      }
    }
    for (int i = 0; i < n(); ++i) {
      V mean;
      if (s_)
        for (int j = 0; j < m(); ++j) {
          a[at(i, j)] -= s;
          mean = fma(a[at(i, j)] * size, of_a[at(i, j)], mean);
        }
      for (int j = 0; j < m(); ++j)
        (a[at(i, j)] * (of_a[at(i, j)] - mean) * V(temperature_.high)).store(place(x, i, j));
    }
  }

 private:
  static constexpr int kLine = kN ? std::max(kN, kM) : kSmallest;
  static constexpr int kEntries = kLine * kLine;
  int n() const { return kN ? kN : rows_; }
  int m() const { return kM ? kM : columns_; }
  static int at(int i, int j) { return i * kLine + j; }
  template <typename P>
  P place(P matrices, int i, int j) const {
    return matrices + (i * row_step_ + j * column_step_) * W;
  }
  template <typename F>
  void each(F f) const {
    for (int i = 0; i < n(); ++i)
      for (int j = 0; j < m(); ++j) f(i, j);
  }
  // 0 in place of −infinity: what a line without entries is shifted by.
  static V usable(V most) {
    return select(most == V(-std::numeric_limits<A>::infinity()), V(), most);
  }

  void start(const A* x, V* a, V* u, V* v) const {
    V shift[kLine];
    for (int i = 0; i < n(); ++i) {
      V most = V::load(place(x, i, 0));
      for (int j = 1; j < m(); ++j) most = max(V::load(place(x, i, j)), most);
      shift[i] = usable(Temperature<A>::nearest(most * V(temperature_.high)));
      u[i] = V(A(1));
    }
    if (s_) {
      for (int i = 0; i < n(); ++i) {
        V sum;
        for (int j = 0; j < m(); ++j) {
          a[at(i, j)] = exp_or_zero(temperature_.of(V::load(place(x, i, j)), -shift[i]));
          sum += a[at(i, j)];
        }
        const V share = V(size_) * fast_reciprocal(max(V(kLeast), sum));
        for (int j = 0; j < m(); ++j) a[at(i, j)] = fma(a[at(i, j)], share, V(s_));
      }
      for (int j = 0; j < m(); ++j) v[j] = V(A(1));
      return;
    }
    const V scale(temperature_.high);
    for (int j = 0; j < m(); ++j) {
      V most = fma(V::load(place(x, 0, j)), scale, -shift[0]);
      for (int i = 1; i < n(); ++i)
        most = max(fma(V::load(place(x, i, j)), scale, -shift[i]), most);
      most = usable(Temperature<A>::nearest(most));
      v[j] = exp_or_zero(most);
      for (int i = 0; i < n(); ++i)
        a[at(i, j)] = exp_or_zero(temperature_.of(V::load(place(x, i, j)), -(shift[i] + most)));
    }
  }

  // Of a line of zeros the factor is large and finite; max returns its second operand if NaN.
  static constexpr A kLeast = A(1e-30);

  void iterate(const V* a, V* u, V* v, bool first) const {
    if (!(s_ && first)) {
      for (int i = 0; i < n(); ++i) {
        const V sum = dot(m(), a + at(i, 0), 1, v);
        u[i] = s_ ? V(size_) * u[i] * fast_reciprocal(fma(u[i], sum, V(s_)))
                  : fast_reciprocal(max(V(kLeast), sum));
      }
    }
    for (int j = 0; j < m(); ++j) {
      const V sum = dot(n(), a + j, kLine, u);
      v[j] =
          s_ ? v[j] * fast_reciprocal(fma(v[j], sum, V(s_))) : fast_reciprocal(max(V(kLeast), sum));
    }
  }

  // By halves: the chain of additions is what an iteration waits for.
  static V dot(int count, const V* x, int step, const V* y) {
    V even = x[0] * y[0], odd;
    for (int k = 2; k < count; k += 2) even = fma(x[k * step], y[k], even);
    for (int k = 1; k < count; k += 2) odd = k == 1 ? x[step] * y[1] : fma(x[k * step], y[k], odd);
    return even + odd;
  }

  void keep(const V* u, const V* v, A* to) const {
    for (int i = 0; i < n(); ++i) u[i].store(to + i * W);
    for (int j = 0; j < m(); ++j) v[j].store(to + (kLine + j) * W);
  }

  int rows_, columns_, row_step_, column_step_;
  int64_t iterations_;
  Temperature<A> temperature_;
  A s_, size_;
};

}  // namespace weft
