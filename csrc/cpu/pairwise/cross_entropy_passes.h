// The passes over all logits of a cross entropy: the sums of rows and columns, and with them, in
// the same pass, the gradients of a loss whose weights are known.
#pragma once
#include "cpu/pairwise/cross_entropy.h"

namespace weft {

inline constexpr int64_t kBufferBytes = 32 << 20;  // of whole rows of logits
inline constexpr int64_t kChunkBytes = 16 << 20;   // of packed columns
inline constexpr int64_t kTileRows = 128, kTileColumns = 512, kGroupTiles = 16;

template <typename A>
struct Sums {
  std::vector<RowSums<A>> rows, columns;
};

// What a tile (n, m) knows of its columns, into maximum[m], total[m] and positive[m].
template <typename A>
void column_sums(const PairTargets<A>& of, int64_t i0, int64_t n, int64_t j0, int64_t m, const A* s,
                 int64_t ld, A* maximum_, A* total, A* positive) {
  constexpr int64_t W = Vec<A>::size;
  const Vec<A> none(PairTargets<A>::kNone), zero(A(0));
  for (int64_t c = 0; c < m; c += W) {
    const int64_t count = std::min(W, m - c);
    Vec<A> largest = none, sum;
    for (int64_t r = 0; r < n; ++r)
      largest = maximum(largest, load_first<A>(s + r * ld + c, count));
    const Vec<A> shift = select(largest == none, zero, largest);
    for (int64_t r = 0; r < n; ++r)
      sum += exp_or_zero(load_first<A>(s + r * ld + c, count) - shift);
    largest.store(maximum_ + c, count);
    sum.store(total + c, count);
  }
  std::fill_n(positive, m, A(0));
  for (int64_t r = 0; r < n; ++r)
    of.each_positive(i0 + r, j0, m, [&](int64_t c) { positive[c] += s[r * ld + c]; });
}

template <typename A>
void merge(RowSums<A>& into, A largest, A total, A positive) {
  into.positive += positive;
  if (largest == PairTargets<A>::kNone) return;
  if (!(largest <= into.largest)) {
    if (into.total != 0) into.total *= std::exp(into.largest - largest);
    into.largest = largest;
    into.total += total;
  } else {
    into.total += total * std::exp(largest - into.largest);
  }
}

template <typename T, typename A = Acc<T>>
void tile_sums(const PairTiles<T>& tiles, const PairTargets<A>& of, Sums<A>& sums) {
  const int64_t N = tiles.rows(), M = tiles.columns();
  const bool of_columns = !sums.columns.empty();
  static thread_local Scratch columns_storage, partial_storage;
  const int64_t bytes = std::max<int64_t>(tiles.columns_bytes(kTileColumns), 1);
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / bytes) * kTileColumns;
  const int64_t group = kTileRows * kGroupTiles;
  for (int64_t first = 0; first < M; first += chunk) {
    const int64_t width = std::min(chunk, M - first);
    const auto columns = prepare_columns(tiles, first, width, kTileColumns, columns_storage);
    A* partial = of_columns ? partial_storage.get<A>(kGroupTiles * 3 * width) : nullptr;
    for (int64_t i0 = 0; i0 < N; i0 += of_columns ? group : N) {
      const int64_t rows = of_columns ? std::min(group, N - i0) : N;
      const int64_t tasks = ceil_div(rows, kTileRows);
      parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        static thread_local Scratch tile;
        A* s = tile.get<A>(kTileRows * kTileColumns);
        const ProductSession<T> session;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = i0 + task * kTileRows, n = std::min(kTileRows, i0 + rows - i);
          for (const auto& block : columns) {
            const int64_t m = block.count;
            tiles.values(i, n, block, 0, m, s, m);
            for (int64_t r = 0; r < n; ++r) {
              of.logits(i + r, block.first, m, s + r * m, s + r * m);
              sums.rows[size_t(i + r)].add(of, i + r, block.first, m, s + r * m);
            }
            if (!of_columns) continue;
            A* to = partial + task * 3 * width + block.first - first;
            column_sums(of, i, n, block.first, m, s, m, to, to + width, to + 2 * width);
          }
        }
      });
      if (!of_columns) continue;
      parallel_for(0, ceil_div(width, 1024), 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin * 1024; c < std::min(end * 1024, width); ++c)
          for (int64_t task = 0; task < tasks; ++task) {
            const A* from = partial + task * 3 * width + c;
            merge(sums.columns[size_t(first + c)], from[0], from[width], from[2 * width]);
          }
      });
    }
  }
}

