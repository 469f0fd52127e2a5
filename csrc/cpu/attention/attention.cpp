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

namespace weft {
namespace {

template <typename T>
struct ForwardResult {
  T* out;       // (B, Nq, Hq, Dv)
  Acc<T>* lse;  // (B, Hq, Nq)
  // What the key sums read, or null: (B, Hq, 2, Nq), the largest score and 1 / sum of each query.
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

  ForwardTile(const AttentionProblem<T>& problem, const BiasTiles<T>& bias,
              const SharedBias<T>& shared, ForwardResult<T> result)
      : p_(problem), tile_(problem, bias, shared), result_(result) {
    weights_ = weight_memory_.template get<Packed>(kBlockKeys * columns);
    sums_ = sum_memory_.template get<A>(QueryTile<T>::kPanels * columns * (p_.Dv + 1));
  }

  void run(int64_t b, int64_t h, int64_t q0, int64_t nq) {
    tile_.begin(b, h, q0, nq);
    for (int64_t i = 0; i < tile_.panels(); ++i) softmax_[i].clear();
    bool started = false;
    while (tile_.next(p_.Nk)) {
      for (int64_t i = 0; i < tile_.panels(); ++i)
        with_vectors<P::vectors>(tile_.lanes(i), W,
                                 [&](auto V) { add_block<decltype(V)::value>(i, started); });
      started = true;
    }
    for (int64_t i = 0; i < tile_.panels(); ++i) finish(i, started);
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

  // Divides by the sums and writes the rows of a panel.
  [[gnu::noinline]] void finish(int64_t panel, bool started) {
    const int64_t n = tile_.lanes(panel), first = tile_.q0 + panel * columns;
    const SoftmaxPanel<T>& state = softmax_[panel];
    A* lse = result_.lse + (tile_.b * p_.Hq + tile_.h) * p_.Nq + first;
    const Lanes zero, none(-std::numeric_limits<A>::infinity());
    const int64_t stride = p_.Hq * p_.Dv;
    T* rows = result_.out + ((tile_.b * p_.Nq + first) * p_.Hq + tile_.h) * p_.Dv;
    for (int64_t lane = 0; lane < n; lane += W, rows += W * stride) {
      const int64_t m = std::min<int64_t>(W, n - lane);
      const Lanes maximum = Lanes::load(state.highest + lane);
      const Lanes highest = maximum * Lanes(tile_.rule.unit);
      const Lanes sum = Lanes::load(state.sum + lane);
      const auto empty = sum == zero;
      select(empty, none, highest + log(sum)).store(lse + lane, m);
      Lanes total = sum;
      if (p_.sink) total += exp(Lanes(p_.sink[tile_.h]) - highest);
      const Lanes share = Lanes(A(1)) / total;
      if (result_.state) {
        A* to = result_.state + 2 * (tile_.b * p_.Hq + tile_.h) * p_.Nq + first + lane;
        select(empty, zero, maximum).store(to, m);
        select(empty, zero, share).store(to + p_.Nq, m);
      }
      for (int64_t d = 0; d < p_.Dv; d += W) {
        const int64_t width = std::min<int64_t>(W, p_.Dv - d);
        typename Lanes::Register row[W];
        for (int j = 0; j < W; ++j)
          row[j] =
              started && j < width
                  ? select(empty, zero, Lanes::load(sums(panel) + (d + j) * columns + lane) * share)
                        .v
                  : zero.v;
        transpose_block<W>(row);
        for (int64_t i = 0; i < m; ++i) {
          if (width == W)
            Lanes(row[i]).store(rows + i * stride + d);
          else
            Lanes(row[i]).store(rows + i * stride + d, width);
        }
      }
    }
  }

  const AttentionProblem<T>& p_;
  QueryTile<T> tile_;
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

std::tuple<Tensor, Tensor, Tensor> attention(
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
    attention_forward<T>(p, tiles, shared, {mutable_data<T>(out), mutable_data<A>(lse), state});
    if (key_sums) attention_key_sums<T>(p, tiles, shared, state, mutable_data<A>(sums));
  });
  return {out, lse, sums};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("attention(" WEFT_ATTENTION_SCHEMA ", bool key_sums) -> (Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace weft
