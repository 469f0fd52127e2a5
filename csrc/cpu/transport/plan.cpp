// The plan of potentials, P_ij = a_i b_j e_ij with e_ij = e^((f_i + g_j − C_ij) / ε), or its
// logarithm; its gradients; and those of the dual objective (weft/reference/transport/gradients.py
// has the formulas). Each is one pass over the costs with one exponential per entry.
#include "cpu/transport/rows.h"

namespace weft {
namespace {

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// log w; −∞ of what is not positive.
template <typename A>
void log_weights(const A* weights, int64_t n, A* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = weights[i] != 0 ? std::log(weights[i]) : -std::numeric_limits<A>::infinity();
}

template <typename T, bool log>
void plan(const TransportArguments& args, const Tensor& f, const Tensor& g, T* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  for_problems(args.B, args.N * args.M, [&](int64_t index) {
    static thread_local Scratch vectors, logs;
    const Extended<T> p(args, index, f, g, vectors);
    const CostMatrix<T>& c = p.cost;
    const A *a = p.a, *b = p.b;
    if constexpr (log) {
      A* of_a = logs.get<A>(p.rows + p.columns);
      log_weights(p.a, p.rows, of_a), log_weights(p.b, p.columns, of_a + p.rows);
      a = of_a, b = of_a + p.rows;
    }
    const int64_t width = args.all_columns();
    const T hidden = log ? T(-kInfinity<A>) : T(0);
    T* P = out + index * args.all_rows() * width;
    RowBlocks(p.rows).run([&](int64_t, int64_t first, int64_t last) {
      static thread_local Scratch buffers;
      A* buffer = buffers.get<A>(2 * p.columns);
      for (int64_t i = first; i < last; ++i) {
        A sign;
        const A* C = p.costs(i, buffer, sign);
        T* row = P + c.row_at(i) * width;
        A* to = buffer + p.columns;
        bool direct = false;
        if constexpr (std::is_same_v<T, A>)
          if (p.columns == width) to = row, direct = true;
        const V f_i(p.f[i]), a_i(a[i]);
        for_vectors<A>(p.columns, [&](int64_t j, int64_t n) {
          const V x = p.exponent(f_i, C, sign, j, n), b_j = load_first<A>(b + j, n);
          if constexpr (log) {
            const V total = (a_i + b_j) + x;
            const V value = select(is_nan(total) & (x == x), V(-kInfinity<A>), total);
            store_first(value, to + j, n);
          } else {
            store_first(a_i * (b_j * ratio(x, a_i, b_j)), to + j, n);
          }
        });
        if (direct) continue;
        convert(to, row, c.m);
        std::fill(row + c.m, row + c.M, hidden);
        if (c.has_column) row[c.M] = T(to[c.m]);
      }
    });
    std::fill(P + c.n * width, P + c.N * width, hidden);
  });
}

// A gradient of P, (B, N', M') with any strides.
template <typename T>
struct PlanGradient {
  using A = Acc<T>;
  const T* data;
  int64_t batch_stride, row_stride, col_stride;

