// Projection onto subspaces:  out_bc = S_c S_cᵀ x_b   or, as complement,   x_b − S_c S_cᵀ x_b.
// Backward, with z_bc = S_cᵀ x_b and q_bc = S_cᵀ g_bc:
//     ∂x_b = Σ_c S_c q_bc   or   Σ_c (g_bc − S_c q_bc),      ∂S_c = ± Σ_b (x_b q_bcᵀ + g_bc z_bcᵀ).
//
// Forward: for each class and block of samples Z = X S, then Z Sᵀ while Z is in cache: the work is
// two products, and at k columns a result element costs 2k multiplications, so for small k the
// limit is the writing of the result. Backward: ∂x by blocks of samples, classes inside, in order;
// ∂S by classes, blocks of samples inside. No sum depends on how blocks fall to threads.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/gemm.h"
#include "cpu/registration.h"

namespace weft {
namespace {

constexpr int64_t kSampleBlock = 256;

template <typename T>
struct Bases {
  const T* data;
  int64_t C, D, k, stride_c, stride_d, stride_k;
  Matrix<T> of(int64_t c) const { return {data + c * stride_c, D, k, stride_d, stride_k}; }
};

// (B, C, D), any strides.
template <typename T>
struct Gradient {
  const T* data;
  int64_t stride_b, stride_c, stride_d;
  Matrix<T> of(int64_t b, int64_t c, int64_t rows, int64_t D) const {
    return {data + b * stride_b + c * stride_c, rows, D, stride_b, stride_d};
  }
};

template <typename T>
Matrix<T> samples(Matrix<T> x, int64_t b, int64_t rows) {
  return x.block(b, 0, rows, x.cols);
}

template <typename T>
void forward(Matrix<T> x, const Bases<T>& s, bool complement, T* out) {
  using A = Acc<T>;
  const int64_t blocks = ceil_div(x.rows, kSampleBlock);
  parallel_for(0, blocks * s.C, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> z(kSampleBlock * s.k), block(std::is_same_v<T, A> ? 0 : kSampleBlock * s.D);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / blocks, b0 = task % blocks * kSampleBlock;
      const int64_t n = std::min(kSampleBlock, x.rows - b0);
      const Matrix<T> rows = samples(x, b0, n);
      gemm(rows, s.of(c), z.data(), s.k);
      T* to = out + (b0 * s.C + c) * s.D;
      A* projected = block.data();
      int64_t stride = s.D;
      if constexpr (std::is_same_v<T, A>) projected = to, stride = s.C * s.D;
      gemm(row_major<A>(z.data(), n, s.k), s.of(c).transposed(), projected, stride);
      if (std::is_same_v<T, A> && !complement) continue;
      for (int64_t b = 0; b < n; ++b)
        for (int64_t d = 0; d < s.D; ++d) {
          const A value = projected[b * stride + d];
          to[b * s.C * s.D + d] = T(complement ? A(*rows.at(b, d)) - value : value);
        }
    }
  });
}

template <typename T>
void features_gradient(const Gradient<T>& grad, int64_t B, const Bases<T>& s, bool complement,
                       T* out) {
  using A = Acc<T>;
  constexpr int64_t block = 64;  // fewer rows than forward: the classes are inside
  parallel_for(0, ceil_div(B, block), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> q(block * s.k), sum(block * s.D);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b0 = task * block, n = std::min(block, B - b0);
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t c = 0; c < s.C; ++c) {
        const Matrix<T> g = grad.of(b0, c, n, s.D);
        gemm(g, s.of(c), q.data(), s.k);
        if (complement) {
          for (A& value : q) value = -value;
          for (int64_t b = 0; b < n; ++b)
            for (int64_t d = 0; d < s.D; ++d) sum[b * s.D + d] += A(*g.at(b, d));
        }
        gemm(row_major<A>(q.data(), n, s.k), s.of(c).transposed(), sum.data(), s.D, true);
      }
      for (int64_t i = 0; i < n * s.D; ++i) out[b0 * s.D + i] = T(sum[i]);
    }
  });
}

