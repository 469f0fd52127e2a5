// The arguments of the transport ops on cost matrices, checked, as the kernels read them.
//
// Kernels see one problem of the batch at a time as its extended matrix (reference/transport/
// dense.py) without what lies beyond the lengths: rows and columns are numbered 0, 1, ..., a
// dustbin comes last. So a padded problem is computed as the same problem without its padding, bit
// for bit.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "common/convert.h"
#include "cpu/registration.h"

// The part that the schemas share (weft/ops/transport/problem.py).
#define WEFT_TRANSPORT_SCHEMA                                                     \
  "Tensor cost, Tensor a, Tensor b, Tensor epsilon, Tensor? mask, Tensor? rows, " \
  "Tensor? columns, Tensor? border, bool similarity"

namespace weft {

using OptionalTensor = std::optional<Tensor>;

// λ = ρ / (ρ + ε) of a marginal; of a constraint, 1.
inline double damping(double rho, double epsilon) {
  return std::isinf(rho) ? 1.0 : rho / (rho + epsilon);
}

// (B, count), any strides.
template <typename A>
struct Vectors {
  const A* data = nullptr;
  int64_t batch_stride = 0, stride = 0;

  A at(int64_t b, int64_t i) const { return data[b * batch_stride + i * stride]; }
};

// One problem of the batch.
template <typename T>
struct CostMatrix {
  using A = Acc<T>;

  const T* cost;  // (N, M) in memory
  int64_t row_stride, col_stride;
  const bool* mask;  // or null; like cost
  int64_t mask_row_stride, mask_col_stride;
  int64_t N, M;              // of the batch
  int64_t n, m;              // of them real
  bool has_row, has_column;  // a dustbin
  bool similarity;           // costs are −cost
  A border[3];               // costs of the last column, of the last row, of their corner
  A epsilon;

  int64_t rows() const { return n + has_row; }
  int64_t columns() const { return m + has_column; }
  // Where row i and column j are in a, f and in b, g: between n and N there is padding.
  int64_t row_at(int64_t i) const { return i < n ? i : N; }
  int64_t column_at(int64_t j) const { return j < m ? j : M; }

  const T* at(int64_t i, int64_t j) const { return cost + i * row_stride + j * col_stride; }

  // The cost C_ij of any row and column of the extended matrix.
  A operator()(int64_t i, int64_t j) const {
    if (j >= m) return i < n ? border[0] : border[2];
    if (i >= n) return border[1];
    if (mask && !mask[i * mask_row_stride + j * mask_col_stride])
      return std::numeric_limits<A>::infinity();
    return similarity ? -A(*at(i, j)) : A(*at(i, j));
  }

  // C_ij of row i, columns [first, last) of columns(), into out[0 ... last − first).
  void costs(int64_t i, int64_t first, int64_t last, A* out) const {
    const int64_t end = std::min(last, m), count = end - first;
    if (last > m) out[m - first] = i < n ? border[0] : border[2];
    if (i >= n) {
      std::fill_n(out, std::max<int64_t>(count, 0), border[1]);
      return;
    }
    if (col_stride == 1)
      convert(at(i, first), out, std::max<int64_t>(count, 0));
    else
      for (int64_t j = 0; j < count; ++j) out[j] = A(*at(i, first + j));
    if (similarity)
      for (int64_t j = 0; j < count; ++j) out[j] = -out[j];
    if (!mask) return;
    const bool* allowed = mask + i * mask_row_stride + first * mask_col_stride;
    const A infinity = std::numeric_limits<A>::infinity();
    if (mask_col_stride == 1)
      for (int64_t j = 0; j < count; ++j) out[j] = allowed[j] ? out[j] : infinity;
    else
      for (int64_t j = 0; j < count; ++j)
        if (!allowed[j * mask_col_stride]) out[j] = infinity;
  }
  void costs(int64_t i, A* out) const { costs(i, 0, columns(), out); }

