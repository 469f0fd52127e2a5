// How the work of the backward is cut, and the gradient of a bias that heads or batches share.
//
// A member is one (batch, key head). A cell is the members that add to the same planes of the
// bias; without a gradient of the bias each member is a cell. An item, the unit of work, is a part
// of the members of a cell and a chunk of the queries. All of that follows from shapes alone, and
// what several items add to is summed in a fixed order: no bit depends on the number of threads.
#pragma once
#include <algorithm>

#include "common/scratch.h"
#include "cpu/attention/backward_scores.h"

namespace weft {

struct BackwardSplit {
  int64_t cells = 0, members = 0, parts = 1, chunks = 1;
  int64_t items() const { return cells * parts * chunks; }
};

template <typename T>
class BiasGradient {
 public:
  using A = Acc<T>;

  // `out` is null if the gradient is not wanted.
  BiasGradient(const AttentionProblem<T>& p, void* out)
      : p_(p), tiles_(p.bias), out_(out), kind_(out ? tiles_.kind() : BiasKind::none) {
    if (kind_ == BiasKind::none) return;
    stride_ = round_up(p.Nq, kTile);
    of_batch_ = p.bias.sizes[0] != 1, of_head_ = p.bias.sizes[1] != 1;
    planes_ = p.bias.sizes[0] * p.bias.sizes[1];
    plane_ = kind_ == BiasKind::of_pairs  ? p.Nk * stride_
             : kind_ == BiasKind::of_keys ? p.Nk
                                          : stride_;
  }

  explicit operator bool() const { return kind_ != BiasKind::none; }
  BiasKind kind() const { return kind_; }

  BackwardSplit split() {
    constexpr int64_t kItems = 16, kBytes = int64_t(16) << 20;
    BackwardSplit s;
    s.cells = *this ? (of_batch_ ? p_.B : 1) * (of_head_ ? p_.Hkv : 1) : p_.B * p_.Hkv;
    s.members = s.cells ? p_.B * p_.Hkv / s.cells : 0;
    if (*this) {
      const int64_t size = planes_ * plane_ * int64_t(sizeof(A));
      const int64_t limit = std::max(
          kBytes, 2 * planes_ * p_.Nq * p_.Nk * int64_t(p_.bias.wide ? sizeof(A) : sizeof(T)));
      const int64_t wanted = std::min(ceil_div(kItems, std::max<int64_t>(s.cells, 1)), s.members);
      s.parts = std::max<int64_t>(1, std::min(wanted, limit / std::max<int64_t>(size, 1)));
    }
    if (s.cells > 0)
      s.chunks = std::clamp<int64_t>(ceil_div(kItems, s.cells * s.parts), 1,
                                     std::clamp<int64_t>(ceil_div(p_.Nq, kTile), 1, 8));
    split_ = s;
    direct_ = kind_ == BiasKind::of_pairs && s.members == 1 && (of_head_ || p_.group == 1);
    static thread_local Scratch memory;
    if (*this && !direct_) sums_ = memory.get<A>(s.parts * key_chunks() * planes_ * plane_);
    return s;
  }

  // (batch, key head) of a member.
  std::pair<int64_t, int64_t> member(int64_t cell, int64_t i) const {
    if (!*this || (of_batch_ && of_head_)) return {cell / p_.Hkv, cell % p_.Hkv};
    if (of_batch_) return {cell, i};
    if (of_head_) return {i, cell};
    return {i / p_.Hkv, i % p_.Hkv};
  }

  // Makes the sums of an item 0: the queries [q0, q1), the planes that its cell adds to.
  void clear(int64_t cell, int64_t part, int64_t chunk, int64_t q0, int64_t q1) const {
    if (!*this || direct_) return;
    const int64_t heads = p_.bias.sizes[1], cell_heads = of_head_ ? p_.group : heads;
    const int64_t of_cell = of_head_ ? cell % p_.Hkv * p_.group : 0;
    const int64_t batch = of_batch_ ? (of_head_ ? cell / p_.Hkv : cell) : 0;
    for (int64_t h = of_cell; h < of_cell + cell_heads; ++h) {
      A* sum = sums(part, chunk, batch * heads + h);
      if (kind_ == BiasKind::of_keys) {
        std::fill_n(sum, p_.Nk, A(0));
      } else {
        const int64_t rows = kind_ == BiasKind::of_pairs ? p_.Nk : 1;
        const int64_t end = round_up(q1, kTile);
        for (int64_t j = 0; j < rows; ++j)
          std::fill(sum + j * stride_ + q0, sum + j * stride_ + end, A(0));
      }
    }
  }

