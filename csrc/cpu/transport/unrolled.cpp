// The gradient of exactly T plain iterations. Back through iteration t, from cotangents γ of f and
// δ of g = g^t, with the potentials F, G before damping, f = λ F, g = λ G:
//
//     q_ij = a_i e^((f_i + G_j − C_ij) / ε)        u_j = λ_j δ_j    γ_i ← γ_i − Σ_j u_j q_ij
//     p_ij = b_j e^((g^{t-1}_j + F_i − C_ij) / ε)  v_i = λ_i γ_i    δ_j ← −Σ_i v_i p_ij
//     ∂C_ij += u_j q_ij + v_i p_ij
//
// The columns of q sum to 1, the rows of p too. ∂a_i = −(ε / a_i) Σ_t Σ_j u_j q_ij and
// ∂b_j = (ε / b_j) Σ_t δ_j. Potentials scale with costs and ε, so
//
//     ε ∂ε = Σ_t (Σ_j u_j g_j + Σ_i f_i (v_i + Σ_j u_j q_ij) − Σ_j g^{t-1}_j δ_j) − Σ ∂C_ij C_ij
//
// where the last sum is made of C_ij − f_i − g_j, with the last potentials, and of the sums of rows
// and columns of ∂C, which are known: so the rounding of ∂C counts for little.
//
// All but the sums over i belongs to one row: an iteration reads the costs once and adds to ∂C
// once, and q and p share an exponential, E_ij = e^((F_i + max(g^{t-1}_j, G_j) − C_ij) / ε):
// neither is more than its factors times E, so that what underflows is of no account. Rows whose
// factor is too small for that, as those of weight 0, take two.
#include "cpu/transport/unrolled_history.h"

namespace weft {
namespace {

template <typename T>
class Unrolled {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  using Doubles = std::vector<double>;

  // gradient is a matrix (n, m), without the dustbin, with row stride ld, set to 0 here.
  Unrolled(const Extended<T>& p, double rho_a, double rho_b, int64_t iterations, const A* start,
           A* gradient, int64_t ld)
      : p_(p),
        blocks_(p.rows),
        history_(p, blocks_, rho_a, rho_b, iterations, start),
        gradient_(gradient),
        ld_(ld),
        width_(round_up(p.columns, V::size)),
        row_sums_(size_t(p.rows), 0.0),
        column_sums_(size_t(p.columns), 0.0),
        last_f_(history_.f(iterations)),
        last_g_(history_.g(iterations)),
        block_scalars_(size_t(4 * blocks_.count()), 0.0) {
    static thread_local Scratch storage;
    column_factors_ = storage.get<A>((5 + 2 * blocks_.count()) * width_);
    sums_ = column_factors_ + 5 * width_;
    for (int64_t j = 0; j < p.columns; ++j) {
      const A b = p.b[j];
      if (b != 0 && b < A(kLeastFactor)) shares_ = false;
    }
  }

  // Back through all iterations; δ becomes the gradient of the start.
  void run(int64_t iterations, const Doubles& gamma, Doubles& delta) {
    blocks_.run([&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < std::min(last, p_.cost.n); ++i)
        std::fill_n(gradient_ + i * ld_, p_.cost.m, A(0));
    });
    for (int64_t t = iterations; t > 0; --t) {
      prepare(t, delta);
      blocks_.run([&](int64_t k, int64_t first, int64_t last) {
        std::fill_n(sums_ + 2 * k * width_, 2 * width_, A(0));
        for (int64_t i = first; i < last; ++i)
          back(t, k, i, t == iterations ? gamma[size_t(i)] : 0.0);
      });
      finish(t, delta);
    }
  }

