// Subspace logits:  û_b = x_b / max(‖x_b‖, eps) if normalize else x_b,   z_bc = S_cᵀ û_b,
//                   logit_bc = γ ‖z_bc‖   or, squared,   γ ‖z_bc‖².
// Backward:         q_bc = γ g_bc z_bc/‖z_bc‖  or  2 γ g_bc z_bc,   ∂W = Qᵀ Û,   ∂Û = Q W,
//                   ∂x = (∂û − û⟨û, ∂û⟩)/‖x‖.
//
// With the bases as the rows of W (C·k × D) all the work is three matrix products, so the limit is
// the multiply rate. Forward: for each block of classes and of samples, Z = U Wᵀ, then the norms
// while Z is in cache. Backward: for each group of classes as large as its buffer allows, Q (from
// the saved Z, or from Z computed again), then ∂W by blocks of classes and ∂Û by blocks of D.
// No sum depends on how blocks fall to threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/gemm.h"
#include "cpu/registration.h"

namespace weft {
namespace {

constexpr int64_t kSampleBlock = 256;      // rows of a Z block
constexpr int64_t kRowBlock = 256;         // columns of a Z block, that is rows of W, about
constexpr int64_t kFeatureBlock = 256;     // columns of a ∂Û block
constexpr int64_t kGroupBytes = 32 << 20;  // the buffer of Q in the backward

struct Options {
  double gamma;
  bool squared, normalize;
  double eps;
};

// û_b = scale_b · x'_b with x' = x·2^-e and 2^e ≈ ‖x_b‖_∞: no square overflows or vanishes, and the
// scaling is exact in every dtype.
template <typename T>
struct Features {
  Matrix<T> rows;  // x', or x itself where nothing is normalised
  std::vector<T> storage;
  std::vector<Acc<T>> scale;    // 1/max(‖x'‖, eps·2^-e), 0 for a zero row without eps
  std::vector<Acc<T>> inverse;  // 1/max(‖x‖, eps), likewise
  std::vector<char> inside;     // ‖x‖ <= eps: the divisor is a constant

  Features(Matrix<T> x, Options opt) : rows(x) {
    if (!opt.normalize) return;
    using A = Acc<T>;
    storage.resize(x.rows * x.cols);
    scale.resize(x.rows), inverse.resize(x.rows), inside.resize(x.rows);
    parallel_for(0, x.rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const T* in = x.data + b * x.row_stride;
        T* out = storage.data() + b * x.cols;
        A largest = 0;
        for (int64_t d = 0; d < x.cols; ++d)
          largest = std::max(largest, std::abs(A(in[d * x.col_stride])));  // drops a NaN, as wanted
        constexpr int most = std::numeric_limits<A>::max_exponent - 2;
        const int e = largest > 0 && std::isfinite(largest) ? std::ilogb(largest) : 0;
        const A down = std::ldexp(A(1), -std::clamp(e, -most, most));
        A square = 0;
        for (int64_t d = 0; d < x.cols; ++d) {
          const A v = A(in[d * x.col_stride]) * down;
          out[d] = T(v);
          square += v * v;
        }
        const A length = std::sqrt(square), floor = A(opt.eps) * down;
        inside[b] = length <= floor;
        const A divisor = inside[b] ? floor : length;
        scale[b] = divisor == 0 ? A(0) : A(1) / divisor;
        inverse[b] = scale[b] * down;
      }
    });
    rows = {storage.data(), x.rows, x.cols, x.cols, 1};
  }
};

// The bases as rows of W: row c·k + j is column j of S_c, zero from dims[c] on.
template <typename T>
struct Bases {
  const T* data;
  int64_t C, D, k, stride_c, stride_d, stride_k;
  const int64_t* dims;

  int64_t dim(int64_t c) const { return dims ? std::clamp<int64_t>(dims[c], 0, k) : k; }

