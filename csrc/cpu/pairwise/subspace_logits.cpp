// Subspace logits:  û_b = x_b / max(‖x_b‖, eps) if normalize else x_b,   z_bc = S_cᵀ û_b,
//                   logit_bc = γ ‖z_bc‖   or, squared,   γ ‖z_bc‖².
// Backward:         q_bc = γ g_bc z_bc/‖z_bc‖  or  2 γ g_bc z_bc,   ∂W = Qᵀ Û,   ∂Û = Q W,
//                   ∂x = (∂û − û⟨û, ∂û⟩)/‖x‖.
//
// With the bases as the rows of W (C·k × D) all the work is three matrix products, so the limit is
// the multiply rate. Z and Q are held transposed, one row per column of a basis and the samples in
// vector lanes: the rows of W are then read as they lie, and a norm is a sum over k rows.
//   forward:  for blocks of classes > of samples:  Zᵀ = W Uᵀ in cache, then its norms
//   backward: for groups of classes, as many as the buffer of Q holds:
//               Qᵀ from the saved Z, or from Zᵀ = W Uᵀ computed again
//               for blocks of classes: ∂W = Qᵀ U;   for blocks of D > of samples: ∂Û += Q W
// No sum depends on how blocks fall to threads.
#include "common/convert.h"
#include "cpu/pairwise/subspace.h"

namespace weft {
namespace {

constexpr int64_t kSampleBlock = 256;
constexpr int64_t kRowBlock = 256;         // rows of W, about: a block has whole classes
constexpr int64_t kFeatureBlock = 256;     // columns of ∂Û
constexpr int64_t kResultRows = 64;        // of ∂W in cache, where it is converted or scattered
constexpr int64_t kDepthBlock = 1024;      // rows of W that one product for ∂Û sums over, about
constexpr int64_t kGroupBytes = 16 << 20;  // the buffer of Q

struct Options {
  double gamma;
  bool squared, normalize;
  double eps;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

Range block_of(int64_t index, int64_t size, Range whole) {
  const int64_t begin = whole.begin + index * size;
  return {begin, std::min(begin + size, whole.end)};
}

int64_t classes_per_block(int64_t k) {
  return std::max<int64_t>(1, kRowBlock / std::max<int64_t>(k, 1));
}

// Blocks of an operand, each packed once for all products that read it; block(i) is a Matrix.
template <typename Packed, typename F>
std::vector<Packed> pack_blocks(int64_t count, int64_t size, Scratch& storage, F block) {
  auto* memory = storage.get<typename Packed::Packed>(count * size);
  std::vector<Packed> packed(size_t(count), Packed(decltype(block(0)){}, memory));
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) packed[size_t(i)] = Packed(block(i), memory + i * size);
  });
  return packed;
}

// Uᵀ by blocks of samples, the right operand of Zᵀ = W Uᵀ.
template <typename T>
std::vector<PackedRight<T>> pack_samples(Matrix<T> u, Scratch& storage) {
  return pack_blocks<PackedRight<T>>(ceil_div(u.rows, kSampleBlock),
                                     PackedRight<T>::size(u.cols, std::min(kSampleBlock, u.rows)),
                                     storage, [&](int64_t i) {
                                       const Range b = block_of(i, kSampleBlock, {0, u.rows});
                                       return u.block(b.begin, 0, b.size(), u.cols).transposed();
                                     });
}

// ‖z‖ of the k values stride apart, where the sum of squares overflowed or vanished.
template <typename A>
A careful_length(const A* z, int64_t k, int64_t stride) {
  A largest = 0, square = 0;
  bool nan = false;
  for (int64_t j = 0; j < k; ++j) {
    nan |= std::isnan(z[j * stride]);
    largest = std::max(largest, std::abs(z[j * stride]));
  }
  if (nan) return std::numeric_limits<A>::quiet_NaN();
  if (largest == 0 || std::isinf(largest)) return largest;
  for (int64_t j = 0; j < k; ++j) square += (z[j * stride] / largest) * (z[j * stride] / largest);
  return std::sqrt(square) * largest;
}

