// Conditional transport on the matrix of similarities s (N × M) of each problem, at temperature τ,
// with logarithms of weights α_i and β_j:
//
//   to columns   r_i = Σ_j π_ij s_ij,   π_ij = exp((s_ij − h_i)/τ + β_j) / z_i,   h_i = max_j s_ij
//   to rows      c_j = Σ_i κ_ij s_ij,   κ_ij = exp((s_ij − h_j)/τ + α_i) / z_j,   h_j = max_i s_ij
//
// Backward, with p = ∂r_i π_ij, q = ∂c_j κ_ij, u = s_ij − r_i, v = s_ij − c_j:
//   ∂s_ij = p + q + (p u + q v)/τ,   ∂β_j = Σ_i p u,   ∂α_i = Σ_j q v,   ∂τ = −Σ (p u² + q v²)/τ²
//
// Loop order: problems × blocks of kRows rows, the tasks > rows > columns in registers. A block
// stays in cache for two passes, one for the maxima of its rows and columns and one for the
// exponentials: s is read from memory once. What a block sums for columns is relative to the
// block's own maxima; blocks are merged in their order, whatever thread had them.
#include <algorithm>
#include <limits>

#include "common/math.h"
#include "common/reduce.h"
#include "common/scratch.h"
#include "cpu/registration.h"

namespace weft {
namespace {

constexpr int64_t kRows = 64;
constexpr int64_t kSegment = 1024;  // columns that one partial sum of a row has
constexpr int64_t kMerged = 256;    // columns of a task that merges blocks

template <typename T>
struct Problem {
  using A = Acc<T>;
  const T* s;      // (B, N, M)
  const A* alpha;  // (B, N), or null
  const A* beta;   // (B, width), −infinity behind M
  A inverse;       // 1/τ
  int64_t B, N, M;
  int64_t blocks, width;

  const T* row(int64_t b, int64_t i) const { return s + (b * N + i) * M; }
  A weight(int64_t b, int64_t i) const { return alpha ? alpha[b * N + i] : A(0); }
};

template <typename A>
constexpr A kNone = -std::numeric_limits<A>::infinity();

// Mean, maximum and log z of each row or column.
template <typename A>
struct Expectation {
  A *mean, *largest, *log_total;

