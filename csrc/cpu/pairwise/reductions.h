// Dense reductions of the rows of s_ij, tile by tile (weft/reference/pairwise/pairwise.py):
//
//   sum        out_i = Σ_j s_ij  or  Σ_j s_ij values_j       w_ij = grad_i  or  ⟨grad_i, values_j⟩
//   logsumexp  out_i = log Σ_j e^s_ij                        w_ij = grad_i e^(s_ij − out_i)
//
// over the pairs that the mask allows. The tiles of a row come in the order of their columns, so a
// row's running sum and maximum are one number each. w are the weights of the shared backward
// (gradients.h).
#pragma once
#include "cpu/pairwise/gradients.h"
#include "cpu/pairwise/masks.h"

namespace weft {

// values (M, E) of a kernel sum, ready for tiles.
template <typename A>
class SumValues {
 public:
  static constexpr int64_t kFew = 4;  // so many columns are dot products, more are a matrix product

  SumValues(Matrix<A> values, const PairMask& mask) : E(values.cols), values_(values), mask_(mask) {
    // Zeros stand in the copy for points that are not finite, where 0 · NaN would reach the rows
    // that are masked from them: those are added pair by pair.
    if (!mask.empty()) {
      for (int64_t j = 0; j < values.rows; ++j) {
        A total = 0;
        for (int64_t e = 0; e < E; ++e) total += A(0) * *values.at(j, e);
        if (total != 0) unusual_.push_back(j);
      }
    }
    A* copy = storage_.template get<A>(values.rows * E);
    parallel_for(0, values.rows, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t e = 0; e < E; ++e)
          copy[E <= kFew ? e * values.rows + j : j * E + e] = *values.at(j, e);
    });
    for (const int64_t j : unusual_)
      for (int64_t e = 0; e < E; ++e) copy[E <= kFew ? e * values.rows + j : j * E + e] = 0;
    copy_ = copy;
  }

  // out (n, E) += s (n, m) values, of the rows from i0 and the columns from j0 on.
  void add(int64_t i0, int64_t n, int64_t j0, int64_t m, const A* s, A* out) const {
    if (E <= kFew) {
      for (int64_t r = 0; r < n; ++r)
        for (int64_t e = 0; e < E; ++e)
          out[r * E + e] += dot(s + r * m, copy_ + e * values_.rows + j0, m);
    } else {
      gemm(row_major<A>(s, n, m), row_major<A>(copy_ + j0 * E, m, E), out, E, true);
    }
    auto j = std::lower_bound(unusual_.begin(), unusual_.end(), j0);
    for (; j != unusual_.end() && *j < j0 + m; ++j)
      for (int64_t r = 0; r < n; ++r)
        for (int64_t e = 0; e < E && mask_(i0 + r, *j); ++e)
          out[r * E + e] += s[r * m + *j - j0] * *values_.at(*j, e);
  }

  // w (n, m) = grad (n, E) valuesᵀ, of the columns from j0 on.
  void weights(Matrix<A> grad, int64_t j0, int64_t m, A* w) const {
    if (E > kFew || grad.col_stride != 1) {
      gemm(grad, values_.block(j0, 0, m, E).transposed(), w, m);
      return;
    }
    for (int64_t r = 0; r < grad.rows; ++r)
      for (int64_t j = 0; j < m; ++j) {
        A total = 0;
        for (int64_t e = 0; e < E; ++e) total += *grad.at(r, e) * *values_.at(j0 + j, e);
        w[r * m + j] = total;
      }
  }

  const int64_t E;

 private:
  Matrix<A> values_;
  const PairMask& mask_;
  std::vector<int64_t> unusual_;
  Scratch storage_;
  const A* copy_ = nullptr;
};

// out (N,), or (N, E) with values.
template <typename T>
void pair_sum(const PairTiles<T>& tiles, const PairMask& mask, const SumValues<Acc<T>>* values,
              Acc<T>* out) {
  using A = Acc<T>;
  std::vector<double> totals(values ? 0 : size_t(tiles.rows()), 0.0);
  if (values) std::fill_n(out, tiles.rows() * values->E, A(0));
  for_each_tile(tiles, [&](int64_t i0, int64_t n, int64_t j0, int64_t m, A* s) {
    if (!mask.empty())
      for (int64_t r = 0; r < n; ++r) mask.apply(i0 + r, j0, m, s + r * m, A(0));
    if (values)
      values->add(i0, n, j0, m, s, out + i0 * values->E);
    else
      for (int64_t r = 0; r < n; ++r) totals[size_t(i0 + r)] += double(sum(s + r * m, m));
  });
  for (size_t i = 0; i < totals.size(); ++i) out[i] = A(totals[i]);
}

