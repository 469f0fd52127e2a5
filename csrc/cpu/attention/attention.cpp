// Attention, forward: O = P V with P = u e^S / (sum u e^S + e^sink) over the keys that the mask
// shows, the logarithm of the sums, and what each key receives, c_j = sum_i w_i P_ij.
//
// For tiles of 64 queries of a head > blocks of 128 keys > panels of queries in the lanes of
// vectors: scores = K Qᵀ, the online softmax in registers (softmax.h), Oᵀ += Vᵀ Pᵀ. The tiles of a
// head follow one another on one thread, which packs keys and values at most once for them; every
// query's results depend on its own lane alone, so no division of the work changes a bit.
//
// Key sums: for ranges of keys of a head > tiles of queries: the scores again, and from them and
// the sums P, added up lane by lane.
#include "cpu/attention/key_sums.h"
#include "cpu/attention/query_rows.h"

namespace weft {
namespace {

template <typename T>
struct ForwardResult {
  T* out;       // (B, Nq, Hq, Dv)
  Acc<T>* lse;  // (B, Hq, Nq)
  // (B, Hq, 2, Nq): m, about the largest score of a query, and the sum of u e^(S - m). The backward
  // divides by it: the rounding of lse would cost P a digit.
  Acc<T>* normalizer;
  // What the key sums read, or null: (B, Hq, 2, Nq), the largest score and 1 / sum of each query.
  // They compute the scores again, and must find the same ones.
  Acc<T>* state;
};

template <typename T>
class ForwardTile {
 public:
  using P = Panels<T>;
  using A = Acc<T>;
  using Lanes = Vec<A>;
  using Packed = typename P::Packed;
  static constexpr int W = P::W;
  static constexpr int64_t columns = P::columns;
  static constexpr int64_t kSingle = W / 4;  // queries that are cheaper one by one

  ForwardTile(const AttentionProblem<T>& problem, const BiasTiles<T>& bias,
              const SharedBias<T>& shared, ForwardResult<T> result)
      : p_(problem),
        tile_(problem, bias, shared),
        rows_(problem, bias, !result.state),
        result_(result) {
    weights_ = weight_memory_.template get<Packed>(kBlockKeys * columns);
    sums_ = sum_memory_.template get<A>(QueryTile<T>::kPanels * columns * (p_.Dv + 1));
  }

  void run(int64_t b, int64_t h, int64_t q0, int64_t nq) {
    rows_.begin(b, h, q0);
    // A few queries beyond whole vectors are cheaper one by one.
    const int64_t single = rows_.possible() && nq % W <= kSingle ? nq % W : 0;
    const int64_t together = nq - single;
    for (auto& panel : softmax_) panel.clear();
    started_ = false;
    if (single) add_single(b, h, q0, together, single);
    if (together) {
      tile_.begin(b, h, q0, together);
      while (tile_.next(p_.Nk, [&](const uint64_t* words, int64_t first, int64_t count) {
        if (!rows_.possible() || !is_sparse(words, together, count)) return false;
        rows_.add_tile(words, together, first);
        return true;
      })) {
        for (int64_t i = 0; i < tile_.panels(); ++i)
          with_vectors<P::vectors>(tile_.lanes(i), W,
                                   [&](auto V) { add_block<decltype(V)::value>(i, started_); });
        started_ = true;
      }
    }
    rows_.flush();
    for (int64_t first = 0; first < nq; first += W)
      finish(b, h, q0 + first, first, std::min<int64_t>(W, nq - first));
  }

 private:
  A* sums(int64_t panel) { return sums_ + panel * columns * p_.Dv; }

  template <int V>
  void add_block(int64_t panel, bool started) {
    alignas(64) A rescale[columns];
    tile_.template fill<V>(panel);
    const bool changed =
        softmax_[panel].template weigh<V>(tile_.runs, tile_.count, tile_.scores, tile_.rule.factor,
                                          tile_.dropout(), int(panel * columns), weights_, rescale);
    A* out = sums(panel);
    if (started && changed) {
      Lanes times[V];
      for (int v = 0; v < V; ++v) times[v] = Lanes::load(rescale + v * W);
      for (int64_t d = 0; d < p_.Dv; ++d)
        for (int v = 0; v < V; ++v) {
          A* at = out + d * columns + v * W;
          (Lanes::load(at) * times[v]).store(at);
        }
    }
    for (int i = 0; i < tile_.count; ++i) {
      const KeyRun<A>& run = tile_.runs[i];
      P::multiply(tile_.blocks.values(run.first, run.count), weights_ + run.row * columns,
                  run.count, V * W, out, columns, started || i > 0);
    }
  }

