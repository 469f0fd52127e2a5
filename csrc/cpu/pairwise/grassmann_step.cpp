// One step of momentum descent on the Grassmann manifold, in place, for each class's basis P (D ×
// k):
//     G ← μ G + (1 − τ) g (where a gradient g is given),   H = G − P (PᵀG),   A = α² HᵀH,   α =
//     −lr, P ← P cos √A + α H sin √A / √A          (the geodesic) G ← H cos √A − α P HᵀH sin √A /
//     √A      (its velocity: H transported along it)
// then, if asked, P ← P F with F = R⁻¹ of P = QR (CholeskyQR), (PᵀP)^(-1/2) or (3 I − PᵀP)/2.
//
// The functions of the k × k matrix A are entire, so small_matrix.h sums them in double without an
// eigenvalue. All else is products of tall columns with k × k matrices, panel by panel: load and
// PᵀG; H and HᵀH; both results (and PᵀP); P F. A class stays in the second-level cache, so each
// operand is read and written once, and the next class is fetched while this one is computed.
// Classes are independent: no sum depends on how they fall to threads.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/grassmann.h"
#include "common/scratch.h"
#include "common/tall_skinny.h"
#include "common/transpose.h"
#include "cpu/registration.h"

namespace weft {
namespace {

using grassmann::Reorth;
using small_matrix::OneThread;
using tall_skinny::kWidth;
using tall_skinny::Lines;

struct Options {
  double alpha, momentum, gain;
  Reorth reorth;
  bool transport;
};

// (C, D, k), any strides.
template <typename T>
struct Operand {
  T* data;
  int64_t stride_c, stride_d, stride_k;

  T* at(int64_t c, int64_t d) const { return data + c * stride_c + d * stride_d; }
  Lines lines(int64_t c, int64_t C, int64_t D, int64_t k) const {
    if (!data || c >= C) return {};
    const int64_t size = sizeof(T);
    if (stride_d == 1) return {at(c, 0), D * size, k, stride_k * size};
    return stride_k == 1 ? Lines(at(c, 0), k * size, D, stride_d * size) : Lines();
  }
};

// n elements of each of k columns into a panel, zeros around them.
template <typename T, typename R>
void load(const T* from, int64_t stride_d, int64_t stride_k, int n, int k, int rows, R* panel) {
  using V = Vec<R>;
  if (n < kWidth) std::fill_n(panel, rows * kWidth, R(0));
  std::fill(panel + k * kWidth, panel + rows * kWidth, R(0));
  if (stride_k == 1 && stride_d != 1) return transpose(from, stride_d, n, k, panel, kWidth);
  for (int j = 0; j < k; ++j) {
    const T* column = from + j * stride_k;
    R* row = panel + j * kWidth;
    int d = 0;
    if (stride_d == 1)
      for (; d + V::size <= n; d += V::size) V::load(column + d).store(row + d);
    for (; d < n; ++d) row[d] = R(column[d * stride_d]);
  }
}

template <typename T, typename R>
void store(const R* panel, int n, int k, T* to, int64_t stride_d, int64_t stride_k) {
  using V = Vec<R>;
  if constexpr (std::is_same_v<T, R>)
    if (stride_k == 1 && stride_d != 1) return transpose(panel, kWidth, k, n, to, stride_d);
  for (int j = 0; j < k; ++j) {
    const R* row = panel + j * kWidth;
    T* column = to + j * stride_k;
    int d = 0;
    if (stride_d == 1)
      for (; d + V::size <= n; d += V::size) V::load(row + d).store(column + d);
    for (; d < n; ++d) column[d * stride_d] = T(row[d]);
  }
}

template <typename T>
class Stepper {
 public:
  using R = Acc<T>;