  // After run, from ∂C and C: what is left of ε ∂ε, and ∂C in its place.
  void results(T* grad_cost, double* border, double& scalar) {
    const CostMatrix<T>& c = p_.cost;
    for (int64_t k = 0; k < blocks_.count(); ++k) {
      scalar_ += block_scalars_[size_t(4 * k)];
      for (int64_t l = 0; l < 3; ++l) border[l] += block_scalars_[size_t(4 * k + 1 + l)];
    }
    Doubles parts(size_t(blocks_.count()), 0.0);
    blocks_.run([&](int64_t k, int64_t first, int64_t last) {
      static thread_local Scratch buffers;
      A* buffer = buffers.get<A>(p_.columns);
      for (int64_t i = first; i < std::min(last, c.n); ++i) {
        A sign, *row = gradient_ + i * ld_;
        const A* C = p_.costs(i, buffer, sign);
        V sum(A(0));
        const V back(c.similarity ? A(-1) : A(1)), f_i(last_f_[i]);
        for_vectors<A>(c.m, [&](int64_t j, int64_t n) {
          const V d = load_first<A>(row + j, n);
          const V potential = f_i + load_first<A>(last_g_ + j, n);
          const V gap = fma(V(-sign), load_first<A>(C + j, n), potential);
          sum = fma(d, weft::finite(gap), sum);
          store_first(d * back, row + j, n);
        });
        parts[size_t(k)] += double(reduce_sum(sum));
        T* to = grad_cost + i * c.M;
        if constexpr (!std::is_same_v<T, A>) convert(row, to, c.m);
        std::fill(to + c.m, to + c.M, T(0));
      }
    });
    std::fill(grad_cost + c.n * c.M, grad_cost + c.N * c.M, T(0));
    for (const double part : parts) scalar_ += part;
    for (int64_t l = 0; l < 3; ++l)
      if (std::isfinite(c.border[l])) scalar_ -= border[l] * double(c.border[l]);
    scalar = scalar_;
  }

  // Σ_t Σ_j u_j q_ij and Σ_t δ_j
  const Doubles& row_sums() const { return row_sums_; }
  const Doubles& column_sums() const { return column_sums_; }

 private:
  static constexpr double kLeastFactor = 1e-26, kLargestFactor = 1e8;
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();

  static A finite(A potential) { return std::isinf(potential) ? A(0) : potential; }

  A* factors(int n) const { return column_factors_ + n * width_; }
  A* H() const { return factors(0); }  // max(g^{t-1}, G)
  A* P() const { return factors(1); }  // p_ij = P_j E_ij
  A* U() const { return factors(2); }  // u_j q_ij = a_i e^((f_i − F_i) / ε) U_j E_ij
  A* u() const { return factors(3); }
  A* G() const { return factors(4); }

  // The factors of columns in iteration t.
  void prepare(int64_t t, const Doubles& delta) {
    const A *g = history_.g(t), *before = history_.g(t - 1), *lambda = history_.column_damping();
    const V none(-kInfinity), zero(A(0)), inverse(p_.inverse);
    for (int64_t j = 0; j < p_.columns; ++j) {
      const double weighted = double(lambda[j]) * delta[size_t(j)];
      u()[j] = g[j] == -kInfinity ? A(0) : A(weighted);
      if (g[j] != -kInfinity) scalar_ += weighted * (double(g[j]) - double(finite(last_g_[j])));
    }
    for_vectors<A>(p_.columns, [&](int64_t j, int64_t n) {
      const V old = load_first<A>(before + j, n), b = load_first<A>(p_.b + j, n);
      const V now = load_first<A>(g + j, n) / load_first<A>(lambda + j, n);
      const V most = select(b == zero, now, maximum(old, now));
      const V of_p = select((old == none) | (b == zero), zero, b * exp((old - most) * inverse));
      const V of_q = select(now == none, zero, exp((now - most) * inverse));
      store_first(now, G() + j, n), store_first(most, H() + j, n);
      store_first(of_p, P() + j, n), store_first(of_q * load_first<A>(u() + j, n), U() + j, n);
    });
  }

