// What a thread of the backward keeps between tiles, and rows that are too short for a function.
#pragma once
#include "common/reduce.h"
#include "common/transpose.h"
#include "cpu/attention/backward.h"

namespace weft {

// products[r] = Σ_d x[first + r, d] y[first + r, d] for r < n, at most kTile, in one chain of
// multiply-adds in the order of d, as the products of tiles are: where a query sees one key alone,
// its dP - δ is exactly 0.
template <typename A, typename T>
inline void row_products(Matrix<T> x, Matrix<T> y, int64_t first, int64_t n, A* products) {
  constexpr int64_t W = Vec<A>::size;
  if (x.col_stride != 1 || y.col_stride != 1) {
    for (int64_t r = 0; r < n; ++r) {
      products[r] = 0;
      for (int64_t d = 0; d < x.cols; ++d)
        products[r] = std::fma(A(*x.at(first + r, d)), A(*y.at(first + r, d)), products[r]);
    }
    return;
  }
  alignas(64) A columns[2][W * W];
  for (int64_t r = 0; r < n; r += W) {
    const int rows = int(std::min(W, n - r));
    Vec<A> sum;
    for (int64_t d = 0; d < x.cols; d += W) {
      const int width = int(std::min(W, x.cols - d));
      transpose_tile<A>(x.at(first + r, d), x.row_stride, rows, width, columns[0], W, int(W));
      transpose_tile<A>(y.at(first + r, d), y.row_stride, rows, width, columns[1], W, int(W));
      for (int j = 0; j < width; ++j)
        sum = fma(Vec<A>::load(columns[0] + j * W), Vec<A>::load(columns[1] + j * W), sum);
    }
    sum.store(products + r);
  }
}

// y = scale x.
template <typename A, typename T>
inline void scale_row(const A* x, A scale, T* y, int64_t n) {
  constexpr int64_t W = Vec<A>::size;
  int64_t d = 0;
  for (; d + W <= n; d += W) (Vec<A>::load(x + d) * Vec<A>(scale)).store(y + d);
  if (d < n) (Vec<A>::load(x + d, n - d) * Vec<A>(scale)).store(y + d, n - d);
}

// One thread's.
template <typename T>
struct AttentionBackward<T>::Workspace {
  Scratch memory[10];
  TokenRows<T> keys, values;
  KeyColumns<T> key_columns;
  QueryTile<T> query, grad_out;
  QueryLanes<A> lanes;
  DropoutTile dropout;
  ReadAhead ahead;
  int64_t bias_plane = -1;             // whose transpose memory[9] holds
  std::vector<uint8_t> touched, seen;  // of tiles of keys: their sums hold something; of keys
  A *key_sums, *value_sums, *query_sums, *products, *upstream, *bias, *direct;
  E *weights, *gradients, *gradient_panels, *weights_rest;
  alignas(64) A delta[kTile], received[kTile], bias_of_queries[kTile];
  alignas(64) A key_bias[kTile];
  uint64_t words[kTile];

  static Workspace& mine() {
    static thread_local Workspace workspace;
    return workspace;
  }
};

template <typename T>
struct AttentionBackward<T>::Place {
  int64_t part, chunk;
  int64_t b, kv_head, h = 0, q0 = 0, nq = 0;
  int64_t first_tile = 0, last_tile = 0;  // of queries
  int64_t next_b = 0, next_head = 0;      // the member that follows
  bool last = true;                       // none does
};

}  // namespace weft
