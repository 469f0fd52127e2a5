// The pointwise part of the backward on a tile, queries in the lanes: from the products of keys
// and queries and the gradient of the weights to weights and gradients of scores,
//   e = exp(S - m) / l,   dS = u e (r (dP - delta) + dlse),   P = r u e,
// with m and l = sum u exp(S - m) from the forward,
// written in the element type of the matrix products.
#pragma once
#include "common/bits.h"
#include "common/math.h"
#include "cpu/attention/backward_operands.h"
#include "cpu/attention/bias_tiles.h"
#include "cpu/attention/dropout.h"

namespace weft {

// What the queries of a tile know; 0 for those that see no key or do not exist.
template <typename A>
struct QueryLanes {
  alignas(64) A shift[kTile];    // -m, and the bias of queries
  alignas(64) A inverse[kTile];  // 1 / sum of u e^(S - m)
  alignas(64) A share[kTile];    // r, the part of the sink excluded
  alignas(64) A offset[kTile];   // dlse - r delta
  alignas(64) A weight[kTile];   // w of the key sums
  uint64_t live = 0;             // those that see a key
  int64_t count = 0, lanes = 0;
};

// A tile of scores: [key][kTile].
template <typename T>
struct ScoreTile {
  using P = TileProducts<T>;
  using A = Acc<T>;
  using E = typename P::E;

  int64_t keys = 0;
  A *products, *upstream;  // Q K and dO V; the second may hold nothing
  E *weights, *gradients;  // P and dS, the latter of the products, left operands
  E *weights_rest = nullptr, *gradients_rest = nullptr;  // what rounding took from these, or null
  const uint64_t* words;                                 // the pairs that the mask shows, or null
  const A* bias = nullptr;                               // [key][bias_ld]
  int64_t bias_ld = kTile;
  const A* key_bias = nullptr;  // [key]

  A scale, softcap;
  bool has_upstream, plain;  // plain: a bias and a mask are all there is
  const A* key_weight = nullptr;
  const A* grad_sums = nullptr;
  const DropoutTile* dropout = nullptr;
  int64_t first_key = 0;

  // Sums to add to, or null.
  A* bias_of_pairs = nullptr;  // [key][bias_stride]
  int64_t bias_stride = 0;
  A* bias_of_keys = nullptr;     // [key]
  A* bias_of_queries = nullptr;  // [query]
  A* of_key_weight = nullptr;    // [key]

  // sums[r] += sum_j e u dc.
  void add_received(const QueryLanes<A>& q, A* sums) const {
    constexpr int64_t W = Vec<A>::size;
    for (int64_t c = 0; c < keys; ++c) {
      const uint64_t word = words ? words[c] & q.live : q.live;
      const Vec<A> factor((key_weight ? key_weight[c] : A(1)) * grad_sums[c]);
      for (int64_t v = 0; v < q.lanes; v += W) {
        Vec<A> slope;
        const Vec<A> e = exponential<true, true>(q, c, v, word, slope);
        const Vec<A> part = select(e == Vec<A>(), Vec<A>(), e * factor);
        (Vec<A>::load(sums + v) + part).store(sums + v);
      }
    }
  }

  void run(const QueryLanes<A>& q) const {
    const bool masked_lanes = words || q.live != bits_below(q.lanes);
    if (!plain)
      run_as<true, true>(q);
    else if (masked_lanes)
      run_as<false, true>(q);
    else
      run_as<false, false>(q);
  }

 private:
  // e, and the derivative of the softcap.
  template <bool kGeneral, bool kMasked>
  __attribute__((always_inline)) Vec<A> exponential(const QueryLanes<A>& q, int64_t c, int64_t v,
                                                    uint64_t word, Vec<A>& slope) const {
    Vec<A> x = Vec<A>::load(products + c * kTile + v);
    if (kGeneral && softcap != 0) {
      const Vec<A> t = tanh(x * Vec<A>(scale / softcap));
      slope = Vec<A>(A(1)) - t * t;
      x = fma(t, Vec<A>(softcap), Vec<A>::load(q.shift + v));
    } else {
      x = fma(x, Vec<A>(scale), Vec<A>::load(q.shift + v));
    }
    if (bias || key_bias) {
      x += bias ? Vec<A>::load(bias + c * bias_ld + v) : Vec<A>(key_bias[c]);
    }
    if constexpr (kMasked)
      x = select(lanes_from_bits<A>(word >> v), x, Vec<A>(-std::numeric_limits<A>::infinity()));
    // Beside a weight near 0 the others may leave e too large for the quicker function.
    const Vec<A> e = kGeneral && key_weight ? exp(x) : exp_or_zero(x);
    return e * Vec<A>::load(q.inverse + v);
  }

  template <bool kGeneral, bool kMasked>
  void run_as(const QueryLanes<A>& q) const {
    constexpr int64_t W = Vec<A>::size;
    const Vec<A> zero;
    alignas(64) A kept[kTile];
    for (int64_t c = 0; c < keys; ++c) {
      const uint64_t word = words ? words[c] & q.live : q.live;
      if (kGeneral && dropout) dropout->factors(first_key + c, kept);
      Vec<A> of_weight, of_bias;
      for (int64_t v = 0; v < q.lanes; v += W) {
        const int64_t at = c * kTile + v;
        Vec<A> slope(A(1));
        const Vec<A> e = exponential<kGeneral, kMasked>(q, c, v, word, slope);
        const auto hidden = e == zero;  // whatever is beside it must not count
        Vec<A> p = e, slack, ds;
        if constexpr (kGeneral) {
          if (key_weight) p *= Vec<A>(key_weight[c]);
          Vec<A> dp;
          if (has_upstream) dp = Vec<A>::load(upstream + at);
          if (dropout) dp *= Vec<A>::load(kept + v);
          if (grad_sums) dp = fma(Vec<A>::load(q.weight + v), Vec<A>(grad_sums[c]), dp);
          const Vec<A> share = Vec<A>::load(q.share + v);
          slack = fma(share, dp, Vec<A>::load(q.offset + v));
          ds = select(hidden, zero, p * slack);
          p *= share;
          if (dropout) p *= Vec<A>::load(kept + v);
          if (of_key_weight) of_weight += select(hidden, zero, e * slack);
          if (bias_of_keys) of_bias += ds;
          if (bias_of_queries) (Vec<A>::load(bias_of_queries + v) + ds).store(bias_of_queries + v);
        } else {
          slack = Vec<A>::load(upstream + at) + Vec<A>::load(q.offset + v);
          ds = select(hidden, zero, p * slack);
        }
        if (bias_of_pairs) {
          A* sum = bias_of_pairs + c * bias_stride + v;
          (Vec<A>::load(sum) + ds).store(sum);
        }
        if (kGeneral && softcap != 0) ds *= slope;
        store(p, weights + at);
        store(ds, gradients + at);
        if constexpr (!P::by_vectors) {
          if (weights_rest) {
            store(p - Vec<A>::load(weights + at), weights_rest + at);
            store(ds - Vec<A>::load(gradients + at), gradients_rest + at);
          }
        }
      }
      if (kGeneral && of_key_weight) of_key_weight[c] += reduce_sum(of_weight);
      if (kGeneral && bias_of_keys) bias_of_keys[c] += reduce_sum(of_bias);
    }
  }

  static void store(Vec<A> x, E* target) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<E, bfloat16>) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(x.v));
      return;
    }
#endif
    x.store(target);
  }
};

}  // namespace weft