  // Row i of block k in iteration t.
  void back(int64_t t, int64_t k, int64_t i, double gamma) {
    static thread_local Scratch buffers;
    A* buffer = buffers.get<A>(4 * width_);
    A *E = buffer + width_, *Q = E + width_, *d = Q + width_, *sums = sums_ + 2 * k * width_;
    const double lambda = double(history_.row_damping()[i]);
    const A f = history_.f(t)[i], F = f / history_.row_damping()[i];
    if (f == -kInfinity) return;  // it has no pair
    A sign;
    const A* C = p_.costs(i, buffer, sign);
    const A factor = p_.a[i] * std::exp((f - F) * p_.inverse);
    const bool shared = shares_ && factor >= A(kLeastFactor) && factor <= A(kLargestFactor);
    const A taken = shared ? make_shared(C, sign, F, E) * factor
                           : make_both(C, sign, f, F, history_.log_a()[i], t, E, Q);
    const double of_row = gamma - double(taken), v = lambda * of_row;
    row_sums_[size_t(i)] += double(taken);
    double* scalars = block_scalars_.data() + 4 * k;
    const A last_f = last_f_[i];
    scalars[0] += (double(f) - double(finite(last_f))) * (double(taken) + v);
    const bool inside = i < p_.cost.n;
    const int64_t m = p_.cost.m;
    if (inside)
      d = gradient_ + i * ld_;
    else
      std::fill_n(d, m, A(0));
    const V factor_i(factor), v_i{A(v)};
    // ∂C, and the column sums of v_i E or, where P does not serve, of v_i p.
    const auto add = [&](int64_t j, int64_t n, A* to) {
      const V e = load_first<A>(E + j, n);
      V sum;
      if (shared)
        sum = e * fma(factor_i, load_first<A>(U() + j, n), v_i * load_first<A>(P() + j, n));
      else
        sum = fma(v_i, e, load_first<A>(Q + j, n));
      store_first(load_first<A>(to, n) + sum, to, n);
      A* column = sums + (shared ? 0 : width_) + j;
      store_first(fma(v_i, e, load_first<A>(column, n)), column, n);
    };
    if (shared)
      for_vectors<A>(m, [&](int64_t j, int64_t n) { add(j, n, d + j); });
    else
      for_vectors<A>(m, [&](int64_t j, int64_t n) { add(j, n, d + j); });
    if (!inside) {
      const double total = double(sum(d, m));
      scalars[2] += total, scalars[0] += double(finite(last_f)) * total;
      for (int64_t j = 0; j < m; ++j) scalars[0] += double(d[j]) * double(finite(last_g_[j]));
    }
    if (p_.cost.has_column) {
      A last = 0;
      add(m, 1, &last);
      scalars[inside ? 1 : 3] += double(last);
      scalars[0] += double(last) * (double(finite(last_f)) + double(finite(last_g_[m])));
    }
  }

  // E; returns Σ_j E_j U_j.
  A make_shared(const A* C, A sign, A F, A* E) const {
    V sum(A(0));
    const V F_i(F), bound(A(80));
    for_vectors<A>(p_.columns, [&](int64_t j, int64_t n) {
      const V x = p_.scaled(F_i + load_first<A>(H() + j, n), C, sign, j, n);
      const V e = exp_or_zero(min(bound, x));  // more only where both weights are 0
      store_first(e, E + j, n);
      sum = fma(e, load_first<A>(U() + j, n), sum);
    });
    return reduce_sum(sum);
  }

  // p and u q; returns Σ_j u_j q_j.
  [[gnu::noinline]] A make_both(const A* C, A sign, A f, A F, A log_a, int64_t t, A* P_i,
                                A* Q) const {
    V sum(A(0));
    const V f_i(f), F_i(F), log_i(log_a), zero(A(0)), none(-kInfinity), bound(A(80));
    const A *before = history_.g(t - 1), *log_b = history_.log_b();
    for_vectors<A>(p_.columns, [&](int64_t j, int64_t n) {
      const V old = load_first<A>(before + j, n), now = load_first<A>(G() + j, n);
      const V to_p = p_.scaled(F_i + old, C, sign, j, n) + load_first<A>(log_b + j, n);
      const V to_q = p_.scaled(f_i + now, C, sign, j, n) + log_i;
      const auto no_p = (load_first<A>(p_.b + j, n) == zero) | (old == none);
      const V p = select(no_p, zero, exp_or_zero(min(bound, to_p)));
      const auto no_q = (log_i == none) | (now == none);
      const V q = select(no_q, zero, exp_or_zero(min(bound, to_q))) * load_first<A>(u() + j, n);
      store_first(p, P_i + j, n), store_first(q, Q + j, n);
      sum += load_first<A>(Q + j, n);
    });
    return reduce_sum(sum);
  }

  // δ of the iteration before.
  void finish(int64_t t, Doubles& delta) {
    const A* before = history_.g(t - 1);
    for (int64_t j = 0; j < p_.columns; ++j) {
      double shared = 0, other = 0;
      for (int64_t k = 0; k < blocks_.count(); ++k) {
        shared += double(sums_[2 * k * width_ + j]);
        other += double(sums_[(2 * k + 1) * width_ + j]);
      }
      delta[size_t(j)] = -(double(P()[j]) * shared + other);
      column_sums_[size_t(j)] += delta[size_t(j)];
      if (before[j] != -kInfinity)
        scalar_ -= (double(before[j]) - double(finite(last_g_[j]))) * delta[size_t(j)];
    }
  }