// out_b = ‖z_b‖² or ‖z_b‖ over the k rows of z, for n samples.
template <typename A>
void lengths(const A* z, int64_t k, int64_t n, bool squared, A* out) {
  std::fill_n(out, n, A(0));
  for (int64_t j = 0; j < k; ++j)
    for (int64_t b = 0; b < n; ++b) out[b] += z[j * n + b] * z[j * n + b];
  if (squared) return;
  constexpr A tiny = std::is_same_v<A, float> ? A(1e-30) : A(1e-290);
  bool ordinary = true;
  for (int64_t b = 0; b < n; ++b) ordinary &= out[b] > tiny && out[b] < 1 / tiny;
  if (ordinary)
    for (int64_t b = 0; b < n; ++b) out[b] = std::sqrt(out[b]);
  else
    for (int64_t b = 0; b < n; ++b) out[b] = careful_length(z + b, k, n);
}

// Zᵀ of a block of classes and samples: û's scale put in, padding cleared.
template <typename T>
void finish_projections(Acc<T>* z, const UnitRows<T>& u, const Bases<T>& s, Range c, Range b) {
  for (int64_t i = c.begin; i < c.end; ++i)
    for (int64_t j = 0; j < s.k; ++j, z += b.size()) {
      if (j >= s.dim(i)) std::fill_n(z, b.size(), Acc<T>(0));
      if (!u.scale.empty())
        for (int64_t n = 0; n < b.size(); ++n) z[n] *= u.scale[b.begin + n];
    }
}

// projections, if kept, are (C, k, B).
template <typename T>
void forward(const UnitRows<T>& u, const Bases<T>& s, Options opt, T* logits, T* projections) {
  using A = Acc<T>;
  const int64_t B = u.rows.rows, per = classes_per_block(s.k);
  const int64_t sample_blocks = ceil_div(B, kSampleBlock);
  static thread_local Scratch storage;
  const auto samples = pack_samples(u.rows, storage);
  parallel_for(0, sample_blocks * ceil_div(s.C, per), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch rows, block;
    A* z = block.get<A>((per * s.k + per) * std::min(B, kSampleBlock));
    const ProductSession<T> session;
    for (int64_t task = begin; task < end; ++task) {
      const Range c = block_of(task / sample_blocks, per, {0, s.C});
      const Range b = block_of(task % sample_blocks, kSampleBlock, {0, B});
      const int64_t n = b.size();
      A* value = z + c.size() * s.k * n;  // (classes, samples)
      gemm(s.rows(c.begin, c.end, rows), samples[size_t(task % sample_blocks)], z, n);
      finish_projections(z, u, s, c, b);
      for (int64_t i = 0; i < c.size(); ++i)
        lengths(z + i * s.k * n, s.k, n, opt.squared, value + i * n);
      for (int64_t m = 0; m < n; ++m)
        for (int64_t i = 0; i < c.size(); ++i)
          logits[(b.begin + m) * s.C + c.begin + i] = T(A(opt.gamma) * value[i * n + m]);
      if (projections)
        for (int64_t r = 0; r < c.size() * s.k; ++r)
          convert(z + r * n, projections + (c.begin * s.k + r) * B + b.begin, n);
    }
  });
}

// Q in bfloat16 feeds the bfloat16 product; float16 would lose small gradients: float32 there.
template <typename T>
using Weight = std::conditional_t<std::is_same_v<T, half>, float, T>;

// Qᵀ of the classes in `group`, (group·k × B), times û's scale, so that ∂W = Qᵀ x'.
template <typename T>
void weights(const UnitRows<T>& u, const Bases<T>& s, Options opt, Matrix<T> grad,
             const T* projections, const std::vector<PackedRight<T>>& samples, Range group,
             Weight<T>* q) {
  using A = Acc<T>;
  const int64_t B = u.rows.rows, per = classes_per_block(s.k);
  const int64_t sample_blocks = ceil_div(B, kSampleBlock);
  parallel_for(0, sample_blocks * ceil_div(group.size(), per), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch rows, block;
    const ProductSession<T> session;
    for (int64_t task = begin; task < end; ++task) {
      const Range c = block_of(task / sample_blocks, per, group);
      const Range b = block_of(task % sample_blocks, kSampleBlock, {0, B});
      const int64_t n = b.size();
      A* z = block.get<A>(((per + 1) * s.k + per + 1) * n);
      A* g = z + c.size() * s.k * n;  // (classes, samples)
      A* length = g + c.size() * n;
      if (projections) {
        for (int64_t r = 0; r < c.size() * s.k; ++r)
          convert(projections + (c.begin * s.k + r) * B + b.begin, z + r * n, n);
      } else {
        gemm(s.rows(c.begin, c.end, rows), samples[size_t(task % sample_blocks)], z, n);
        finish_projections(z, u, s, c, b);
      }
      for (int64_t m = 0; m < n; ++m) {
        const T* from = grad.at(b.begin + m, c.begin);
        const A factor = A(opt.gamma) * (opt.normalize ? u.scale[b.begin + m] : A(1));
        for (int64_t i = 0; i < c.size(); ++i) g[i * n + m] = factor * A(from[i * grad.col_stride]);
      }
      for (int64_t i = 0; i < c.size(); ++i) {
        A* zi = z + i * s.k * n;
        const A* gi = g + i * n;
        if (opt.squared)
          std::fill_n(length, n, A(0.5));
        else
          lengths(zi, s.k, n, false, length);
        for (int64_t j = 0; j < s.k; ++j, zi += n) {
          for (int64_t m = 0; m < n; ++m)  // a zero projection has no direction: q = 0
            zi[m] = length[m] == 0 ? A(0) : gi[m] * (zi[m] / length[m]);
          convert(zi, q + ((c.begin - group.begin + i) * s.k + j) * B + b.begin, n);
        }
      }
    }
  });
}

