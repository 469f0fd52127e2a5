// The backward of every dense reduction of s_ij:
//
//   w_ij = ∂L/∂s_ij          from the reduction, 0 where masked
//   g_ij = w_ij f'(v_ij) = ∂L/∂v_ij,       h_ij = scale α_i β_j g_ij = ∂L/∂u_ij
//   dot:      ∂x_i = Σ_j h_ij y_j                     ∂y_j = Σ_i h_ij x_i
//   squared:  ∂x_i = 2 (x_i Σ_j h_ij − Σ_j h_ij y_j)  ∂y_j = 2 (y_j Σ_i h_ij − Σ_i h_ij x_i)
//   l1:       ∂x_i = Σ_j h_ij sign(x_i − y_j)         ∂y_j = −Σ_i h_ij sign(x_i − y_j)
//   ∂bias_j = Σ_i g_ij,   ∂α_i = Σ_j g_ij scale β_j u_ij,   ∂β_j = Σ_i g_ij scale α_i u_ij
//
// For groups of rows > of columns, as many as the buffer of H holds:
//   tiles of s, computed again, into H;   then ∂x += H Y by blocks of rows;   ∂y += Hᵀ X by
//   columns.
// Every sum is in an order that does not depend on how blocks fall to threads. A point with an
// infinity or a NaN is left out of the products, where 0 · NaN would reach rows that are masked
// from it, and is added pair by pair.
#pragma once
#include "cpu/pairwise/tiles.h"

namespace weft {

// Where gradients go, each contiguous; null where not wanted.
template <typename T>
struct PairGradients {
  T *x, *y;
  Acc<T>*row_factor, *column_factor, *bias;
};

// weights(i0, n, j0, m, s, w): w (n, m) = ∂L/∂s from s (n, m).
template <typename T>
using PairWeights =
    std::function<void(int64_t i0, int64_t n, int64_t j0, int64_t m, const Acc<T>* s, Acc<T>* w)>;

template <typename T>
class PairBackward {
 public:
  using A = Acc<T>;
  // H in bfloat16 feeds the bfloat16 product; float16 would lose small gradients: float there.
  using H = std::conditional_t<std::is_same_v<T, half>, float, T>;

  PairBackward(const PairTiles<T>& tiles, PairGradients<T> out);

  // For weights that the caller has, in place of `run`: products only, added to the sums in x and
  // y, which the caller keeps.
  PairBackward(const PairTiles<T>& tiles, A* x, A* y);
  // h: rows [i0, i0 + h.rows), all columns.
  void add_rows(int64_t i0, Matrix<H> h);

  // weights(i0, n, j0, m, s, w): w (n, m) from s (n, m).
  void run(const PairWeights<T>& weights);

 private:
  static constexpr int64_t kGroupRows = 4096, kGroupColumns = 1024, kTileRows = 64;

  // Σ_j h_ij y_j and Σ_j h_ij of every row i, or the same of columns.
  struct Side {
    A* sum = nullptr;
    std::vector<A> weight;
    Scratch storage;

    void init(T* out, int64_t n, int64_t depth) {
      if (!out) return;
      if constexpr (std::is_same_v<T, A>)
        sum = out;
      else
        sum = storage.get<A>(n * depth);
      std::fill_n(sum, n * depth, A(0));
      weight.assign(size_t(n), A(0));
    }
  };

  // H of a group, and the sums that need no products.
  void fill(const PairWeights<T>& weights, int64_t i0, int64_t rows, int64_t j0, int64_t cols,
            H* h);
  // h of m columns of row i, and their parts of the sums.
  template <Function f>
  void slopes(int64_t i, int64_t j0, int64_t m, const A* s, const A* v, const A* w, H* h, A* sums,
              int64_t stride);
  // The points with a coordinate that is not finite.
  static std::vector<int64_t> unusual(Matrix<T> points);
  // sum_i += Σ_j h_ij y_j for the rows i of h, from row `first` on, and the points y from j0 on.
  void add_products(Matrix<T> points, const std::vector<int64_t>& unusual, int64_t j0, Matrix<H> h,
                    int64_t first, A* sum);
  // sum_i += Σ_j h_ij ∂u_ij/∂x_i for the rows i of h, which are those of `own` from `first` on.
  void add_differences(Matrix<T> own, Matrix<T> points, int64_t j0, Matrix<H> h, int64_t first,
                       A* sum);
  // ∂u/∂(own coordinate) of a pair times its h, without the 2 of squares.
  Vec<A> term(Vec<A> h, Vec<A> own, Vec<A> other) const;
  // From the sums to the gradient: of squares, 2 (x Σ h − Σ h y) in moved coordinates.
  void finish(Matrix<T> points, Side& side, T* out);

  const PairTiles<T>& p_;
  PairGradients<T> out_;
  Side x_, y_;
  std::vector<int64_t> unusual_x_, unusual_y_;
};

template <typename T>
void pair_gradients(const PairTiles<T>& tiles, const PairWeights<T>& weights,
                    PairGradients<T> out) {
  PairBackward<T>(tiles, out).run(weights);
}

}  // namespace weft