  void store(int64_t at, A h, A z, A t) const {
    const bool none = z == 0;  // no point has a weight
    largest[at] = none ? A(0) : h;
    log_total[at] = none ? A(0) : std::log(z);
    mean[at] = none ? A(0) : h + t / z;
  }
};

// What a block sums for its columns, `width` each.
template <typename A>
struct ColumnSums {
  A *largest, *total, *moment;
};

template <typename A>
ColumnSums<A> of_block(A* memory, int64_t block, int64_t width) {
  A* at = memory + 3 * block * width;
  return {at, at + width, at + 2 * width};
}

template <typename T>
void forward_block(const Problem<T>& x, int64_t b, int64_t first, int64_t last,
                   const Expectation<Acc<T>>& rows, ColumnSums<Acc<T>> columns) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size;
  const A* beta = x.beta + b * x.width;
  A largest[kRows];
  std::fill_n(columns.largest, x.width, kNone<A>);
  std::fill_n(columns.total, 2 * x.width, A(0));
  for (int64_t i = first; i < last; ++i) {
    const T* row = x.row(b, i);
    const bool used = x.weight(b, i) != kNone<A>;
    Vec<A> most(kNone<A>);
    for (int64_t j = 0; j < x.M; j += W) {
      const Vec<A> s = load_first<A>(row + j, std::min(W, x.M - j));
      most = max(most, select(Vec<A>::load(beta + j) == Vec<A>(kNone<A>), Vec<A>(kNone<A>), s));
      if (used) max(Vec<A>::load(columns.largest + j), s).store(columns.largest + j);
    }
    largest[i - first] = reduce_max(most);
  }
  const Vec<A> inverse(x.inverse);
  for (int64_t i = first; i < last; ++i) {
    const T* row = x.row(b, i);
    const A h = largest[i - first] == kNone<A> ? A(0) : largest[i - first];
    const Vec<A> shift(h), alpha(x.weight(b, i));
    const bool used = x.weight(b, i) != kNone<A>;
    Vec<A> total, moment;
    for (int64_t start = 0; start < x.M; start += kSegment) {
      Vec<A> part, part_moment;
      for (int64_t j = start; j < std::min(x.M, start + kSegment); j += W) {
        const Vec<A> s = load_first<A>(row + j, std::min(W, x.M - j));
        const Vec<A> u = s - shift;
        const Vec<A> e = exp_or_zero(fma(u, inverse, Vec<A>::load(beta + j)));
        part += e;
        part_moment = fma(e, u, part_moment);
        if (!used) continue;
        const Vec<A> v = s - Vec<A>::load(columns.largest + j);
        const Vec<A> f = exp_or_zero(fma(v, inverse, alpha));
        (Vec<A>::load(columns.total + j) + f).store(columns.total + j);
        fma(f, v, Vec<A>::load(columns.moment + j)).store(columns.moment + j);
      }
      total += part;
      moment += part_moment;
    }
    rows.store(b * x.N + i, h, reduce_sum(total), reduce_sum(moment));
  }
}

template <typename T>
void forward(const Problem<T>& x, const Expectation<Acc<T>>& rows,
             const Expectation<Acc<T>>& columns) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size;
  static thread_local Scratch scratch;
  A* memory = scratch.get<A>(3 * x.B * x.blocks * x.width);
  parallel_for(0, x.B * x.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / x.blocks, first = task % x.blocks * kRows;
      forward_block(x, b, first, std::min(x.N, first + kRows), rows,
                    of_block(memory, task, x.width));
    }
  });
  const int64_t parts = ceil_div(x.M, kMerged);
  parallel_for(0, x.B * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, start = task % parts * kMerged;
      const Vec<A> inverse(x.inverse), none(kNone<A>);
      for (int64_t j = start; j < std::min(x.M, start + kMerged); j += W) {
        Vec<A> h = none, z, t;
        for (int64_t k = b * x.blocks; k < (b + 1) * x.blocks; ++k)
          h = max(h, Vec<A>::load(of_block(memory, k, x.width).largest + j));
        for (int64_t k = b * x.blocks; k < (b + 1) * x.blocks; ++k) {
          const ColumnSums<A> sums = of_block(memory, k, x.width);
          const Vec<A> own = Vec<A>::load(sums.largest + j), mass = Vec<A>::load(sums.total + j);
          // A block without weights has sums of 0 and no maximum.
          const Vec<A> step = select(own == none, Vec<A>(), own - h);
          const Vec<A> scale = exp_or_zero(step * inverse);
          z = fma(scale, mass, z);
          t = fma(scale, fma(mass, step, Vec<A>::load(sums.moment + j)), t);
        }
        for (int64_t lane = 0; lane < std::min(W, x.M - j); ++lane)
          columns.store(b * x.M + j + lane, h.v[lane], z.v[lane], t.v[lane]);
      }
    }
  });
}

// Upstream gradients, and the results of the forward.
template <typename A>
struct Side {
  const A *grad, *mean, *largest, *log_total;
};

template <typename T>
struct Gradients {
  T* s;           // (B, N, M)
  Acc<T>* alpha;  // (B, N), or null
  Acc<T>* beta;   // (B, M), or null
  Acc<T>* temperature;
};