  // Rows of the classes [c0, c1); copied to storage where they do not lie one stride apart.
  Matrix<T> rows(int64_t c0, int64_t c1, std::vector<T>& storage) const {
    if (!dims && (stride_c == k * stride_k || c1 - c0 == 1))
      return {data + c0 * stride_c, (c1 - c0) * k, D, stride_k, stride_d};
    storage.resize((c1 - c0) * k * D);
    T* out = storage.data();
    for (int64_t c = c0; c < c1; ++c)
      for (int64_t j = 0; j < k; ++j, out += D)
        for (int64_t d = 0; d < D; ++d)
          out[d] = j < dim(c) ? data[c * stride_c + j * stride_k + d * stride_d] : T(0);
    return {storage.data(), (c1 - c0) * k, D, D, 1};
  }
};

// ‖z‖; squares that overflow or vanish are scaled first.
template <typename A>
A length(const A* z, int64_t k) {
  A square = 0;
  for (int64_t j = 0; j < k; ++j) square += z[j] * z[j];
  constexpr A tiny = std::is_same_v<A, float> ? A(1e-30) : A(1e-290);
  if (square > tiny && square < 1 / tiny) return std::sqrt(square);
  A largest = 0;
  for (int64_t j = 0; j < k; ++j) largest = std::max(largest, std::abs(z[j]));
  if (!(largest > 0) || !std::isfinite(largest)) return std::sqrt(square);
  square = 0;
  for (int64_t j = 0; j < k; ++j) square += (z[j] / largest) * (z[j] / largest);
  return std::sqrt(square) * largest;
}

// Z block -> û's scale applied in place, logits written, projections kept if asked for.
template <typename T>
void logits_of_block(Acc<T>* z, int64_t ldz, const Features<T>& u, const Bases<T>& s, Options opt,
                     int64_t b0, int64_t b1, int64_t c0, int64_t c1, T* logits, T* projections) {
  using A = Acc<T>;
  for (int64_t b = b0; b < b1; ++b) {
    A* row = z + (b - b0) * ldz;
    if (opt.normalize)
      for (int64_t i = 0; i < (c1 - c0) * s.k; ++i) row[i] *= u.scale[b];
    for (int64_t c = c0; c < c1; ++c) {
      const A* zc = row + (c - c0) * s.k;
      A value;
      if (opt.squared) {
        value = 0;
        for (int64_t j = 0; j < s.dim(c); ++j) value += zc[j] * zc[j];
      } else {
        value = length(zc, s.dim(c));
      }
      logits[b * s.C + c] = T(A(opt.gamma) * value);
    }
    if (projections)
      for (int64_t i = 0; i < (c1 - c0) * s.k; ++i)
        projections[(b * s.C + c0) * s.k + i] = T(row[i]);
  }
}

int64_t classes_per_block(int64_t k) {
  return std::max<int64_t>(1, kRowBlock / std::max<int64_t>(k, 1));
}
int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Z (b0..b1) × (c0..c1) = U Wᵀ without û's scale, row-major with leading dimension (c1 − c0)·k.
template <typename T>
void project(const Features<T>& u, const Bases<T>& s, int64_t b0, int64_t b1, int64_t c0,
             int64_t c1, std::vector<T>& storage, Acc<T>* z) {
  const Matrix<T> w = s.rows(c0, c1, storage);
  gemm(u.rows.block(b0, 0, b1 - b0, s.D), w.transposed(), z, w.rows);
}

template <typename T>
void forward(const Features<T>& u, const Bases<T>& s, Options opt, T* logits, T* projections) {
  const int64_t B = u.rows.rows, per = classes_per_block(s.k);
  const int64_t sample_blocks = blocks(B, kSampleBlock), class_blocks = blocks(s.C, per);
  parallel_for(0, sample_blocks * class_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> storage;
    std::vector<Acc<T>> z(std::min(B, kSampleBlock) * std::min(per, s.C) * s.k);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = task / sample_blocks * per, c1 = std::min(s.C, c0 + per);
      const int64_t b0 = task % sample_blocks * kSampleBlock, b1 = std::min(B, b0 + kSampleBlock);
      project(u, s, b0, b1, c0, c1, storage, z.data());
      logits_of_block(z.data(), (c1 - c0) * s.k, u, s, opt, b0, b1, c0, c1, logits, projections);
    }
  });
}

// Q in bf16 feeds the bf16 product; float16 would lose small gradients, so it stays in float32.
template <typename T>
using Weight = std::conditional_t<std::is_same_v<T, torch::headeronly::Half>, float, T>;

