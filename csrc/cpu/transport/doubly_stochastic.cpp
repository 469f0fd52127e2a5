// Doubly stochastic matrices:  Q = exp(x / epsilon), then T times the columns and the rows of Q are
// normalised in turn, or the rows and the columns (normalize.h: how, and why nothing vanishes).
//
// Matrices of up to 8 x 8 go through registers, one in each lane; larger ones by passes over their
// rows. Several matrices are shared out among the threads whole, few are cut into chunks of rows.
#include "cpu/registration.h"
#include "cpu/transport/normalize_backward.h"
#include "cpu/transport/normalize_small.h"

namespace weft {
namespace {

struct Options {
  int64_t B, N, M;
  double epsilon;
  int64_t iterations;
  bool last_rows;
  double stabilizer;
};

template <typename T>
constexpr bool kHalf = !std::is_same_v<T, Acc<T>>;

// `count` matrices of `entries` elements to and from vectors of one entry of each.
template <typename T>
void to_lanes(const T* from, int64_t count, int64_t entries, Acc<T>* to) {
  constexpr int64_t W = Vec<Acc<T>>::size;
  if (count < W) std::fill(to, to + entries * W, Acc<T>(0));
  transpose<Acc<T>>(from, entries, count, entries, to, W);
}
template <typename T>
void from_lanes(const Acc<T>* from, int64_t count, int64_t entries, T* to) {
  using V = Vec<Acc<T>>;
  if constexpr (!kHalf<T>) {
    transpose<T>(from, V::size, entries, count, to, entries);
  } else {
    alignas(64) Acc<T> matrices[V::size * kSmallest * kSmallest];
    transpose<Acc<T>>(from, V::size, entries, count, matrices, entries);
    const int64_t total = count * entries;
    for (int64_t i = 0; i < total; i += V::size)
      V::load(matrices + i).store(to + i, std::min<int64_t>(V::size, total - i));
  }
}

template <typename T, int kN, int kM>
void small(const T* grad, const T* x, const Options& o, T* out) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size, kTask = 64;  // groups of a task
  const int64_t entries = o.N * o.M, groups = ceil_div(o.B, W);
  const SmallNormalizer<A, kN, kM> normalizer(int(o.N), int(o.M), Temperature<A>(o.epsilon),
                                              o.iterations, o.last_rows, A(o.stabilizer));
  parallel_for(0, ceil_div(groups, kTask), 1, [&](int64_t begin, int64_t end) {
    alignas(64) A lanes[kSmallest * kSmallest * W], upstream[kSmallest * kSmallest * W];
    for (int64_t g = begin * kTask; g < std::min(groups, end * kTask); ++g) {
      const int64_t first = g * W, count = std::min(W, o.B - first);
      to_lanes(x + first * entries, count, entries, lanes);
      if (grad) {
        to_lanes(grad + first * entries, count, entries, upstream);
        normalizer.backward(upstream, lanes);
      } else {
        normalizer.forward(lanes);
      }
      from_lanes(lanes, count, entries, out + first * entries);
    }
  });
}

template <typename T>
void large(const T* grad, const T* x, const Options& o, T* out) {
  const int64_t entries = o.N * o.M;
  const bool few = o.B < 8 && entries > 4096;
  for_each_task(o.B, !few, [&](int64_t b) {
    const T *matrix = x + b * entries, *upstream = grad ? grad + b * entries : nullptr;
    const Temperature<Acc<T>> temperature(o.epsilon);
    if (grad) {
      NormalizerBackward<T>(o.N, o.M, temperature, o.iterations, o.last_rows, few)
          .run(upstream, matrix, out + b * entries);
    } else {
      Normalizer<T>(o.N, o.M, temperature, o.iterations, o.last_rows, false, few)
          .run(matrix, out + b * entries);
    }
  });
}

template <typename T>
void run(const T* grad, const T* x, const Options& o, T* out) {
  if (o.B * o.N * o.M == 0) return;
  if (o.N == 4 && o.M == 4) return small<T, 4, 4>(grad, x, o, out);
  if (o.N <= kSmallest && o.M <= kSmallest) return small<T, 0, 0>(grad, x, o, out);
  STD_TORCH_CHECK(o.stabilizer == 0, "doubly_stochastic: a stabilizer goes with at most 8 x 8");
  large(grad, x, o, out);
}

Options options(const Tensor& scores, double epsilon, int64_t iterations, bool last_rows,
                double stabilizer) {
  STD_TORCH_CHECK(scores.dim() == 3, "doubly_stochastic: scores must be (B, N, M)");
  STD_TORCH_CHECK(iterations >= 1, "doubly_stochastic: iterations must be >= 1");
  return {scores.size(0), scores.size(1), scores.size(2), epsilon,
          iterations,     last_rows,      stabilizer};
}

Tensor doubly_stochastic(const Tensor& scores, double epsilon, int64_t iterations, bool last_rows,
                         double stabilizer) {
  const Options o = options(scores, epsilon, iterations, last_rows, stabilizer);
  const Tensor x = torch::stable::contiguous(scores);
  Tensor out = torch::stable::new_empty(x, {o.B, o.N, o.M});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    run<T>(nullptr, data<T>(x), o, mutable_data<T>(out));
  });
  return out;
}

Tensor doubly_stochastic_backward(const Tensor& grad, const Tensor& scores, double epsilon,
                                  int64_t iterations, bool last_rows, double stabilizer) {
  const Options o = options(scores, epsilon, iterations, last_rows, stabilizer);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == o.B && grad.size(1) == o.N &&
                      grad.size(2) == o.M && grad.scalar_type() == scores.scalar_type(),
                  "doubly_stochastic_backward: grad must be like scores");
  const Tensor g = torch::stable::contiguous(grad), x = torch::stable::contiguous(scores);
  Tensor out = torch::stable::new_empty(x, {o.B, o.N, o.M});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    run<T>(data<T>(g), data<T>(x), o, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "doubly_stochastic(Tensor scores, float epsilon, int iterations, bool last_rows, "
      "float stabilizer) -> Tensor");
  m.def(
      "doubly_stochastic_backward(Tensor grad, Tensor scores, float epsilon, int iterations, "
      "bool last_rows, float stabilizer) -> Tensor");
}
WEFT_CPU_KERNELS(m) {
  m.impl("doubly_stochastic", TORCH_BOX(&doubly_stochastic));
  m.impl("doubly_stochastic_backward", TORCH_BOX(&doubly_stochastic_backward));
}

}  // namespace weft
