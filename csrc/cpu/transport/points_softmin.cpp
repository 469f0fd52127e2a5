// Soft minima over points, −ε log Σ_j w_j e^((g_j − c_ij) / ε): tiles of costs, and for each row
// the largest g_j − c_ij so far and the sum relative to it.
#include <cmath>
#include <limits>

#include "common/math.h"
#include "cpu/transport/points.h"

namespace weft {
namespace {

// Σ_j w_j e^((v_j − largest) / ε), v = g − c.
template <typename T>
struct Running {
  T largest = -std::numeric_limits<T>::infinity();
  T sum = 0;

  // c is a tile's row, and becomes v; beyond the columns g is −∞ and w 0.
  void add(T* c, const T* g, const T* w, int64_t count, T inverse) {
    constexpr int64_t W = Vec<T>::size;
    Vec<T> most(-std::numeric_limits<T>::infinity());
    for (int64_t j = 0; j < count; j += W) {
      const Vec<T> v = Vec<T>::load(g + j) - Vec<T>::load(c + j);
      v.store(c + j);
      most = max(v, most);
    }
    const T now = std::max(largest, reduce_max(most));
    if (now == -std::numeric_limits<T>::infinity()) return;
    const Vec<T> offset(now), scale(inverse);
    Vec<T> part[2];
    int64_t j = 0;
    for (; j + W < count; j += 2 * W)
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k)
        part[k] = fma(Vec<T>::load(w + j + k * W),
                      exp_or_zero((Vec<T>::load(c + j + k * W) - offset) * scale), part[k]);
    if (j < count)
      part[0] =
          fma(Vec<T>::load(w + j), exp_or_zero((Vec<T>::load(c + j) - offset) * scale), part[0]);
    sum = sum * std::exp((largest - now) * inverse) + reduce_sum(part[0] + part[1]);
    largest = now;
  }
};

Tensor points_softmin(const Tensor& x, const Tensor& y, const Tensor& epsilon,
                      const OptionalTensor& rows, const OptionalTensor& columns, std::string cost,
                      std::string, const Tensor& g, const Tensor& weight) {
  const PointArguments arguments(x, y, epsilon, rows, columns, cost);
  const int64_t N = arguments.N, M = arguments.M;
  const Tensor potentials = arguments.like(g, M, "g"),
               weights = arguments.like(weight, M, "weight");
  Tensor out = torch::stable::new_empty(x, {arguments.B, N});
  with_wide(x, [&](auto type) {
    using T = decltype(type);
    using Tiles = PointTiles<T>;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    T* to = mutable_data<T>(out);
    std::fill_n(to, arguments.B * N, infinity);
    auto problems = arguments.problems<T>(false);
    std::vector<int64_t> real;
    for (const auto& p : problems) real.push_back(p.columns());
    const auto w = padded(data<T>(weights), arguments.B, M, real, T(0));
    auto v = padded(data<T>(potentials), arguments.B, M, real, -infinity);
    for (size_t j = 0; j < v.size(); ++j)
      if (w[j] == 0) v[j] = -infinity;  // what has no weight is not looked at
    const int64_t room = round_up(M, Tiles::kColumns);
    for_each_rows(problems, Tiles::kRows * Tiles::kColumns,
                  [&](const Tiles& p, int64_t b, const typename Tiles::Rows& block, T* tile) {
                    Running<T> running[Tiles::kRows];
                    const T inverse = T(1) / p.epsilon;
                    for (int64_t j = 0; j < p.columns(); j += Tiles::kColumns) {
                      const int64_t m = std::min(Tiles::kColumns, p.columns() - j);
                      p.costs(block, j, m, tile);
                      for (int64_t r = 0; r < block.count; ++r)
                        running[r].add(tile + r * Tiles::kColumns, v.data() + b * room + j,
                                       w.data() + b * room + j, m, inverse);
                    }
                    for (int64_t r = 0; r < block.count; ++r) {
                      const auto [largest, sum] = running[r];
                      to[b * N + block.first + r] =
                          sum == 0 ? infinity : -p.epsilon * std::log(sum) - largest;
                    }
                  });
  });
  return out;
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("points_softmin(" WEFT_POINTS_SCHEMA ", Tensor g, Tensor weight) -> Tensor");
}
WEFT_CPU_KERNELS(m) { m.impl("points_softmin", TORCH_BOX(&points_softmin)); }

}  // namespace weft
