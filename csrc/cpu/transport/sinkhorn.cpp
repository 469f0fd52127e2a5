// Sinkhorn's iterations on a matrix of costs:
//
//   f_i ← −λ_a ε log Σ_j b_j e^((g_j − C_ij) / ε)      g_j ← −λ_b ε log Σ_i a_i e^((f_i − C_ij) /
//   ε)
//
// from g, a problem at a time until its error is small (relaxation.h). Both halves of an iteration
// are one pass over the rows: of each block of them, the sums, the new f, and what they add to the
// columns (sinkhorn_rows.h); then the columns (sinkhorn_columns.h). A matrix is read once for each
// iteration, with one exponential for each entry; and one whose kernel matrix fits half of an L2
// cache not even that, while the potentials stay near those of which it was made.
//
// Large matrices are split in parts of rows, by shape alone, with column sums of their own that are
// added in order. Threads take problems, or parts where there are few problems: the bits are the
// same.
#include "cpu/transport/relaxation.h"
#include "cpu/transport/sinkhorn_columns.h"
#include "cpu/transport/sinkhorn_rows.h"

namespace weft {
namespace {

struct Options {
  double rho_a, rho_b;
  int64_t max_iterations;
  double tolerance;
  bool relax;
};

// Where the results of a problem go.
template <typename A>
struct Results {
  A *f, *g, *error;
  int64_t* iterations;
};

template <typename T>
class Solver {
 public:
  using A = Acc<T>;

  Solver(SinkhornState<T>& state, const Options& options, bool threads)
      : s_(state), options_(options), threads_(threads && state.parts() > 1) {}

  void run(const Results<A>& results) {
    Relaxation rule(options_.tolerance, options_.relax);
    double error = std::numeric_limits<double>::infinity(), before = 0;
    int64_t count = 1;
    for (;; ++count) {
      before = s_.translation;
      error = iterate(rule.factor());
      if (count == options_.max_iterations) break;
      if (!rule.goes_on(count, error, Relaxation::decides(count) ? rounding_floor() : 0)) break;
    }
    for (int64_t i = 0; i < s_.rows; ++i) results.f[s_.cost.row_at(i)] = s_.row_potential(i);
    for (int64_t j = 0; j < s_.columns; ++j)
      results.g[s_.cost.column_at(j)] = s_.column_potential(j);
    without_weight(before, results.g);
    *results.error = A(error);
    *results.iterations = count;
  }

 private:
  static constexpr A kInfinity = SinkhornState<T>::kInfinity;

  double iterate(double omega) {
    RowsResult each[SinkhornState<T>::kMostParts], all;
    const RowUpdate<T> rows(s_, options_.relax, omega);
    const auto parts = [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) each[part] = rows.run(part);
    };
    if (threads_)
      parallel_for(0, s_.parts(), 1, parts);
    else
      parts(0, s_.parts());
    for (int64_t part = 0; part < s_.parts(); ++part) {
      all.error += each[part].error;
      all.alive += each[part].alive;
      all.moved |= each[part].moved;
    }
    s_.built = s_.K && !all.moved;
    ColumnUpdate<T> columns(s_, omega, all.moved, threads_);
    return std::max(columns.run(all.alive), all.error);
  }

  // The error that rounding leaves: what is rounded is as large as k (f_i + g_j) where mass is.
  double rounding_floor() const {
    const auto mean = [](int64_t count, const A* weight, auto potential) {
      double sum = 0, mass = 0;
      for (int64_t i = 0; i < count; ++i)
        if (const double p = double(potential(i)); weight[i] > 0 && std::isfinite(p))
          sum += double(weight[i]) * p, mass += double(weight[i]);
      return mass > 0 ? sum / mass : 0;
    };
    const double of_mass =
        mean(s_.rows, s_.a, [&](int64_t i) { return s_.row_potential(i); }) +
        mean(s_.columns, s_.b, [&](int64_t j) { return s_.column_potential(j); });
    return std::numeric_limits<A>::epsilon() *
           (4 + std::abs(of_mass) / (4 * double(s_.cost.epsilon)));
  }