// Where ∂S goes: element (c, d, j) at c·stride_c + d·stride_d + j·stride_k.
template <typename T>
struct BasesGradient {
  T* data;
  int64_t stride_c, stride_d, stride_k;
};

// ∂W = Qᵀ x' for the classes of the group.
template <typename T>
void bases_gradient(Matrix<T> u, const Bases<T>& s, const Weight<T>* q, Range group,
                    BasesGradient<T> out) {
  using A = Acc<T>;
  const int64_t B = u.rows, per = classes_per_block(s.k);
  const bool in_place =
      std::is_same_v<T, A> && out.stride_d == 1 && out.stride_c == s.k * out.stride_k;
  static thread_local Scratch packed;
  const PackedRight<T> right(
      u, packed.get<typename PackedRight<T>::Packed>(PackedRight<T>::size(u.rows, u.cols)));
  parallel_for(0, ceil_div(group.size(), per), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch block;
    const ProductSession<T> session;
    for (int64_t task = begin; task < end; ++task) {
      const Range c = block_of(task, per, group);
      const auto left = row_major(q + (c.begin - group.begin) * s.k * B, c.size() * s.k, B);
      if constexpr (std::is_same_v<T, A>) {
        if (in_place) {
          gemm(left, right, out.data + c.begin * out.stride_c, s.D);
          continue;
        }
      }
      for (int64_t r0 = 0; r0 < left.rows; r0 += kResultRows) {
        const int64_t n = std::min(kResultRows, left.rows - r0);
        A* rows = block.get<A>(n * s.D);
        gemm(left.block(r0, 0, n, B), right, rows, s.D);
        for (int64_t r = r0; r < r0 + n; ++r, rows += s.D) {
          T* to = out.data + (c.begin + r / s.k) * out.stride_c + r % s.k * out.stride_k;
          if (out.stride_d == 1)
            convert(rows, to, s.D);
          else
            for (int64_t d = 0; d < s.D; ++d) to[d * out.stride_d] = T(rows[d]);
        }
      }
    }
  });
}

// ∂Û (+)= Q W over the classes of the group, times û's scale.
template <typename T>
void features_gradient(const Bases<T>& s, const Weight<T>* q, int64_t B, Range group, Acc<T>* out,
                       bool accumulate) {
  const int64_t sample_blocks = ceil_div(B, kSampleBlock);
  const int64_t per = std::max<int64_t>(1, kDepthBlock / std::max<int64_t>(s.k, 1));
  const int64_t chunks = ceil_div(group.size(), per);
  const auto classes = [&](int64_t chunk) { return block_of(chunk, per, group); };
  static thread_local Scratch storage;
  const auto left = pack_blocks<PackedLeft<T>>(
      chunks * sample_blocks,
      PackedLeft<T>::size(std::min(kSampleBlock, B), std::min(per, group.size()) * s.k), storage,
      [&](int64_t i) {
        const Range c = classes(i / sample_blocks);
        const Range b = block_of(i % sample_blocks, kSampleBlock, {0, B});
        const auto qt = row_major(q + (c.begin - group.begin) * s.k * B, c.size() * s.k, B);
        return qt.block(0, b.begin, qt.rows, b.size()).transposed();
      });
  parallel_for(0, sample_blocks * ceil_div(s.D, kFeatureBlock), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch rows;
    const ProductSession<T> session;
    for (int64_t task = begin; task < end; ++task) {
      const Range d = block_of(task / sample_blocks, kFeatureBlock, {0, s.D});
      const int64_t block = task % sample_blocks;
      Bases<T> columns = s;
      columns.data += d.begin * s.stride_d, columns.D = d.size();
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Range c = classes(chunk);
        gemm(left[size_t(chunk * sample_blocks + block)], columns.rows(c.begin, c.end, rows),
             out + block * kSampleBlock * s.D + d.begin, s.D, accumulate || chunk > 0);
      }
    }
  });
}