// Q block of the backward from z (with û's scale in it), times û's scale, so that ∂W = Qᵀ x'.
template <typename T>
void weights_of_block(const Acc<T>* z, int64_t ldz, const Features<T>& u, const Bases<T>& s,
                      Options opt, Matrix<T> grad, int64_t b0, int64_t b1, int64_t c0, int64_t c1,
                      Weight<T>* q, int64_t ldq) {
  using A = Acc<T>;
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t c = c0; c < c1; ++c) {
      const A* zc = z + (b - b0) * ldz + (c - c0) * s.k;
      Weight<T>* out = q + (b - b0) * ldq + (c - c0) * s.k;
      const A g = A(opt.gamma) * A(grad.data[b * grad.row_stride + c * grad.col_stride]) *
                  (opt.normalize ? u.scale[b] : A(1));
      const int64_t dim = s.dim(c);
      const A n = opt.squared ? A(0.5) : length(zc, dim);
      for (int64_t j = 0; j < s.k; ++j)
        out[j] = Weight<T>(j < dim && n != 0 ? g * (zc[j] / n) : A(0));
    }
}

// Q of the classes [c0, c1) and all samples, (B × (c1 − c0)·k).
template <typename T>
void weights(const Features<T>& u, const Bases<T>& s, Options opt, Matrix<T> grad,
             const T* projections, int64_t c0, int64_t c1, Weight<T>* q) {
  const int64_t B = u.rows.rows, per = classes_per_block(s.k), ldq = (c1 - c0) * s.k;
  const int64_t sample_blocks = blocks(B, kSampleBlock), class_blocks = blocks(c1 - c0, per);
  parallel_for(0, sample_blocks * class_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> storage;
    std::vector<Acc<T>> z(std::min(B, kSampleBlock) * std::min(per, c1 - c0) * s.k);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p0 = c0 + task / sample_blocks * per, p1 = std::min(c1, p0 + per);
      const int64_t b0 = task % sample_blocks * kSampleBlock, b1 = std::min(B, b0 + kSampleBlock);
      const int64_t ldz = (p1 - p0) * s.k;
      if (projections) {
        for (int64_t b = b0; b < b1; ++b)
          for (int64_t i = 0; i < ldz; ++i)
            z[(b - b0) * ldz + i] = Acc<T>(projections[(b * s.C + p0) * s.k + i]);
      } else {
        project(u, s, b0, b1, p0, p1, storage, z.data());
        if (opt.normalize)
          for (int64_t b = b0; b < b1; ++b)
            for (int64_t i = 0; i < ldz; ++i) z[(b - b0) * ldz + i] *= u.scale[b];
      }
      weights_of_block<T>(z.data(), ldz, u, s, opt, grad, b0, b1, p0, p1,
                          q + b0 * ldq + (p0 - c0) * s.k, ldq);
    }
  });
}

// Where ∂S goes: element (c, d, j) at c·stride_c + d·stride_d + j·stride_k.
template <typename T>
struct BasesGradient {
  T* data;
  int64_t stride_c, stride_d, stride_k;
};

// ∂W = Qᵀ x' for the classes [c0, c1).
template <typename T>
void bases_gradient(const Features<T>& u, const Bases<T>& s, Matrix<Weight<T>> q, int64_t c0,
                    int64_t c1, BasesGradient<T> out) {
  using A = Acc<T>;
  const int64_t per = classes_per_block(s.k);
  const bool in_place =
      std::is_same_v<T, A> && out.stride_d == 1 && out.stride_c == s.k * out.stride_k;
  parallel_for(0, blocks(c1 - c0, per), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> block(in_place ? 0 : std::min(per, c1 - c0) * s.k * s.D);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p0 = c0 + task * per, p1 = std::min(c1, p0 + per), rows = (p1 - p0) * s.k;
      const auto left = q.block(0, (p0 - c0) * s.k, q.rows, rows).transposed();
      if constexpr (std::is_same_v<T, A>) {
        if (in_place) {
          gemm(left, u.rows, out.data + p0 * out.stride_c, out.stride_k);
          continue;
        }
      }
      gemm(left, u.rows, block.data(), s.D);
      for (int64_t c = p0; c < p1; ++c)
        for (int64_t j = 0; j < s.k; ++j) {
          const A* from = block.data() + ((c - p0) * s.k + j) * s.D;
          T* to = out.data + c * out.stride_c + j * out.stride_k;
          for (int64_t d = 0; d < s.D; ++d) to[d * out.stride_d] = T(from[d]);
        }
    }
  });
}

