// What each key receives: c_j = sum_i w_i P_ij, with P_ij = u_j e^(s_ij - m_i) / l_i from the
// maxima and sums that the forward found.
//
// For ranges of keys of a head > tiles of queries > blocks of keys: each key has a vector of sums,
// one for each lane, in the order of the queries; the lanes are added up at the end.
#pragma once
#include <memory>

#include "cpu/attention/query_tiles.h"

namespace weft {

template <typename T>
class KeySums {
 public:
  using A = Acc<T>;
  using Lanes = Vec<A>;
  static constexpr int W = Lanes::size;
  static constexpr int64_t columns = Panels<T>::columns;

  KeySums(const AttentionProblem<T>& problem, const BiasTiles<T>& bias, const SharedBias<T>& shared,
          const A* state)
      : p_(problem), tile_(problem, bias, shared), state_(state) {
    sums_ = memory_.template get<A>(keys_of_task(tile_.step) * W);
  }

  // Keys of a task: whole runs.
  static int64_t keys_of_task(int64_t step) { return std::max<int64_t>(1, 1024 / step) * step; }

  // Sums of the keys [first, last) of a head, into out.
  void run(int64_t b, int64_t h, int64_t first, int64_t last, A* out) {
    std::fill_n(sums_, (last - first) * W, A(0));
    for (int64_t q0 = 0; q0 < p_.Nq; q0 += kTileQueries) add_queries(b, h, q0, first, last);
    for (int64_t k = first; k < last; ++k)
      out[k] = reduce_sum(Lanes::load(sums_ + (k - first) * W));
  }

 private:
  void add_queries(int64_t b, int64_t h, int64_t q0, int64_t first, int64_t last) {
    int64_t begin = 0, end = std::min(kTileQueries, p_.Nq - q0);
    const A* weight = p_.query_weight ? p_.query_weight(b, h) + q0 : nullptr;
    if (weight) {  // a class token alone costs one vector of queries
      while (end > begin && weight[end - 1] == 0) --end;
      while (begin < end && weight[begin] == 0) ++begin;
      begin = begin / 16 * 16;
    }
    if (begin == end) return;
    const A* state = state_ + 2 * (b * p_.Hq + h) * p_.Nq + q0;
    for (int64_t i = 0; i < kTileQueries; ++i) {
      const bool exists = begin + i < end;
      highest_[i] = exists ? state[begin + i] : A(0);
      weight_[i] = exists ? state[p_.Nq + begin + i] * (weight ? weight[begin + i] : A(1)) : A(0);
    }
    tile_.begin(b, h, q0 + begin, end - begin);
    tile_.skip_to(first);
    while (tile_.next(last, [](const uint64_t*, int64_t, int64_t) { return false; }))
      for (int64_t i = 0; i < tile_.panels(); ++i)
        with_vectors<Panels<T>::vectors>(tile_.lanes(i), W,
                                         [&](auto V) { add_block<decltype(V)::value>(i, first); });
  }

  template <int V>
  void add_block(int64_t panel, int64_t first) {
    tile_.template fill<V>(panel);
    const Lanes factor(tile_.rule.factor), zero;
    Lanes highest[V], weight[V];
    for (int v = 0; v < V; ++v) {
      highest[v] = Lanes::load(highest_ + panel * columns + v * W);
      weight[v] = Lanes::load(weight_ + panel * columns + v * W);
    }
    for (int i = 0; i < tile_.count; ++i) {
      const KeyRun<A>& run = tile_.runs[i];
      const A* row = tile_.scores + run.row * columns;
      A* sums = sums_ + (run.first - first) * W;
      for (int64_t k = 0; k < run.count; ++k, row += columns, sums += W) {
        Lanes total;
        for (int v = 0; v < V; ++v) {
          const Lanes e = power_or_zero((Lanes::load(row + v * W) - highest[v]) * factor);
          total += select(weight[v] == zero, zero, e * weight[v]);
        }
        if (run.key_weight) total *= Lanes(run.key_weight[k]);
        (Lanes::load(sums) + total).store(sums);
      }
    }
  }

  const AttentionProblem<T>& p_;
  QueryTile<T> tile_;
  const A* state_;  // (B, Hq, 2, Nq): m and 1 / l
  A* sums_;         // [key of the task][lane]
  alignas(64) A highest_[kTileQueries];
  alignas(64) A weight_[kTileQueries];
  inline static thread_local Scratch memory_;
};

template <typename T>
void attention_key_sums(const AttentionProblem<T>& p, const BiasTiles<T>& bias,
                        const SharedBias<T>& shared, const Acc<T>* state, Acc<T>* sums) {
  const int64_t keys = KeySums<T>::keys_of_task(QueryTile<T>::step_of(p));
  const int64_t tasks = ceil_div(p.Nk, keys), items = p.B * p.Hq * tasks;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunk = p.B * p.Hkv >= 4 * threads ? p.group * tasks : ceil_div(items, 8 * threads);
  for_chunks(items, std::max<int64_t>(chunk, 1), [&] {
    return [session = std::make_unique<ProductSession<T>>(),
            worker = std::make_unique<KeySums<T>>(p, bias, shared, state), &p, sums, tasks,
            keys](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / tasks, first = item % tasks * keys;
        worker->run(head / p.Hq, head % p.Hq, first, std::min(first + keys, p.Nk),
                    sums + head * p.Nk);
      }
    };
  });
}

}  // namespace weft