// ∂x = (∂û − û⟨û, ∂û⟩)/‖x‖, from ∂û times û's scale.
template <typename T>
void through_normalization(const UnitRows<T>& u, const Acc<T>* scaled, T* out) {
  using A = Acc<T>;
  const int64_t D = u.rows.cols;
  parallel_for(0, u.rows.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* x = u.rows.at(b, 0);  // û = scale · x'
      const A* g = scaled + b * D;
      const A scale = u.scale[b], factor = scale == 0 ? A(0) : u.inverse[b] / scale;
      A radial = 0;
      if (!u.inside[b])
        for (int64_t d = 0; d < D; ++d) radial += A(x[d]) * g[d];
      for (int64_t d = 0; d < D; ++d)
        out[b * D + d] = T((g[d] - scale * scale * A(x[d]) * radial) * factor);
    }
  });
}

template <typename T>
void backward(Matrix<T> grad, const UnitRows<T>& u, const Bases<T>& s, Options opt,
              const T* projections, T* grad_x, BasesGradient<T> grad_bases) {
  using A = Acc<T>;
  const int64_t B = u.rows.rows, per = classes_per_block(s.k);
  const int64_t bytes = std::max<int64_t>(1, per * s.k * B * int64_t(sizeof(Weight<T>)));
  const int64_t group_size = std::min(s.C, per * std::max<int64_t>(1, kGroupBytes / bytes));
  static thread_local Scratch storage, sum_storage;
  Weight<T>* q = storage.get<Weight<T>>(group_size * s.k * B);
  const bool in_place = std::is_same_v<T, A> && !opt.normalize;
  A* sums = in_place ? nullptr : sum_storage.get<A>(B * s.D);
  if constexpr (std::is_same_v<T, A>)
    if (in_place) sums = grad_x;
  static thread_local Scratch sample_storage;
  std::vector<PackedRight<T>> samples;
  if (!projections) samples = pack_samples(u.rows, sample_storage);
  for (Range group{0, 0}; group.end < s.C;) {
    group = {group.end, std::min(group.end + group_size, s.C)};
    weights(u, s, opt, grad, projections, samples, group, q);
    bases_gradient(u.rows, s, q, group, grad_bases);
    features_gradient(s, q, B, group, sums, group.begin > 0);
  }
  if (s.C == 0) std::fill_n(sums, B * s.D, A(0));
  if (opt.normalize)
    through_normalization(u, sums, grad_x);
  else if (!in_place)
    convert(sums, grad_x, B * s.D);
}

// ---- registration -------------------------------------------------------------------------------

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
      save ? torch::stable::new_empty(x, {C, k, B}) : torch::stable::new_empty(x, {0});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    forward<T>({matrix<T>(x), normalize, eps}, bases_of<T>(bases, dims),
               {gamma, squared, normalize, eps}, mutable_data<T>(logits),
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
  const int64_t B = x.size(0), C = bases.size(0), D = bases.size(1), k = bases.size(2);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == B && grad.size(1) == C &&
                      grad.scalar_type() == x.scalar_type(),
                  "subspace_logits_backward: grad must be (B, C) in the dtype of x");
  const bool saved = projections.dim() == 3;
  STD_TORCH_CHECK(!saved || (projections.numel() == C * k * B && projections.is_contiguous()),
                  "subspace_logits_backward: projections must be (C, k, B)");
  Tensor grad_x = torch::stable::new_empty(x, {B, D});
  const BasesResult grad_bases(bases);
  with_float(x, [&](auto type) {
    using T = decltype(type);
    backward<T>(
        matrix<T>(grad), {matrix<T>(x), normalize, eps}, bases_of<T>(bases, dims),
        {gamma, squared, normalize, eps}, saved ? data<T>(projections) : nullptr,
        mutable_data<T>(grad_x),
        {mutable_data<T>(grad_bases.tensor), k * D, grad_bases.stride_d, grad_bases.stride_k});
  });
  return {grad_x, grad_bases.tensor};
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