template <typename T>
void pair_sum_gradients(const PairTiles<T>& tiles, const PairMask& mask, Matrix<Acc<T>> grad,
                        const SumValues<Acc<T>>* values, PairGradients<T> out) {
  using A = Acc<T>;
  const auto weights = [&](int64_t i0, int64_t n, int64_t j0, int64_t m, const A*, A* w) {
    if (values) values->weights(grad.block(i0, 0, n, grad.cols), j0, m, w);
    for (int64_t r = 0; r < n; ++r) {
      if (!values) std::fill_n(w + r * m, m, *grad.at(i0 + r, 0));
      mask.apply(i0 + r, j0, m, w + r * m, A(0));
    }
  };
  pair_gradients(tiles, weights, out);
}

// Σ_j e^(s_j − largest) of m values.
template <typename A>
A sum_of_exp(const A* s, int64_t m, A largest) {
  constexpr int64_t W = Vec<A>::size;
  const Vec<A> shift(largest), none(-std::numeric_limits<A>::infinity());
  Vec<A> part[2];
  int64_t j = 0;
  for (; j + 2 * W <= m; j += 2 * W)
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) part[k] += exp_or_zero(Vec<A>::load(s + j + k * W) - shift);
  for (; j < m; j += W) {
    alignas(64) A rest[size_t(W)];
    none.store(rest);
    std::copy(s + j, s + std::min(m, j + W), rest);
    part[0] += exp_or_zero(Vec<A>::load(rest) - shift);
  }
  return reduce_sum(part[0] + part[1]);
}

template <typename T>
void pair_logsumexp(const PairTiles<T>& tiles, const PairMask& mask, Acc<T>* out) {
  using A = Acc<T>;
  constexpr A none = -std::numeric_limits<A>::infinity();
  std::fill_n(out, tiles.rows(), none);  // the largest so far
  std::vector<double> totals(size_t(tiles.rows()), 0.0);
  for_each_tile(tiles, [&](int64_t i0, int64_t n, int64_t j0, int64_t m, A* s) {
    for (int64_t r = 0; r < n; ++r) {
      A *row = s + r * m, *largest = out + i0 + r;
      mask.apply(i0 + r, j0, m, row, none);
      const A before = *largest, now = max(row, m);
      if (before != before || now == none) continue;
      *largest = now > before || now != now ? now : before;
      if (!std::isfinite(*largest)) continue;  // infinity or NaN: that is the result
      double& total = totals[size_t(i0 + r)];
      if (before != *largest) total *= std::exp(double(before) - double(*largest));
      total += double(sum_of_exp(row, m, *largest));
    }
  });
  for (int64_t i = 0; i < tiles.rows(); ++i)
    if (std::isfinite(out[i])) out[i] = A(double(out[i]) + std::log(totals[size_t(i)]));
}

template <typename T>
void pair_logsumexp_gradients(const PairTiles<T>& tiles, const PairMask& mask, Matrix<Acc<T>> grad,
                              const Acc<T>* out, PairGradients<T> to) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size;
  const auto weights = [&](int64_t i0, int64_t n, int64_t j0, int64_t m, const A* s, A* w) {
    for (int64_t r = 0; r < n; ++r) {
      const A total = out[i0 + r];
      if (total == -std::numeric_limits<A>::infinity()) {
        std::fill_n(w + r * m, m, A(0));
        continue;
      }
      const Vec<A> shift(total), g(*grad.at(i0 + r, 0));
      for (int64_t j = 0; j < m; j += W) {
        const int64_t count = std::min(W, m - j);
        (g * exp_or_zero(load_first<A>(s + r * m + j, count) - shift)).store(w + r * m + j, count);
      }
      mask.apply(i0 + r, j0, m, w + r * m, A(0));
    }
  };
  pair_gradients(tiles, weights, to);
}

}  // namespace weft