// Writes ∂s and ∂α of a block and its part of ∂β; returns its part of Σ p u² + q v².
template <typename T>
Acc<T> backward_block(const Problem<T>& x, int64_t b, int64_t first, int64_t last,
                      const Side<Acc<T>>& rows, const Side<Acc<T>>& columns,
                      const Gradients<T>& out, Acc<T>* of_beta) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size;
  const Vec<A> inverse(x.inverse);
  const A *beta = x.beta + b * x.width, *grads = columns.grad + b * x.M;
  const A *means = columns.mean + b * x.M, *most = columns.largest + b * x.M;
  const A* logs = columns.log_total + b * x.M;
  std::fill_n(of_beta, x.width, A(0));
  Vec<A> of_temperature;
  for (int64_t i = first; i < last; ++i) {
    const int64_t at = b * x.N + i;
    const T* row = x.row(b, i);
    T* to = out.s + at * x.M;
    const Vec<A> shift(rows.largest[at]), log_total(rows.log_total[at]), mean(rows.mean[at]);
    const Vec<A> grad(rows.grad[at]), alpha(x.weight(b, i));
    Vec<A> of_alpha, bend;
    const auto step = [&](int64_t j, int64_t n) {
      const auto load = [&](const A* p) { return load_first<A>(p + j, n); };
      const Vec<A> s = load_first<A>(row + j, n);
      const Vec<A> e = fma(s - shift, inverse, Vec<A>::load(beta + j) - log_total);
      const Vec<A> f = fma(s - load(most), inverse, alpha - load(logs));
      const Vec<A> p = grad * exp_or_zero(e), q = load(grads) * exp_or_zero(f);
      const Vec<A> u = s - mean, v = s - load(means), pu = p * u, qv = q * v;
      const Vec<A> of_s = fma(pu + qv, inverse, p + q);
      n == W ? of_s.store(to + j) : of_s.store(to + j, n);
      (Vec<A>::load(of_beta + j) + pu).store(of_beta + j);
      of_alpha += qv;
      bend = fma(pu, u, fma(qv, v, bend));
    };
    int64_t j = 0;
    for (; j + W <= x.M; j += W) step(j, W);
    if (j < x.M) step(j, x.M - j);
    of_temperature += bend;
    if (out.alpha) out.alpha[at] = reduce_sum(of_alpha);
  }
  return reduce_sum(of_temperature);
}

template <typename T>
void backward(const Problem<T>& x, const Side<Acc<T>>& rows, const Side<Acc<T>>& columns,
              const Gradients<T>& out) {
  using A = Acc<T>;
  static thread_local Scratch scratch;
  const int64_t tasks = x.B * x.blocks;
  A* memory = scratch.get<A>(tasks * (x.width + 1));
  A* bends = memory + tasks * x.width;
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / x.blocks, first = task % x.blocks * kRows;
      bends[task] = backward_block(x, b, first, std::min(x.N, first + kRows), rows, columns, out,
                                   memory + task * x.width);
    }
  });
  A bend = 0;
  for (int64_t task = 0; task < tasks; ++task) bend += bends[task];
  *out.temperature = -(bend * x.inverse) * x.inverse;
  if (!out.beta) return;
  for (int64_t b = 0; b < x.B; ++b)
    for (int64_t j = 0; j < x.M; ++j) {
      A sum = 0;
      for (int64_t k = b * x.blocks; k < (b + 1) * x.blocks; ++k) sum += memory[k * x.width + j];
      out.beta[b * x.M + j] = sum;
    }
}

// ---- registration -------------------------------------------------------------------------------

