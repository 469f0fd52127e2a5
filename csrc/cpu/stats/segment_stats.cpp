// Count n, mean μ and squared deviations M of the rows of each class c, with weights w:
//
//   n_c = Σ w_i      μ_c = Σ w_i x_i / n_c      M_c = Σ w_i (x_i − μ_c)²
//
// Loop order: rows sorted by class > blocks of kSegmentBlock rows of one class, the tasks > runs of
// kRun rows, which stay in the first-level cache > columns in registers > the rows of the run.
//
// A run is summed around the mean so far: with p = Σ w (x − s) and q = Σ w (x − s)² over a run of
// weight m, n the weight with it, and l what rounding left of the mean, which is s + l,
//   μ = s + (p + (n − m) l) / n      M += q − (p² + 2 (n − m) l p − (n − m) m l²) / n
// The first run of a block has no mean yet and goes twice over its rows. Little cancels: p² ≤ m q,
// and m ≤ n / 2 from the second run on where rows weigh the same. Blocks merge by Chan's formula.
// The remainder l is kept for the gradient of M, Σ of which is 0 only around the exact mean.
#include "common/segments.h"
#include "cpu/registration.h"

namespace weft {
namespace {

constexpr int64_t kRun = 64;
#if defined(__AVX512F__)
constexpr int kVectors = 8;  // of a row in registers: each has its mean and two sums
#else
constexpr int kVectors = 4;
#endif

template <typename T>
struct Rows {
  const T* data;
  int64_t stride, D;
  const Acc<T>* weights;