  // The potentials of columns that the iterations skip; `before`: the translation before the last.
  void without_weight(double before, A* g) const {
    constexpr int64_t kChunk = 512;
    A found[kChunk];
    for (int64_t first = 0; first < s_.columns; first += kChunk) {
      const int64_t last = std::min(first + kChunk, s_.columns);
      if (std::count(s_.b + first, s_.b + last, A(0)) == 0) continue;
      ColumnUpdate<T>::soft_minima(s_, first, last, found);
      for (int64_t j = first; j < last; ++j) {
        if (s_.b[j] != 0) continue;
        const double best = double(s_.damp_b[j]) * (double(found[j - first]) - before);
        const double shift = s_.translation - before;
        g[s_.cost.column_at(j)] =
            found[j - first] == kInfinity ? -kInfinity : A((best - shift) / double(s_.k));
      }
    }
  }

  SinkhornState<T>& s_;
  const Options& options_;
  bool threads_;
};

// ---- registration -------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn(
    const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
    const OptionalTensor& mask, const OptionalTensor& rows, const OptionalTensor& columns,
    const OptionalTensor& border, bool similarity, const OptionalTensor& start, double rho_a,
    double rho_b, int64_t max_iterations, double tolerance, bool relax, bool) {
  const TransportArguments args(cost, a, b, epsilon, mask, rows, columns, border, similarity);
  if (start) args.check_columns(*start, "start");
  STD_TORCH_CHECK(max_iterations >= 1, "weft: max_iterations must be at least 1");
  const int64_t N = args.all_rows(), M = args.all_columns();
  Tensor f = torch::stable::new_empty(a, {args.B, N}), g = torch::stable::new_empty(b, {args.B, M});
  Tensor error = torch::stable::new_empty(epsilon, {args.B});
  Tensor iterations = torch::stable::new_empty(epsilon, {args.B}, ScalarType::Long);
  const Options options{rho_a, rho_b, max_iterations, tolerance, relax};
  with_float(cost, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    A *to_f = mutable_data<A>(f), *to_g = mutable_data<A>(g), *errors = mutable_data<A>(error);
    int64_t* counts = mutable_data<int64_t>(iterations);
    std::fill_n(to_f, args.B * N, -std::numeric_limits<A>::infinity());
    std::fill_n(to_g, args.B * M, -std::numeric_limits<A>::infinity());
    const auto view = [](const Tensor& t) { return TransportArguments::view<A>(t); };
    const Vectors<A> weights = view(a), others = view(b),
                     first = start ? view(*start) : Vectors<A>{};
    const auto solve = [&](int64_t n, bool threads) {
      static thread_local Scratch storage;
      SinkhornState<T> state(args.problem<T>(n), rho_a, rho_b, storage);
      state.start(weights.data + n * weights.batch_stride, weights.stride,
                  others.data + n * others.batch_stride, others.stride,
                  start ? first.data + n * first.batch_stride : nullptr, first.stride);
      Solver<T>(state, options, threads).run({to_f + n * N, to_g + n * M, errors + n, counts + n});
    };
    const int64_t threads = torch::stable::get_num_threads();
    if (args.B < 4 * threads && N * M > 1 << 17) {
      for (int64_t n = 0; n < args.B; ++n) solve(n, true);
    } else {
      parallel_for(0, args.B, 1, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) solve(n, false);
      });
    }
  });
  return {f, g, error, iterations};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("sinkhorn(" WEFT_TRANSPORT_SCHEMA
        ", Tensor? start, float rho_a, float rho_b, int max_iterations, float tolerance, "
        "bool relax, bool unrolled) -> (Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) { m.impl("sinkhorn", TORCH_BOX(&sinkhorn)); }

}  // namespace weft
