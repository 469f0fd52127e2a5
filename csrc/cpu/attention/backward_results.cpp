// Where the sums of backward.h become results: dQ of a tile, dK and dV of a member, and what chunks
// and heads add to.
#include "cpu/attention/backward_workspace.h"

namespace weft {

// dQ of a tile, from [query][D] or [D][query].
template <typename T>
void AttentionBackward<T>::finish_queries(const Place& at, Workspace& w, bool any) {
  const int64_t D = p_.D, stride = p_.Hq * D;
  T* out = row(out_.query, at.b, at.q0, at.h, p_.Nq, p_.Hq, D);
  if (!any) {
    for (int64_t r = 0; r < at.nq; ++r) std::fill_n(out + r * stride, D, T(0));
    return;
  }
  const A* rows = w.query_sums;
  if constexpr (!P::by_vectors) {
    A* transposed = w.memory[8].template get<A>(kTile * D);
    transpose<A>(w.query_sums, kTile, D, at.nq, transposed, D);
    rows = transposed;
  }
  for (int64_t r = 0; r < at.nq; ++r) scale_row(rows + r * D, p_.scale, out + r * stride, D);
}

// dK and dV of a member; of a chunk, what no tile added to becomes 0.
template <typename T>
void AttentionBackward<T>::finish_keys(const Place& at, Workspace& w) {
  const auto finish = [&](A* sums, int64_t D, A scale, T* result, bool exists) {
    for (int64_t j = 0; result && j < p_.Nk; ++j) {
      const bool zero = !exists || !w.touched[size_t(j / kTile)];
      if (chunk_sums_ && zero) {
        std::fill_n(sums + j * D, D, A(0));
      } else if (!chunk_sums_) {
        T* out = row(result, at.b, j, at.kv_head, p_.Nk, p_.Hkv, D);
        zero ? std::fill_n(out, D, T(0)), void() : scale_row(sums + j * D, scale, out, D);
      }
    }
  };
  finish(w.key_sums, p_.D, p_.scale, out_.key, true);
  finish(w.value_sums, p_.Dv, 1, out_.value, up_.grad_out.data != nullptr);
}

template <typename T>
void AttentionBackward<T>::add_chunks() {
  const int64_t blocks = ceil_div(p_.Nk, kTile);
  parallel_for(0, p_.B * p_.Hkv * blocks, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t W = Vec<A>::size;
    static thread_local Scratch memory;
    A* total = memory.get<A>(std::max(p_.D, p_.Dv));
    const auto add = [&](int64_t member, int64_t j, int64_t offset, int64_t D, A scale, T* result) {
      if (!result) return;
      for (int64_t d = 0; d < D; d += W) {
        const int64_t n = std::min(W, D - d);
        Vec<A> sum;
        for (int64_t chunk = 0; chunk < split_.chunks; ++chunk)
          sum += load_first<A>(partial_sums(chunk, member) + offset + j * D + d, n);
        sum.store(total + d, n);
      }
      scale_row(total, scale, row(result, member / p_.Hkv, j, member % p_.Hkv, p_.Nk, p_.Hkv, D),
                D);
    };
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = i % blocks * kTile; j < std::min(p_.Nk, (i % blocks + 1) * kTile); ++j) {
        add(i / blocks, j, 0, p_.D, p_.scale, out_.key);
        add(i / blocks, j, p_.Nk * p_.D, p_.Dv, 1, out_.value);
      }
  });
}

// The gradients of the sink and of the weights, from the sums of the heads.
template <typename T>
void AttentionBackward<T>::add_vectors() {
  for (int64_t h = 0; out_.sink && h < p_.Hq; ++h) {
    A total = 0;
    for (int64_t b = 0; b < p_.B; ++b)
      for (int64_t t = 0; t < query_tiles_; ++t)
        total += sink_sums_[(b * p_.Hq + h) * query_tiles_ + t];
    out_.sink[h] = total;
  }
  // out (B, heads, n), heads 1 or Hq, of terms (terms, B, Hq, n).
  const auto add = [&](A* out, int64_t heads, const A* sums, int64_t terms, int64_t n) {
    if (!out) return;
    std::fill_n(out, p_.B * heads * n, A(0));
    for (int64_t term = 0; term < terms; ++term)
      for (int64_t b = 0; b < p_.B; ++b)
        for (int64_t h = 0; h < p_.Hq; ++h) {
          const A* from = sums + ((term * p_.B + b) * p_.Hq + h) * n;
          A* to = out + (b * heads + (heads == 1 ? 0 : h)) * n;
          for (int64_t i = 0; i < n; ++i) to[i] += from[i];
        }
  };
  add(out_.key_weight, out_.key_weight_heads, key_weight_sums_, split_.chunks, p_.Nk);
  add(out_.query_weight, out_.query_weight_heads, received_, 1, p_.Nq);
}

template class AttentionBackward<double>;
template class AttentionBackward<float>;
template class AttentionBackward<bfloat16>;
template class AttentionBackward<half>;

}  // namespace weft
