// The implicit gradient of optimal potentials. With e_ij = e^((f_i + g_j − C_ij) / ε) and the
// diagonals φ_i = (1 + ε/ρ_a) Σ_j b_j e_ij, ψ_j = (1 + ε/ρ_b) Σ_i a_i e_ij, cotangents γ, δ ask for
//
//     φ_i X_i + a_i Σ_j e_ij Y_j = γ_i        ψ_j Y_j + b_j Σ_i e_ij X_i = δ_j
//
// and ∂C_ij = e_ij (b_j X_i + a_i Y_j), ∂a_i = −ε Σ_j e_ij Y_j, ∂b_j = −ε Σ_i e_ij X_i.
//
// The e are computed once, where ∂C will be or, of half precision and of a dustbin, in scratch
// memory. Without the X, and with Y_j = δ_j / ψ_j + b_j y_j, the system is symmetric and, since the
// diagonals are the sums of these very e, not negative:
//
//     b_j ψ_j y_j − b_j Σ_i e_ij (a_i / φ_i) Σ_k e_ik b_k y_k
//         = b_j Σ_i e_ij (a_i Σ_k e_ik δ_k / ψ_k − γ_i) / φ_i
//
// Conjugate gradients with the diagonal as preconditioner solve it; each step reads every e once.
// Nothing divides by a weight, and a small one makes no large residual. Vectors are double.
#include "cpu/transport/rows.h"