  const A* row(const CostMatrix<T>& c, int64_t index, int64_t i, A* buffer) const {
    const T* from = data + index * batch_stride + c.row_at(i) * row_stride;
    if (col_stride == 1) {
      if constexpr (std::is_same_v<T, A>)
        if (!c.has_column || c.m == c.M) return from;
      convert(from, buffer, c.m);
    } else {
      for (int64_t j = 0; j < c.m; ++j) buffer[j] = A(from[j * col_stride]);
    }
    if (c.has_column) buffer[c.m] = A(from[c.M * col_stride]);
    return buffer;
  }
};

template <typename T, bool log>
void plan_backward(const TransportArguments& args, const Tensor& f, const Tensor& g,
                   const PlanGradient<T>& grad, const Gradients& grads, Acc<T>* grad_f,
                   Acc<T>* grad_g) {
  using A = Acc<T>;
  using V = Vec<A>;
  for_problems(args.B, args.N * args.M, [&](int64_t index) {
    static thread_local Scratch vectors;
    const Extended<T> p(args, index, f, g, vectors);
    PassSums sums;
    pass(p, grads.cost_of<T>(index), sums, [&](int64_t i) {
      static thread_local Scratch buffers;
      const A* G = grad.row(p.cost, index, i, buffers.get<A>(p.columns));
      const V a_i(p.a[i]), zero(A(0)), back(-p.inverse);
      return [=](V x, int64_t j, int64_t n) {
        const V b_j = load_first<A>(p.b + j, n), G_j = load_first<A>(G + j, n);
        if constexpr (log) {
          const auto some = (abs(x) < V(kInfinity<A>)) & ~(a_i == zero) & ~(b_j == zero);
          const V w = select(some, G_j, zero);
          return Terms<A>{w * back, w, w, select(some, w * x, zero)};
        } else {
          const auto none = (G_j == zero) | (x == V(-kInfinity<A>));
          const V plain = select(none, zero, G_j * ratio(x, a_i, b_j));
          const V to_a = plain * b_j, w = to_a * a_i;
          return Terms<A>{w * back, to_a, plain * a_i, w * finite(x)};
        }
      };
    });
    // Sums of weights in the matrix, and those of its rows without their own weight, or back.
    const double inverse = 1.0 / double(p.cost.epsilon);
    const auto finish = [&](std::vector<double>& of_weight, const A* weights, A* of_potential) {
      for (size_t i = 0; i < of_weight.size(); ++i) {
        const double w = double(weights[i]), sum = of_weight[i];
        of_potential[i] = A(log ? sum * inverse : w * sum * inverse);
        if (log && w != 0) of_weight[i] = sum / w;
      }
    };
    finish(sums.rows, p.a, p.f), finish(sums.columns, p.b, p.g);
    p.to_rows(sums.rows.data(), mutable_data<A>(grads.a), index);
    p.to_columns(sums.columns.data(), mutable_data<A>(grads.b), index);
    p.to_rows(p.f, grad_f, index), p.to_columns(p.g, grad_g, index);
    grads.set_scalars<A>(index, -sums.scalar * inverse, sums.border);
  });
}

// φ(p) = ρ (1 − e^(−p / ρ)), or p of a constraint.
double penalty(double potential, double rho) {
  return std::isinf(rho) ? potential : -rho * std::expm1(-potential / rho);
}

// Σ w φ(p), nothing of what has no weight or no potential.
template <typename A>
double penalties(const A* weights, const A* potentials, int64_t count, double rho, bool border) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double strength = border && i + 1 == count ? double(INFINITY) : rho;
    const double value = penalty(double(potentials[i]), strength);
    if (weights[i] != 0 && !std::isinf(value)) sum += double(weights[i]) * value;
  }
  return sum;
}

// Σ a φ_a(f) + Σ b φ_b(g) + ε (Σ a Σ b − Σ b ψ) with ψ = φ_b'(g), the ratios of the columns.
template <typename T>
void value(const TransportArguments& args, const Tensor& f, const Tensor& g, double rho_a,
           double rho_b, Acc<T>* out) {
  using A = Acc<T>;
  for_problems(args.B, args.N + args.M, [&](int64_t index) {
    static thread_local Scratch vectors;
    const Extended<T> p(args, index, f, g, vectors);
    double mass_a = 0, mass_b = 0, moved = 0;
    for (int64_t i = 0; i < p.rows; ++i) mass_a += double(p.a[i]);
    for (int64_t j = 0; j < p.columns; ++j) {
      const double b = double(p.b[j]), potential = double(p.g[j]);
      const bool exact = std::isinf(rho_b) || (p.cost.has_column && j + 1 == p.columns);
      mass_b += b;
      if (b != 0 && potential != -double(INFINITY))
        moved += exact ? b : b * std::exp(-potential / rho_b);
    }
    const double of_a = penalties(p.a, p.f, p.rows, rho_a, p.cost.has_row);
    const double of_b = penalties(p.b, p.g, p.columns, rho_b, p.cost.has_column);
    out[index] = A(of_a + of_b + double(p.cost.epsilon) * (mass_a * mass_b - moved));
  });
}

