// Tiles of costs between points, c_ij = c(x_i, y_j), in cache, for whatever reduces them.
//
// Up to 8 coordinates are compared by their differences, with columns in the lanes. More go through
// products: ‖x‖² + ‖y‖² − 2⟨x, y⟩ of points near the origin, to which the caller moves them; pairs
// so close that the digits cancel all the same are computed again by their differences.
//
// One problem of the batch is one PointTiles without what lies beyond the lengths, so that a padded
// problem has the bits of the same problem without its padding.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "common/gemm.h"
#include "common/reduce.h"
#include "common/scratch.h"
#include "cpu/registration.h"

// The part that the schemas share (weft/ops/transport/points.py).
#define WEFT_POINTS_SCHEMA \
  "Tensor x, Tensor y, Tensor epsilon, Tensor? rows, Tensor? columns, str cost, str precision"

namespace weft {

using OptionalTensor = std::optional<Tensor>;

enum class PointCost { kSquared, kDistance, kDot };

// Calls f with a value of the dtype of sums.
template <typename F>
void with_wide(const Tensor& tensor, F f) {
  if (tensor.scalar_type() == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float,
                  "weft: the dtype must be float64 or float32");
  f(float{});
}

template <typename T>
class PointTiles {
 public:
  static constexpr int64_t kRows = 128, kColumns = 512;  // of a tile
  static constexpr int64_t W = Vec<T>::size;
  static constexpr int64_t kFew = 8;  // coordinates, for differences

  Matrix<T> x, y;
  PointCost cost;
  T shift;  // of −⟨x, y⟩: 1 for cosines
  T epsilon;

  int64_t rows() const { return x.rows; }
  int64_t columns() const { return y.rows; }
  int64_t depth() const { return x.cols; }
  bool direct() const { return cost != PointCost::kDot && depth() <= kFew; }

  // Elements that the columns take, made ready by `prepare` in blocks of kColumns.
  int64_t memory_size() const { return round_up(columns(), kColumns) * (depth() + 1); }
  void use(T* memory) { memory_ = memory; }
  void prepare(int64_t first_column) const;

  // Rows [first, first + count), made ready for many tiles.
  struct Rows {
    int64_t first, count;
    const T* coordinates;               // (count up to a multiple of 4, D), for differences
    std::optional<PackedLeft<T>> left;  // for products
    const T* squares;
  };
  Rows prepare_rows(int64_t first, int64_t count, Scratch& storage) const;

  // Where points are compared by differences: coordinate d of column first + j at [d * kColumns +
  // j].
  const T* coordinates(int64_t first) const { return memory_ + first * depth(); }

  // c of these rows and columns [first_column, + count): out[r * kColumns + j]. Lanes of a row's
  // last vector beyond the columns are finite.
  void costs(const Rows& rows, int64_t first_column, int64_t count, T* out) const;

 private:
  T* squares() const { return memory_ + round_up(columns(), kColumns) * depth(); }
  void differences(const Rows& rows, int64_t first_column, int64_t count, T* out) const;
  void from_product(const Rows& rows, int64_t r, int64_t first_column, int64_t count, T* u) const;
  T exactly(int64_t i, int64_t j) const;

  T* memory_ = nullptr;
};

// The checked arguments of an op on points.
class PointArguments {
 public:
  PointArguments(const Tensor& x, const Tensor& y, const Tensor& epsilon,
                 const OptionalTensor& rows, const OptionalTensor& columns,
                 const std::string& cost);

  Tensor x, y, epsilon;
  int64_t B, N, M, D;

  // (B, count), or (B, count, E), in the dtype of x; contiguous.
  Tensor like(const Tensor& t, int64_t count, const char* name) const;

  // All problems of the batch; with `swapped` x and y have changed places.
  template <typename T>
  std::vector<PointTiles<T>> problems(bool swapped) const;

 private:
  OptionalTensor lengths(const OptionalTensor& t) const;

  OptionalTensor rows_, columns_;
  PointCost cost_;
  bool cosine_;
};

// (B, count) as the tiles read it: each problem's real entries, then `empty` up to whole tiles.
template <typename T>
std::vector<T> padded(const T* values, int64_t B, int64_t count, const std::vector<int64_t>& real,
                      T empty, int64_t stride = 1) {
  const int64_t room = round_up(count, PointTiles<T>::kColumns);
  std::vector<T> result(size_t(B * room), empty);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 0; j < real[size_t(b)]; ++j)
      result[size_t(b * room + j)] = values[(b * count + j) * stride];
  return result;
}

// Calls visit(problem, index, rows, memory) for every block of rows of every problem, the columns
// made ready; `scratch` elements of memory of its own for each call.
template <typename T, typename Visit>
void for_each_rows(std::vector<PointTiles<T>>& problems, int64_t scratch, Visit visit) {
  static thread_local Scratch storage;
  int64_t size = 0, columns = 0, blocks = 0;
  std::vector<std::pair<int64_t, int64_t>> column_tasks, row_tasks;
  for (const auto& p : problems) size += p.memory_size();
  T* memory = storage.get<T>(size);
  for (size_t b = 0; b < problems.size(); ++b) {
    auto& p = problems[b];
    p.use(memory);
    memory += p.memory_size();
    for (int64_t j = 0; j < p.columns(); j += p.kColumns) column_tasks.emplace_back(b, j);
    // Of few rows, smaller blocks: there is something for every thread.
    const int64_t step = std::min(p.kRows, std::max<int64_t>(16, round_up(p.rows() / 8, 16)));
    for (int64_t i = 0; i < p.rows(); i += step) row_tasks.emplace_back(b, i);
  }
  columns = int64_t(column_tasks.size()), blocks = int64_t(row_tasks.size());
  parallel_for(0, columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      problems[size_t(column_tasks[size_t(k)].first)].prepare(column_tasks[size_t(k)].second);
  });
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch of_rows, own;
    T* mine = own.get<T>(scratch);
    for (int64_t k = begin; k < end; ++k) {
      const auto [b, i] = row_tasks[size_t(k)];
      const auto& p = problems[size_t(b)];
      const bool last = k + 1 == blocks || row_tasks[size_t(k + 1)].first != b;
      const int64_t stop = last ? p.rows() : row_tasks[size_t(k + 1)].second;
      visit(p, b, p.prepare_rows(i, stop - i, of_rows), mine);
    }
  });
}

}  // namespace weft
