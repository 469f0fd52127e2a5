// What the passes over the rows of extended matrices share: the vectors of a problem side by side,
// blocks of rows, and one pass that makes a matrix of the shape of the cost, sums of its rows and
// columns, and a scalar.
//
// The size of the blocks depends on the number of rows alone, and what blocks sum is added in their
// order: threads change no bit, nor does padding, of which the rows here know nothing.
#pragma once
#include <vector>

#include "common/math.h"
#include "common/reduce.h"
#include "common/scratch.h"
#include "cpu/transport/problem.h"

namespace weft {

struct RowBlocks {
  int64_t rows, size;
  explicit RowBlocks(int64_t rows)
      : rows(rows), size(std::max<int64_t>(32, ceil_div(rows, int64_t(64)))) {}
  int64_t count() const { return ceil_div(rows, size); }

  // f(k, first, last) for the rows of each block k.
  template <typename F>
  void run(F f) const {
    parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) f(k, k * size, std::min(rows, (k + 1) * size));
    });
  }
};

// f(index) for each problem: of many, several at a time; of few, one after the other, and the
// threads share its blocks (a parallel_for inside of another runs in its thread).
template <typename F>
void for_problems(int64_t count, int64_t entries, F f) {
  constexpr int64_t kSmall = 4096;
  if (count < 2 * torch::stable::get_num_threads() && entries > kSmall) {
    for (int64_t index = 0; index < count; ++index) f(index);
    return;
  }
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) f(index);
  });
}

// f(j, count) for vectors of count elements from j on; all but the last are full.
template <typename A, typename F>
inline void for_vectors(int64_t n, F f) {
  constexpr int64_t W = Vec<A>::size;
  int64_t j = 0;
  for (; j + W <= n; j += W) f(j, W);
  if (j < n) f(j, n - j);
}
template <typename A>
inline void store_first(Vec<A> v, A* p, int64_t n) {
  if (n == Vec<A>::size)
    v.store(p);
  else
    v.store(p, n);
}

// n entries of a vector of a problem and, of `all` > n, the one at `last`; and back, between them
// 0.
template <typename A, typename To>
void gather(const Vectors<A>& from, int64_t index, int64_t n, int64_t all, int64_t last, To* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = To(from.at(index, i));
  if (all > n) to[n] = To(from.at(index, last));
}
template <typename A, typename From>
void scatter(const From* from, int64_t n, int64_t all, int64_t last, A* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = A(from[i]);
  std::fill(to + n, to + last, A(0));
  if (all > n) to[last] = A(from[n]);
}

// A problem with weights and potentials of its rows and columns.
template <typename T>
struct Extended {
  using A = Acc<T>;
  CostMatrix<T> cost;
  int64_t rows, columns;
  A inverse, inverse_rest;  // 1/ε is their sum, both > 0
  A *a, *b, *f, *g;

  Extended(const TransportArguments& args, int64_t index, const Tensor& f_all, const Tensor& g_all,
           Scratch& storage)
      : Extended(args, index, storage) {
    of_rows(args.view<A>(f_all), index, f);
    of_columns(args.view<A>(g_all), index, g);
  }
  // Without potentials: f and g are not filled.
  Extended(const TransportArguments& args, int64_t index, Scratch& storage)
      : cost(args.problem<T>(index)), rows(cost.rows()), columns(cost.columns()) {
    const double exact = 1 / double(cost.epsilon);
    inverse = A(exact);
    if (double(inverse) > exact) inverse = std::nextafter(inverse, A(0));
    inverse_rest = A(std::max(exact - double(inverse), exact * 0x1p-60));
    a = storage.get<A>(2 * (rows + columns));
    b = a + rows, f = b + columns, g = f + rows;
    of_rows(args.view<A>(args.a), index, a);
    of_columns(args.view<A>(args.b), index, b);
  }

  template <typename To>
  void of_rows(const Vectors<A>& v, int64_t index, To* to) const {
    gather(v, index, cost.n, rows, cost.N, to);
  }
  template <typename To>
  void of_columns(const Vectors<A>& v, int64_t index, To* to) const {
    gather(v, index, cost.m, columns, cost.M, to);
  }
  // Into the vector of this problem in an output (B, N') or (B, M').
  template <typename From>
  void to_rows(const From* from, A* out, int64_t index) const {
    scatter(from, cost.n, rows, cost.N, out + index * (cost.N + cost.has_row));
  }
  template <typename From>
  void to_columns(const From* from, A* out, int64_t index) const {
    scatter(from, cost.m, columns, cost.M, out + index * (cost.M + cost.has_column));
  }

  // Row i of the costs, with the sign of memory if that is where they lie: `sign` says which.
  const A* costs(int64_t i, A* buffer, A& sign) const {
    const A* direct = cost.has_column ? nullptr : cost.direct(i);
    sign = direct && cost.similarity ? A(-1) : A(1);
    if (direct) return direct;
    cost.costs(i, buffer);
    return buffer;
  }
  // (f_i + g_j − C_ij) / ε
  Vec<A> exponent(Vec<A> f_i, const A* C, A sign, int64_t j, int64_t count) const {
    return scaled(f_i + load_first<A>(g + j, count), C, sign, j, count);
  }
  // (potential − C_ij) / ε, of an infinite one as that; a rounded 1/ε would change every digit that
  // e^x has beyond those of x.
  Vec<A> scaled(Vec<A> potential, const A* C, A sign, int64_t j, int64_t count) const {
    const Vec<A> gap = fma(Vec<A>(-sign), load_first<A>(C + j, count), potential);
    return fma(gap, Vec<A>(inverse), gap * Vec<A>(inverse_rest));
  }
};

