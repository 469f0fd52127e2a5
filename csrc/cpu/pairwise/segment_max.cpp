// Maxima over segments of rows:  v_slm = ⟨x_sl, y_m⟩ or −‖x_sl − y_m‖²,
//                                indices_sm = the first l < length_s with the largest v,
//                                values_sm = v there; −∞ and −1 for an empty segment.
// Backward:  ∂x_sl += g y_m or −2 g (x − y_m) with l = indices_sm,   ∂y_m += g x or 2 g (x − y_m).
//
// Forward: tasks are segments × blocks of rows of y, packed once. 256 rows of a segment at a time
// are multiplied by the block, as they lie in memory where the product takes them so, and the tile
// is reduced with m in vector lanes, the row numbers beside the maxima. Distances are of
// coordinates moved by the mean of y; what is within the rounding error of the best is compared
// again in double, from differences, and so are the values: no digit is lost.
//
// Backward: ∂x by segments, ∂y by blocks of m over all segments. A value gives its gradient to one
// row of each, so no sum depends on the number of threads.
#include "cpu/pairwise/exact.h"
#include "cpu/pairwise/tiles.h"

namespace weft {
namespace {

constexpr int64_t kRows = 256, kColumns = 256, kGradientColumns = 64;

// Segment s is x[s, :length_s] of (S, L, D), or x[offset_s : offset_{s+1}] of (T, D).
template <typename T>
struct Segments {
  const T* data;
  int64_t count, longest, segment_stride, row_stride, col_stride, total;
  const int64_t *lengths, *offsets;

  // What lies outside of x, where values are not checked, does not exist.
  int64_t first_row(int64_t s) const {
    return offsets ? std::clamp<int64_t>(offsets[s], 0, total) : s * longest;
  }
  int64_t length(int64_t s) const {
    if (offsets) return std::clamp<int64_t>(offsets[s + 1], first_row(s), total) - first_row(s);
    return lengths ? std::clamp<int64_t>(lengths[s], 0, longest) : longest;
  }
  Matrix<T> rows(int64_t s, int64_t D) const {
    const int64_t first = offsets ? first_row(s) * row_stride : s * segment_stride;
    return {data + first, length(s), D, row_stride, col_stride};
  }
};

// The rows of a tile (n, m) against the best of each column so far; row r has the number r0 + r. A
// NaN is larger than every number and stays; of equal values the first stays.
template <typename A>
void reduce_tile(const A* tile, int64_t n, int64_t m, int64_t ld, A* value, int64_t* row,
                 int64_t r0) {
  using V = Vec<A>;
  constexpr int64_t W = V::size;
  for (int64_t j = 0; j < m; j += W) {
    const int64_t count = std::min(W, m - j);
    V best = load_first<A>(value + j, count), number(A(-1)), now(A(0));
    for (int64_t r = 0; r < n; ++r) {
      const V v = V::load(tile + r * ld + j);
      const auto better = ~(v <= best) & (best == best);
      best = select(better, v, best);
      number = select(better, now, number);
      now += V(A(1));
    }
    alignas(64) A numbers[W], values[W];
    number.store(numbers), best.store(values);
    for (int64_t l = 0; l < count; ++l) {
      if (numbers[l] < 0) continue;
      value[j + l] = values[l];
      row[j + l] = r0 + int64_t(numbers[l]);
    }
  }
}

template <typename T>
class SegmentMax {
 public:
  using A = Acc<T>;

  SegmentMax(const Segments<T>& x, Matrix<T> y, Base base)
      : x_(x), y_(y), tiles_({base}, y, y, nullptr, nullptr, nullptr, false) {}

  void run(A* values, int64_t* indices) const {
    const int64_t M = y_.rows;
    static thread_local Scratch packed;
    const auto columns = prepare_columns(tiles_, 0, M, kColumns, packed);
    const int64_t blocks = int64_t(columns.size());
    parallel_for(0, x_.count * blocks, 1, [&](int64_t begin, int64_t end) {
      const ProductSession<T> session;
      for (int64_t task = begin; task < end; ++task) {
        const auto& c = columns[size_t(task % blocks)];
        const int64_t at = task / blocks * M + c.first;
        segment(x_.rows(task / blocks, y_.cols), c, values + at, indices + at);
      }
    });
  }

 private:
  using Columns = typename PairTiles<T>::Columns;
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();