  // The m costs of row i in memory, −C_ij of a similarity, where they lie there as computed with.
  const A* direct(int64_t i) const {
    if constexpr (std::is_same_v<T, A>)
      return i < n && col_stride == 1 && !mask ? at(i, 0) : nullptr;
    else
      return nullptr;
  }
};

// Keeps what the views of the problems point to.
class TransportArguments {
 public:
  TransportArguments(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                     const OptionalTensor& mask, const OptionalTensor& rows,
                     const OptionalTensor& columns, const OptionalTensor& border, bool similarity)
      : cost(cost), a(a), b(b), epsilon(epsilon), mask_(mask), similarity_(similarity) {
    STD_TORCH_CHECK(cost.dim() == 3, "weft: cost must be (B, N, M)");
    B = cost.size(0), N = cost.size(1), M = cost.size(2);
    const auto wide = [&](const Tensor& t, int64_t dim) {
      return t.dim() == dim && t.size(0) == B && t.scalar_type() == wide_type();
    };
    STD_TORCH_CHECK(wide(a, 2) && wide(b, 2) && wide(epsilon, 1),
                    "weft: a, b and epsilon must be (B, N'), (B, M') and (B) in the dtype of sums");
    has_row = a.size(1) > N, has_column = b.size(1) > M;
    STD_TORCH_CHECK(a.size(1) == N + has_row && b.size(1) == M + has_column,
                    "weft: a and b must have one weight for each row and column of cost");
    STD_TORCH_CHECK(!(has_row || has_column) || border, "weft: a dustbin needs its border");
    if (border) {
      STD_TORCH_CHECK(wide(*border, 2) && border->size(1) == 3,
                      "weft: border must be (B, 3) in the dtype of sums");
      border_ = torch::stable::contiguous(*border);
    }
    if (mask)
      STD_TORCH_CHECK(mask->dim() == 3 && mask->size(0) == B && mask->size(1) == N &&
                          mask->size(2) == M && mask->scalar_type() == ScalarType::Bool,
                      "weft: mask must be a bool tensor like cost");
    rows_ = lengths(rows), columns_ = lengths(columns);
  }
  TransportArguments(const TransportArguments&) = delete;
  TransportArguments& operator=(const TransportArguments&) = delete;

  Tensor cost, a, b, epsilon;
  int64_t B = 0, N = 0, M = 0;  // of cost
  bool has_row = false, has_column = false;

  int64_t all_rows() const { return N + has_row; }  // N', the size of a
  int64_t all_columns() const { return M + has_column; }
  ScalarType wide_type() const {
    return cost.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // Problem number `index`; T is the type of cost.
  template <typename T>
  CostMatrix<T> problem(int64_t index) const {
    using A = Acc<T>;
    CostMatrix<T> p{};
    p.cost = data<T>(cost) + index * cost.stride(0);
    p.row_stride = cost.stride(1), p.col_stride = cost.stride(2);
    if (mask_) {
      p.mask = data<bool>(*mask_) + index * mask_->stride(0);
      p.mask_row_stride = mask_->stride(1), p.mask_col_stride = mask_->stride(2);
    }
    p.N = N, p.M = M;
    // What lies outside of the cost, where values are not checked, does not exist.
    p.n = rows_ ? std::clamp<int64_t>(data<int64_t>(*rows_)[index], 0, N) : N;
    p.m = columns_ ? std::clamp<int64_t>(data<int64_t>(*columns_)[index], 0, M) : M;
    p.has_row = has_row, p.has_column = has_column, p.similarity = similarity_;
    if (border_) std::copy_n(data<A>(*border_) + 3 * index, 3, p.border);
    p.epsilon = view<A>(epsilon).at(index, 0);
    return p;
  }

  // Of a, b, epsilon, potentials or their gradients: (B) or (B, count) in the dtype of sums.
  template <typename A>
  static Vectors<A> view(const Tensor& t) {
    return {data<A>(t), t.stride(0), t.dim() > 1 ? t.stride(1) : 0};
  }
  // Checks f (B, N'), g (B, M') and whatever is shaped like them.
  void check_rows(const Tensor& t, const char* name) const { check(t, name, all_rows()); }
  void check_columns(const Tensor& t, const char* name) const { check(t, name, all_columns()); }

 private:
  void check(const Tensor& t, const char* name, int64_t count) const {
    STD_TORCH_CHECK(
        t.dim() == 2 && t.size(0) == B && t.size(1) == count && t.scalar_type() == wide_type(),
        "weft: ", name, " must be a vector for each problem in the dtype of sums");
  }
  OptionalTensor lengths(const OptionalTensor& t) const {
    if (!t) return std::nullopt;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == B && t->scalar_type() == ScalarType::Long,
                    "weft: lengths must be (B) int64");
    return torch::stable::contiguous(*t);
  }

  OptionalTensor mask_, rows_, columns_, border_;
  bool similarity_;
};

}  // namespace weft
