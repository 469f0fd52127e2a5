// Tiles of up to 64 queries of a head against its keys: what the forward and the key sums share.
#pragma once
#include <atomic>

#include "cpu/attention/key_blocks.h"
#include "cpu/attention/softmax.h"

namespace weft {

inline constexpr int64_t kTileQueries = 64;
inline constexpr int64_t kBlockKeys = 128;  // of which the scores are held at once

// A bias of pairs that many heads or batches share, transposed once: [plane][key][query].
template <typename T>
class SharedBias {
 public:
  using A = Acc<T>;

  SharedBias(const AttentionProblem<T>& p, const BiasTiles<T>& tiles, Scratch& memory) {
    if (tiles.kind() != BiasKind::of_pairs) return;
    const int64_t batches = p.bias.sizes[0], heads = p.bias.sizes[1];
    const int64_t lanes = round_up(p.Nq, kTileQueries);
    const int64_t size = batches * heads * p.Nk * lanes;
    if (p.B * p.Hq < 2 * batches * heads || size > kMost) return;
    A* planes = memory.template get<A>(size);
    const int64_t blocks = ceil_div(p.Nk, kBlockKeys);
    parallel_for(0, batches * heads * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t plane = task / blocks, k0 = task % blocks * kBlockKeys;
        A* to = planes + (plane * p.Nk + k0) * lanes;
        const int64_t n = std::min(kBlockKeys, p.Nk - k0);
        tiles.tile(plane / heads, plane % heads, 0, p.Nq, k0, n, to, lanes);
        for (int64_t k = 0; k < n; ++k)
          std::fill(to + k * lanes + p.Nq, to + (k + 1) * lanes, A(0));
      }
    });
    data_ = planes, batches_ = batches, heads_ = heads, lanes_ = lanes, keys_ = p.Nk;
  }

  explicit operator bool() const { return data_ != nullptr; }
  int64_t stride() const { return lanes_; }
  const A* at(int64_t b, int64_t h, int64_t q0, int64_t k0) const {
    const int64_t plane = (batches_ > 1 ? b : 0) * heads_ + (heads_ > 1 ? h : 0);
    return data_ + (plane * keys_ + k0) * lanes_ + q0;
  }

 private:
  static constexpr int64_t kMost = int64_t(1) << 22;
  const A* data_ = nullptr;
  int64_t batches_ = 0, heads_ = 0, lanes_ = 0, keys_ = 0;
};

// The scores of a tile of queries with runs of keys. One per thread.
template <typename T>
class QueryTile {
 public:
  using P = Panels<T>;
  using A = Acc<T>;
  using Packed = typename P::Packed;
  static constexpr int W = P::W;
  static constexpr int64_t columns = P::columns;
  static constexpr int64_t kPanels = kTileQueries / columns;
  static constexpr int kRuns = int(kBlockKeys / 64);

  QueryTile(const AttentionProblem<T>& problem, const BiasTiles<T>& bias,
            const SharedBias<T>& shared)
      : p(problem),
        rule(problem.scale, problem.softcap, bias.kind() != BiasKind::none, bias.masked()),
        step(step_of(problem)),
        blocks(problem, step),
        bias_(bias),
        shared_(shared),
        query_size_(round_up(P::right_size(problem.D), 32)) {
    A* base = memory_.template get<A>(2 * kBlockKeys * (columns + 1));
    scores = base, pair_bias_ = base + kBlockKeys * columns,
    key_bias_ = base + 2 * kBlockKeys * columns;
    queries_ = query_memory_.template get<Packed>(kPanels * query_size_);
  }

  void begin(int64_t batch, int64_t head, int64_t first, int64_t n) {
    b = batch, h = head, q0 = first, nq = n;
    blocks.begin(b, h / p.group);
    const Matrix<T> x = p.query(b, h);
    for (int64_t i = 0; i * columns < nq; ++i)
      P::pack_right(x.block(q0 + i * columns, 0, lanes(i), p.D).transposed(),
                    queries_ + i * query_size_);
    if (bias_.kind() == BiasKind::of_queries) bias_.vector(b, h, q0, nq, query_bias_);
    if (p.dropout) dropout_ = DropoutTile(*p.dropout, b * p.Hq + h, q0);
    next_ = 0;
    range_ = p.mask->keys(b, h, q0, nq);
    if (!p.mask->everything()) next_ = range_.begin / 64 * 64;
  }

  // Leaves out the keys before `key`, a multiple of `step`.
  void skip_to(int64_t key) { next_ = std::max(next_, key); }