  const T* row(int64_t i) const { return data + i * stride; }
  Acc<T> weight(int64_t i) const { return weights ? weights[i] : Acc<T>(1); }
};

// p and q of V vectors of columns from d on, n of them used, around the vectors at `around`.
template <int V, bool weighted, typename T>
void sums_around(const Rows<T>& x, const int64_t* run, int64_t m, const int64_t* end, int64_t d,
                 int64_t n, const Acc<T>* around, Vec<Acc<T>>* p, Vec<Acc<T>>* q) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size, kAhead = 8;
  const bool whole = n == V * W;
  Vec<A> shift[V], first[V], second[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
    shift[v] = whole ? Vec<A>::load(around + d + v * W) : Vec<A>::load(around + d, n);
  for (int64_t i = 0; i < m; ++i) {
    if (run + i + kAhead < end) {
      const char* next = reinterpret_cast<const char*>(x.row(run[i + kAhead]) + d);
#pragma GCC unroll 8
      for (int64_t line = 0; line < V * W * int64_t(sizeof(T)); line += 64)
        __builtin_prefetch(next + line);
    }
    const T* row = x.row(run[i]) + d;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec<A> r = (whole ? Vec<A>::load(row + v * W) : Vec<A>::load(row, n)) - shift[v];
      const Vec<A> wr = weighted ? Vec<A>(x.weight(run[i])) * r : r;
      first[v] += wr;
      second[v] = fma(wr, r, second[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) p[v] = first[v], q[v] = second[v];
}

// Statistics of one class or of a part of it, D columns each.
template <typename A>
struct Moments {
  A *mean, *m2, *low;
};

// The rows [begin, end) of one class; returns their weight.
template <bool weighted, typename T>
Acc<T> block_stats(const Rows<T>& x, const int64_t* begin, const int64_t* end,
                   Moments<Acc<T>> out) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size;
  for (A* sums : {out.mean, out.m2, out.low}) std::fill_n(sums, x.D, A(0));
  A total = 0;
  for (const int64_t* run = begin; run < end; run += kRun) {
    const int64_t m = std::min<int64_t>(kRun, end - run);
    A weight = 0;
    if constexpr (weighted)
      for (int64_t i = 0; i < m; ++i) weight += x.weight(run[i]);
    else
      weight = A(m);
    const Vec<A> before(total), mass(weight);
    total += weight;
    const Vec<A> inverse(A(1) / total);
    const auto columns = [&](int64_t d, auto width, int64_t n) {
      constexpr int V = decltype(width)::value;
      Vec<A> p[V], q[V];
      const auto store = [&](Vec<A> value, A* to) {
        n == V* W ? value.store(to) : value.store(to, n);
      };
      const auto load = [&](const A* from) {
        return n == V * W ? Vec<A>::load(from) : Vec<A>::load(from, n);
      };
      if (run == begin) {
        sums_around<V, weighted>(x, run, m, end, d, n, out.mean, p, q);
        for (int v = 0; v < V; ++v) store(p[v] * inverse, out.mean + d + v * W);
      }
      sums_around<V, weighted>(x, run, m, end, d, n, out.mean, p, q);
      for (int v = 0; v < V; ++v) {
        const int64_t at = d + v * W;
        const Vec<A> shift = load(out.mean + at), low = load(out.low + at), carried = before * low;
        const Vec<A> step = (p[v] + carried) * inverse, mean = shift + step;
        store(mean, out.mean + at);
        store(step - (mean - shift), out.low + at);
        const Vec<A> lost = fma(p[v], p[v] + carried + carried, -(carried * mass * low));
        // What is added is a sum of squares: rounding must not make it negative.
        const Vec<A> added = maximum(q[v] - lost * inverse, Vec<A>());
        store(load(out.m2 + at) + added, out.m2 + at);
      }
    };
    int64_t d = 0;
    for (; d + kVectors * W <= x.D; d += kVectors * W)
      columns(d, std::integral_constant<int, kVectors>{}, kVectors * W);
    for (; d < x.D; d += W)
      columns(d, std::integral_constant<int, 1>{}, std::min<int64_t>(W, x.D - d));
  }
  return total;
}

// The statistics of two parts of a class, of weights n and other_n, into the first.
template <typename A>
void merge(int64_t D, A& n, Moments<A> to, A other_n, Moments<A> other) {
  n += other_n;
  const A share = other_n / n, between = (n - other_n) * share;
  for (int64_t d = 0; d < D; ++d) {
    const A delta = (other.mean[d] - to.mean[d]) + (other.low[d] - to.low[d]);
    const A step = to.low[d] + share * delta, mean = to.mean[d] + step;
    to.low[d] = step - (mean - to.mean[d]);
    to.mean[d] = mean;
    to.m2[d] += other.m2[d] + between * delta * delta;
  }
}

template <typename T>
void forward(const Rows<T>& x, const Segments& segments, Acc<T>* totals, Moments<Acc<T>> out) {
  using A = Acc<T>;
  const int64_t D = x.D;
  std::vector<SegmentBlock> blocks;
  static thread_local Scratch memory;
  const int64_t count = segment_blocks(segments, blocks);
  A* weights = memory.get<A>(count * (3 * D + 1));
  A* moments = weights + count;
  const auto partial = [=](int64_t p) {
    return Moments<A>{moments + 3 * p * D, moments + (3 * p + 1) * D, moments + (3 * p + 2) * D};
  };
  const auto of_class = [=](int64_t key) {
    return Moments<A>{out.mean + key * D, out.m2 + key * D, out.low + key * D};
  };
  for_segment_blocks(
      blocks,
      [&](const SegmentBlock& b) {
        const bool part = b.partial >= 0;
        const Moments<A> to = part ? partial(b.partial) : of_class(b.key);
        (part ? weights[b.partial] : totals[b.key]) =
            x.weights ? block_stats<true>(x, b.begin, b.end, to)
                      : block_stats<false>(x, b.begin, b.end, to);
      },
      [&](int64_t key, int64_t first, int64_t last) {
        const Moments<A> sum = partial(first), to = of_class(key);
        for (int64_t p = first + 1; p < last; ++p)
          merge(D, weights[first], sum, weights[p], partial(p));
        totals[key] = weights[first];
        std::copy_n(sum.mean, D, to.mean);
        std::copy_n(sum.m2, D, to.m2);
        std::copy_n(sum.low, D, to.low);
      });
}

// ∂x_i = w_i (∂μ/n + 2 ∂M r_i),   ∂w_i = ∂n + Σ_d r_i (∂μ/n + ∂M r_i)   with r_i = x_i − μ − l
template <typename T>
struct Gradients {
  const Acc<T>*of_count, *of_mean, *of_m2, *total, *mean, *low;
  T* x;
  Acc<T>* weights;
};

template <typename T>
void backward(const Rows<T>& x, const int64_t* labels, int64_t N, int64_t C,
              const Gradients<T>& g) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size;
  const int64_t D = x.D;
  torch::stable::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = labels[i];
      const A w = x.weight(i);
      T* out = g.x + i * D;
      if (w == 0 || uint64_t(c) >= uint64_t(C)) {  // not read
        std::fill_n(out, D, T(0));
        if (g.weights) g.weights[i] = 0;
        continue;
      }
      const Vec<A> inverse(A(1) / g.total[c]), weight(w);
      const A *of_mean = g.of_mean + c * D, *of_m2 = g.of_m2 + c * D, *mean = g.mean + c * D;
      const A* low = g.low + c * D;
      Vec<A> along;
      const auto step = [&](int64_t d, auto load, auto store) {
        const Vec<A> r = (load(x.row(i) + d) - load(mean + d)) - load(low + d);
        const Vec<A> bend = load(of_m2 + d) * r;
        const Vec<A> slope = fma(load(of_mean + d), inverse, bend);
        store(weight * (slope + bend), out + d);
        along = fma(r, slope, along);
      };
      int64_t d = 0;
      for (; d + W <= D; d += W)
        step(d, [](const auto* p) { return Vec<A>::load(p); }, [](Vec<A> v, T* p) { v.store(p); });
      if (d < D)
        step(
            d, [=](const auto* p) { return Vec<A>::load(p, D - d); },
            [=](Vec<A> v, T* p) { v.store(p, D - d); });
      if (g.weights) g.weights[i] = g.of_count[c] + reduce_sum(along);
    }
  });
}

