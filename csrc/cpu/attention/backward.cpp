// The items of backward.h: tiles of queries and keys. Compiled once for each element type.
#include "cpu/attention/backward.h"

#include <atomic>

#include "cpu/attention/backward_workspace.h"

namespace weft {

template <typename T>
AttentionBackward<T>::AttentionBackward(const AttentionProblem<T>& problem,
                                        const BackwardUpstream<T>& upstream,
                                        const BackwardResults<T>& results)
    : p_(problem),
      up_(upstream),
      out_(results),
      bias_(problem.bias),
      bias_gradient_(problem, results.bias),
      split_(bias_gradient_.split()),
      query_tiles_(ceil_div(problem.Nq, kTile)),
      masked_(!problem.mask->everything()) {
  const BiasKind kind = bias_gradient_.kind();
  plain_ = up_.grad_out.data && !p_.sink && !p_.key_weight && p_.softcap == 0 && !p_.dropout &&
           !up_.grad_sums && (kind == BiasKind::none || kind == BiasKind::of_pairs);
}

template <typename T>
void AttentionBackward<T>::run() {
  static thread_local Scratch of_chunks, of_weights, of_sink, of_received;
  const int64_t heads = p_.B * p_.Hq;
  if (split_.chunks > 1 && (out_.key || out_.value))
    chunk_sums_ = of_chunks.get<A>(split_.chunks * p_.B * p_.Hkv * p_.Nk * (p_.D + p_.Dv));
  if (out_.key_weight) key_weight_sums_ = of_weights.get<A>(split_.chunks * heads * p_.Nk);
  if (out_.sink) sink_sums_ = of_sink.get<A>(heads * query_tiles_);
  if (out_.query_weight) received_ = of_received.get<A>(heads * p_.Nq);
  // Items cost unlike amounts under a mask: a thread takes the next when it has done one.
  std::atomic<int64_t> next{0};
  parallel_for(0, split_.items(), 1, [&](int64_t, int64_t) {
    const ProductSession<T> session;
    Workspace& w = Workspace::mine();
    for (int64_t item; (item = next++) < split_.items();) run_item(item, w);
  });
  if (chunk_sums_) add_chunks();
  bias_gradient_.finish();
  add_vectors();
}

template <typename T>
void AttentionBackward<T>::run_item(int64_t item, Workspace& w) {
  const int64_t chunk = item % split_.chunks, part = item / split_.chunks % split_.parts;
  const int64_t cell = item / split_.chunks / split_.parts;
  Place at{part, chunk, 0, 0};
  at.first_tile = query_tiles_ * chunk / split_.chunks;
  at.last_tile = query_tiles_ * (chunk + 1) / split_.chunks;
  w.bias_plane = -1;
  bias_gradient_.clear(cell, part, chunk, at.first_tile * kTile,
                       std::min(p_.Nq, at.last_tile * kTile));
  const int64_t begin = split_.members * part / split_.parts;
  const int64_t end = split_.members * (part + 1) / split_.parts;
  for (int64_t i = begin; i < end; ++i) {
    std::tie(at.b, at.kv_head) = bias_gradient_.member(cell, i);
    if (i + 1 < end) std::tie(at.next_b, at.next_head) = bias_gradient_.member(cell, i + 1);
    at.last = i + 1 == end;
    run_member(at, w);
  }
}

// One (batch, key head), with all its query heads.
template <typename T>
void AttentionBackward<T>::run_member(Place at, Workspace& w) {
  const int64_t Nk = p_.Nk, D = p_.D, Dv = p_.Dv;
  w.keys.load(p_.key(at.b, at.kv_head), w.memory[0]);
  w.values.load(p_.value(at.b, at.kv_head), w.memory[1]);
  if (masked_ && !w.keys.finite()) {
    // 0 times what is not finite would reach the queries: keys that nobody sees must go.
    w.seen.resize(size_t(Nk));
    p_.mask->visible_keys(at.b, at.kv_head, p_.group, w.seen.data());
    w.keys.load(p_.key(at.b, at.kv_head), w.memory[0], w.seen.data());
  }
  if (out_.query) w.key_columns.load(w.keys, Nk, D, w.memory[2]);
  w.touched.assign(size_t(ceil_div(Nk, kTile)), 0);
  if (chunk_sums_)
    w.key_sums = partial_sums(at.chunk, at.b * p_.Hkv + at.kv_head);
  else
    w.key_sums = w.memory[3].template get<A>(Nk * (D + Dv));
  w.value_sums = w.key_sums + Nk * D;

  // One tile's memory: two of scores in the type of sums, three in that of the products.
  constexpr int64_t kScores = kTile * kTile;
  w.products = w.memory[4].template get<A>(4 * kScores + D * kTile);
  w.upstream = w.products + kScores;
  w.bias = w.upstream + kScores, w.direct = w.bias + kScores, w.query_sums = w.direct + kScores;
  w.gradient_panels = w.memory[5].template get<E>(P::right_size(kTile, kTile) + 4 * kScores);
  w.weights = w.gradient_panels + P::right_size(kTile, kTile);
  w.gradients = w.weights + kScores, w.weights_rest = w.gradients + kScores;

  for (int64_t g = 0; g < p_.group; ++g) {
    at.h = at.kv_head * p_.group + g;
    if (key_weight_sums_) std::fill_n(key_weight_sums(at.chunk, at.b, at.h), Nk, A(0));
    for (int64_t t = at.first_tile; t < at.last_tile; ++t) {
      at.q0 = t * kTile, at.nq = std::min(kTile, p_.Nq - at.q0);
      read_ahead(at, w);
      run_tile(at, w);
    }
  }
  finish_keys(at, w);
}

// Biases that hide their pairs become -infinity. n: a multiple of kTile, what is beyond a tile too.
template <typename T>
void AttentionBackward<T>::hide(A* bias, int64_t n) const {
  const Vec<A> lowest(bias_.masked()), none(-std::numeric_limits<A>::infinity());
  for (int64_t i = 0; i < n; i += Vec<A>::size) {
    const Vec<A> x = Vec<A>::load(bias + i);
    select(x <= lowest, none, x).store(bias + i);
  }
}

// What the tile after this one reads, and what this one writes.
template <typename T>
void AttentionBackward<T>::read_ahead(const Place& at, Workspace& w) {
  constexpr int64_t kRows = 256;  // of keys; more would not stay in the cache
  w.ahead.clear();
  int64_t b = at.b, h = at.h, q0 = at.q0 + kTile;
  const bool last_head = h + 1 == (at.kv_head + 1) * p_.group;
  if (q0 >= std::min(p_.Nq, at.last_tile * kTile)) {
    q0 = at.first_tile * kTile, ++h;
    if (last_head) b = at.next_b, h = at.next_head * p_.group;
  }
  if (b != at.b || h != at.h || q0 != at.q0) {
    w.ahead.add(p_.query(b, h), q0, kTile);
    w.ahead.add(up_.out(b, h), q0, kTile);
    if (up_.grad_out.data) w.ahead.add(up_.grad_out(b, h), q0, kTile);
  }
  const auto written = [&](T* result, int64_t N, int64_t H, int64_t head, int64_t D) {
    return row_major<T>(row(result, at.b, 0, head, N, H, D), N, D, H * D);
  };
  if (out_.query) w.ahead.add(written(out_.query, p_.Nq, p_.Hq, at.h, p_.D), at.q0, kTile);
  if (last_head && at.q0 == at.first_tile * kTile && !at.last) {
    w.ahead.add(p_.key(at.next_b, at.next_head), 0, kRows);
    w.ahead.add(p_.value(at.next_b, at.next_head), 0, kRows);
  }
  if (last_head && at.q0 + kTile >= std::min(p_.Nq, at.last_tile * kTile) && !chunk_sums_) {
    if (out_.key) w.ahead.add(written(out_.key, p_.Nk, p_.Hkv, at.kv_head, p_.D), 0, kRows);
    if (out_.value) w.ahead.add(written(out_.value, p_.Nk, p_.Hkv, at.kv_head, p_.Dv), 0, kRows);
  }
}

// The queries of a tile: their rows, packed, and their constants.
template <typename T>
void AttentionBackward<T>::load_queries(const Place& at, Workspace& w) {
  const int64_t first = (at.b * p_.Hq + at.h) * p_.Nq + at.q0;
  QueryLanes<A>& q = w.lanes;
  q.count = at.nq, q.lanes = round_up(at.nq, P::lane_unit);
  q.live = 0;
  for (int64_t r = 0; r < at.nq; ++r)
    q.live |= uint64_t(up_.lse[first + r] != -std::numeric_limits<A>::infinity()) << r;
  const Matrix<T> out = up_.out(at.b, at.h);
  Matrix<T> grad_out{};
  w.query.load(p_.query(at.b, at.h), at.q0, at.nq, q.live, w.memory[6]);
  if (up_.grad_out.data) {
    grad_out = up_.grad_out(at.b, at.h);
    w.grad_out.load(grad_out, at.q0, at.nq, q.live, w.memory[7]);
  }
  std::fill_n(w.delta, kTile, A(0));
  if (grad_out.data) row_products(grad_out, out, at.q0, at.nq, w.delta);
  for (int64_t r = 0; r < q.lanes; ++r) {
    q.shift[r] = q.inverse[r] = q.share[r] = q.offset[r] = q.weight[r] = 0;
    if (!(q.live >> r & 1)) {
      w.delta[r] = 0;
      continue;
    }
    const int64_t i = at.q0 + r;
    const A* normalizer = up_.normalizer + 2 * (first - at.q0) + i;
    q.shift[r] = -normalizer[0], q.inverse[r] = 1 / normalizer[p_.Nq];
    const A of_sink = p_.sink ? std::exp(p_.sink[at.h] - normalizer[0]) : A(0);
    q.share[r] = std::isinf(of_sink) ? A(0) : normalizer[p_.Nq] / (normalizer[p_.Nq] + of_sink);
    q.weight[r] = p_.query_weight ? p_.query_weight(at.b, at.h)[i] : A(1);
  }
  if (bias_.kind() == BiasKind::of_queries) {
    bias_.vector(at.b, at.h, at.q0, at.nq, w.bias);
    hide(w.bias, kTile);
    for (int64_t r = 0; r < at.nq; ++r)
      if (q.live >> r & 1) q.shift[r] += w.bias[r];
  }
  if (p_.dropout) w.dropout = DropoutTile(*p_.dropout, at.b * p_.Hq + at.h, at.q0);
}

template <typename T>
ScoreTile<T> AttentionBackward<T>::new_tile(Workspace& w) const {
  ScoreTile<T> tile;
  tile.products = w.products, tile.upstream = w.upstream;
  tile.weights = w.weights, tile.gradients = w.gradients;
  tile.words = nullptr;
  tile.scale = p_.scale, tile.softcap = p_.softcap;
  tile.has_upstream = up_.grad_out.data != nullptr, tile.plain = plain_;
  if (p_.dropout) tile.dropout = &w.dropout;
  return tile;
}

// The products of the keys [k0, k0 + nk) and what the scores need beside them; false if no query
// of the tile sees any of them.
template <typename T>
bool AttentionBackward<T>::load_scores(const Place& at, int64_t k0, int64_t nk, Workspace& w,
                                       ScoreTile<T>& tile) {
  if (masked_) {
    const Tile state = p_.mask->tile(at.b, at.h, at.q0, at.nq, k0, nk, w.words);
    if (state == Tile::empty) return false;
    tile.words = state == Tile::partial ? w.words : nullptr;
  }
  tile.keys = nk, tile.first_key = k0;
  P::multiply(w.keys.rows(k0, nk), w.query.transposed, w.query.depth, p_.D, w.lanes.lanes,
              w.products, kTile, false, w.ahead);
  if (bias_.kind() == BiasKind::of_pairs) {
    constexpr int64_t kKept = 1 << 16;
    const int64_t stride = round_up(p_.Nq, kTile);
    if (stride * p_.Nk <= kKept) {  // members that follow may read it again
      A* whole = w.memory[9].template get<A>(kKept);
      const int64_t plane = bias_.plane(at.b, at.h);
      if (plane != w.bias_plane) {
        bias_.tile(at.b, at.h, 0, p_.Nq, 0, p_.Nk, whole, stride);
        hide(whole, stride * p_.Nk);
        w.bias_plane = plane;
      }
      tile.bias = whole + k0 * stride + at.q0, tile.bias_ld = stride;
    } else {
      bias_.tile(at.b, at.h, at.q0, at.nq, k0, nk, w.bias, kTile);
      hide(w.bias, nk * kTile);
      tile.bias = w.bias;
    }
  } else if (bias_.kind() == BiasKind::of_keys) {
    bias_.vector(at.b, at.h, k0, nk, w.key_bias);
    hide(w.key_bias, kTile);
    tile.key_bias = w.key_bias;
  }
  if (p_.key_weight) tile.key_weight = p_.key_weight(at.b, at.h) + k0;
  if (up_.grad_sums) tile.grad_sums = up_.grad_sums + (at.b * p_.Hq + at.h) * p_.Nk + k0;
  return true;
}

// a_i = sum_j P_ij dc_j of the tile's queries, which delta needs: a sweep of its own.
template <typename T>
void AttentionBackward<T>::sum_received(const Place& at, Workspace& w, ScoreTile<T> tile) {
  std::fill_n(w.received, kTile, A(0));
  const Range keys = p_.mask->keys(at.b, at.h, at.q0, at.nq);
  for (int64_t k0 = keys.begin / kTile * kTile; k0 < keys.end; k0 += kTile)
    if (load_scores(at, k0, std::min(kTile, p_.Nk - k0), w, tile))
      tile.add_received(w.lanes, w.received);
  for (int64_t r = 0; r < at.nq; ++r) {
    w.received[r] *= w.lanes.share[r];
    w.delta[r] += w.lanes.weight[r] * w.received[r];
  }
}

// dV += P dO, dK += dS Q, dQ += K dS of a tile; P and dS, or what their rounding took.
template <typename T>
void AttentionBackward<T>::add_products(const Place& at, int64_t k0, int64_t nk, const E* weights,
                                        const E* gradients, bool add_keys, bool add_queries,
                                        Workspace& w) {
  if (out_.value && up_.grad_out.data)
    P::multiply({weights, nk, at.nq, kTile, 1}, w.grad_out.rows, kTile, at.nq, p_.Dv,
                w.value_sums + k0 * p_.Dv, p_.Dv, add_keys, w.ahead);
  if (out_.key)
    P::multiply({gradients, nk, at.nq, kTile, 1}, w.query.rows, kTile, at.nq, p_.D,
                w.key_sums + k0 * p_.D, p_.D, add_keys, w.ahead);
  if (!out_.query) return;
  if constexpr (!P::by_vectors)
    P::pack_right(row_major<E>(gradients, nk, w.lanes.lanes, kTile), w.gradient_panels, kTile);
  w.key_columns.multiply(k0, nk, at.nq, w.lanes.lanes, gradients, w.gradient_panels, w.query_sums,
                         add_queries, w.ahead);
}

template <typename T>
void AttentionBackward<T>::run_tile(const Place& at, Workspace& w) {
  load_queries(at, w);
  QueryLanes<A>& q = w.lanes;
  const int64_t of_head = (at.b * p_.Hq + at.h) * p_.Nq + at.q0;
  ScoreTile<T> tile = new_tile(w);
  if (up_.grad_sums) sum_received(at, w, tile);
  A of_sink = 0;
  for (int64_t r = 0; r < at.nq; ++r) {
    q.offset[r] = -q.share[r] * w.delta[r];
    if (q.live >> r & 1) {
      if (up_.grad_lse) q.offset[r] += up_.grad_lse[of_head + r];
      if (p_.sink) of_sink -= (1 - q.share[r]) * w.delta[r];
    }
    if (received_) received_[of_head + r] = up_.grad_sums ? w.received[r] : A(0);
  }
  if (sink_sums_) sink_sums_[(at.b * p_.Hq + at.h) * query_tiles_ + at.q0 / kTile] = of_sink;

  const BiasKind kind = bias_gradient_.kind();
  const bool direct = bias_gradient_.direct();
  const bool is_long = std::max(p_.Nq, p_.Nk) >= kLong;
  if (direct && masked_) bias_gradient_.clear_rows(at.b, at.h, at.q0, at.nq);
  if (kind == BiasKind::of_queries) {
    std::fill_n(w.bias_of_queries, kTile, A(0));
    tile.bias_of_queries = w.bias_of_queries;
  }
  const Range keys = p_.mask->keys(at.b, at.h, at.q0, at.nq);
  bool any = false;
  for (int64_t k0 = keys.begin / kTile * kTile; k0 < keys.end; k0 += kTile) {
    const int64_t nk = std::min(kTile, p_.Nk - k0);
    if (!load_scores(at, k0, nk, w, tile)) continue;
    if (tile.has_upstream)
      P::multiply(w.values.rows(k0, nk), w.grad_out.transposed, w.grad_out.depth, p_.Dv, q.lanes,
                  w.upstream, kTile, false, w.ahead);
    if (direct) {
      std::fill_n(w.direct, nk * kTile, A(0));
      tile.bias_of_pairs = w.direct, tile.bias_stride = kTile;
    } else if (kind == BiasKind::of_pairs) {
      tile.bias_of_pairs = bias_gradient_.of_pairs(at.part, at.b, at.h, at.q0, k0);
      tile.bias_stride = bias_gradient_.pair_stride();
    } else if (kind == BiasKind::of_keys) {
      tile.bias_of_keys = bias_gradient_.of_keys(at.part, at.chunk, at.b, at.h, k0);
    }
    if (key_weight_sums_) tile.of_key_weight = key_weight_sums(at.chunk, at.b, at.h) + k0;
    if constexpr (!P::by_vectors) {
      // Weights rounded to bfloat16 cost as much as rounding the result: of long sums, two parts in
      // five keep what rounding takes, and the error is 1.26 times that of the result's rounding.
      const bool exact = is_long && (at.q0 + k0) / kTile % 5 < 2;
      tile.weights_rest = exact ? w.weights_rest : nullptr;
      tile.gradients_rest = w.weights_rest + kTile * kTile;
    }
    tile.run(q);
    if (direct)
      bias_gradient_.write(bias_gradient_.plane(at.b, at.h), at.q0, at.nq, k0, nk, w.direct);

    add_products(at, k0, nk, tile.weights, tile.gradients, w.touched[size_t(k0 / kTile)], any, w);
    if (tile.weights_rest)
      add_products(at, k0, nk, tile.weights_rest, tile.gradients_rest, true, true, w);
    w.touched[size_t(k0 / kTile)] = 1;
    any = true;
  }
  if (kind == BiasKind::of_queries) {
    A* sum = bias_gradient_.of_queries(at.part, at.b, at.h, at.q0);
    for (int64_t r = 0; r < at.nq; ++r) sum[r] += w.bias_of_queries[r];
  }
  if (out_.query) finish_queries(at, w, any);
}

template class AttentionBackward<double>;
template class AttentionBackward<float>;
template class AttentionBackward<bfloat16>;
template class AttentionBackward<half>;

}  // namespace weft