  void segment(Matrix<T> rows, const Columns& c, A* values, int64_t* indices) const {
    static thread_local Scratch storage, moved, copied;
    static thread_local std::vector<double> exact;
    const int64_t m = c.count, D = y_.cols, ld = round_up(m, 32);
    const bool squared = tiles_.pair.base == Base::kSquared;
    std::fill_n(values, m, -kInfinity), std::fill_n(indices, m, int64_t(-1));
    if (rows.rows == 0) return;
    if (squared) exact.assign(size_t(m), -std::numeric_limits<double>::infinity());
    A* tile = storage.get<A>(std::min(kRows, rows.rows) * ld);
    const PackedRight<T> right(static_cast<const typename PackedRight<T>::Packed*>(c.memory), D, m);
    for (int64_t r0 = 0; r0 < rows.rows; r0 += kRows) {
      Matrix<T> part = rows.block(r0, 0, std::min(kRows, rows.rows - r0), D);
      const int64_t n = part.rows;
      if (squared && part.col_stride != 1) part = contiguous(part, copied);
      gemm(tiles_.moved_rows(part, 0, n, moved), right, tile, ld);
      if (!squared) {
        reduce_tile(tile, n, m, ld, values, indices, r0);
        continue;
      }
      const auto candidate = [&](int64_t r, int64_t j) {
        const double v = -exact_base<Base::kSquared>(part.at(r, 0), part.col_stride,
                                                     y_.at(c.first + j, 0), y_.col_stride, D);
        double& best = exact[size_t(j)];
        if (!(v > best || (std::isnan(v) && !std::isnan(best)))) return;
        best = v, indices[j] = r0 + r;
      };
      distances(tiles_.moved_rows(part, 0, n, moved), c, tile, ld, candidate);
    }
    if (squared)
      for (int64_t j = 0; j < m; ++j) values[j] = A(exact[size_t(j)]);
    for (int64_t j = 0; j < m; ++j)  // where all are −∞ the first is the best
      indices[j] = std::max<int64_t>(indices[j], 0);
  }

  static Matrix<T> contiguous(Matrix<T> rows, Scratch& storage) {
    T* copy = storage.get<T>(rows.rows * rows.cols);
    for (int64_t d = 0; d < rows.cols; ++d)
      for (int64_t r = 0; r < rows.rows; ++r) copy[r * rows.cols + d] = *rows.at(r, d);
    return row_major<T>(copy, rows.rows, rows.cols);
  }

  // The tile of products of the moved rows, turned into −‖x − y‖²; candidate(r, j) for what may be
  // the largest of its column, in the order of the rows.
  template <typename Candidate>
  void distances(Matrix<T> moved, const Columns& c, A* tile, int64_t ld,
                 Candidate candidate) const {
    using V = Vec<A>;
    constexpr int64_t W = V::size;
    constexpr A unit = std::numeric_limits<A>::epsilon();
    const int64_t n = moved.rows, m = c.count, D = y_.cols;
    static thread_local std::vector<A> square;
    square.resize(size_t(n));
    A most = 0;
    for (int64_t r = 0; r < n; ++r) {
      square[size_t(r)] = 0;
      if (moved.col_stride == 1)
        square[size_t(r)] = sum_of_squares(moved.at(r, 0), D);
      else
        for (int64_t d = 0; d < D; ++d)
          square[size_t(r)] += A(*moved.at(r, d)) * A(*moved.at(r, d));
      if (!(square[size_t(r)] <= most)) most = square[size_t(r)];  // keeps a NaN
    }
    for (int64_t j = 0; j < m; j += W) {
      const int64_t count = std::min(W, m - j);
      const V squares = load_first<A>(tiles_.y_squares().data() + c.first + j, count);
      V best(-kInfinity);
      for (int64_t r = 0; r < n; ++r) {
        A* at = tile + r * ld + j;
        const V v = fma(V(A(2)), V::load(at), -squares) - V(square[size_t(r)]);
        v.store(at);
        best = max(v, best);  // a NaN of the products is passed over here and found below
      }
      const V error = V(unit * A(2 * D + 16)) * (V(most) + squares) +
                      V(std::numeric_limits<A>::min() * 64 * A(D + 1));
      const V bound = best - (error + error);
      for (int64_t r = 0; r < n; ++r) {
        const V v = V::load(tile + r * ld + j);
        if (all(v < bound)) continue;
        alignas(64) A lane[W], limit[W];
        v.store(lane), bound.store(limit);
        for (int64_t l = 0; l < count; ++l)
          if (!(lane[l] < limit[l])) candidate(r, j + l);
      }
    }
  }