template <typename T>
void value_backward(const TransportArguments& args, const Tensor& f, const Tensor& g,
                    Vectors<Acc<T>> grad, double rho_a, double rho_b, const Gradients& grads) {
  using A = Acc<T>;
  using V = Vec<A>;
  for_problems(args.B, args.N * args.M, [&](int64_t index) {
    static thread_local Scratch vectors;
    const Extended<T> p(args, index, f, g, vectors);
    const A upstream = grad.at(index, 0);
    PassSums sums;
    pass(p, grads.cost_of<T>(index), sums, [&](int64_t i) {
      const V a_i(p.a[i]), grad_all(upstream), one(A(1));
      return [=](V x, int64_t j, int64_t n) {
        const V b_j = load_first<A>(p.b + j, n), e = ratio(x, a_i, b_j);
        const V to_a = e * b_j, P = a_i * to_a;
        return Terms<A>{grad_all * P, to_a, e * a_i, P * (finite(x) - one)};
      };
    });
    double mass_a = 0, mass_b = 0;
    for (int64_t i = 0; i < p.rows; ++i) mass_a += double(p.a[i]);
    for (int64_t j = 0; j < p.columns; ++j) mass_b += double(p.b[j]);
    const double epsilon = double(p.cost.epsilon), wide = double(upstream);
    const auto finish = [&](std::vector<double>& sum, const A* potential, double rho, bool border,
                            double mass) {
      for (size_t i = 0; i < sum.size(); ++i) {
        const double strength = border && i + 1 == sum.size() ? double(INFINITY) : rho;
        const double of_weight =
            penalty(double(potential[i]), strength) + epsilon * (mass - sum[i]);
        sum[i] = std::isinf(potential[i]) || std::isinf(of_weight) ? 0 : wide * of_weight;
      }
    };
    finish(sums.rows, p.f, rho_a, p.cost.has_row, mass_b);
    finish(sums.columns, p.g, rho_b, p.cost.has_column, mass_a);
    p.to_rows(sums.rows.data(), mutable_data<A>(grads.a), index);
    p.to_columns(sums.columns.data(), mutable_data<A>(grads.b), index);
    grads.set_scalars<A>(index, wide * (sums.scalar + mass_a * mass_b), sums.border);
  });
}

// ---- registration -------------------------------------------------------------------------------