  const Extended<T>& p_;
  RowBlocks blocks_;
  UnrolledHistory<T> history_;
  A *gradient_, *column_factors_, *sums_;
  int64_t ld_, width_;
  Doubles row_sums_, column_sums_;
  const A *last_f_, *last_g_;
  Doubles block_scalars_;  // of a block: a scalar and the border's
  double scalar_ = 0;
  bool shares_ = true;  // weights of columns allow one exponential for both
};

struct Arguments {
  const Tensor &grad_f, &grad_g;
  double rho_a, rho_b;
  int64_t iterations;
};

template <typename T>
void backward(const TransportArguments& args, const OptionalTensor& start, const Arguments& given,
              const Gradients& grads, Acc<T>* grad_start) {
  using A = Acc<T>;
  for_problems(args.B, args.N * args.M, [&](int64_t index) {
    static thread_local Scratch vectors, matrix, first;
    const Extended<T> p(args, index, vectors);
    A* g0 = nullptr;
    if (start) p.of_columns(args.view<A>(*start), index, g0 = first.get<A>(p.columns));
    T* grad_cost = grads.cost_of<T>(index);
    A* gradient;
    int64_t ld = p.cost.m;
    if constexpr (std::is_same_v<T, A>)
      gradient = grad_cost, ld = p.cost.M;
    else
      gradient = matrix.get<A>(p.cost.n * ld);
    Unrolled<T> loop(p, given.rho_a, given.rho_b, given.iterations, g0, gradient, ld);
    std::vector<double> gamma(size_t(p.rows)), delta(size_t(p.columns));
    p.of_rows(args.view<A>(given.grad_f), index, gamma.data());
    p.of_columns(args.view<A>(given.grad_g), index, delta.data());
    loop.run(given.iterations, gamma, delta);
    const double epsilon = double(p.cost.epsilon);
    double border[3] = {0, 0, 0}, scalar = 0;
    loop.results(grad_cost, border, scalar);
    grads.set_scalars<A>(index, scalar / epsilon, border);
    for (int64_t i = 0; i < p.rows; ++i)
      gamma[size_t(i)] = p.a[i] == 0 ? 0 : -epsilon * loop.row_sums()[size_t(i)] / double(p.a[i]);
    p.to_rows(gamma.data(), mutable_data<A>(grads.a), index);
    p.to_columns(delta.data(), grad_start, index);
    for (int64_t j = 0; j < p.columns; ++j)
      delta[size_t(j)] = p.b[j] == 0 ? 0 : epsilon * loop.column_sums()[size_t(j)] / double(p.b[j]);
    p.to_columns(delta.data(), mutable_data<A>(grads.b), index);
  });
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six sinkhorn_unrolled_backward(const Tensor& cost, const Tensor& a, const Tensor& b,
                               const Tensor& epsilon, const OptionalTensor& mask,
                               const OptionalTensor& rows, const OptionalTensor& columns,
                               const OptionalTensor& border, bool similarity,
                               const OptionalTensor& start, const Tensor& grad_f,
                               const Tensor& grad_g, double rho_a, double rho_b,
                               int64_t max_iterations) {
  const TransportArguments args(cost, a, b, epsilon, mask, rows, columns, border, similarity);
  if (start) args.check_columns(*start, "start");
  args.check_rows(grad_f, "grad_f"), args.check_columns(grad_g, "grad_g");
  STD_TORCH_CHECK(args.has_row || args.has_column || std::isinf(rho_a) || std::isinf(rho_b),
                  "sinkhorn_unrolled_backward: two penalties without a dustbin are translated");
  const Gradients grads(args, border.has_value());
  Tensor grad_start = torch::stable::new_empty(b, {args.B, args.all_columns()});
  with_float(cost, [&](auto type) {
    using T = decltype(type);
    backward<T>(args, start, {grad_f, grad_g, rho_a, rho_b, max_iterations}, grads,
                mutable_data<Acc<T>>(grad_start));
  });
  return {grads.cost, grads.a, grads.b, grads.epsilon, grads.border, grad_start};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("sinkhorn_unrolled_backward(" WEFT_TRANSPORT_SCHEMA
        ", Tensor? start, Tensor grad_f, Tensor grad_g, float rho_a, float rho_b, "
        "int max_iterations) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("sinkhorn_unrolled_backward", TORCH_BOX(&sinkhorn_unrolled_backward));
}

}  // namespace weft
