// A matrix of any size by passes over its rows:
//
//     Q_ij = u_i v_j K_ij,     K_ij = exp(x_ij / epsilon + F_i + G_j) <= e,
//
// F and G are shifts that are chosen once, by the largest exponent of each row and each column; u
// and v are what the normalisations set: u_i = 1 / Σ_j K_ij v_j and v_j = 1 / Σ_i u_i K_ij. With
// both shifts no first sum vanishes, and later ones stay in [1/M, N] by themselves.
//
// A pass has the exponentials of four rows, sets their u and adds them to the column sums: one read
// of the matrix for each iteration, and one more, for the columns that come first or for the
// result. The exponentials of a matrix that fits the second-level cache are kept there; those of a
// larger one are computed anew, so that nothing but the result is written. The rows are cut into
// chunks by their number alone; each has its own column sums, which are added in order, so no bit
// depends on the threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "common/math.h"
#include "common/reduce.h"
#include "common/scratch.h"
#include "cpu/transport/temperature.h"

namespace weft {

// f(0) ... f(n - 1), by all threads or here.
template <typename F>
void for_each_task(int64_t n, bool threads, F f) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  };
  if (threads) {
    torch::stable::parallel_for(0, n, 1, some);
  } else {
    some(0, n);
  }
}

template <typename T>
class Normalizer {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int64_t W = V::size;
  static constexpr int kRows = 4;
  static constexpr int64_t kBlock = 32;  // rows whose columns' largest are found before their sums
  static constexpr int64_t kTile = 32 * W;              // columns that one accumulator adds
  static constexpr int64_t kResidentBytes = 512 << 10;  // of exponentials that are kept
  static constexpr A kNothing = -std::numeric_limits<A>::infinity();

  // `keep`: u and v of every iteration stay, for the backward.
  Normalizer(int64_t N, int64_t M, Temperature<A> temperature, int64_t iterations, bool last_rows,
             bool keep, bool threads)
      : N(N),
        M(M),
        width(round_up(M, 16)),
        iterations(iterations),
        chunk(std::max(kBlock, round_up(ceil_div(N, 64), kBlock))),
        chunks(ceil_div(N, chunk)),
        temperature(temperature),
        last_rows(last_rows),
        keep(keep),
        threads(threads) {
    const int64_t kept = keep ? iterations + 1 : 1;
    static thread_local Scratch scratch;
    const int64_t stored = N * width * int64_t(sizeof(A)) <= kResidentBytes ? N : 0;
    F = scratch.get<A>(N * (1 + kept) + width * (1 + kept + 2 * chunks + stored));
    u_ = F + N;
    G = u_ + kept * N;
    v_ = G + width;
    sums = v_ + kept * width;
    largest = sums + chunks * width;
    resident = stored ? largest + chunks * width : nullptr;
    std::fill(G, G + width, kNothing);  // beyond M every exponential is 0
    std::fill(v_, v_ + kept * width, A(0));
    std::fill(F, F + N, A(0));
  }

  A* u(int64_t t) const { return u_ + (keep ? t * N : 0); }
  A* v(int64_t t) const { return v_ + (keep ? t * width : 0); }

  // All but the last pass: rows last, u of the last iteration is not set yet.
  void iterate(const T* x) {
    first_columns(x);
    if (last_rows) {
      for (int64_t t = 1; t < iterations; ++t) {
        rows(x, t, t, nullptr);
        columns(t + 1);
      }
    } else {
      for (int64_t t = 2; t <= iterations; ++t) {
        rows(x, t, t - 1, nullptr);
        columns(t);
      }
    }
  }

  void run(const T* x, T* out) {
    iterate(x);
    if (last_rows) {
      rows(x, iterations, iterations, out);
    } else {
      write(x, out);
    }
  }

  // f(first row, rows, chunk) for each chunk of rows.
  template <typename Fn>
  void for_each_chunk(Fn f) const {
    for_each_task(chunks, threads,
                  [&](int64_t c) { f(c * chunk, std::min(N, (c + 1) * chunk), c); });
  }
  // f(first row, std::integral_constant of the number of rows): by four, then one by one.
  template <typename Fn>
  static void by_rows(int64_t first, int64_t last, Fn f) {
    for (; first + kRows <= last; first += kRows) f(first, std::integral_constant<int, kRows>{});
    for (; first < last; ++first) f(first, std::integral_constant<int, 1>{});
  }
  // f(j, n) for each vector of columns, n of them real.
  template <typename Fn>
  void by_columns(Fn f) const {
    int64_t j = 0;
    for (; j + W <= M; j += W) f(j, std::integral_constant<int64_t, W>{});
    if (j < M) f(j, M - j);
  }
  template <typename Count>
  static V load_x(const T* p, Count n) {
    if constexpr (std::is_same_v<Count, int64_t>) {
      return V::load(p, n);
    } else {
      return V::load(p);
    }
  }
  template <typename Count>
  static void store_x(V value, T* p, Count n) {
    if constexpr (std::is_same_v<Count, int64_t>) {
      value.store(p, n);
    } else {
      value.store(p);
    }
  }