  Stepper(Operand<T> basis, Operand<T> buffer, Operand<const T> grad, const int64_t* dims,
          int64_t C, int64_t D, int64_t k, Options opt)
      : basis_(basis), buffer_(buffer), grad_(grad), dims_(dims), C_(C), D_(D), k_(k), opt_(opt) {
    const int64_t rows = tall_skinny::padded(k), small = k * k, panel = rows * kWidth;
    panels_ = ceil_div(D, kWidth);
    static thread_local Scratch tiles, doubles;
    p_ = tiles.get<R>(2 * panels_ * panel + 2 * panel + tall_skinny::sums_size<R>(rows) +
                      4 * rows * rows);
    h_ = p_ + panels_ * panel;
    temporary_ = h_ + panels_ * panel;
    sums_ = temporary_ + 2 * panel;
    coefficients_ = sums_ + tall_skinny::sums_size<R>(rows);
    // Room for a panel and sums in double at the end.
    small_ = doubles.get<double>(9 * small + k + panel + tall_skinny::sums_size<double>(rows));
  }

  void step(int64_t c) {
    class_ = c;
    used_ = int(dims_ ? std::clamp<int64_t>(dims_[c], 0, k_) : k_);
    rows_ = tall_skinny::padded(used_);
    next_basis_ = basis_.lines(c + 1, C_, D_, k_);
    next_buffer_ = buffer_.lines(c + 1, C_, D_, k_);
    next_grad_ = grad_.lines(c + 1, C_, D_, k_);
    const int64_t tiles = panels_ * tall_skinny::combine_tiles<R>(rows_) * (opt_.transport ? 3 : 2);
    fetch_ = int(ceil_div(next_basis_.count(), std::max<int64_t>(tiles, 1)));
    clear_padding();
    if (used_ == 0 || D_ == 0) return;
    double* m = matrix(0);
    load_and_project();
    tangent(m);
    move(m);
    if (opt_.reorth != Reorth::none) orthonormalize();
  }

 private:
  double* matrix(int i) const { return small_ + i * k_ * k_; }
  R* panel(R* tile, int64_t i) const { return tile + i * rows_ * kWidth; }
  R* coefficient(int i) const { return coefficients_ + i * rows_ * rows_; }
  int width(int64_t i) const { return int(std::min<int64_t>(kWidth, D_ - i * kWidth)); }
  // A share of the next class, before each register tile of `combine`.
  void fetch() {
    next_basis_.fetch(fetch_);
    next_buffer_.fetch(fetch_);
    next_grad_.fetch(fetch_);
  }
  void clear_sums() { std::fill_n(sums_, tall_skinny::sums_size<R>(rows_), R(0)); }

  void clear_padding() {
    for (const auto& operand : {basis_, buffer_})
      for (int64_t j = used_; j < k_; ++j)
        for (int64_t d = 0; d < D_; ++d) operand.at(class_, d)[j * operand.stride_k] = T(0);
  }

  template <typename S>
  void load_panel(const Operand<S>& operand, int64_t i, R* to) {
    load(operand.at(class_, i * kWidth), operand.stride_d, operand.stride_k, width(i), used_, rows_,
         to);
  }
  void store_panel(const Operand<T>& operand, int64_t i, const R* from) {
    store(from, width(i), used_, operand.at(class_, i * kWidth), operand.stride_d,
          operand.stride_k);
  }

  // P and G into their tiles, and T = PᵀG as coefficients −T.
  void load_and_project() {
    clear_sums();
    for (int64_t i = 0; i < panels_; ++i) {
      R *p = panel(p_, i), *g = panel(h_, i);
      load_panel(basis_, i, p);
      load_panel(buffer_, i, g);
      if (grad_.data) {
        load_panel(grad_, i, temporary_);
        const Vec<R> momentum(R(opt_.momentum)), gain(R(opt_.gain));
        for (int64_t d = 0; d < int64_t(rows_) * kWidth; d += Vec<R>::size)
          fma(momentum, Vec<R>::load(g + d), gain * Vec<R>::load(temporary_ + d)).store(g + d);
        if (!opt_.transport) store_panel(buffer_, i, g);
      }
      tall_skinny::gram(p, g, rows_, false, sums_);
    }
    double* t = matrix(0);
    tall_skinny::reduce(sums_, rows_, used_, false, t);
    tall_skinny::coefficients(t, used_, -1.0, rows_, coefficient(0));
  }