  int64_t lanes(int64_t panel) const { return std::min(columns, nq - panel * columns); }
  int64_t panels() const { return ceil_div(nq, columns); }
  const DropoutTile* dropout() const { return p.dropout ? &dropout_ : nullptr; }

  // The next keys that some query sees, at most kBlockKeys; false when there are none left. Partial
  // tiles of the mask that `takes_tile` takes are left out.
  template <typename F>
  bool next(int64_t end, F takes_tile) {
    count = 0;
    const int64_t last = std::min(end, range_.end);
    for (int64_t row = 0; next_ < last && row + step <= kBlockKeys;) {
      KeyRun<A> run;
      run.first = next_, run.count = std::min(step, p.Nk - next_), run.row = row;
      next_ += step;
      if (!p.mask->everything()) {
        const Tile state = p.mask->tile(b, h, q0, nq, run.first, run.count, words_[count]);
        if (state == Tile::empty) continue;
        if (state == Tile::partial) {
          if (takes_tile(words_[count], run.first, run.count)) continue;
          run.words = words_[count];
        }
      }
      if (p.key_weight) run.key_weight = p.key_weight(b, h) + run.first;
      if (bias_.kind() == BiasKind::of_keys) {
        bias_.vector(b, h, run.first, run.count, key_bias_ + row);
        run.key_bias = key_bias_ + row;
      }
      runs[count++] = run;
      row += round_up(run.count, P::depth_unit);
    }
    return count > 0;
  }

  // The scores of a panel with those keys.
  template <int V>
  void fill(int64_t panel) {
    for (int i = 0; i < count; ++i)
      P::multiply(blocks.keys(runs[i].first, runs[i].count), queries_ + panel * query_size_, p.D,
                  V * W, scores + runs[i].row * columns, columns, false);
    for (int i = 0; i < count; ++i) {
      KeyRun<A> run = runs[i];
      if (rule.products && !run.words) continue;
      if (bias_.kind() == BiasKind::of_queries) {
        run.bias = query_bias_ + panel * columns;
      } else if (shared_) {
        run.bias = shared_.at(b, h, q0 + panel * columns, run.first);
        run.bias_stride = shared_.stride();
      } else if (bias_.kind() == BiasKind::of_pairs) {
        bias_.tile(b, h, q0 + panel * columns, lanes(panel), run.first, run.count, pair_bias_,
                   columns);
        run.bias = pair_bias_, run.bias_stride = columns;
      }
      products_to_scores<T, V>(rule, run, int(panel * columns), scores + run.row * columns);
    }
  }

  // Runs of 64 keys where a mask says which there are, otherwise equal ones.
  static int64_t step_of(const AttentionProblem<T>& p) {
    if (!p.mask->everything()) return 64;
    const int64_t even = ceil_div(p.Nk, ceil_div(std::max<int64_t>(p.Nk, 1), kBlockKeys));
    return std::min(kBlockKeys, round_up(std::max<int64_t>(even, 1), P::depth_unit));
  }

  const AttentionProblem<T>& p;
  const ScoreRule<A> rule;
  const int64_t step;  // keys of a run, at most
  KeyBlocks<T> blocks;
  int64_t b = 0, h = 0, q0 = 0, nq = 0;
  KeyRun<A> runs[kRuns];
  int count = 0;
  A* scores;  // [row][columns]

 private:
  const BiasTiles<T>& bias_;
  const SharedBias<T>& shared_;
  const int64_t query_size_;
  DropoutTile dropout_;
  Range range_;
  int64_t next_ = 0;
  uint64_t words_[kRuns][64];
  alignas(64) A query_bias_[kTileQueries] = {};
  A *pair_bias_, *key_bias_;
  Packed* queries_;
  inline static thread_local Scratch memory_, query_memory_;
};

// Calls f with the number of vectors that n lanes of a panel fill, as a constant.
template <int most, typename F>
inline void with_vectors(int64_t n, int W, F f) {
  if constexpr (most > 1) {
    if (n <= (most - 1) * W) return with_vectors<most - 1>(n, W, f);
  }
  f(std::integral_constant<int, most>{});
}

// Calls work(first, last) for chunks of [0, n) on all threads, each when a thread is free: the
// items take different times, and none depends on another.
template <typename F>
inline void for_chunks(int64_t n, int64_t chunk, F make_worker) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(n, chunk));
  if (n == 0) return;
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto work = make_worker();
      for (int64_t at; (at = next.fetch_add(chunk)) < n;) work(at, std::min(n, at + chunk));
    }
  });
}

}  // namespace weft