// Gradients that the forward keeps: sums in the accumulation type; factor and bias may be null.
template <typename A>
struct Kept {
  A *x, *y, *factor, *bias;
};

template <typename T, typename A = Acc<T>>
void sums_and_gradients(const PairTiles<T>& tiles, const PairTargets<A>& of, const A* row_weight,
                        const A* column_weight, const A* factor, Sums<A>& sums, Kept<A> out) {
  using H = typename PairBackward<T>::H;
  const int64_t N = tiles.rows(), M = tiles.columns(), D = tiles.depth();
  const bool of_columns = !sums.columns.empty();
  const int64_t most = std::max<int64_t>(64, kBufferBytes / std::max<int64_t>(M * sizeof(A), 1));
  const int64_t block = std::min(N, of_columns ? N : std::min<int64_t>(most / 64 * 64, 2048));
  static thread_local Scratch buffer, columns_storage;
  A* v = buffer.get<A>(block * M);
  PairBackward<T> products(tiles, out.x, out.y);
  const auto vector = [](int64_t n) { return std::vector<A>(size_t(n), A(0)); };
  const int64_t C = of_columns ? M : 0;
  auto row_shift = vector(N), row_factor = vector(N), row_t = vector(N);
  auto column_shift = vector(C), column_factor = vector(C), column_t = vector(C);
  for (int64_t i = 0; i < N; ++i) row_t[size_t(i)] = -row_weight[i];
  for (int64_t j = 0; j < C; ++j) column_t[size_t(j)] = -column_weight[j];
  const PairUpstream<A> up{row_shift.data(),     row_factor.data(), column_shift.data(),
                           column_factor.data(), row_weight,        row_t.data(),
                           column_weight,        column_t.data()};
  if (out.bias) std::fill_n(out.bias, M, A(0));
  const int64_t bytes = std::max<int64_t>(tiles.columns_bytes(kTileColumns), 1);
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / bytes) * kTileColumns;
  std::vector<typename PairTiles<T>::Columns> columns;
  for (int64_t i0 = 0; i0 < N; i0 += block) {
    const int64_t rows = std::min(block, N - i0);
    for (int64_t first = 0; first < M; first += chunk) {
      if (i0 == 0 || chunk < M)
        columns = prepare_columns(tiles, first, std::min(chunk, M - first), kTileColumns,
                                  columns_storage);
      parallel_for(0, ceil_div(rows, kTileRows), 1, [&](int64_t begin, int64_t end) {
        const ProductSession<T> session;
        for (int64_t r = begin * kTileRows; r < std::min(end * kTileRows, rows); r += kTileRows)
          for (const auto& c : columns)
            tiles.values(i0 + r, std::min(kTileRows, rows - r), c, 0, c.count, v + r * M + c.first,
                         M);
      });
    }
    // The rows' sums and, unless the columns' are missing, the weights while the row is in cache.
    const auto add_row = [&](int64_t r) {
      alignas(64) A s[kTileColumns];
      RowSums<A>& row = sums.rows[size_t(i0 + r)];
      for (int64_t j = 0; j < M; j += kTileColumns) {
        const int64_t m = std::min(kTileColumns, M - j);
        of.logits(i0 + r, j, m, v + r * M + j, s);
        row.add(of, i0 + r, j, m, s);
      }
      row_shift[size_t(i0 + r)] = row.largest;
      row_factor[size_t(i0 + r)] = row.factor(of.sigmoid);
    };
    const auto weigh_row = [&](int64_t r) {
      alignas(64) A w[kTileColumns];
      H* h = reinterpret_cast<H*>(v + r * M);  // never beyond what was read
      for (int64_t j = 0; j < M; j += kTileColumns) {
        const int64_t m = std::min(kTileColumns, M - j);
        cross_entropy_weights(of, up, i0 + r, j, m, v + r * M + j, w);
        convert(w, h + j, m);
      }
    };
    parallel_for(0, ceil_div(rows, 16), 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * 16; r < std::min(end * 16, rows); ++r) {
        add_row(r);
        if (!of_columns) weigh_row(r);
      }
    });
    if (of_columns) {
      parallel_for(0, ceil_div(M, kTileColumns), 1, [&](int64_t begin, int64_t end) {
        static thread_local Scratch storage;
        A* s = storage.get<A>((kTileRows + 3) * kTileColumns);
        A* partial = s + kTileRows * kTileColumns;
        for (int64_t j = begin * kTileColumns; j < std::min(end * kTileColumns, M);
             j += kTileColumns) {
          const int64_t m = std::min(kTileColumns, M - j);
          for (int64_t r0 = 0; r0 < rows; r0 += kTileRows) {
            const int64_t n = std::min(kTileRows, rows - r0);
            for (int64_t r = 0; r < n; ++r)
              of.logits(r0 + r, j, m, v + (r0 + r) * M + j, s + r * m);
            column_sums(of, r0, n, j, m, s, m, partial, partial + m, partial + 2 * m);
            for (int64_t c = 0; c < m; ++c)
              merge(sums.columns[size_t(j + c)], partial[c], partial[m + c], partial[2 * m + c]);
          }
          for (int64_t c = j; c < j + m; ++c) {
            column_shift[size_t(c)] = sums.columns[size_t(c)].largest;
            column_factor[size_t(c)] = sums.columns[size_t(c)].factor(false);
          }
        }
      });
      parallel_for(0, ceil_div(rows, 16), 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin * 16; r < std::min(end * 16, rows); ++r) weigh_row(r);
      });
    }
    const Matrix<H> h{reinterpret_cast<const H*>(v), rows, M, M * int64_t(sizeof(A) / sizeof(H)),
                      1};
    products.add_rows(i0, h);
    if (out.bias)
      parallel_for(0, ceil_div(M, 1024), 1, [&](int64_t begin, int64_t end) {
        constexpr int64_t W = Vec<A>::size;
        for (int64_t j = begin * 1024; j < std::min(end * 1024, M); j += W) {
          const int64_t m = std::min(W, std::min(end * 1024, M) - j);
          Vec<A> total = load_first<A>(out.bias + j, m);
          for (int64_t r = 0; r < rows; ++r) total += load_first<A>(h.at(r, j), m);
          total.store(out.bias + j, m);
        }
      });
  }
  // H is ∂L/∂v: v = scale factor ⟨x, y⟩ + bias.
  const A scale = A(tiles.pair.scale);
  double of_factor = 0;
  for (int64_t i = 0; out.factor && i < N; ++i) {
    bool some = false;
    double part = 0;
    for (int64_t d = 0; d < D; ++d) {
      const A g = out.x[i * D + d];
      some |= g != 0;
      part += double(g) * double(A(*tiles.x.at(i, d)));
    }
    if (some) of_factor += part;
  }
  if (out.factor) *out.factor = A(of_factor * tiles.pair.scale / double(*factor));
  const auto scaled = [&](A* sum, int64_t n) {
    parallel_for(0, ceil_div(n, 4096), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * 4096; k < std::min(end * 4096, n); ++k) sum[k] *= scale;
    });
  };
  if (scale != 1) scaled(out.x, N * D), scaled(out.y, M * D);
}

}  // namespace weft