  // Whether a pair by itself, at the price of three in vectors, is the better way.
  static bool is_sparse(const uint64_t* words, int64_t queries, int64_t keys) {
    int64_t pairs = 0;
    for (int64_t k = 0; k < keys; ++k) pairs += __builtin_popcountll(words[k]);
    return 4 * pairs < round_up(queries, W) * keys;
  }

  // Queries [first, first + n) of the tile, by themselves.
  void add_single(int64_t b, int64_t h, int64_t q0, int64_t first, int64_t n) {
    if (p_.mask->everything()) {
      for (int64_t r = first; r < first + n; ++r) rows_.add_range(r, 0, p_.Nk);
      return;
    }
    uint64_t words[64];
    const Range keys = p_.mask->keys(b, h, q0 + first / 16 * 16, first % 16 + n);
    for (int64_t k = keys.begin / 64 * 64; k < keys.end; k += 64) {
      const int64_t count = std::min<int64_t>(64, p_.Nk - k);
      const Tile state = p_.mask->tile(b, h, q0 + first / 16 * 16, first % 16 + n, k, count, words,
                                       BitOrder::by_query);
      if (state == Tile::empty) continue;
      for (int64_t r = 0; r < n; ++r)
        rows_.add_bits(first + r, state == Tile::full ? bits_below(count) : words[first % 16 + r],
                       k);
    }
  }

  // Joins what was found for queries q0 ... q0 + n, lanes of the tile from `lane` on, divides by
  // the sums and writes the rows.
  [[gnu::noinline]] void finish(int64_t b, int64_t h, int64_t q0, int64_t lane, int64_t n) {
    const SoftmaxPanel<T>& state = softmax_[lane / columns];
    const Lanes zero, none(-std::numeric_limits<A>::infinity()), base(kBase<A>);
    const Lanes unit(tile_.rule.unit);
    Lanes highest = Lanes::load(state.highest + lane % columns) * unit;
    Lanes sum = Lanes::load(state.sum + lane % columns);
    alignas(64) A row_share[W];
    Lanes share(A(1));
    const bool joined = (rows_.used() >> lane & bits_below(n)) != 0;
    if (joined) {
      alignas(64) A row_highest[W], row_sum[W];
      for (int i = 0; i < W; ++i)
        row_highest[i] = rows_.highest(lane + i), row_sum[i] = rows_.sum(lane + i);
      const Lanes of_rows = Lanes::load(row_highest), most = max(highest, of_rows);
      const Lanes shift = select(most == none, zero, most);
      share = power_or_zero((highest - shift) * base);
      const Lanes others = power_or_zero((of_rows - shift) * base);
      sum = fma(sum, share, Lanes::load(row_sum) * others);
      highest = most;
      others.store(row_share);
    }
    const auto empty = sum == zero;
    const Lanes maximum = Lanes::load(state.highest + lane % columns);
    const Lanes lse = joined ? highest + log(sum) : fma(maximum, unit, log(sum));
    select(empty, none, lse).store(result_.lse + (b * p_.Hq + h) * p_.Nq + q0, n);
    // The sum is relative to maximum * unit, m is that rounded.
    const Lanes lost = joined ? zero : fma(maximum, unit, -highest);
    A* normalizer = result_.normalizer + 2 * (b * p_.Hq + h) * p_.Nq + q0;
    select(empty, zero, highest).store(normalizer, n);
    select(empty, zero, fma(sum, lost, sum)).store(normalizer + p_.Nq, n);
    if (p_.sink) sum += exp(Lanes(p_.sink[h]) - highest);
    const Lanes factor = select(empty, zero, Lanes(A(1)) / sum);
    if (result_.state) {
      A* to = result_.state + 2 * (b * p_.Hq + h) * p_.Nq + q0;
      select(empty, zero, maximum).store(to, n);
      factor.store(to + p_.Nq, n);
    }
    share *= factor;
    const auto absent = share == zero;
    const A* from = sums(lane / columns) + lane % columns;
    const int64_t stride = p_.Hq * p_.Dv;
    T* rows = result_.out + ((b * p_.Nq + q0) * p_.Hq + h) * p_.Dv;
    if (joined) (Lanes::load(row_share) * factor).store(row_share);
    for (int64_t d = 0; d < p_.Dv; d += W) {
      const int64_t width = std::min<int64_t>(W, p_.Dv - d);
      typename Lanes::Register row[W];
      for (int j = 0; j < W; ++j)
        row[j] = started_ && j < width
                     ? select(absent, zero, Lanes::load(from + (d + j) * columns) * share).v
                     : zero.v;
      transpose_block<W>(row);
      for (int64_t i = 0; i < n; ++i) {
        Lanes x(row[i]);
        if (joined && rows_.used() >> (lane + i) & 1)
          x = fma(Lanes::load(rows_.out(lane + i) + d), Lanes(row_share[i]), x);
        if (width == W)
          x.store(rows + i * stride + d);
        else
          x.store(rows + i * stride + d, width);
      }
    }
  }

