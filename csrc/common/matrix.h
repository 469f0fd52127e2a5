// A matrix in memory, as the products see it: any strides, so a transpose or a block costs nothing.
#pragma once
#include "common/types.h"

namespace weft {

template <typename T>
struct Matrix {
  using Element = T;

  const T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
  Matrix block(int64_t row, int64_t col, int64_t block_rows, int64_t block_cols) const {
    return {at(row, col), block_rows, block_cols, row_stride, col_stride};
  }
  const T* at(int64_t row, int64_t col) const { return data + row * row_stride + col * col_stride; }
};

// Rows one after the other, `stride` elements apart.
template <typename T>
Matrix<T> row_major(const T* data, int64_t rows, int64_t cols, int64_t stride) {
  return {data, rows, cols, stride, 1};
}
template <typename T>
Matrix<T> row_major(const T* data, int64_t rows, int64_t cols) {
  return {data, rows, cols, cols, 1};
}

// A walk over the cache lines of a region that the next step will read: products fetch a line of it
// now and then between their multiplications, so that memory and arithmetic overlap.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const void* first, int64_t row_bytes, int64_t rows, int64_t stride_bytes)
      : line_(static_cast<const char*>(first)),
        per_row_((row_bytes + 63) / 64),
        column_(per_row_),
        rows_(row_bytes > 0 ? rows : 0),
        jump_(stride_bytes - 64 * per_row_) {}

  int64_t lines() const { return rows_ * per_row_; }
  // Asks for the next line; false once there is none.
  bool next() {
    if (rows_ <= 0) return false;
    __builtin_prefetch(line_, 0, 2);
    line_ += 64;
    if (--column_ == 0) {
      column_ = per_row_;
      line_ += jump_;
      --rows_;
    }
    return true;
  }

 private:
  const char* line_ = nullptr;
  int64_t per_row_ = 0, column_ = 0, rows_ = 0, jump_ = 0;
};

}  // namespace weft
