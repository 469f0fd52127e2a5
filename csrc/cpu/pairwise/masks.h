// Which pairs (i, j) of a problem count: weft/reference/pairwise/masks.py says it in PyTorch.
#pragma once
#include <optional>

#include "cpu/registration.h"

namespace weft {

struct PairMask {
  const bool* dense = nullptr;  // any strides; null allows all
  int64_t row_stride = 0, column_stride = 0;
  const int64_t *row_labels = nullptr, *column_labels = nullptr;  // null: no condition on labels
  bool same = true;
  bool exclude_diagonal = false;

  bool allows_all() const { return !dense && !row_labels && !exclude_diagonal; }

  bool allows(int64_t i, int64_t j) const {
    if (exclude_diagonal && i == j) return false;
    if (dense && !dense[i * row_stride + j * column_stride]) return false;
    return !row_labels || (row_labels[i] == column_labels[j]) == same;
  }

  // s[j] = value for the columns j0 + j, 0 <= j < n, that row i is masked from.
  template <typename A>
  void fill(int64_t i, int64_t j0, int64_t n, A* s, A value) const {
    if (dense) {
      const bool* allowed = dense + i * row_stride + j0 * column_stride;
      if (column_stride == 1)
        for (int64_t j = 0; j < n; ++j) s[j] = allowed[j] ? s[j] : value;
      else
        for (int64_t j = 0; j < n; ++j) s[j] = allowed[j * column_stride] ? s[j] : value;
    }
    if (row_labels) {
      const int64_t label = row_labels[i], *labels = column_labels + j0;
      if (same)
        for (int64_t j = 0; j < n; ++j) s[j] = labels[j] == label ? s[j] : value;
      else
        for (int64_t j = 0; j < n; ++j) s[j] = labels[j] != label ? s[j] : value;
    }
    if (exclude_diagonal && i >= j0 && i < j0 + n) s[i - j0] = value;
  }
};

// From the arguments of the schema; labels are contiguous.
inline PairMask pair_mask(const Tensor& x, const Tensor& y, const std::optional<Tensor>& dense,
                          const std::optional<Tensor>& row_labels,
                          const std::optional<Tensor>& column_labels, bool same,
                          bool exclude_diagonal) {
  PairMask mask;
  const int64_t N = x.size(0), M = y.size(0);
  if (dense) {
    STD_TORCH_CHECK(dense->dim() == 2 && dense->size(0) == N && dense->size(1) == M &&
                        dense->scalar_type() == ScalarType::Bool,
                    "weft: mask must be (N, M) bool");
    mask.dense = data<bool>(*dense);
    mask.row_stride = dense->stride(0);
    mask.column_stride = dense->stride(1);
  }
  STD_TORCH_CHECK(row_labels.has_value() == column_labels.has_value(),
                  "weft: labels must be given for both sides");
  const auto labels = [](const Tensor& t, int64_t n) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.scalar_type() == ScalarType::Long &&
                        (n <= 1 || t.stride(0) == 1),
                    "weft: labels must be contiguous int64, one for each row");
    return data<int64_t>(t);
  };
  if (row_labels) {
    mask.row_labels = labels(*row_labels, N);
    mask.column_labels = labels(*column_labels, M);
  }
  mask.same = same;
  mask.exclude_diagonal = exclude_diagonal;
  return mask;
}

}  // namespace weft