  const AttentionProblem<T>& p_;
  QueryTile<T> tile_;
  QueryRows<T> rows_;
  bool started_ = false;
  const ForwardResult<T> result_;
  SoftmaxPanel<T> softmax_[QueryTile<T>::kPanels];
  Packed* weights_;  // [row][columns], in the layout of right operands
  A* sums_;          // [panel][Dv][columns]
  inline static thread_local Scratch weight_memory_, sum_memory_;
};

template <typename T>
void attention_forward(const AttentionProblem<T>& p, const BiasTiles<T>& bias,
                       const SharedBias<T>& shared, ForwardResult<T> result) {
  const int64_t tiles = ceil_div(p.Nq, kTileQueries), of_head = p.group * tiles;
  const int64_t items = p.B * p.Hkv * of_head;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunk = p.B * p.Hkv >= 4 * threads ? of_head : ceil_div(items, 8 * threads);
  for_chunks(items, std::max<int64_t>(chunk, 1), [&] {
    return [session = std::make_unique<ProductSession<T>>(),
            tile = std::make_unique<ForwardTile<T>>(p, bias, shared, result), &p,
            tiles](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / tiles, q0 = item % tiles * kTileQueries;
        tile->run(head / p.Hq, head % p.Hq, q0, std::min(kTileQueries, p.Nq - q0));
      }
    };
  });
}

// ---- registration -------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
    const OptionalTensor& sink, const OptionalTensor& key_weight,
    const OptionalTensor& query_weight, const OptionalTensor& seed, std::string mask_program,
    std::vector<int64_t> mask_ints, std::vector<Tensor> mask_tensors, double scale, double softcap,
    double dropout_p, bool key_sums) {
  const AttentionArguments arguments(query, key, value, bias, sink, key_weight, query_weight, seed,
                                     mask_program, mask_ints, mask_tensors, scale, softcap,
                                     dropout_p);
  const int64_t B = arguments.B, Hq = arguments.Hq, Nq = arguments.Nq, Nk = arguments.Nk;
  const auto wide = arguments.wide_type();
  Tensor out = torch::stable::new_empty(query, {B, Nq, Hq, value.size(3)});
  Tensor lse = torch::stable::new_empty(query, {B, Hq, Nq}, wide);
  Tensor normalizer = torch::stable::new_empty(query, {B, Hq, 2, Nq}, wide);
  Tensor sums = key_sums ? torch::stable::new_empty(query, {B, Hq, Nk}, wide)
                         : torch::stable::new_empty(query, {0}, wide);
  with_float(query, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    static thread_local Scratch bias_memory, state_memory;
    const AttentionProblem<T> p = arguments.template problem<T>();
    const BiasTiles<T> tiles(p.bias);
    const SharedBias<T> shared(p, tiles, bias_memory);
    A* state = key_sums ? state_memory.template get<A>(2 * B * Hq * Nq) : nullptr;
    attention_forward<T>(
        p, tiles, shared,
        {mutable_data<T>(out), mutable_data<A>(lse), mutable_data<A>(normalizer), state});
    if (key_sums) attention_key_sums<T>(p, tiles, shared, state, mutable_data<A>(sums));
  });
  return {out, lse, sums, normalizer};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("attention(" WEFT_ATTENTION_SCHEMA ", bool key_sums) -> (Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace weft
