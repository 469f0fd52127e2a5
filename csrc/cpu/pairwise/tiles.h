// Tiles of s_ij for blocks of rows and columns, in cache, for whatever reduces them.
//
// Two plans. By products: a block of y is packed once and multiplied by many blocks of x; squared
// distances are ‖x'‖² + ‖y'‖² − 2⟨x', y'⟩ of points moved by the mean of y (exact for distances,
// and what keeps the digits of data far from the origin), and the pairs so close that the digits
// cancel all the same are computed again by their differences. Directly: differences in vector
// registers, with columns in the lanes; for few dimensions, and for ‖·‖₁.
#pragma once
#include <functional>
#include <vector>

#include "common/convert.h"
#include "common/gemm.h"
#include "common/reduce.h"
#include "common/scratch.h"
#include "cpu/pairwise/pairs.h"

namespace weft {

template <typename T>
class PairTiles {
 public:
  using A = Acc<T>;
  static constexpr int64_t kUnit = 64;  // columns of a tile begin at multiples of it

  Pair pair;
  Matrix<T> x, y;
  const A *row_factor, *column_factor, *bias;
  bool direct;

  PairTiles(const Pair& pair, Matrix<T> x, Matrix<T> y, const A* row_factor, const A* column_factor,
            const A* bias, bool direct);

  int64_t rows() const { return x.rows; }
  int64_t columns() const { return y.rows; }
  int64_t depth() const { return x.cols; }
  // Where coordinates are moved, they are moved by this.
  const A* center() const { return center_.empty() ? nullptr : center_.data(); }
  const std::vector<A>& x_squares() const { return x_squares_; }
  const std::vector<A>& y_squares() const { return y_squares_; }

  // Columns [first, first + count), made ready in the caller's memory.
  struct Columns {
    int64_t first, count;
    const void* memory;
  };
  int64_t columns_bytes(int64_t count) const {
    if (direct) return round_up(count, kUnit) * depth() * int64_t(sizeof(A));
    return PackedRight<T>::size(depth(), count) * int64_t(sizeof(typename PackedRight<T>::Packed));
  }
  Columns prepare(int64_t first, int64_t count, void* memory) const;

  // s[r ld + c] = s of row i0 + r and column columns.first + j0 + c, j0 a multiple of kUnit; v, if
  // not null, gets the argument of f likewise.
  void values(int64_t i0, int64_t n, const Columns& c, int64_t j0, int64_t m, A* s, int64_t ld,
              A* v = nullptr) const;

  // Rows [first, first + n) of x or y, moved by the center; copied to `storage` where they are.
  Matrix<T> moved_rows(Matrix<T> points, int64_t first, int64_t n, Scratch& storage) const;

  // u of one pair by its differences.
  A exactly(int64_t i, int64_t j) const;

 private:
  // Half precision would lose digits by being moved; its products are exact, and their sums float.
  static constexpr bool moved() { return std::is_same_v<T, A>; }

  void find_center();
  std::vector<A> squares(Matrix<T> points) const;
  void products(int64_t i0, int64_t n, const Columns& c, int64_t j0, int64_t m, A* u,
                int64_t ld) const;
  void squared_distances(int64_t i, int64_t j0, int64_t m, A* u) const;
  void differences(int64_t i0, int64_t n, const Columns& c, int64_t j0, int64_t m, A* u,
                   int64_t ld) const;
  template <Base base>
  static void strip(const A* four, int64_t D, const A* columns, int64_t stride, int64_t m,
                    int64_t count, A* u, int64_t ld);
  template <Function f>
  void apply(int64_t i, int64_t j0, int64_t m, A* s, A* v) const;

  std::vector<A> center_, x_squares_, y_squares_;
};

// The columns [first, first + count), made ready by all threads in blocks of `size`.
template <typename T>
std::vector<typename PairTiles<T>::Columns> prepare_columns(const PairTiles<T>& tiles,
                                                            int64_t first, int64_t count,
                                                            int64_t size, Scratch& storage);

// Calls visit(i0, n, j0, m, s) for every tile: s (n, m) is row-major and may be overwritten. The
// tiles of a row come in the order of their columns, never two at a time, so that visit may keep
// what it knows of a row in memory.
template <typename T>
using TileVisit = std::function<void(int64_t i0, int64_t n, int64_t j0, int64_t m, Acc<T>* s)>;
template <typename T>
void for_each_tile(const PairTiles<T>& tiles, const TileVisit<T>& visit);

}  // namespace weft