  const Segments<T>& x_;
  Matrix<T> y_;
  PairTiles<T> tiles_;
};

// ---- backward -----------------------------------------------------------------------------------

// A row in the type of sums, in place where it is so in memory.
template <typename T>
const Acc<T>* wide_row(const Matrix<T>& rows, int64_t i, Acc<T>* buffer) {
  if constexpr (std::is_same_v<T, Acc<T>>)
    if (rows.col_stride == 1) return rows.at(i, 0);
  for (int64_t d = 0; d < rows.cols; ++d) buffer[d] = Acc<T>(*rows.at(i, d));
  return buffer;
}

// sum += g other  or  −2 g (mine − other)
template <typename A>
void add_gradient(bool squared, A g, const A* mine, const A* other, int64_t D, A* sum) {
  if (squared)
    for (int64_t d = 0; d < D; ++d) sum[d] += -2 * g * (mine[d] - other[d]);
  else
    for (int64_t d = 0; d < D; ++d) sum[d] += g * other[d];
}

template <typename T>
void backward(const Segments<T>& x, Matrix<T> y, bool squared, const Acc<T>* grad,
              const int64_t* indices, T* grad_x, int64_t grad_rows, T* grad_y) {
  using A = Acc<T>;
  const int64_t M = y.rows, D = y.cols;
  const bool chosen = x.count * M > 0;
  if (!x.offsets && chosen) grad_rows = 0;  // each segment clears its own
  std::fill_n(grad_x, grad_rows * D, T(0));
  parallel_for(0, x.count, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch storage;
    std::vector<int64_t> start, order(static_cast<size_t>(M));
    A* sum = storage.get<A>(3 * D);
    for (int64_t s = begin; s < end && chosen; ++s) {
      const Matrix<T> rows = x.rows(s, D);
      T* out = grad_x + x.first_row(s) * D;
      if (!x.offsets) std::fill_n(out, x.longest * D, T(0));
      // The columns that chose each row, in their order.
      start.assign(size_t(rows.rows + 2), 0);
      for (int64_t m = 0; m < M; ++m)
        if (indices[s * M + m] >= 0) ++start[size_t(indices[s * M + m] + 2)];
      for (size_t l = 2; l < start.size(); ++l) start[l] += start[l - 1];
      for (int64_t m = 0; m < M; ++m)
        if (const int64_t l = indices[s * M + m]; l >= 0) order[size_t(start[size_t(l + 1)]++)] = m;
      for (int64_t l = 0; l < rows.rows; ++l) {
        if (start[size_t(l)] == start[size_t(l + 1)]) continue;
        std::fill_n(sum, D, A(0));
        const A* mine = squared ? wide_row(rows, l, sum + D) : nullptr;
        for (int64_t e = start[size_t(l)]; e < start[size_t(l + 1)]; ++e) {
          const int64_t m = order[size_t(e)];
          add_gradient(squared, grad[s * M + m], mine, wide_row(y, m, sum + 2 * D), D, sum);
        }
        convert(sum, out + l * D, D);
      }
    }
  });
  parallel_for(0, ceil_div(M, kGradientColumns), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch storage;
    A* sums = storage.get<A>((kGradientColumns + 2) * D);
    A* buffer = sums + kGradientColumns * D;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kGradientColumns, last = std::min(first + kGradientColumns, M);
      std::fill_n(sums, kGradientColumns * D, A(0));
      for (int64_t s = 0; s < x.count; ++s) {
        const Matrix<T> rows = x.rows(s, D);
        for (int64_t m = first; m < last; ++m) {
          const int64_t l = indices[s * M + m];
          if (l < 0) continue;
          const A* mine = squared ? wide_row(y, m, buffer + D) : nullptr;
          add_gradient(squared, grad[s * M + m], mine, wide_row(rows, l, buffer), D,
                       sums + (m - first) * D);
        }
      }
      convert(sums, grad_y + first * D, (last - first) * D);
    }
  });
}

// ---- registration -------------------------------------------------------------------------------

using Optional = std::optional<Tensor>;

