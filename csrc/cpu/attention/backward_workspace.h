// What a thread of the backward keeps between tiles, and rows that are too short for a function.
#pragma once
#include "common/reduce.h"
#include "cpu/attention/backward.h"

namespace weft {

template <typename A, typename T>
inline A row_dot(const T* x, const T* y, int64_t n) {
  constexpr int64_t W = Vec<A>::size;
  Vec<A> sum;
  int64_t d = 0;
  for (; d + W <= n; d += W) sum = fma(Vec<A>::load(x + d), Vec<A>::load(y + d), sum);
  if (d < n) sum = fma(Vec<A>::load(x + d, n - d), Vec<A>::load(y + d, n - d), sum);
  return reduce_sum(sum);
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
