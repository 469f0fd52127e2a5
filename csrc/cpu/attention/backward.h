// The backward of attention in one pass over the scores, with five products for each tile:
//
//   S = K Q, dP = V dO, then P and dS (backward_scores.h), dV += P dO, dK += dS Q, dQ += K dS
//
// Scores are kept transposed, queries in the lanes. Loop order of an item (backward_bias.h):
// members > heads of the key head > tiles of queries > tiles of keys. The sums of dK and dV of a
// member stay with the thread until all its queries are done, or, where its queries are cut into
// chunks, are added afterwards in the order of the chunks.
#pragma once
#include "cpu/attention/backward_bias.h"

namespace weft {

// What the forward gave and the gradients of its results; those that are not there are null.
template <typename T>
struct BackwardUpstream {
  using A = Acc<T>;
  Heads<const T> out, grad_out;         // (B, Hq, Nq, Dv)
  const A *lse, *grad_lse, *grad_sums;  // (B, Hq, Nq), the last (B, Hq, Nk)
  const A* normalizer;                  // (B, Hq, 2, Nq): m and the sum of u e^(S - m)
};

// Where the gradients go; null if they are not wanted. Those of tokens are (B, N, H, D).
template <typename T>
struct BackwardResults {
  using A = Acc<T>;
  T *query, *key, *value;
  void* bias;
  A *sink, *key_weight, *query_weight;
  int64_t key_weight_heads, query_weight_heads;  // 1 or Hq
};

template <typename T>
class AttentionBackward {
 public:
  using A = Acc<T>;

  AttentionBackward(const AttentionProblem<T>& problem, const BackwardUpstream<T>& upstream,
                    const BackwardResults<T>& results);
  void run();

 private:
  using P = TileProducts<T>;
  using E = typename P::E;

  static constexpr int64_t kLong = 2048;  // tokens: sums that are worth more exact terms

  struct Workspace;
  struct Place;  // of a tile

  void run_item(int64_t item, Workspace& w);
  void run_member(Place at, Workspace& w);
  void hide(A* bias, int64_t n) const;
  void read_ahead(const Place& at, Workspace& w);
  void run_tile(const Place& at, Workspace& w);
  void load_queries(const Place& at, Workspace& w);
  void sum_received(const Place& at, Workspace& w, ScoreTile<T> tile);
  void add_products(const Place& at, int64_t k0, int64_t nk, const E* weights, const E* gradients,
                    bool add_keys, bool add_queries, Workspace& w);
  void finish_queries(const Place& at, Workspace& w, bool any);
  void finish_keys(const Place& at, Workspace& w);
  bool load_scores(const Place& at, int64_t k0, int64_t nk, Workspace& w, ScoreTile<T>& tile);
  void add_chunks();
  void add_vectors();
  ScoreTile<T> new_tile(Workspace& w) const;

  A* partial_sums(int64_t chunk, int64_t member) const {
    return chunk_sums_ + (chunk * p_.B * p_.Hkv + member) * p_.Nk * (p_.D + p_.Dv);
  }
  A* key_weight_sums(int64_t chunk, int64_t b, int64_t h) const {
    return key_weight_sums_ + ((chunk * p_.B + b) * p_.Hq + h) * p_.Nk;
  }
  // Tokens of one head of a result (B, N, H, D).
  static T* row(T* result, int64_t b, int64_t i, int64_t h, int64_t N, int64_t H, int64_t D) {
    return result + ((b * N + i) * H + h) * D;
  }

  const AttentionProblem<T>& p_;
  const BackwardUpstream<T>& up_;
  const BackwardResults<T>& out_;
  BiasTiles<T> bias_;
  BiasGradient<T> bias_gradient_;
  BackwardSplit split_;
  int64_t query_tiles_;
  bool masked_, plain_;
  A *chunk_sums_ = nullptr, *key_weight_sums_ = nullptr, *sink_sums_ = nullptr,
    *received_ = nullptr;
};

}  // namespace weft