template <typename T>
Segments<T> segments_of(const Tensor& x, const Optional& lengths, const Optional& offsets) {
  const auto integers = [](const Optional& t) { return t ? data<int64_t>(*t) : nullptr; };
  if (offsets)
    return {data<T>(x), offsets->size(0) - 1, 0, 0, x.stride(0), x.stride(1), x.size(0),
            nullptr,    integers(offsets)};
  return {data<T>(x),
          x.size(0),
          x.size(1),
          x.stride(0),
          x.stride(1),
          x.stride(2),
          x.size(0) * x.size(1),
          integers(lengths),
          nullptr};
}

bool check(const Tensor& x, const Tensor& y, const Optional& lengths, const Optional& offsets,
           const std::string& base) {
  STD_TORCH_CHECK(x.dim() == (offsets ? 2 : 3) && y.dim() == 2 &&
                      x.size(x.dim() - 1) == y.size(1) && x.scalar_type() == y.scalar_type(),
                  "segment_max: x must be (S, L, D), or (T, D) with offsets, and y (M, D)");
  const auto integers = [](const Optional& t) {
    return !t || (t->scalar_type() == ScalarType::Long && t->dim() == 1 && t->is_contiguous());
  };
  STD_TORCH_CHECK(integers(lengths) && integers(offsets) &&
                      (!lengths || lengths->size(0) == x.size(0)) &&
                      (!offsets || offsets->size(0) >= 1),
                  "segment_max: lengths must be (S,) and offsets (S + 1,), contiguous int64");
  STD_TORCH_CHECK(base == "dot" || base == "sqeuclidean", "segment_max: no base is called ", base);
  return base == "sqeuclidean";
}

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {data<T>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> segment_max(const Tensor& x, const Tensor& y, const Optional& lengths,
                                       const Optional& offsets, std::string base) {
  const bool squared = check(x, y, lengths, offsets, base);
  const int64_t S = offsets ? offsets->size(0) - 1 : x.size(0), M = y.size(0);
  Tensor values = torch::stable::new_empty(x, {S, M}, wide(x));
  Tensor indices = torch::stable::new_empty(x, {S, M}, ScalarType::Long);
  with_float(x, [&](auto type) {
    using T = decltype(type);
    const auto segments = segments_of<T>(x, lengths, offsets);
    if (S * M > 0)
      SegmentMax<T>(segments, matrix<T>(y), squared ? Base::kSquared : Base::kDot)
          .run(mutable_data<Acc<T>>(values), mutable_data<int64_t>(indices));
  });
  return {values, indices};
}

std::tuple<Tensor, Tensor> segment_max_backward(const Tensor& grad, const Tensor& x,
                                                const Tensor& y, const Tensor& indices,
                                                const Optional& offsets, std::string base) {
  const bool squared = check(x, y, std::nullopt, offsets, base);
  const int64_t S = offsets ? offsets->size(0) - 1 : x.size(0), M = y.size(0), D = y.size(1);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == S && grad.size(1) == M &&
                      grad.scalar_type() == wide(x) && indices.dim() == 2 && indices.size(0) == S &&
                      indices.size(1) == M && indices.is_contiguous() &&
                      indices.scalar_type() == ScalarType::Long,
                  "segment_max_backward: grad and indices must be (S, M)");
  const Tensor upstream = torch::stable::contiguous(grad);
  Tensor grad_x = offsets ? torch::stable::new_empty(x, {x.size(0), D})
                          : torch::stable::new_empty(x, {x.size(0), x.size(1), D});
  Tensor grad_y = torch::stable::new_empty(y, {M, D});
  with_float(x, [&](auto type) {
    using T = decltype(type);
    const auto segments = segments_of<T>(x, std::nullopt, offsets);
    backward<T>(segments, matrix<T>(y), squared, data<Acc<T>>(upstream), data<int64_t>(indices),
                mutable_data<T>(grad_x), segments.total, mutable_data<T>(grad_y));
  });
  return {grad_x, grad_y};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "segment_max(Tensor x, Tensor y, Tensor? lengths, Tensor? offsets, str base) "
      "-> (Tensor, Tensor)");
  m.def(
      "segment_max_backward(Tensor grad, Tensor x, Tensor y, Tensor indices, Tensor? offsets, "
      "str base) -> (Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) {
  m.impl("segment_max", TORCH_BOX(&segment_max));
  m.impl("segment_max_backward", TORCH_BOX(&segment_max_backward));
}

}  // namespace weft
