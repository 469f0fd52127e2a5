// The bias of a tile of scores, transposed as the scores are: [key][query].
#pragma once
#include <algorithm>

#include "common/transpose.h"
#include "cpu/attention/problem.h"

namespace weft {

// Along which of the two sequences a bias varies.
enum class BiasKind { none, of_queries, of_keys, of_pairs };

template <typename T>
class BiasTiles {
 public:
  using A = Acc<T>;

  explicit BiasTiles(const BiasView& view) : view_(view) {
    if (!view) return;
    const bool queries = view.sizes[2] != 1, keys = view.sizes[3] != 1;
    kind_ = keys ? (queries ? BiasKind::of_pairs : BiasKind::of_keys) : BiasKind::of_queries;
  }

  BiasKind kind() const { return kind_; }
  // A number for (b, h), the same where the bias is.
  int64_t plane(int64_t b, int64_t h) const {
    return (view_.sizes[0] == 1 ? 0 : b) * view_.sizes[1] + (view_.sizes[1] == 1 ? 0 : h);
  }
  // Values up to this one hide the pair.
  A masked() const { return A(view_.masked); }

  // target[i] of query q and key first + keys[i].
  void gather(int64_t b, int64_t h, int64_t q, int64_t first, const int32_t* keys, int64_t n,
              A* target) const {
    const int64_t stride = view_.strides[3];
    of_type([&](auto* data) {
      data += b * view_.strides[0] + h * view_.strides[1] + q * view_.strides[2] + first * stride;
      for (int64_t i = 0; i < n; ++i) target[i] = A(data[keys[i] * stride]);
    });
  }

  // target[r] of query q0 + r, for a bias of queries, or target[c] of key k0 + c.
  void vector(int64_t b, int64_t h, int64_t first, int64_t n, A* target) const {
    const int64_t stride = view_.strides[kind_ == BiasKind::of_keys ? 3 : 2];
    of_type([&](auto* data) {
      data += b * view_.strides[0] + h * view_.strides[1] + first * stride;
      for (int64_t i = 0; i < n; ++i) target[i] = A(data[i * stride]);
    });
  }

  // target[c * ld + r] of query q0 + r and key k0 + c, for a bias of pairs.
  void tile(int64_t b, int64_t h, int64_t q0, int64_t nq, int64_t k0, int64_t nk, A* target,
            int64_t ld) const {
    const int64_t row = view_.strides[2], col = view_.strides[3];
    of_type([&](auto* data) {
      data += b * view_.strides[0] + h * view_.strides[1] + q0 * row + k0 * col;
      if (col == 1) return transpose<A>(data, row, nq, nk, target, ld);
      for (int64_t c = 0; c < nk; ++c)
        for (int64_t r = 0; r < nq; ++r) target[c * ld + r] = A(data[r * row + c * col]);
    });
  }

 private:
  template <typename F>
  void of_type(F f) const {
    if (view_.wide)
      f(static_cast<const A*>(view_.data));
    else
      f(static_cast<const T*>(view_.data));
  }

  BiasView view_;
  BiasKind kind_ = BiasKind::none;
};

}  // namespace weft