ScalarType wide(const Tensor& s) {
  return s.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check(const Tensor& s, const std::optional<Tensor>& log_a, const std::optional<Tensor>& log_b,
           const Tensor& temperature) {
  STD_TORCH_CHECK(s.dim() == 3 && s.is_contiguous(),
                  "conditional_transport: similarity must be (B, N, M) and contiguous");
  const int64_t B = s.size(0), N = s.size(1), M = s.size(2);
  const auto fits = [&](const std::optional<Tensor>& t, int64_t numel) {
    return !t || (t->numel() == numel && t->is_contiguous() && t->scalar_type() == wide(s));
  };
  STD_TORCH_CHECK(fits(log_a, B * N) && fits(log_b, B * M) && fits(temperature, 1),
                  "conditional_transport: log_a must be (B, N), log_b (B, M) and temperature of "
                  "one element, contiguous in the dtype of sums");
}

// The logarithms of the columns' weights are copied once, with −infinity behind each row's end.
template <typename T>
Problem<T> problem_of(const Tensor& s, const std::optional<Tensor>& log_a,
                      const std::optional<Tensor>& log_b, const Tensor& temperature) {
  using A = Acc<T>;
  static thread_local Scratch scratch;
  const int64_t B = s.size(0), N = s.size(1), M = s.size(2);
  const int64_t width = round_up(M, Vec<A>::size);
  A* beta = scratch.get<A>(B * width);
  for (int64_t b = 0; b < B; ++b) {
    if (log_b)
      std::copy_n(data<A>(*log_b) + b * M, M, beta + b * width);
    else
      std::fill_n(beta + b * width, M, A(0));
    std::fill(beta + b * width + M, beta + (b + 1) * width, kNone<A>);
  }
  const A inverse = std::min(A(1) / *data<A>(temperature), A(1e20));  // beyond, it is the limit
  const A* alpha = log_a ? data<A>(*log_a) : nullptr;
  return {data<T>(s), alpha, beta, inverse, B, N, M, ceil_div(N, kRows), width};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conditional_transport(const Tensor& s,
                                                                 const std::optional<Tensor>& log_a,
                                                                 const std::optional<Tensor>& log_b,
                                                                 const Tensor& temperature) {
  check(s, log_a, log_b, temperature);
  const int64_t B = s.size(0), N = s.size(1), M = s.size(2);
  Tensor row_mean = torch::stable::new_empty(s, {B, N}, wide(s));
  Tensor column_mean = torch::stable::new_empty(s, {B, M}, wide(s));
  Tensor row_stats = torch::stable::new_empty(s, {2, B, N}, wide(s));
  Tensor column_stats = torch::stable::new_empty(s, {2, B, M}, wide(s));
  with_float(s, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const auto into = [](const Tensor& mean, const Tensor& stats) {
      A* at = mutable_data<A>(stats);
      return Expectation<A>{mutable_data<A>(mean), at, at + mean.numel()};
    };
    forward<T>(problem_of<T>(s, log_a, log_b, temperature), into(row_mean, row_stats),
               into(column_mean, column_stats));
  });
  return {row_mean, column_mean, row_stats, column_stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conditional_transport_backward(
    const Tensor& s, const Tensor& grad_row, const Tensor& grad_column,
    const std::optional<Tensor>& log_a, const std::optional<Tensor>& log_b,
    const Tensor& temperature, const Tensor& row_mean, const Tensor& column_mean,
    const Tensor& row_stats, const Tensor& column_stats) {
  check(s, log_a, log_b, temperature);
  const int64_t B = s.size(0), N = s.size(1), M = s.size(2);
  const auto require = [&](const Tensor& t, int64_t numel) {
    STD_TORCH_CHECK(t.numel() == numel && t.is_contiguous() && t.scalar_type() == wide(s),
                    "conditional_transport_backward: gradients, means and stats must have the "
                    "shapes of the forward's results, contiguous in the dtype of sums");
  };
  require(grad_row, B * N), require(row_mean, B * N), require(row_stats, 2 * B * N);
  require(grad_column, B * M), require(column_mean, B * M), require(column_stats, 2 * B * M);
  Tensor grad_s = torch::stable::new_empty(s, {B, N, M});
  Tensor grad_a = log_a ? torch::stable::new_empty(s, {B, N}, wide(s))
                        : torch::stable::new_empty(s, {0}, wide(s));
  Tensor grad_b = log_b ? torch::stable::new_empty(s, {B, M}, wide(s))
                        : torch::stable::new_empty(s, {0}, wide(s));
  Tensor grad_temperature = torch::stable::new_empty(s, {}, wide(s));
  with_float(s, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const auto side = [](const Tensor& grad, const Tensor& mean, const Tensor& stats) {
      const A* at = data<A>(stats);
      return Side<A>{data<A>(grad), data<A>(mean), at, at + mean.numel()};
    };
    backward<T>(problem_of<T>(s, log_a, log_b, temperature), side(grad_row, row_mean, row_stats),
                side(grad_column, column_mean, column_stats),
                {mutable_data<T>(grad_s), log_a ? mutable_data<A>(grad_a) : nullptr,
                 log_b ? mutable_data<A>(grad_b) : nullptr, mutable_data<A>(grad_temperature)});
  });
  return {grad_s, grad_a, grad_b, grad_temperature};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "conditional_transport(Tensor similarity, Tensor? log_a, Tensor? log_b, Tensor temperature) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conditional_transport_backward(Tensor similarity, Tensor grad_row, Tensor grad_column, "
      "Tensor? log_a, Tensor? log_b, Tensor temperature, Tensor row_mean, Tensor column_mean, "
      "Tensor row_stats, Tensor column_stats) -> (Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("conditional_transport", TORCH_BOX(&conditional_transport));
  m.impl("conditional_transport_backward", TORCH_BOX(&conditional_transport_backward));
}

}  // namespace weft