// ∂Û (+)= Q W over the classes [c0, c1), times û's scale.
template <typename T>
void features_gradient(const Bases<T>& s, Matrix<Weight<T>> q, int64_t c0, int64_t c1, Acc<T>* out,
                       bool accumulate) {
  const int64_t B = q.rows, per = classes_per_block(s.k);
  const int64_t sample_blocks = blocks(B, kSampleBlock), columns = blocks(s.D, kFeatureBlock);
  const bool whole = !s.dims && s.stride_c == s.k * s.stride_k;
  const int64_t step = whole ? c1 - c0 : per;
  parallel_for(0, sample_blocks * columns, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> storage;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t d0 = task / sample_blocks * kFeatureBlock,
                    d1 = std::min(s.D, d0 + kFeatureBlock);
      const int64_t b0 = task % sample_blocks * kSampleBlock, b1 = std::min(B, b0 + kSampleBlock);
      Bases<T> columns_of = s;
      columns_of.data += d0 * s.stride_d, columns_of.D = d1 - d0;
      for (int64_t p0 = c0; p0 < c1; p0 += step) {
        const int64_t p1 = std::min(c1, p0 + step);
        gemm(q.block(b0, (p0 - c0) * s.k, b1 - b0, (p1 - p0) * s.k),
             columns_of.rows(p0, p1, storage), out + b0 * s.D + d0, s.D, accumulate || p0 > c0);
      }
    }
  });
}

// ∂x = (∂û − û⟨û, ∂û⟩)/‖x‖, from ∂û times û's scale.
template <typename T>
void through_normalization(const Features<T>& u, const Acc<T>* scaled, T* out) {
  using A = Acc<T>;
  const int64_t D = u.rows.cols;
  parallel_for(0, u.rows.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* x = u.rows.data + b * D;  // û = scale · x'
      const A* g = scaled + b * D;
      const A scale = u.scale[b];
      A radial = 0;
      if (!u.inside[b])
        for (int64_t d = 0; d < D; ++d) radial += A(x[d]) * g[d];
      const A factor = scale == 0 ? A(0) : u.inverse[b] / scale;
      for (int64_t d = 0; d < D; ++d)
        out[b * D + d] = T((g[d] - scale * scale * A(x[d]) * radial) * factor);
    }
  });
}

template <typename T>
void backward(Matrix<T> grad, const Features<T>& u, const Bases<T>& s, Options opt,
              const T* projections, T* grad_x, BasesGradient<T> grad_bases) {
  using A = Acc<T>;
  const int64_t B = u.rows.rows, per = classes_per_block(s.k);
  const int64_t bytes = std::max<int64_t>(1, B * s.k * int64_t(sizeof(Weight<T>)));
  const int64_t group = std::max<int64_t>(1, std::min(s.C, kGroupBytes / bytes / per * per));
  std::vector<Weight<T>> q(B * std::min(group, s.C) * s.k);
  const bool in_place = std::is_same_v<T, A> && !opt.normalize;
  std::vector<A> sums(in_place ? 0 : B * s.D);
  A* out = sums.data();
  if constexpr (std::is_same_v<T, A>)
    if (in_place) out = grad_x;
  if (s.C == 0) std::fill(out, out + B * s.D, A(0));
  for (int64_t c0 = 0; c0 < s.C; c0 += group) {
    const int64_t c1 = std::min(s.C, c0 + group), n = (c1 - c0) * s.k;
    weights(u, s, opt, grad, projections, c0, c1, q.data());
    const Matrix<Weight<T>> block{q.data(), B, n, n, 1};
    bases_gradient(u, s, block, c0, c1, grad_bases);
    features_gradient(s, block, c0, c1, out, c0 > 0);
  }
  if (opt.normalize)
    through_normalization(u, out, grad_x);
  else if (!in_place)
    for (int64_t i = 0; i < B * s.D; ++i) grad_x[i] = T(out[i]);
}