  // H = G − P T in the place of G, and M = HᵀH.
  void tangent(double* m) {
    clear_sums();
    for (int64_t i = 0; i < panels_; ++i) {
      R* h = panel(h_, i);
      tall_skinny::combine<true, R>(panel(p_, i), coefficient(0), nullptr, nullptr, rows_, h,
                                    [this] { fetch(); });
      tall_skinny::gram(h, h, rows_, true, sums_);
    }
    tall_skinny::reduce(sums_, rows_, used_, true, m);
    // An angle θ of the step carries θ² times the rounding errors of M: large ones need more
    // digits.
    if (opt_.alpha * opt_.alpha * small_matrix::trace(used_, m) > 1) exact_gram(h_, m);
  }

  // The Gram matrix of a tile, summed in double.
  void exact_gram(R* tile, double* out) {
    if constexpr (std::is_same_v<R, double>) return;  // it was
    double* wide = small_ + 9 * k_ * k_ + k_;
    double* sums = wide + int64_t(rows_) * kWidth;
    std::fill_n(sums, tall_skinny::sums_size<double>(rows_), 0.0);
    for (int64_t i = 0; i < panels_; ++i) {
      const R* narrow = panel(tile, i);
      for (int64_t d = 0; d < int64_t(rows_) * kWidth; ++d) wide[d] = narrow[d];
      tall_skinny::gram(wide, wide, rows_, true, sums);
    }
    tall_skinny::reduce(sums, rows_, used_, true, out);
  }

  void move(const double* m) {
    double *cosine = matrix(1), *sine = matrix(2), *radial = matrix(3);
    grassmann::geodesic(OneThread(), used_, opt_.alpha, m, cosine, sine, radial, matrix(4));
    tall_skinny::coefficients(cosine, used_, 1.0, rows_, coefficient(0));
    tall_skinny::coefficients(sine, used_, 1.0, rows_, coefficient(1));
    tall_skinny::coefficients(radial, used_, -1.0, rows_, coefficient(2));
    const bool again = opt_.reorth != Reorth::none;
    clear_sums();
    for (int64_t i = 0; i < panels_; ++i) {
      R *p = panel(p_, i), *h = panel(h_, i), *moved = temporary_, *velocity = temporary_;
      velocity += int64_t(rows_) * kWidth;
      if (opt_.transport) {
        tall_skinny::combine<false, R>(h, coefficient(0), p, coefficient(2), rows_, velocity,
                                       [this] { fetch(); });
        store_panel(buffer_, i, velocity);
      }
      tall_skinny::combine<false, R>(p, coefficient(0), h, coefficient(1), rows_, moved,
                                     [this] { fetch(); });
      if (again) {
        std::copy_n(moved, int64_t(rows_) * kWidth, p);
        tall_skinny::gram(p, p, rows_, true, sums_);
      } else {
        store_panel(basis_, i, moved);
      }
    }
  }

  // P ← P F until PᵀP was near I before a round, and store.
  void orthonormalize() {
    const int k = used_;
    double *w = matrix(0), *factor = matrix(1);
    const double enough = std::is_same_v<R, double> ? 1e-8 : 1e-4;
    bool last = false;
    for (int round = 0; !last; ++round) {
      tall_skinny::reduce(sums_, rows_, k, true, w);
      double distance = grassmann::from_identity(k, w);
      if (!(distance <= grassmann::kNear))
        exact_gram(p_, w), distance = grassmann::from_identity(k, w);
      last = grassmann::orthonormalizer(OneThread(), k, opt_.reorth, round, distance, enough, w,
                                        factor, matrix(4));
      if (last && opt_.reorth == Reorth::gcr) flip_columns(factor);
      tall_skinny::coefficients(factor, k, 1.0, rows_, coefficient(0));
      clear_sums();
      for (int64_t i = 0; i < panels_; ++i) {
        R* p = panel(p_, i);
        tall_skinny::combine<false, R>(p, coefficient(0), nullptr, nullptr, rows_, temporary_,
                                       [] {});
        if (last) {
          store_panel(basis_, i, temporary_);
        } else {
          std::copy_n(temporary_, int64_t(rows_) * kWidth, p);
          tall_skinny::gram(p, p, rows_, true, sums_);
        }
      }
    }
  }

