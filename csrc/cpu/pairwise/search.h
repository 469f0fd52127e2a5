// The search of weft.nearest: for each row of x the k best columns, in the order of
//   w_ij = ± (scale α_i β_j u_ij + bias_j),      smaller is better, a tie goes to the lower j.
//
// A group of rows whose candidates fit a buffer at a time:
//   for chunks of columns, packed once > for blocks of rows (tasks) > tiles:
//     products, and w in vectors against the row's threshold; what is not above it is a candidate
//   for rows: the candidates compared exactly (candidates.h)
// Few dimensions: the sums of a tile are compared in registers. More: a matrix product, then a pass
// over the tile. Few rows: the columns are dealt to several tasks, each with candidates of its own.
// The result does not depend on any of these sizes.
#pragma once
#include "cpu/pairwise/candidates.h"
#include "cpu/pairwise/exact.h"
#include "cpu/pairwise/masks.h"
#include "cpu/pairwise/tiles.h"

namespace weft {
namespace search {

constexpr int64_t kRows = 128, kColumns = 512;  // of a block
constexpr int64_t kScanColumns = 256;           // of a tile that is stored
constexpr int64_t kRegisterDepth = 64;          // up to it, tiles stay in registers
constexpr int64_t kTasks = 8;                   // at least, by splitting the columns
constexpr int64_t kChunkBytes = 8 << 20, kCandidateBytes = 16 << 20;

// ‖row‖² of products, ‖row‖₁ of absolute differences: what bounds the rounding errors of u.
template <typename T>
std::vector<Acc<T>> sizes(Matrix<T> points, Base base) {
  using A = Acc<T>;
  std::vector<A> result(size_t(points.rows));
  parallel_for(0, points.rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A total = 0;
      for (int64_t d = 0; d < points.cols; ++d) {
        const A value = A(*points.at(i, d));
        total += base == Base::kL1 ? std::abs(value) : value * value;
      }
      result[size_t(i)] = total;
    }
  });
  return result;
}

template <typename A>
A largest(const A* values, int64_t n) {
  A result = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!(std::abs(values[i]) <= result)) result = std::abs(values[i]);  // keeps a NaN
  return result;
}

// What turns the u of a tile into w, and how far w may be off.
template <typename T>
struct Order {
  using A = Acc<T>;

  const ExactPairs<T>& pairs;
  double sign;  // −1 where the largest v are wanted
  bool squared, general;
  std::vector<A> x_size, y_size, column;       // column: w = slope · tile + column + offset
  std::vector<A> size_of, factor_of, bias_of;  // largest of a block of columns

  Order(const ExactPairs<T>& pairs, const PairTiles<T>& tiles, bool largest_v)
      : pairs(pairs),
        sign(largest_v ? -1.0 : 1.0),
        squared(pairs.pair.base == Base::kSquared),
        general(pairs.column_factor || (squared && (pairs.row_factor || pairs.bias))) {
    x_size = squared ? tiles.x_squares() : sizes(pairs.x, pairs.pair.base);
    y_size = squared ? tiles.y_squares() : sizes(pairs.y, pairs.pair.base);
    const int64_t M = pairs.y.rows;
    column.assign(size_t(round_up(M, kColumns)), std::numeric_limits<A>::infinity());
    if (!general)
      for (int64_t j = 0; j < M; ++j)
        column[size_t(j)] = squared ? A(sign * pairs.pair.scale) * y_size[size_t(j)]
                                    : (pairs.bias ? A(sign) * pairs.bias[j] : A(0));
    for (int64_t j = 0; j < M; j += kColumns) {
      const int64_t n = std::min(kColumns, M - j);
      size_of.push_back(largest(y_size.data() + j, n));
      factor_of.push_back(pairs.column_factor ? largest(pairs.column_factor + j, n) : A(1));
      bias_of.push_back(pairs.bias ? largest(pairs.bias + j, n) : A(0));
    }
  }