Tensor transport_plan(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                      const OptionalTensor& mask, const OptionalTensor& rows,
                      const OptionalTensor& columns, const OptionalTensor& border, bool similarity,
                      const Tensor& f, const Tensor& g, bool log) {
  const TransportArguments args(cost, a, b, epsilon, mask, rows, columns, border, similarity);
  args.check_rows(f, "f"), args.check_columns(g, "g");
  Tensor out = torch::stable::new_empty(cost, {args.B, args.all_rows(), args.all_columns()});
  with_float(cost, [&](auto type) {
    using T = decltype(type);
    if (log)
      plan<T, true>(args, f, g, mutable_data<T>(out));
    else
      plan<T, false>(args, f, g, mutable_data<T>(out));
  });
  return out;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Seven transport_plan_backward(const Tensor& cost, const Tensor& a, const Tensor& b,
                              const Tensor& epsilon, const OptionalTensor& mask,
                              const OptionalTensor& rows, const OptionalTensor& columns,
                              const OptionalTensor& border, bool similarity, const Tensor& f,
                              const Tensor& g, const Tensor& grad, bool log) {
  const TransportArguments args(cost, a, b, epsilon, mask, rows, columns, border, similarity);
  args.check_rows(f, "f"), args.check_columns(g, "g");
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == args.B && grad.size(1) == args.all_rows() &&
                      grad.size(2) == args.all_columns() &&
                      grad.scalar_type() == cost.scalar_type(),
                  "transport_plan_backward: grad must be (B, N', M') in the dtype of cost");
  const Gradients grads(args, border.has_value());
  Tensor grad_f = torch::stable::new_empty(f, {args.B, args.all_rows()});
  Tensor grad_g = torch::stable::new_empty(g, {args.B, args.all_columns()});
  with_float(cost, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const PlanGradient<T> of_plan{data<T>(grad), grad.stride(0), grad.stride(1), grad.stride(2)};
    A *to_f = mutable_data<A>(grad_f), *to_g = mutable_data<A>(grad_g);
    if (log)
      plan_backward<T, true>(args, f, g, of_plan, grads, to_f, to_g);
    else
      plan_backward<T, false>(args, f, g, of_plan, grads, to_f, to_g);
  });
  return {grads.cost, grads.a, grads.b, grads.epsilon, grads.border, grad_f, grad_g};
}

Tensor transport_value(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                       const OptionalTensor& mask, const OptionalTensor& rows,
                       const OptionalTensor& columns, const OptionalTensor& border, bool similarity,
                       const Tensor& f, const Tensor& g, double rho_a, double rho_b) {
  const TransportArguments args(cost, a, b, epsilon, mask, rows, columns, border, similarity);
  args.check_rows(f, "f"), args.check_columns(g, "g");
  Tensor out = torch::stable::new_empty(epsilon, {args.B});
  with_float(cost, [&](auto type) {
    using T = decltype(type);
    value<T>(args, f, g, rho_a, rho_b, mutable_data<Acc<T>>(out));
  });
  return out;
}

Five transport_value_backward(const Tensor& cost, const Tensor& a, const Tensor& b,
                              const Tensor& epsilon, const OptionalTensor& mask,
                              const OptionalTensor& rows, const OptionalTensor& columns,
                              const OptionalTensor& border, bool similarity, const Tensor& f,
                              const Tensor& g, const Tensor& grad, double rho_a, double rho_b) {
  const TransportArguments args(cost, a, b, epsilon, mask, rows, columns, border, similarity);
  args.check_rows(f, "f"), args.check_columns(g, "g");
  STD_TORCH_CHECK(
      grad.dim() == 1 && grad.size(0) == args.B && grad.scalar_type() == args.wide_type(),
      "transport_value_backward: grad must be (B) in the dtype of sums");
  const Gradients grads(args, border.has_value());
  with_float(cost, [&](auto type) {
    using T = decltype(type);
    value_backward<T>(args, f, g, args.view<Acc<T>>(grad), rho_a, rho_b, grads);
  });
  return {grads.cost, grads.a, grads.b, grads.epsilon, grads.border};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("transport_plan(" WEFT_TRANSPORT_SCHEMA ", Tensor f, Tensor g, bool log) -> Tensor");
  m.def("transport_plan_backward(" WEFT_TRANSPORT_SCHEMA
        ", Tensor f, Tensor g, Tensor grad, bool log) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("transport_value(" WEFT_TRANSPORT_SCHEMA
        ", Tensor f, Tensor g, float rho_a, float rho_b) -> Tensor");
  m.def("transport_value_backward(" WEFT_TRANSPORT_SCHEMA
        ", Tensor f, Tensor g, Tensor grad, float rho_a, float rho_b) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("transport_plan", TORCH_BOX(&transport_plan));
  m.impl("transport_plan_backward", TORCH_BOX(&transport_plan_backward));
  m.impl("transport_value", TORCH_BOX(&transport_value));
  m.impl("transport_value_backward", TORCH_BOX(&transport_value_backward));
}

}  // namespace weft
