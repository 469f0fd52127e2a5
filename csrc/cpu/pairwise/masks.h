// Which pairs (i, j) count: those that a bool matrix, labels and the diagonal all allow.
#pragma once
#include <optional>

#include "common/matrix.h"
#include "common/simd.h"
#include "cpu/registration.h"

namespace weft {

struct PairMask {
  const bool* allowed = nullptr;  // (N, M), any strides
  int64_t row_stride = 0, col_stride = 0;
  const int64_t *x_labels = nullptr, *y_labels = nullptr;
  bool same = true, off_diagonal = false;

  PairMask() = default;
  PairMask(const std::optional<Tensor>& mask, const std::optional<Tensor>& x_labels_,
           const std::optional<Tensor>& y_labels_, bool same, bool off_diagonal, int64_t N,
           int64_t M)
      : same(same), off_diagonal(off_diagonal) {
    if (mask) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                          mask->size(0) == N && mask->size(1) == M,
                      "weft: mask must be (N, M) bool");
      allowed = data<bool>(*mask), row_stride = mask->stride(0), col_stride = mask->stride(1);
    }
    STD_TORCH_CHECK(x_labels_.has_value() == y_labels_.has_value(),
                    "weft: labels of x and of y go together");
    if (!x_labels_) return;
    x_labels = labels(*x_labels_, N), y_labels = labels(*y_labels_, M);
  }

  bool empty() const { return !allowed && !x_labels && !off_diagonal; }

  bool operator()(int64_t i, int64_t j) const {
    return (!allowed || allowed[i * row_stride + j * col_stride]) &&
           (!x_labels || (x_labels[i] == y_labels[j]) == same) && !(off_diagonal && i == j);
  }

  // s[j] = fill where (i, j0 + j) does not count, for j < m.
  template <typename A>
  void apply(int64_t i, int64_t j0, int64_t m, A* s, A fill) const {
    if (allowed) {
      const bool* row = allowed + i * row_stride + j0 * col_stride;
      for (int64_t j = 0; j < m; ++j) s[j] = row[j * col_stride] ? s[j] : fill;
    }
    if (x_labels) {
      const int64_t label = x_labels[i];
      const int64_t* columns = y_labels + j0;
      if (same)
        for (int64_t j = 0; j < m; ++j) s[j] = columns[j] == label ? s[j] : fill;
      else
        for (int64_t j = 0; j < m; ++j) s[j] = columns[j] != label ? s[j] : fill;
    }
    if (off_diagonal && i >= j0 && i < j0 + m) s[i - j0] = fill;
  }

 private:
  static const int64_t* labels(const Tensor& labels, int64_t n) {
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
                        labels.size(0) == n && labels.is_contiguous(),
                    "weft: labels must be contiguous int64, one for each row");
    return data<int64_t>(labels);
  }
};

}  // namespace weft