// ---- registration -------------------------------------------------------------------------------

ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check(const Tensor& x, const Tensor& labels, const std::optional<Tensor>& weights) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1),
                  "segment_stats: x must be (N, D) with adjacent columns");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.is_contiguous() &&
                      labels.numel() == x.size(0),
                  "segment_stats: labels must be (N,) int64 and contiguous");
  STD_TORCH_CHECK(!weights || (weights->scalar_type() == wide(x) && weights->is_contiguous() &&
                               weights->numel() == x.size(0)),
                  "segment_stats: weights must be (N,) in the dtype of the statistics");
}

template <typename T>
Rows<T> rows_of(const Tensor& x, const std::optional<Tensor>& weights) {
  return {data<T>(x), x.stride(0), x.size(1), weights ? data<Acc<T>>(*weights) : nullptr};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> segment_stats(const Tensor& x, const Tensor& labels,
                                                         const std::optional<Tensor>& weights,
                                                         int64_t num_classes) {
  check(x, labels, weights);
  const int64_t N = x.size(0), D = x.size(1), C = num_classes;
  Tensor mean = torch::stable::new_empty(x, {C, D}, wide(x));
  Tensor m2 = torch::stable::new_empty(x, {C, D}, wide(x));
  Tensor low = torch::stable::new_empty(x, {C, D}, wide(x));
  Tensor count = torch::stable::new_empty(x, {C}, weights ? wide(x) : ScalarType::Long);
  with_float(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    static thread_local Scratch key_memory, order, start, totals_memory;
    const Rows<T> rows = rows_of<T>(x, weights);
    const int64_t* keys = data<int64_t>(labels);
    if (weights) {  // a row of weight 0 belongs to no class
      int64_t* used = key_memory.get<int64_t>(N);
      for (int64_t i = 0; i < N; ++i) used[i] = rows.weights[i] == 0 ? -1 : keys[i];
      keys = used;
    }
    const Segments segments(keys, N, C, order, start);
    A* totals = weights ? mutable_data<A>(count) : totals_memory.get<A>(C);
    forward(rows, segments, totals,
            {mutable_data<A>(mean), mutable_data<A>(m2), mutable_data<A>(low)});
    if (!weights)
      for (int64_t c = 0; c < C; ++c) mutable_data<int64_t>(count)[c] = segments.count(c);
  });
  return {mean, m2, low, count};
}

std::tuple<Tensor, Tensor> segment_stats_backward(
    const Tensor& x, const std::optional<Tensor>& grad_count, const Tensor& grad_mean,
    const Tensor& grad_m2, const Tensor& labels, const std::optional<Tensor>& weights,
    const Tensor& total, const Tensor& mean, const Tensor& low) {
  check(x, labels, weights);
  const int64_t N = x.size(0), D = x.size(1), C = total.numel();
  for (const Tensor* t : {&grad_mean, &grad_m2, &mean, &low})
    STD_TORCH_CHECK(t->numel() == C * D && t->is_contiguous() && t->scalar_type() == wide(x),
                    "segment_stats_backward: means and gradients must be (C, D) and contiguous");
  STD_TORCH_CHECK(total.is_contiguous() && total.scalar_type() == wide(x) &&
                      bool(weights) == bool(grad_count) &&
                      (!grad_count || (grad_count->numel() == C && grad_count->is_contiguous() &&
                                       grad_count->scalar_type() == wide(x))),
                  "segment_stats_backward: total and grad_count must be (C,) and contiguous");
  Tensor grad_x = torch::stable::new_empty(x, {N, D});
  Tensor grad_weights = torch::stable::new_empty(x, {weights ? N : 0}, wide(x));
  with_float(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    backward<T>(rows_of<T>(x, weights), data<int64_t>(labels), N, C,
                {grad_count ? data<A>(*grad_count) : nullptr, data<A>(grad_mean), data<A>(grad_m2),
                 data<A>(total), data<A>(mean), data<A>(low), mutable_data<T>(grad_x),
                 weights ? mutable_data<A>(grad_weights) : nullptr});
  });
  return {grad_x, grad_weights};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "segment_stats(Tensor x, Tensor labels, Tensor? weights, int num_classes) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "segment_stats_backward(Tensor x, Tensor? grad_count, Tensor grad_mean, Tensor grad_m2, "
      "Tensor labels, Tensor? weights, Tensor total, Tensor mean, Tensor low) -> (Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("segment_stats", TORCH_BOX(&segment_stats));
  m.impl("segment_stats_backward", TORCH_BOX(&segment_stats_backward));
}

}  // namespace weft