  // K of R rows from row i on, (R, width): kept from an earlier pass, or computed anew. `buffer`
  // has room for what is not kept.
  template <int R>
  A* exponentials(const T* x, int64_t i, A* buffer) const {
    A* k = resident ? resident + i * width : buffer;
    if (filled) return k;
    V shift[R];
    for (int r = 0; r < R; ++r) shift[r] = V(F[i + r]);
    by_columns([&](int64_t j, auto n) {
      const V g = V::load(G + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V y = temperature.of(load_x(x + (i + r) * M + j, n), g + shift[r]);
        exp_or_zero(y).store(k + r * width + j);
      }
    });
    return k;
  }

  // Sums of term(j, r) over columns, for R rows, tile by tile.
  template <int R, typename Term>
  void row_sums(A* out, Term term) const {
    std::fill(out, out + R, A(0));
    for (int64_t first = 0; first < M; first += kTile) {
      const int64_t last = std::min(M, first + kTile);
      V part[R];
      for (int64_t j = first; j < last; j += W)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) part[r] = term(j, r, part[r]);
      for (int r = 0; r < R; ++r) out[r] += reduce_sum(part[r]);
    }
  }

  // sums[chunk] += Σ_r scale_r rows_r
  template <int R>
  void add_rows(const A* scale, const A* k, A* to) const {
    for (int64_t j = 0; j < M; j += W) {
      V s = V::load(to + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) s = fma(V(scale[r]), V::load(k + r * width + j), s);
      s.store(to + j);
    }
  }

  static A reciprocal(A sum) { return sum == A(0) ? A(0) : A(1) / sum; }

  // f(j, sum over the chunks) for each vector of columns.
  template <typename Fn>
  void for_column_sums(Fn f) const {
    for_each_task(ceil_div(M, kTile), threads, [&](int64_t tile) {
      for (int64_t j = tile * kTile; j < std::min(M, (tile + 1) * kTile); j += W) {
        V total;
        for (int64_t c = 0; c < chunks; ++c) total += V::load(sums + c * width + j);
        f(j, total);
      }
    });
  }

  A* row_buffer(int64_t rows) const {
    static thread_local Scratch scratch;
    return scratch.get<A>(rows * width);
  }

  int64_t N, M, width, iterations, chunk, chunks;
  Temperature<A> temperature;
  bool last_rows, keep, threads, filled = false;
  A *F, *u_, *G, *v_, *sums, *largest, *resident;

 private:
  static V nearest(V x) { return Temperature<A>::nearest(x); }
  // 0 in place of the −infinity of a line without entries.
  static V usable(V most) { return select(most == V(kNothing), V(A(0)), most); }

  // F and u of a row by itself, where rows come first.
  void first_row(const T* x, int64_t i) {
    const T* row = x + i * M;
    const V largest_of_row = nearest(V(weft::max(row, M) * temperature.high));
    const A most = usable(largest_of_row).v[0];
    A total = 0;
    const V shift(-most);
    for (int64_t first = 0; first < M; first += kTile) {
      V part;
      const int64_t last = std::min(M, first + kTile);
      for (int64_t j = first; j < last; j += W) {
        const int64_t n = std::min(W, M - j);
        const V e = exp_or_zero(temperature.of(load_first<A>(row + j, n), shift));
        if (n == W) {
          part += e;
        } else {
          A lanes[W];
          e.store(lanes);
          part += V::load(lanes, n);
        }
      }
      total += reduce_sum(part);
    }
    F[i] = -most;
    u(1)[i] = reciprocal(total);
  }

  // G, and the first v: of K with u where rows have come first, else of all rows alike.
  void first_columns(const T* x) {
    for_each_chunk([&](int64_t begin, int64_t end, int64_t c) {
      A *sum = sums + c * width, *most = largest + c * width;
      std::fill(sum, sum + width, A(0));
      std::fill(most, most + width, kNothing);
      A* block_most = row_buffer(2);
      A* block_sum = block_most + width;
      for (int64_t i0 = begin; i0 < end; i0 += kBlock) {
        const int64_t i1 = std::min(end, i0 + kBlock);
        std::fill(block_most, block_most + width, kNothing);
        std::fill(block_sum, block_sum + width, A(0));
        for (int64_t i = i0; i < i1; ++i) {
          if (!last_rows) first_row(x, i);
          const V shift(F[i]);
          by_columns([&](int64_t j, auto n) {
            const V y = temperature.of(load_x(x + i * M + j, n), shift);
            max(y, V::load(block_most + j)).store(block_most + j);
          });
        }
        for (int64_t j = 0; j < M; j += W) nearest(V::load(block_most + j)).store(block_most + j);
        by_rows(i0, i1, [&](int64_t i, auto rows) {
          constexpr int R = rows;
          by_columns([&](int64_t j, auto n) {
            const V shift = usable(V::load(block_most + j));
            V s = V::load(block_sum + j);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              const V y = temperature.of(load_x(x + (i + r) * M + j, n), V(F[i + r]) - shift);
              const V weight(last_rows ? A(1) : u(1)[i + r]);
              s = fma(weight, exp_or_zero(y), s);
            }
            s.store(block_sum + j);
          });
        });
        for (int64_t j = 0; j < M; j += W) {
          const V before = V::load(most + j), now = V::load(block_most + j);
          const V both = max(before, now), shift = usable(both);
          const V old = V::load(sum + j) * exp_or_zero(before - shift);
          fma(V::load(block_sum + j), exp_or_zero(now - shift), old).store(sum + j);
          both.store(most + j);
        }
      }
    });
    for_each_task(ceil_div(M, kTile), threads, [&](int64_t tile) {
      for (int64_t j = tile * kTile; j < std::min(M, (tile + 1) * kTile); j += W) {
        V most(kNothing), total;
        for (int64_t c = 0; c < chunks; ++c) most = max(V::load(largest + c * width + j), most);
        const V shift = usable(most);
        for (int64_t c = 0; c < chunks; ++c) {
          const V factor = exp_or_zero(V::load(largest + c * width + j) - shift);
          total = fma(V::load(sums + c * width + j), factor, total);
        }
        const int64_t n = std::min(W, M - j);
        (-shift).store(G + j, n);
        if (keep && !last_rows) exp_or_zero(shift).store(v(0) + j, n);
        select(total == V(A(0)), V(A(0)), V(A(1)) / total).store(v(1) + j, n);
      }
    });
  }

  // u of iteration t from v of iteration tv, then the column sums or the result.
  void rows(const T* x, int64_t t, int64_t tv, T* out) {
    const A* weights = v(tv);
    const bool first = last_rows && t == 1;
    for_each_chunk([&](int64_t begin, int64_t end, int64_t c) {
      A* sum = sums + c * width;
      if (!out) std::fill(sum, sum + width, A(0));
      by_rows(begin, end, [&](int64_t i, auto rows) {
        constexpr int R = rows;
        if (first)
          for (int r = 0; r < R; ++r) shift_row(x, i + r);
        const A* k = exponentials<R>(x, i, row_buffer(kRows));
        A total[R];
        row_sums<R>(total, [&](int64_t j, int r, V s) {
          return fma(V::load(k + r * width + j), V::load(weights + j), s);
        });
        for (int r = 0; r < R; ++r) u(t)[i + r] = total[r] = reciprocal(total[r]);
        if (!out) return add_rows<R>(total, k, sum);
        by_columns([&](int64_t j, auto n) {
          const V w = V::load(weights + j);
          for (int r = 0; r < R; ++r)
            store_x(V::load(k + r * width + j) * w * V(total[r]), out + (i + r) * M + j, n);
        });
      });
    });
    filled = resident;
  }

  // F, and the u before the first iteration, of a row after the first normalisation of columns.
 public:
  void shift_row(const T* x, int64_t i) {
    V most(kNothing);
    by_columns([&](int64_t j, auto n) {
      most = max(temperature.of(load_x(x + i * M + j, n), V::load(G + j)), most);
    });
    F[i] = -usable(nearest(V(reduce_max(most)))).v[0];
    if (keep) u(0)[i] = std::exp(-F[i]);
  }

 private:
  // v of iteration t from the column sums.
  void columns(int64_t t) {
    for_column_sums([&](int64_t j, V total) {
      select(total == V(A(0)), V(A(0)), V(A(1)) / total).store(v(t) + j);
    });
  }

  void write(const T* x, T* out) {
    const A *scale = u(iterations), *weights = v(iterations);
    for_each_chunk([&](int64_t begin, int64_t end, int64_t) {
      by_rows(begin, end, [&](int64_t i, auto rows) {
        constexpr int R = rows;
        const A* k = exponentials<R>(x, i, row_buffer(kRows));
        by_columns([&](int64_t j, auto n) {
          const V w = V::load(weights + j);
          for (int r = 0; r < R; ++r)
            store_x(V::load(k + r * width + j) * w * V(scale[i + r]), out + (i + r) * M + j, n);
        });
      });
    });
  }
};

}  // namespace weft
