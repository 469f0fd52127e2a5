// The gradient of the T iterations of normalize.h, in passes of the same kind.
//
// In logarithms each normalisation subtracts a log-sum-exp, so that with h = ∂L/∂log Q, log Q after
// it, that of its potentials is  f̄_i = Σ_j h_ij  and, through the earlier ones,
//
//     f̄_i −= Σ_j ḡ_j Q_ij,     ḡ_j −= Σ_i f̄_i Q_ij,
//
// Q as the later normalisation of the two left it. From the last iteration to the first each pair
// is one pass: with ḡ known, f̄ needs the row alone, and then adds to the earlier ḡ. A last pass has
//
//     ∂x_ij = K_ij (g_ij u_i v_j − Σ_t (f̄_i u_i v_j + ḡ_j v_j u_i)) / epsilon,
//
// u and v in the sum as they were at that normalisation: N + M numbers for each are all that is
// kept.
#pragma once
#include "cpu/transport/normalize.h"

namespace weft {

template <typename T>
class NormalizerBackward : Normalizer<T> {
  using Base = Normalizer<T>;
  using Base::kRows, Base::W, Base::N, Base::M, Base::width, Base::iterations, Base::last_rows;
  using Base::sums, Base::u, Base::v, Base::temperature;
  using typename Base::A;
  using typename Base::V;

 public:
  NormalizerBackward(int64_t N, int64_t M, Temperature<A> temperature, int64_t iterations,
                     bool last_rows, bool threads)
      : Base(N, M, temperature, iterations, last_rows, true, threads) {
    static thread_local Scratch scratch;
    row_terms = scratch.get<A>(iterations * (N + width));
    column_terms = row_terms + iterations * N;
  }

  void run(const T* grad, const T* x, T* out) {
    this->iterate(x);
    seed(grad, x);
    const int64_t last = last_rows ? 2 : 1;
    for (int64_t t = iterations; t >= last; --t) step(x, t);
    finish(grad, x, out);
  }

 private:
  // f̄ u of rows and ḡ v of columns, at iteration t.
  A* of_rows(int64_t t) const { return row_terms + (t - 1) * N; }
  A* of_columns(int64_t t) const { return column_terms + (t - 1) * width; }

  // ḡ v = v² Σ
  void set_columns(int64_t t, const A* weights) {
    this->for_column_sums([&](int64_t j, V total) {
      const V w = V::load(weights + j);
      (w * total * w).store(of_columns(t) + j);
    });
  }

  // h = g Q at the end. Rows last: their f̄, and what that leaves for the columns. Columns last: ḡ,
  // and in place of f̄ the row sums that it begins with.
  void seed(const T* grad, const T* x) {
    const A* weights = v(iterations);
    A* scale = u(iterations);
    this->for_each_chunk([&](int64_t begin, int64_t end, int64_t c) {
      A* sum = sums + c * width;
      std::fill(sum, sum + width, A(0));
      Base::by_rows(begin, end, [&](int64_t i, auto rows) {
        constexpr int R = rows;
        A *buffer = this->row_buffer(2 * kRows), *g = buffer + kRows * width;
        if (last_rows && iterations == 1)
          for (int r = 0; r < R; ++r) this->shift_row(x, i + r);
        const A* k = this->template exponentials<R>(x, i, buffer);
        this->by_columns([&](int64_t j, auto n) {
          for (int r = 0; r < R; ++r)
            Base::load_x(grad + (i + r) * M + j, n).store(g + r * width + j);
        });
        const auto entry = [&](int64_t j, int r) {
          return V::load(k + r * width + j) * V::load(weights + j);
        };
        A total[R], mean[R];
        if (last_rows) {
          this->template row_sums<R>(total, [&](int64_t j, int r, V s) { return s + entry(j, r); });
          for (int r = 0; r < R; ++r) scale[i + r] = Base::reciprocal(total[r]);
        }
        this->template row_sums<R>(mean, [&](int64_t j, int r, V s) {
          return fma(V::load(g + r * width + j), entry(j, r), s);
        });
        for (int r = 0; r < R; ++r) {
          const A s = scale[i + r];
          mean[r] *= s;
          of_rows(iterations)[i + r] = last_rows ? mean[r] * s : mean[r];
          const V shift(last_rows ? mean[r] : A(0));
          for (int64_t j = 0; j < M; j += W) {
            const V h = (V::load(g + r * width + j) - shift) * V::load(k + r * width + j);
            fma(V(s), h, V::load(sum + j)).store(sum + j);
          }
        }
      });
    });
    this->filled = this->resident;
    set_columns(iterations, weights);
  }

  // From ḡ of iteration t to the f̄ before it and on to the ḡ before that.
  void step(const T* x, int64_t t) {
    const int64_t row_t = last_rows ? t - 1 : t;
    const A *scale = u(row_t), *given = of_columns(t), *carried = of_rows(iterations);
    const bool begins = !last_rows && t == iterations, ends = !last_rows && t == 1;
    A* found = of_rows(row_t);
    this->for_each_chunk([&](int64_t begin, int64_t end, int64_t c) {
      A* sum = sums + c * width;
      std::fill(sum, sum + width, A(0));
      Base::by_rows(begin, end, [&](int64_t i, auto rows) {
        constexpr int R = rows;
        const A* k = this->template exponentials<R>(x, i, this->row_buffer(kRows));
        A total[R];
        this->template row_sums<R>(total, [&](int64_t j, int r, V s) {
          return fma(V::load(k + r * width + j), V::load(given + j), s);
        });
        for (int r = 0; r < R; ++r) {
          const A s = scale[i + r], carry = begins ? carried[i + r] : A(0);
          found[i + r] = (carry - s * total[r]) * s;
          total[r] = -found[i + r];
        }
        if (!ends) this->template add_rows<R>(total, k, sum);
      });
    });
    if (!ends) set_columns(t - 1, v(t - 1));
  }

  void finish(const T* grad, const T* x, T* out) const {
    const A *scale = u(iterations), *weights = v(iterations);
    const int64_t row_lag = last_rows, column_lag = !last_rows;
    this->for_each_chunk([&](int64_t begin, int64_t end, int64_t) {
      Base::by_rows(begin, end, [&](int64_t i, auto rows) {
        constexpr int R = rows;
        const A* k = this->template exponentials<R>(x, i, this->row_buffer(kRows));
        this->by_columns([&](int64_t j, auto n) {
          V h[R];
          const V w = V::load(weights + j);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            h[r] = Base::load_x(grad + (i + r) * M + j, n) * w * V(scale[i + r]);
          for (int64_t t = 1; t <= iterations; ++t) {
            const V of_f = V::load(v(t - column_lag) + j), of_g = V::load(of_columns(t) + j);
            const A *f = of_rows(t) + i, *before = u(t - row_lag) + i;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) h[r] -= fma(of_f, V(f[r]), of_g * V(before[r]));
          }
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const V factor = V::load(k + r * width + j) * V(temperature.high);
            Base::store_x(h[r] * factor, out + (i + r) * M + j, n);
          }
        });
      });
    });
  }

  A *row_terms, *column_terms;
};

}  // namespace weft