  A slope(int64_t i) const {
    const double scale = sign * pairs.pair.scale * pairs.alpha(i);
    return A(squared && !general ? -2 * scale : scale);
  }
  A offset(int64_t i) const {
    return squared && !general ? A(sign * pairs.pair.scale) * x_size[size_t(i)] : A(0);
  }
  // |w computed − w| for the columns of a block: each of D multiply-adds, of either operand's
  // squares and of the moved coordinates rounds once.
  A error(int64_t i, int64_t block) const {
    constexpr A unit = std::numeric_limits<A>::epsilon();
    const A D = A(pairs.x.cols);
    const A most = x_size[size_t(i)] + size_of[size_t(block)];
    const A factor = std::abs(slope(i)) * factor_of[size_t(block)];
    const A tiny = std::numeric_limits<A>::min() * 64 * (D + 1) * (1 + factor);
    return factor * unit * (2 * D + 16) * most + 4 * unit * bias_of[size_t(block)] + tiny;
  }
  double exact(int64_t i, int64_t j) const { return sign * pairs.argument(i, j, pairs.base(i, j)); }
  // w of the columns j... of row i, where there are factors.
  Vec<A> values(int64_t i, int64_t j, int64_t n, Vec<A> tile) const {
    Vec<A> factor(slope(i));
    if (squared)
      tile = Vec<A>(x_size[size_t(i)]) + load_first<A>(y_size.data() + j, n) - Vec<A>(A(2)) * tile;
    if (pairs.column_factor) factor *= load_first<A>(pairs.column_factor + j, n);
    const Vec<A> bias = pairs.bias ? load_first<A>(pairs.bias + j, n) : Vec<A>(A(0));
    return fma(factor, tile, Vec<A>(A(sign)) * bias);
  }
};

}  // namespace search

template <typename T>
class Search {
 public:
  using A = Acc<T>;

  Search(const ExactPairs<T>& pairs, PairMask mask, int64_t k, bool largest_v)
      : pairs_(pairs),
        mask_(mask),
        k_(k),
        tiles_({pairs.pair.base}, pairs.x, pairs.y, nullptr, nullptr, nullptr, false),
        order_(pairs, tiles_, largest_v),
        capacity_(Candidates<A>::capacity(k)) {
    const int64_t N = pairs.x.rows;
    const int64_t row_bytes = capacity_ * int64_t(sizeof(Candidate<A>));
    splits_ = std::max<int64_t>(
        1, ceil_div(search::kTasks, std::max<int64_t>(1, ceil_div(N, search::kRows))));
    splits_ = std::min(splits_, std::max<int64_t>(1, ceil_div(pairs.y.rows, search::kColumns)));
    in_registers_ = std::is_same_v<Product<T>, VectorProduct<A>> && !tiles_.direct &&
                    !order_.general && pairs.x.cols <= search::kRegisterDepth;
    group_ = std::max<int64_t>(1, search::kCandidateBytes / (row_bytes * splits_ * search::kRows)) *
             search::kRows;
    const int64_t block_bytes = std::max<int64_t>(tiles_.columns_bytes(search::kColumns), 1);
    chunk_ = std::max<int64_t>(splits_, search::kChunkBytes / block_bytes) * search::kColumns;
  }