// ∂S_c, transposed (k × D) while it is summed.
template <typename T>
void bases_gradient(const Gradient<T>& grad, Matrix<T> x, const Bases<T>& s, bool complement,
                    T* out, int64_t stride_d, int64_t stride_k) {
  using A = Acc<T>;
  parallel_for(0, s.C, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> small(kSampleBlock * s.k), sum(s.k * s.D);
    for (int64_t c = begin; c < end; ++c) {
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t b0 = 0; b0 < x.rows; b0 += kSampleBlock) {
        const int64_t n = std::min(kSampleBlock, x.rows - b0);
        const Matrix<T> rows = samples(x, b0, n), g = grad.of(b0, c, n, s.D);
        const Matrix<A> weights = row_major<A>(small.data(), n, s.k).transposed();
        gemm(g, s.of(c), small.data(), s.k);
        gemm(weights, rows, sum.data(), s.D, true);
        gemm(rows, s.of(c), small.data(), s.k);
        gemm(weights, g, sum.data(), s.D, true);
      }
      for (int64_t j = 0; j < s.k; ++j)
        for (int64_t d = 0; d < s.D; ++d) {
          const A value = sum[j * s.D + d];
          out[c * s.k * s.D + j * stride_k + d * stride_d] = T(complement ? -value : value);
        }
    }
  });
}

template <typename T>
Bases<T> bases_of(const Tensor& t) {
  return {data<T>(t), t.size(0), t.size(1), t.size(2), t.stride(0), t.stride(1), t.stride(2)};
}
template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {data<T>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

void check(const Tensor& x, const Tensor& bases) {
  STD_TORCH_CHECK(x.dim() == 2 && bases.dim() == 3 && bases.size(1) == x.size(1),
                  "subspace_project: x must be (B, D) and bases (C, D, k)");
  STD_TORCH_CHECK(x.scalar_type() == bases.scalar_type(), "subspace_project: dtypes differ");
}

Tensor subspace_project(const Tensor& x, const Tensor& bases, bool complement) {
  check(x, bases);
  Tensor out = torch::stable::new_empty(x, {x.size(0), bases.size(0), x.size(1)});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    forward<T>(matrix<T>(x), bases_of<T>(bases), complement, mutable_data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> subspace_project_backward(const Tensor& grad, const Tensor& x,
                                                     const Tensor& bases, bool complement) {
  check(x, bases);
  const int64_t B = x.size(0), C = bases.size(0), D = bases.size(1), k = bases.size(2);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == B && grad.size(1) == C && grad.size(2) == D &&
                      grad.scalar_type() == x.scalar_type(),
                  "subspace_project_backward: grad must be (B, C, D) in the dtype of x");
  const bool transposed = bases.stride(1) == 1;
  Tensor grad_x = torch::stable::new_empty(x, {B, D});
  Tensor grad_bases =
      transposed ? torch::stable::transpose(torch::stable::new_empty(bases, {C, k, D}), 1, 2)
                 : torch::stable::new_empty(bases, {C, D, k});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    const Gradient<T> g{data<T>(grad), grad.stride(0), grad.stride(1), grad.stride(2)};
    const Bases<T> s = bases_of<T>(bases);
    features_gradient<T>(g, B, s, complement, mutable_data<T>(grad_x));
    bases_gradient<T>(g, matrix<T>(x), s, complement, mutable_data<T>(grad_bases),
                      transposed ? 1 : k, transposed ? D : 1);
  });
  return {grad_x, grad_bases};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("subspace_project(Tensor x, Tensor bases, bool complement) -> Tensor");
  m.def(
      "subspace_project_backward(Tensor grad, Tensor x, Tensor bases, bool complement) "
      "-> (Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("subspace_project", TORCH_BOX(&subspace_project));
  m.impl("subspace_project_backward", TORCH_BOX(&subspace_project_backward));
}

}  // namespace weft