namespace weft {
namespace {

using Doubles = std::vector<double>;

// y_r = Σ_j e_rj v_j of R rows
template <int R, typename A>
void row_products(const A* e, int64_t ld, int64_t n, const A* v, A* y) {
  Vec<A> sums[R];
  for_vectors<A>(n, [&](int64_t j, int64_t count) {
    const Vec<A> v_j = load_first<A>(v + j, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = fma(load_first<A>(e + r * ld + j, count), v_j, sums[r]);
  });
  for (int r = 0; r < R; ++r) y[r] = reduce_sum(sums[r]);
}

// out_j += Σ_r w_r e_rj of R rows
template <int R, typename A>
void add_rows(const A* e, int64_t ld, int64_t n, const A* w, A* out) {
  for_vectors<A>(n, [&](int64_t j, int64_t count) {
    Vec<A> sum = load_first<A>(out + j, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum = fma(load_first<A>(e + r * ld + j, count), Vec<A>(w[r]), sum);
    store_first(sum, out + j, count);
  });
}

template <typename T>
class Implicit {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  // e is a matrix (rows, columns) with row stride ld.
  Implicit(const Extended<T>& p, A* e, int64_t ld, double rho_a, double rho_b)
      : p_(p),
        e_(e),
        ld_(ld),
        rows_(p.rows),
        columns_(p.columns),
        blocks_(p.rows),
        balanced_(std::isinf(rho_a) && std::isinf(rho_b)) {
    static thread_local Scratch sums_storage, vector_storage;
    sums_ld_ = round_up(columns_, V::size);
    sums_ = sums_storage.get<A>(2 * blocks_.count() * sums_ld_);
    narrow_ = vector_storage.get<A>(sums_ld_);
    ratios(1 / damping(rho_a, p.cost.epsilon), 1 / damping(rho_b, p.cost.epsilon));
  }

  // X and Y of cotangents γ and δ.
  void solve(Doubles gamma, Doubles delta, Doubles& X, Doubles& Y) const {
    // Of a balanced problem X = a, Y = −b gives 0: what no X, Y can give, a difference of the sums
    // of γ and δ, is spread over them, and Σ X − Σ Y is chosen as in the reference.
    double mass = 0, all_mass = 0, excess = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      all_mass += double(p_.a[i]);
      if (has_row_[size_t(i)]) mass += double(p_.a[i]), excess += gamma[size_t(i)];
    }
    for (int64_t j = 0; j < columns_; ++j) {
      all_mass += double(p_.b[j]);
      if (has_column_[size_t(j)]) mass += double(p_.b[j]), excess -= delta[size_t(j)];
    }
    const bool free = balanced_ && mass > 0;
    if (free) {
      for (int64_t i = 0; i < rows_; ++i) gamma[size_t(i)] -= double(p_.a[i]) * (excess / mass);
      for (int64_t j = 0; j < columns_; ++j) delta[size_t(j)] += double(p_.b[j]) * (excess / mass);
    }
    Y.resize(size_t(columns_));
    for (size_t j = 0; j < Y.size(); ++j) Y[j] = delta[j] / psi_[j];
    Doubles right, y(Y.size(), 0.0);
    through_rows(Y, gamma.data(), right);
    for (size_t j = 0; j < Y.size(); ++j) right[j] *= double(p_.b[j]);
    conjugate_gradients(right, y);
    for (size_t j = 0; j < Y.size(); ++j) Y[j] += double(p_.b[j]) * y[j];
    X.resize(size_t(rows_));
    narrow(Y);
    blocks_.run([&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        A product;
        row_products<1>(e_ + i * ld_, ld_, columns_, narrow_, &product);
        X[size_t(i)] = (gamma[size_t(i)] - double(p_.a[i]) * double(product)) / phi_[size_t(i)];
      }
    });
    if (!free) return;
    double shift = excess / mass * all_mass;
    for (const double x : X) shift -= x;
    for (const double v : Y) shift += v;
    for (size_t i = 0; i < X.size(); ++i)
      if (has_row_[i]) X[i] += double(p_.a[i]) * (shift / mass);
    for (size_t j = 0; j < Y.size(); ++j)
      if (has_column_[j]) Y[j] -= double(p_.b[j]) * (shift / mass);
  }

  const A* row(int64_t i) const { return e_ + i * ld_; }

 private:
  // e, φ, ψ and the diagonal of the system.
  void ratios(double damped_a, double damped_b) {
    phi_.resize(size_t(rows_)), psi_.assign(size_t(columns_), 0.0);
    diagonal_.assign(size_t(columns_), 0.0);
    has_row_.resize(size_t(rows_)), has_column_.resize(size_t(columns_));
    blocks_.run([&](int64_t k, int64_t first, int64_t last) {
      static thread_local Scratch buffers;
      A* buffer = buffers.get<A>(columns_);
      A *sum = sums_ + 2 * k * sums_ld_, *squares = sum + sums_ld_;
      std::fill_n(sum, 2 * sums_ld_, A(0));
      for (int64_t i = first; i < last; ++i) {
        A sign, *e = e_ + i * ld_;
        const A* C = p_.costs(i, buffer, sign);
        const V f_i(p_.f[i]), a_i(p_.a[i]);
        V total(A(0));
        for_vectors<A>(columns_, [&](int64_t j, int64_t n) {
          const V b_j = load_first<A>(p_.b + j, n);
          const V e_j = ratio(p_.exponent(f_i, C, sign, j, n), a_i, b_j);
          store_first(e_j, e + j, n);
          total = fma(load_first<A>(e + j, n), b_j, total);
          store_first(fma(a_i, e_j, load_first<A>(sum + j, n)), sum + j, n);
        });
        const double phi = double(reduce_sum(total));
        const double damped = p_.cost.has_row && i + 1 == rows_ ? 1.0 : damped_a;
        has_row_[size_t(i)] = phi != 0, phi_[size_t(i)] = phi == 0 ? 1.0 : damped * phi;
        const V share(A(double(p_.a[i]) / phi_[size_t(i)]));
        for_vectors<A>(columns_, [&](int64_t j, int64_t n) {
          const V e_j = load_first<A>(e + j, n);
          store_first(fma(e_j * share, e_j, load_first<A>(squares + j, n)), squares + j, n);
        });
      }
    });
    add_blocks(2, 0, psi_), add_blocks(2, 1, diagonal_);
    for (size_t j = 0; j < psi_.size(); ++j) {
      const bool exact = p_.cost.has_column && j + 1 == psi_.size();
      has_column_[j] = psi_[j] != 0;
      psi_[j] = psi_[j] == 0 ? 1.0 : psi_[j] * (exact ? 1.0 : damped_b);
      const double b = double(p_.b[j]), whole = b * psi_[j];
      // Not less than what rounding may leave of a difference.
      constexpr double least = 64 * double(std::numeric_limits<A>::epsilon());
      diagonal_[j] = std::max(whole - b * b * diagonal_[j], least * whole);
    }
  }

  void add_blocks(int64_t parts, int64_t part, Doubles& out) const {
    for (int64_t k = 0; k < blocks_.count(); ++k) {
      const A* sum = sums_ + (parts * k + part) * sums_ld_;
      for (size_t j = 0; j < out.size(); ++j) out[j] += double(sum[j]);
    }
  }

  void narrow(const Doubles& v) const {
    for (size_t j = 0; j < v.size(); ++j) narrow_[j] = A(v[j]);
  }

  // out_j = Σ_i e_ij (a_i Σ_k e_ik v_k − γ_i) / φ_i; without γ if that is null.
  void through_rows(const Doubles& v, const double* gamma, Doubles& out) const {
    narrow(v);
    blocks_.run([&](int64_t k, int64_t first, int64_t last) {
      A* sum = sums_ + k * sums_ld_;
      std::fill_n(sum, sums_ld_, A(0));
      A w[4];
      const auto weigh = [&](int64_t i, int count) {
        for (int r = 0; r < count; ++r) {
          const double product = double(p_.a[i + r]) * double(w[r]);
          w[r] = A((gamma ? product - gamma[i + r] : product) / phi_[size_t(i + r)]);
        }
      };
      int64_t i = first;
      for (; i + 4 <= last; i += 4) {
        row_products<4>(e_ + i * ld_, ld_, columns_, narrow_, w);
        weigh(i, 4);
        add_rows<4>(e_ + i * ld_, ld_, columns_, w, sum);
      }
      for (; i < last; ++i) {
        row_products<1>(e_ + i * ld_, ld_, columns_, narrow_, w);
        weigh(i, 1);
        add_rows<1>(e_ + i * ld_, ld_, columns_, w, sum);
      }
    });
    out.assign(size_t(columns_), 0.0);
    add_blocks(1, 0, out);
  }

  // Until the residual is small or, for kPatience steps, not smaller; the best y is kept. Rounding
  // gives a balanced system's residual a part outside of what y can change, which would grow: it is
  // taken out.
  void conjugate_gradients(Doubles& r, Doubles& y) const {
    constexpr int64_t kPatience = 30;
    constexpr double tolerance = std::is_same_v<A, double> ? 1e-15 : 1e-8;
    const size_t count = r.size();
    Doubles step(count, 0.0), weighted(count, 0.0), product(count), now_y(y);
    double trace = 0;
    for (const double d : diagonal_) trace += d;
    const auto norm = [&] {
      double outside = 0, sum = 0;
      for (const double v : r) outside += v;
      const double share = balanced_ && trace > 0 ? outside / trace : 0;
      for (size_t j = 0; j < count; ++j) {
        if (p_.b[j] == 0) continue;
        r[j] -= share * diagonal_[j];
        sum += r[j] * r[j] / diagonal_[j];
      }
      return sum;
    };
    double now = norm(), best = now, ratio = 0;
    if (!(now < INFINITY)) y.assign(count, NAN);
    const double enough = now * tolerance * tolerance;
    const int64_t most = 50 + 4 * std::min(rows_, columns_);
    int64_t best_at = 0;
    for (int64_t n = 0; n < most && now > enough && n - best_at < kPatience; ++n) {
      for (size_t j = 0; j < count; ++j) {
        if (p_.b[j] == 0) continue;
        step[j] = r[j] / diagonal_[j] + ratio * step[j];
        weighted[j] = double(p_.b[j]) * step[j];
      }
      through_rows(weighted, nullptr, product);
      double curvature = 0;
      for (size_t j = 0; j < count; ++j) {
        product[j] = double(p_.b[j]) * (psi_[j] * step[j] - product[j]);
        curvature += step[j] * product[j];
      }
      if (!(curvature > 0)) break;
      const double length = now / curvature;
      for (size_t j = 0; j < count; ++j) now_y[j] += length * step[j], r[j] -= length * product[j];
      const double next = norm();
      ratio = next / now, now = next;
      if (now < best) best = now, best_at = n, y = now_y;
    }
  }

  const Extended<T>& p_;
  A* e_;
  int64_t ld_, rows_, columns_;
  RowBlocks blocks_;
  bool balanced_;
  A *sums_, *narrow_;
  int64_t sums_ld_;
  Doubles phi_, psi_, diagonal_;
  std::vector<char> has_row_, has_column_;  // a pair
};

template <typename T>
void backward(const TransportArguments& args, const Tensor& f, const Tensor& g,
              const Tensor& grad_f, const Tensor& grad_g, double rho_a, double rho_b,
              const Gradients& grads) {
  using A = Acc<T>;
  using V = Vec<A>;
  for_problems(args.B, args.N * args.M, [&](int64_t index) {
    static thread_local Scratch vectors, matrix, solution;
    const Extended<T> p(args, index, f, g, vectors);
    T* grad_cost = grads.cost_of<T>(index);
    A* e = nullptr;
    int64_t ld = p.columns;
    if constexpr (std::is_same_v<T, A>)
      if (!p.cost.has_row && !p.cost.has_column) e = grad_cost, ld = p.cost.M;
    if (!e) e = matrix.get<A>(p.rows * ld);
    const Implicit<T> system(p, e, ld, rho_a, rho_b);
    Doubles gamma(size_t(p.rows)), delta(size_t(p.columns)), X, Y;
    p.of_rows(args.view<A>(grad_f), index, gamma.data());
    p.of_columns(args.view<A>(grad_g), index, delta.data());
    system.solve(std::move(gamma), std::move(delta), X, Y);
    A* y = solution.get<A>(p.columns);
    for (int64_t j = 0; j < p.columns; ++j) y[j] = A(Y[size_t(j)]);
    PassSums sums;
    pass(p, grad_cost, sums, [&](int64_t i) {
      const A* row = system.row(i);
      const V a_i(p.a[i]), x_i{A(X[size_t(i)])};
      return [=](V x, int64_t j, int64_t n) {
        const V e_j = load_first<A>(row + j, n), y_j = load_first<A>(y + j, n);
        const V both = e_j * fma(load_first<A>(p.b + j, n), x_i, a_i * y_j);
        return Terms<A>{both, e_j * y_j, e_j * x_i, both * finite(x)};
      };
    });
    for (double& sum : sums.rows) sum *= -double(p.cost.epsilon);
    for (double& sum : sums.columns) sum *= -double(p.cost.epsilon);
    p.to_rows(sums.rows.data(), mutable_data<A>(grads.a), index);
    p.to_columns(sums.columns.data(), mutable_data<A>(grads.b), index);
    grads.set_scalars<A>(index, sums.scalar, sums.border);
  });
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five sinkhorn_backward(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                       const OptionalTensor& mask, const OptionalTensor& rows,
                       const OptionalTensor& columns, const OptionalTensor& border, bool similarity,
                       const Tensor& f, const Tensor& g, const Tensor& grad_f, const Tensor& grad_g,
                       double rho_a, double rho_b) {
  const TransportArguments args(cost, a, b, epsilon, mask, rows, columns, border, similarity);
  args.check_rows(f, "f"), args.check_columns(g, "g");
  args.check_rows(grad_f, "grad_f"), args.check_columns(grad_g, "grad_g");
  const Gradients grads(args, border.has_value());
  with_float(cost, [&](auto type) {
    backward<decltype(type)>(args, f, g, grad_f, grad_g, rho_a, rho_b, grads);
  });
  return {grads.cost, grads.a, grads.b, grads.epsilon, grads.border};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("sinkhorn_backward(" WEFT_TRANSPORT_SCHEMA
        ", Tensor f, Tensor g, Tensor grad_f, Tensor grad_g, float rho_a, float rho_b) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) { m.impl("sinkhorn_backward", TORCH_BOX(&sinkhorn_backward)); }

}  // namespace weft