  void run(T* values, int64_t* indices) const {
    static thread_local Scratch memory, packed;
    const int64_t N = pairs_.x.rows, M = pairs_.y.rows;
    for (int64_t first = 0; first < N; first += group_) {
      const int64_t n = std::min(group_, N - first);
      std::vector<Candidates<A>> state(size_t(n * splits_));
      auto* candidates = memory.get<Candidate<A>>(n * splits_ * capacity_);
      for (int64_t j = 0; j < M; j += chunk_) {
        const auto columns =
            prepare_columns(tiles_, j, std::min(chunk_, M - j), search::kColumns, packed);
        parallel_for(0, ceil_div(n, search::kRows) * splits_, 1, [&](int64_t begin, int64_t end) {
          const ProductSession<T> session;
          for (int64_t task = begin; task < end; ++task) {
            const int64_t r = task / splits_ * search::kRows, split = task % splits_;
            scan(first + r, std::min(search::kRows, n - r), split, columns,
                 state.data() + split * n + r, candidates + (split * n + r) * capacity_);
          }
        });
      }
      parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          finish(first + r, state.data() + r, candidates + r * capacity_, n,
                 values + (first + r) * k_, indices + (first + r) * k_);
      });
    }
  }

 private:
  using Columns = typename PairTiles<T>::Columns;
  // As many rows as the registers hold sums of, beside four vectors of columns.
  static constexpr int kHeight = kVectorBytes == 64 ? 6 : 2;

  // Rows i0... against every splits_-th block of columns.
  void scan(int64_t i0, int64_t n, int64_t split, const std::vector<Columns>& columns,
            Candidates<A>* state, Candidate<A>* candidates) const {
    static thread_local Scratch moved, left, tile;
    const int64_t D = pairs_.x.cols;
    A* t = tile.get<A>(search::kRows * search::kScanColumns);
    const bool direct = tiles_.direct;
    using Left = PackedLeft<T>;
    auto* memory = direct ? nullptr : left.get<typename Left::Packed>(Left::size(n, D));
    if (in_registers_) return scan_in_registers(i0, n, split, columns, state, candidates);
    const Left rows(direct ? Matrix<T>{} : tiles_.moved_rows(pairs_.x, i0, n, moved), memory);
    for (size_t b = size_t(split); b < columns.size(); b += size_t(splits_)) {
      const Columns& c = columns[b];
      for (int64_t j = 0; j < c.count; j += search::kScanColumns) {
        const int64_t m = std::min(search::kScanColumns, c.count - j);
        if (direct) {
          tiles_.values(i0, n, c, j, m, t, m);
        } else {
          using Packed = typename PackedRight<T>::Packed;
          const PackedRight<T> right(static_cast<const Packed*>(c.memory), D, c.count);
          gemm(rows, right.block(0, j, D, m), t, m);
        }
        for (int64_t r = 0; r < n; ++r)
          scan_row(i0 + r, c.first + j, m, t + r * m, state[r], candidates + r * capacity_);
      }
    }
  }

  // What a vector of w holds that is not above the threshold becomes a candidate.
  __attribute__((noinline)) void look(int64_t i, int64_t j, int64_t n, Vec<A> w, A offset, A error,
                                      Candidates<A>& state, Candidate<A>* candidates) const {
    constexpr int64_t W = Vec<A>::size;
    alignas(64) A lane[W];
    w.store(lane);
    const auto exact = [&](int64_t column) { return order_.exact(i, column); };
    for (int64_t l = 0; l < n; ++l) {
      if (lane[l] > state.threshold - offset + error || state.finished) continue;
      if (mask_(i, j + l)) state.add(lane[l] + offset, error, j + l, k_, candidates, exact);
    }
  }

  void scan_row(int64_t i, int64_t j0, int64_t m, const A* t, Candidates<A>& state,
                Candidate<A>* candidates) const {
    constexpr int64_t W = Vec<A>::size;
    if (state.finished) return;
    const A error = order_.error(i, j0 / search::kColumns), offset = order_.offset(i);
    Vec<A> bound(state.threshold - offset + error);
    const auto check = [&](int64_t j, int64_t n, Vec<A> w) {
      if (!any(~(w > bound))) return;  // not above: a NaN of the products is a candidate too
      look(i, j0 + j, n, w, offset, error, state, candidates);
      bound = Vec<A>(state.threshold - offset + error);
    };
    if (order_.general) {
      for (int64_t j = 0; j < m; j += W) {
        const int64_t n = std::min(W, m - j);
        check(j, n, order_.values(i, j0 + j, n, load_first<A>(t + j, n)));
      }
      return;
    }
    const Vec<A> slope(order_.slope(i));
    const A* column = order_.column.data() + j0;
    const auto value = [&](int64_t j) {
      return fma(slope, Vec<A>::load(t + j), Vec<A>::load(column + j));
    };
    int64_t j = 0;
    for (; j + 4 * W <= m; j += 4 * W) {
      const Vec<A> w[4] = {value(j), value(j + W), value(j + 2 * W), value(j + 3 * W)};
      if (all((w[0] > bound) & (w[1] > bound) & (w[2] > bound) & (w[3] > bound))) continue;
      for (int v = 0; v < 4; ++v) check(j + v * W, W, w[v]);
    }
    for (; j < m; j += W) {
      const int64_t n = std::min(W, m - j);
      check(j, n, fma(slope, load_first<A>(t + j, n), load_first<A>(column + j, n)));
    }
  }

  // As scan, for few dimensions: kHeight rows by four vectors of columns, which start at column_j
  // and are compared with the rows' bounds as soon as they are summed.
  void scan_in_registers(int64_t i0, int64_t n, int64_t split, const std::vector<Columns>& columns,
                         Candidates<A>* state, Candidate<A>* candidates) const {
    static thread_local Scratch moved, storage;
    const int64_t D = pairs_.x.cols, W = Vec<A>::size;
    const auto x = tiles_.moved_rows(pairs_.x, i0, n, moved);
    A* rows = storage.get<A>(round_up(n, kHeight) * (D + 3));  // slope · x
    A *bound = rows + round_up(n, kHeight) * D, *error = bound + round_up(n, kHeight);
    A* offset = error + round_up(n, kHeight);
    for (int64_t r = 0; r < round_up(n, kHeight); ++r) {
      const A slope = r < n ? order_.slope(i0 + r) : A(0);
      for (int64_t d = 0; d < D; ++d) rows[r * D + d] = r < n ? slope * A(*x.at(r, d)) : A(0);
      offset[r] = r < n ? order_.offset(i0 + r) : A(0);
    }
    for (size_t b = size_t(split); b < columns.size(); b += size_t(splits_)) {
      const Columns& c = columns[b];
      const A* packed = static_cast<const A*>(c.memory);
      const auto bound_of = [&](int64_t r) {
        return state[r].finished ? -Candidates<A>::kInfinity
                                 : state[r].threshold - offset[r] + error[r];
      };
      for (int64_t r = 0; r < round_up(n, kHeight); ++r) {
        error[r] = r < n ? order_.error(i0 + r, c.first / search::kColumns) : A(0);
        bound[r] = r < n ? bound_of(r) : -Candidates<A>::kInfinity;
      }
      for (int64_t j = 0; j < c.count; j += 4 * W)
        for (int64_t r = 0; r < n; r += kHeight) {
          alignas(64) A w[kHeight][4 * Vec<A>::size];
          const int hit = tile(rows + r * D, D, packed + j * D, c.count - j > 2 * W,
                               order_.column.data() + c.first + j, bound + r, w);
          if (!hit) continue;
          for (int64_t q = 0; q < std::min<int64_t>(kHeight, n - r); ++q) {
            if (!(hit >> q & 1)) continue;
            for (int64_t v = 0; v < std::min(4 * W, c.count - j); v += W) {
              const Vec<A> value = Vec<A>::load(w[q] + v);
              if (all(value > Vec<A>(bound[r + q]))) continue;
              look(i0 + r + q, c.first + j + v, std::min(W, c.count - j - v), value, offset[r + q],
                   error[r + q], state[r + q], candidates + (r + q) * capacity_);
              bound[r + q] = bound_of(r + q);
            }
          }
        }
    }
  }

  // Sums of one tile; the rows that have one not above their bound, whose sums are then stored.
  static int tile(const A* rows, int64_t D, const A* packed, bool two_panels, const A* column,
                  const A* bound, A (*w)[4 * Vec<A>::size]) {
    constexpr int64_t W = Vec<A>::size;
    Vec<A> sum[kHeight][4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vec<A> start = Vec<A>::load(column + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < kHeight; ++r) sum[r][v] = start;
    }
    // A packed panel has two vectors of columns.
    const A *first = packed, *second = two_panels ? packed + 2 * W * D : packed;
    for (int64_t d = 0; d < D; ++d, first += 2 * W, second += 2 * W) {
      const Vec<A> y[4] = {Vec<A>::load(first), Vec<A>::load(first + W), Vec<A>::load(second),
                           Vec<A>::load(second + W)};
#pragma GCC unroll 8
      for (int r = 0; r < kHeight; ++r) {
        const Vec<A> x(rows[r * D + d]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[r][v] = fma(x, y[v], sum[r][v]);
      }
    }
    int hit = 0;
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
      const Vec<A> most(bound[r]);
      const auto above =
          (sum[r][0] > most) & (sum[r][1] > most) & (sum[r][2] > most) & (sum[r][3] > most);
      hit |= int(!all(above)) << r;
    }
    if (hit) {
#pragma GCC unroll 8
      for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[r][v].store(w[r] + v * W);
    }
    return hit;
  }

  // The candidates of all splits, compared exactly.
  void finish(int64_t i, const Candidates<A>* state, const Candidate<A>* candidates, int64_t n,
              T* values, int64_t* indices) const {
    static thread_local std::vector<Chosen> chosen;
    chosen.clear();
    A threshold = Candidates<A>::kInfinity;
    for (int64_t s = 0; s < splits_; ++s) threshold = std::min(threshold, state[s * n].threshold);
    for (int64_t s = 0; s < splits_; ++s)
      for (int c = 0; c < state[s * n].count; ++c) {
        const auto& candidate = candidates[s * n * capacity_ + c];
        if (candidate.lower <= threshold)
          chosen.push_back({order_.exact(i, candidate.column), candidate.column});
      }
    const int64_t found = std::min(k_, int64_t(chosen.size()));
    std::partial_sort(chosen.begin(), chosen.begin() + found, chosen.end());
    const Pair& pair = pairs_.pair;
    for (int64_t r = 0; r < k_; ++r) {
      if (r < found) {
        const double v = order_.sign * chosen[size_t(r)].value + pair.shift;
        values[r] = T(A(exact_function(pair, v)));
        indices[r] = chosen[size_t(r)].column;
      } else {
        values[r] = T(fill);
        indices[r] = -1;
      }
    }
  }

 public:
  A fill = Candidates<A>::kInfinity;

 private:
  const ExactPairs<T>& pairs_;
  PairMask mask_;
  int64_t k_;
  PairTiles<T> tiles_;
  search::Order<T> order_;
  int64_t capacity_, splits_, group_, chunk_;
  bool in_registers_;
};

}  // namespace weft
