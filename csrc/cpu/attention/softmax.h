// The pointwise part of the forward: from the products of some keys and a panel of queries, in its
// lanes, to weights relative to a running maximum,
//
//   s = scale q k, or c tanh(scale q k / c), + bias,   -inf where hidden
//   m' = max(m, s),   P = u e^(s - m'),   l' = l e^(m - m') + sum P
//
// in two passes over rows of keys: the maximum, then the weights, their sum, and the panel that the
// product with V reads. Where nothing is added to a product, s is the product without its scale.
#pragma once
#include <limits>

#include "common/bits.h"
#include "common/power.h"
#include "cpu/attention/bias_tiles.h"
#include "cpu/attention/dropout.h"
#include "cpu/attention/panels.h"

namespace weft {

// Consecutive keys, their rows among the scores, and what else makes these.
template <typename A>
struct KeyRun {
  int64_t first = 0, count = 0;     // keys
  int64_t row = 0;                  // of the first one, among the scores
  const uint64_t* words = nullptr;  // bit r of words[c]: query r of the tile sees key first + c
  const A* bias = nullptr;          // [key][query of the panel], bias_stride apart
  int64_t bias_stride = 0;
  const A* key_bias = nullptr;    // [key]
  const A* key_weight = nullptr;  // [key]
};

// What all scores have in common.
template <typename A>
struct ScoreRule {
  A scale, softcap;
  A least;        // a bias up to this one hides the pair
  bool products;  // the scores are the products, and scale is left out
  A unit;         // of a score, in those of a logarithm
  A factor;       // that as an exponent of weights

  ScoreRule(A scale, A softcap, bool any_bias, A least)
      : scale(scale),
        softcap(softcap),
        least(least),
        products(!any_bias && softcap == 0 && scale > A(1e-20)),
        unit(products ? scale : A(1)),
        factor(unit * kBase<A>) {}
};

// Products become scores; `first_lane` is that of the panel in the tile of queries.
template <typename T, int V>
inline void products_to_scores(const ScoreRule<Acc<T>>& rule, const KeyRun<Acc<T>>& run,
                               int first_lane, Acc<T>* scores) {
  using Lanes = Vec<Acc<T>>;
  constexpr int W = Lanes::size;
  const Lanes hidden(-std::numeric_limits<Acc<T>>::infinity()), least(rule.least);
  const Lanes cap(rule.softcap);
  const Lanes scale(rule.softcap != 0 ? rule.scale / rule.softcap : rule.scale);
  for (int64_t k = 0; k < run.count; ++k) {
    Acc<T>* row = scores + k * Panels<T>::columns;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Lanes s = Lanes::load(row + v * W);
      if (!rule.products) {
        s *= scale;
        if (rule.softcap != 0) s = tanh(s) * cap;
        if (run.bias || run.key_bias) {
          const Lanes bias = run.bias ? Lanes::load(run.bias + k * run.bias_stride + v * W)
                                      : Lanes(run.key_bias[k]);
          s = select(bias <= least, hidden, s + bias);
        }
      }
      if (run.words)
        s = select(lanes_from_bits<Acc<T>>(run.words[k] >> (first_lane + v * W)), s, hidden);
      s.store(row + v * W);
    }
  }
}

// The running softmax of the queries of a panel.
template <typename T>
struct SoftmaxPanel {
  using P = Panels<T>;
  using A = Acc<T>;
  using Lanes = Vec<A>;
  static constexpr int W = P::W;

  alignas(64) A highest[P::columns];  // m
  alignas(64) A sum[P::columns];      // l

  void clear() {
    std::fill_n(highest, P::columns, -std::numeric_limits<A>::infinity());
    std::fill_n(sum, P::columns, A(0));
  }

  // Scores become weights in panels, one for each run, that starts at columns * run.row. The output
  // of the keys before is to be multiplied by `rescale` if the result is true.
  template <int V>
  bool weigh(const KeyRun<A>* runs, int count, const A* scores, A factor,
             const DropoutTile* dropout, int first_lane, typename P::Packed* weights, A* rescale) {
    Lanes m[V], total[2][V];
    for (int v = 0; v < V; ++v) {
      m[v] = Lanes(-std::numeric_limits<A>::infinity());
      total[0][v] = total[1][v] = Lanes();
    }
    for (int i = 0; i < count; ++i)
      for (int64_t k = 0; k < runs[i].count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          m[v] = max(m[v], Lanes::load(scores + (runs[i].row + k) * P::columns + v * W));
    bool changed = false;
    const Lanes zero, none(-std::numeric_limits<A>::infinity()), times(factor);
    for (int v = 0; v < V; ++v) {
      const Lanes before = Lanes::load(highest + v * W);
      m[v] = max(before, m[v]);
      m[v].store(highest + v * W);
      m[v] = select(m[v] == none, zero, m[v]);
      const Lanes keep = power_or_zero((before - m[v]) * times);
      keep.store(rescale + v * W);
      changed |= any(~(keep == Lanes(A(1))));
    }
    for (int i = 0; i < count; ++i) {
      const KeyRun<A>& run = runs[i];
      const A* row = scores + run.row * P::columns;
      typename P::Packed* panel = weights + run.row * P::columns;
      const bool plain = !run.key_weight && !dropout;
      for (int64_t k = 0; k < run.count; k += 2, row += 2 * P::columns) {
        if (plain && k + 1 < run.count) {
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            const Lanes a = power_or_zero((Lanes::load(row + v * W) - m[v]) * times);
            const Lanes b = power_or_zero((Lanes::load(row + P::columns + v * W) - m[v]) * times);
            total[0][v] += a, total[1][v] += b;
            P::store_rows(panel, run.count, k, v, a, b);
          }
        } else {
          weigh_pair<V>(run, k, row, times, m, dropout, first_lane, total, panel);
        }
      }
      P::clear_rest(panel, run.count, round_up(run.count, 2));
    }
    for (int v = 0; v < V; ++v)
      fma(Lanes::load(sum + v * W), Lanes::load(rescale + v * W), total[0][v] + total[1][v])
          .store(sum + v * W);
    return changed;
  }

 private:
  // Keys k and k + 1, if there is one, with all that weights may have.
  template <int V>
  static void weigh_pair(const KeyRun<A>& run, int64_t k, const A* row, Lanes times, const Lanes* m,
                         const DropoutTile* dropout, int first_lane, Lanes (*total)[V],
                         typename P::Packed* panel) {
    alignas(64) A kept[2][64];
    const bool pair = k + 1 < run.count;
    if (dropout) {
      dropout->factors(run.first + k, kept[0]);
      dropout->factors(run.first + k + 1, kept[1]);
    }
    for (int v = 0; v < V; ++v) {
      Lanes e[2];
      for (int i = 0; i < 1 + pair; ++i) {
        e[i] = power_or_zero((Lanes::load(row + i * P::columns + v * W) - m[v]) * times);
        if (run.key_weight) e[i] *= Lanes(run.key_weight[k + i]);
        total[i][v] += e[i];
        if (dropout) e[i] *= Lanes::load(kept[i] + first_lane + v * W);
      }
      P::store_rows(panel, run.count, k, v, e[0], e[1]);
    }
  }
};

}  // namespace weft