  // Of (b, h): where a tile adds its gradients, for keys from k0 on. A bias that nobody shares is
  // written by its tiles alone.
  bool direct() const { return direct_; }
  int64_t pair_stride() const { return stride_; }
  A* of_pairs(int64_t part, int64_t b, int64_t h, int64_t q0, int64_t k0) const {
    return sums(part, 0, plane(b, h)) + k0 * stride_ + q0;
  }
  A* of_keys(int64_t part, int64_t chunk, int64_t b, int64_t h, int64_t k0) const {
    return sums(part, chunk, plane(b, h)) + k0;
  }
  A* of_queries(int64_t part, int64_t b, int64_t h, int64_t q0) const {
    return sums(part, 0, plane(b, h)) + q0;
  }

  // The rows of queries [q0, q0 + nq) of a direct gradient: 0, and a tile [key][kTile] of them.
  void clear_rows(int64_t b, int64_t h, int64_t q0, int64_t nq) const {
    of_type([&](auto* out) {
      using To = std::remove_pointer_t<decltype(out)>;
      std::fill_n(out + (plane(b, h) * p_.Nq + q0) * p_.Nk, nq * p_.Nk, To(0));
    });
  }
  void write(int64_t plane, int64_t q0, int64_t nq, int64_t k0, int64_t nk, const A* tile) const {
    alignas(64) A rows[kTile * kTile];
    transpose<A>(tile, kTile, nk, nq, rows, kTile);
    of_type([&](auto* out) {
      for (int64_t r = 0; r < nq; ++r)
        convert(rows + r * kTile, out + (plane * p_.Nq + q0 + r) * p_.Nk + k0, nk);
    });
  }
  int64_t plane(int64_t b, int64_t h) const {
    return (of_batch_ ? b : 0) * p_.bias.sizes[1] + (of_head_ ? h : 0);
  }

  // Adds the sums of the items, in their order.
  void finish() const {
    if (!*this || direct_) return;
    if (kind_ != BiasKind::of_pairs) return finish_vectors();
    const int64_t blocks = ceil_div(p_.Nq, kTile), key_blocks = ceil_div(p_.Nk, kTile);
    parallel_for(0, planes_ * blocks * key_blocks, 4, [&](int64_t begin, int64_t end) {
      constexpr int64_t W = Vec<A>::size;
      alignas(64) A tile[kTile * kTile];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k0 = i % key_blocks * kTile, q0 = i / key_blocks % blocks * kTile;
        const int64_t n = i / key_blocks / blocks, nk = std::min(kTile, p_.Nk - k0);
        for (int64_t c = 0; c < nk; ++c)
          for (int64_t v = 0; v < kTile; v += W) {
            Vec<A> total;
            for (int64_t part = 0; part < split_.parts; ++part)
              total += Vec<A>::load(sums(part, 0, n) + (k0 + c) * stride_ + q0 + v);
            total.store(tile + c * kTile + v);
          }
        write(n, q0, std::min(kTile, p_.Nq - q0), k0, nk, tile);
      }
    });
  }

 private:
  int64_t key_chunks() const { return kind_ == BiasKind::of_keys ? split_.chunks : 1; }
  A* sums(int64_t part, int64_t chunk, int64_t plane) const {
    const int64_t of_chunk = kind_ == BiasKind::of_keys ? chunk : 0;
    return sums_ + ((part * key_chunks() + of_chunk) * planes_ + plane) * plane_;
  }
  void finish_vectors() const {
    const bool one = kind_ == BiasKind::of_queries && p_.bias.sizes[2] == 1;
    const int64_t n = kind_ == BiasKind::of_keys ? p_.Nk : p_.Nq;
    of_type([&](auto* out) {
      using To = std::remove_pointer_t<decltype(out)>;
      for (int64_t plane = 0; plane < planes_; ++plane) {
        A all = 0;
        for (int64_t i = 0; i < n; ++i) {
          A total = 0;
          for (int64_t part = 0; part < split_.parts; ++part)
            for (int64_t chunk = 0; chunk < key_chunks(); ++chunk)
              total += sums(part, chunk, plane)[i];
          all += total;
          if (!one) out[plane * n + i] = To(total);
        }
        if (one) out[plane] = To(all);
      }
    });
  }
  template <typename F>
  void of_type(F f) const {
    if (p_.bias.wide)
      f(static_cast<A*>(out_));
    else
      f(static_cast<T*>(out_));
  }

  const AttentionProblem<T>& p_;
  BiasTiles<T> tiles_;
  void* out_;
  BiasKind kind_;
  bool of_batch_ = false, of_head_ = false, direct_ = false;
  int64_t stride_ = 0, planes_ = 0, plane_ = 0;  // between keys; planes; elements of a plane
  BackwardSplit split_;
  A* sums_ = nullptr;
};

}  // namespace weft