// ---- registration -------------------------------------------------------------------------------

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {data<T>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

template <typename T>
Bases<T> bases_of(const Tensor& bases, const std::optional<Tensor>& dims) {
  return {data<T>(bases),  bases.size(0),   bases.size(1),   bases.size(2),
          bases.stride(0), bases.stride(1), bases.stride(2), dims ? data<int64_t>(*dims) : nullptr};
}

void check(const Tensor& x, const Tensor& bases, const std::optional<Tensor>& dims) {
  STD_TORCH_CHECK(x.dim() == 2 && bases.dim() == 3 && x.size(1) == bases.size(1),
                  "subspace_logits: x must be (B, D) and bases (C, D, k)");
  STD_TORCH_CHECK(x.scalar_type() == bases.scalar_type(), "subspace_logits: dtypes differ");
  STD_TORCH_CHECK(!dims || (dims->scalar_type() == ScalarType::Long && dims->is_contiguous() &&
                            dims->numel() == bases.size(0)),
                  "subspace_logits: dims must be (C,) int64 and contiguous");
}

std::tuple<Tensor, Tensor> subspace_logits(const Tensor& x, const Tensor& bases,
                                           const std::optional<Tensor>& dims, double gamma,
                                           bool squared, bool normalize, double eps, bool save) {
  check(x, bases, dims);
  const int64_t B = x.size(0), C = bases.size(0), k = bases.size(2);
  Tensor logits = torch::stable::new_empty(x, {B, C});
  Tensor projections =
      save ? torch::stable::new_empty(x, {B, C, k}) : torch::stable::new_empty(x, {0});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    const Options opt{gamma, squared, normalize, eps};
    forward<T>({matrix<T>(x), opt}, bases_of<T>(bases, dims), opt, mutable_data<T>(logits),
               save ? mutable_data<T>(projections) : nullptr);
  });
  return {logits, projections};
}

std::tuple<Tensor, Tensor> subspace_logits_backward(const Tensor& grad, const Tensor& x,
                                                    const Tensor& bases,
                                                    const std::optional<Tensor>& dims,
                                                    const Tensor& projections, double gamma,
                                                    bool squared, bool normalize, double eps) {
  check(x, bases, dims);
  const int64_t C = bases.size(0), D = bases.size(1), k = bases.size(2);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == C &&
                      grad.scalar_type() == x.scalar_type(),
                  "subspace_logits_backward: grad must be (B, C) in the dtype of x");
  const bool saved = projections.dim() == 3;
  STD_TORCH_CHECK(
      !saved || (projections.numel() == x.size(0) * C * k && projections.is_contiguous()),
      "subspace_logits_backward: projections must be (B, C, k)");
  // The layout of the product where the bases have it, see gradient_like in the public function.
  const bool transposed = bases.stride(1) == 1;
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), D});
  Tensor grad_bases =
      transposed ? torch::stable::transpose(torch::stable::new_empty(bases, {C, k, D}), 1, 2)
                 : torch::stable::new_empty(bases, {C, D, k});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    const Options opt{gamma, squared, normalize, eps};
    backward<T>(matrix<T>(grad), {matrix<T>(x), opt}, bases_of<T>(bases, dims), opt,
                saved ? data<T>(projections) : nullptr, mutable_data<T>(grad_x),
                {mutable_data<T>(grad_bases), k * D, transposed ? 1 : k, transposed ? D : 1});
  });
  return {grad_x, grad_bases};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "subspace_logits(Tensor x, Tensor bases, Tensor? dims, float gamma, bool squared, "
      "bool normalize, float eps, bool save) -> (Tensor, Tensor)");
  m.def(
      "subspace_logits_backward(Tensor grad, Tensor x, Tensor bases, Tensor? dims, "
      "Tensor projections, float gamma, bool squared, bool normalize, float eps) "
      "-> (Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("subspace_logits", TORCH_BOX(&subspace_logits));
  m.impl("subspace_logits_backward", TORCH_BOX(&subspace_logits_backward));
}

}  // namespace weft