// e^x, 0 where there is no pair and where neither side has weight.
template <typename A>
inline Vec<A> ratio(Vec<A> x, Vec<A> a, Vec<A> b) {
  const Vec<A> zero(A(0)), none(-std::numeric_limits<A>::infinity());
  return select((x == none) | ((a == zero) & (b == zero)), zero, exp(x));
}
// 0 in place of infinities.
template <typename A>
inline Vec<A> finite(Vec<A> x) {
  return select(abs(x) == Vec<A>(std::numeric_limits<A>::infinity()), Vec<A>(A(0)), x);
}

// What an entry gives to the gradient of its cost, to the sum of its row, of its column, of all.
template <typename A>
struct Terms {
  Vec<A> cost, row, column, scalar;
};

// The sums of a pass over a problem, in double; of the border in the order of its gradient.
struct PassSums {
  std::vector<double> rows, columns;
  double scalar = 0, border[3] = {0, 0, 0};
};

// terms(i) is called for each row; what it returns, (x, j, count) -> Terms for columns j and on,
// with x of Extended::exponent. The costs' terms go to grad_cost (N, M), 0 where no row or column
// is.
template <typename T, typename F>
void pass(const Extended<T>& p, T* grad_cost, PassSums& sums, F terms) {
  using A = Acc<T>;
  using V = Vec<A>;
  static thread_local Scratch partial_storage;
  const CostMatrix<T>& c = p.cost;
  const RowBlocks blocks(p.rows);
  const int64_t count = blocks.count(), ld = round_up(p.columns, V::size);
  A* partial = partial_storage.get<A>(count * ld);
  std::vector<double> scalars(size_t(4 * count), 0.0);
  sums.rows.resize(size_t(p.rows)), sums.columns.assign(size_t(p.columns), 0.0);
  blocks.run([&](int64_t k, int64_t first, int64_t last) {
    static thread_local Scratch buffers;
    A* buffer = buffers.get<A>(2 * ld);
    A* column = partial + k * ld;
    double* scalar = scalars.data() + 4 * k;
    std::fill_n(column, ld, A(0));
    for (int64_t i = first; i < last; ++i) {
      A sign;
      const A* C = p.costs(i, buffer, sign);
      A* result = buffer + ld;
      bool direct = false;
      if constexpr (std::is_same_v<T, A>)
        if (i < c.n && !c.has_column) result = grad_cost + i * c.M, direct = true;
      const auto of_row = terms(i);
      const V f_i(p.f[i]), memory_sign(c.similarity ? A(-1) : A(1));
      V row(A(0)), all(A(0));
      for_vectors<A>(p.columns, [&](int64_t j, int64_t n) {
        const Terms<A> t = of_row(p.exponent(f_i, C, sign, j, n), j, n);
        store_first(t.cost * memory_sign, result + j, n);
        store_first(load_first<A>(column + j, n) + t.column, column + j, n);
        if (n < V::size) {  // lanes past the end are of no column
          alignas(64) A lanes[2][V::size];
          t.row.store(lanes[0]), t.scalar.store(lanes[1]);
          row += V::load(lanes[0], n), all += V::load(lanes[1], n);
        } else {
          row += t.row, all += t.scalar;
        }
      });
      sums.rows[size_t(i)] = double(reduce_sum(row)), scalar[0] += double(reduce_sum(all));
      const double back = c.similarity ? -1 : 1;
      if (c.has_column) scalar[i < c.n ? 1 : 3] += back * double(result[c.m]);
      if (i >= c.n) {
        scalar[2] += back * double(sum(result, c.m));
        continue;
      }
      if (!direct) convert(result, grad_cost + i * c.M, c.m);
      std::fill(grad_cost + i * c.M + c.m, grad_cost + (i + 1) * c.M, T(0));
    }
  });
  std::fill(grad_cost + c.n * c.M, grad_cost + c.N * c.M, T(0));
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t j = 0; j < p.columns; ++j) sums.columns[size_t(j)] += double(partial[k * ld + j]);
    sums.scalar += scalars[size_t(4 * k)];
    for (int64_t l = 0; l < 3; ++l) sums.border[l] += scalars[size_t(4 * k + 1 + l)];
  }
}

// The gradients that the backwards return first, contiguous; of no border, of size 0.
struct Gradients {
  Tensor cost, a, b, epsilon, border;

  explicit Gradients(const TransportArguments& args, bool has_border)
      : cost(torch::stable::new_empty(args.cost, {args.B, args.N, args.M})),
        a(torch::stable::new_empty(args.a, {args.B, args.all_rows()})),
        b(torch::stable::new_empty(args.b, {args.B, args.all_columns()})),
        epsilon(torch::stable::new_empty(args.epsilon, {args.B})),
        border(has_border ? torch::stable::new_empty(args.a, {args.B, 3})
                          : torch::stable::new_empty(args.a, {0})) {}

  template <typename T>
  T* cost_of(int64_t index) const {
    return mutable_data<T>(cost) + index * cost.size(1) * cost.size(2);
  }
  template <typename A>
  void set_scalars(int64_t index, double of_epsilon, const double* of_border) const {
    mutable_data<A>(epsilon)[index] = A(of_epsilon);
    if (border.numel() > 0)
      for (int64_t l = 0; l < 3; ++l) mutable_data<A>(border)[3 * index + l] = A(of_border[l]);
  }
};

}  // namespace weft