  // The column signs of Householder's QR, into F.
  void flip_columns(double* factor) {
    const int k = used_;
    double *top = matrix(4), *sign = small_ + 9 * k_ * k_;
    const auto at = [&](int64_t d, int j) {
      return double(panel(p_, d / kWidth)[j * kWidth + d % kWidth]);
    };
    for (int e = 0; e < k * k; ++e) top[e] = at(e / k, e % k);
    grassmann::flip_columns(OneThread(), k, top, D_ == k, factor, matrix(5), sign);
  }

  const Operand<T> basis_, buffer_;
  const Operand<const T> grad_;
  const int64_t* dims_;
  const int64_t C_, D_, k_;
  const Options opt_;
  int64_t panels_, class_ = 0;
  int used_ = 0, rows_ = 0;  // columns of this class, and with padding
  int fetch_ = 0;            // lines of each operand per tile
  R *p_, *h_, *temporary_, *sums_, *coefficients_;
  double* small_;
  Lines next_basis_, next_buffer_, next_grad_;
};

template <typename T, typename S>
Operand<T> operand(S* data, const Tensor& t) {
  return {data, t.stride(0), t.stride(1), t.stride(2)};
}

bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(1) == b.size(1) &&
         a.size(2) == b.size(2) && a.scalar_type() == b.scalar_type();
}

void grassmann_step(const Tensor& basis, const Tensor& buffer, const std::optional<Tensor>& grad,
                    const std::optional<Tensor>& dims, double lr, double momentum, double dampening,
                    int64_t reorth, bool transport) {
  STD_TORCH_CHECK(same_shape(basis, buffer) && (!grad || same_shape(basis, *grad)),
                  "grassmann_step: basis, buffer and grad must be (C, D, k) of one dtype");
  const int64_t C = basis.size(0), D = basis.size(1), k = basis.size(2);
  STD_TORCH_CHECK(k <= D, "grassmann_step: k must be <= D");
  STD_TORCH_CHECK(!dims || (dims->scalar_type() == ScalarType::Long && dims->is_contiguous() &&
                            dims->numel() == C),
                  "grassmann_step: dims must be (C,) int64 and contiguous");
  STD_TORCH_CHECK(reorth >= 0 && reorth <= int64_t(Reorth::gcr), "grassmann_step: reorth");
  const Options opt{-lr, momentum, 1 - dampening, Reorth(reorth), transport};
  with_float(basis, [&](auto type) {
    using T = decltype(type);
    const auto p = operand<T>(mutable_data<T>(basis), basis);
    const auto b = operand<T>(mutable_data<T>(buffer), buffer);
    const auto g = grad ? operand<const T>(data<T>(*grad), *grad) : Operand<const T>{};
    const int64_t* d = dims ? data<int64_t>(*dims) : nullptr;
    parallel_for(0, C, 1, [&](int64_t begin, int64_t end) {
      Stepper<T> stepper(p, b, g, d, C, D, k, opt);
      for (int64_t c = begin; c < end; ++c) stepper.step(c);
    });
  });
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "grassmann_step_(Tensor(a!) basis, Tensor(b!) buffer, Tensor? grad, Tensor? dims, float lr, "
      "float momentum, float dampening, int reorth, bool transport) -> ()");
}
WEFT_CPU_KERNELS(m) { m.impl("grassmann_step_", TORCH_BOX(&grassmann_step)); }

}  // namespace weft
