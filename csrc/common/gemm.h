// Matrix products C (+)= A B on one thread.
//
//   gemm(a, b, c, ldc, accumulate)      a, b: Matrix, PackedLeft or PackedRight; C row-major
//
// Element types: double; float; bfloat16 and half with float sums; or float on one side with
// bfloat16 or half on the other. Where the processor multiplies bfloat16 (AMX tiles, or pairs in
// vector registers) a product with a bfloat16 operand runs there, and a float operand is then
// rounded to bfloat16 while it is packed; all others are converted upwards and run in float.
//
// Loop order: columns in blocks of block_columns > k in blocks of block_depth > rows in blocks of
// block_rows, packed, which stay in the second-level cache > one panel of B > tiles of C. A panel
// of B is packed just before its first use, and while it is multiplied the next one is fetched.
//
// Repeatable: the bits of an element depend on its row of A, its column of B and the types only,
// not on how a caller cuts the rows or the columns.
#pragma once
#include "common/gemm_amx.h"
#include "common/gemm_bf16.h"
#include "common/gemm_vector.h"
#include "common/matrix.h"
#include "common/scratch.h"

namespace weft {

// The engine of a product of element types A and B.
template <typename A, typename B>
struct ProductOf {
  static_assert(std::is_same_v<A, double> == std::is_same_v<B, double>,
                "double multiplies double only");
  static constexpr bool any_bfloat16 = std::is_same_v<A, bfloat16> || std::is_same_v<B, bfloat16>;
  static constexpr bool any_half = std::is_same_v<A, half> || std::is_same_v<B, half>;
#if defined(__AMX_BF16__)
  using type = std::conditional_t<any_bfloat16 && !any_half, AmxProduct, VectorProduct<Acc<A>>>;
#elif defined(__AVX512BF16__)
  using type = std::conditional_t<any_bfloat16 && !any_half, Bf16Product, VectorProduct<Acc<A>>>;
#else
  using type = VectorProduct<Acc<A>>;
#endif
};
template <typename A, typename B = A>
using Product = typename ProductOf<A, B>::type;

// Hold one around many small products: gemm opens one of its own if there is none, which for AMX
// costs as much as a few tiles.
template <typename T>
using ProductSession = typename Product<T>::Session;

namespace product {

// Packs B, any number of columns, into panels `depth` deep.
template <typename Engine, typename S>
void pack_columns(Matrix<S> b, typename Engine::Packed* target, int64_t depth) {
  // Where the rows of B are contiguous a panel is a narrow strip of them, each on a page of its
  // own: then several panels are taken from each visit, a few rows at a time.
  const bool strips = b.col_stride == 1;
  const int64_t group = strips ? Engine::group_panels * Engine::columns : Engine::columns;
  const int64_t rows = strips ? 32 : std::max<int64_t>(b.rows, 1);
  for (int64_t g = 0; g < b.cols; g += group)
    for (int64_t k = 0; k < b.rows; k += rows) {
      if (strips && k + rows < b.rows) {
        Prefetch next(b.at(k + rows, g), std::min(group, b.cols - g) * int64_t(sizeof(S)),
                      std::min(rows, b.rows - k - rows), b.row_stride * int64_t(sizeof(S)));
        while (next.next()) {
        }
      }
      for (int64_t j = g; j < std::min(g + group, b.cols); j += Engine::columns)
        Engine::pack_right(b.block(k, j, std::min(rows, b.rows - k),
                                   std::min<int64_t>(Engine::columns, b.cols - j)),
                           target + Engine::right_size(depth, j) + Engine::right_offset(k), depth);
    }
}

}  // namespace product

// The left operand of products with elements of type T, packed once and read by many calls. The
// memory is the caller's: size(rows, depth) elements of type Packed, 64-byte aligned.
template <typename T>
struct PackedLeft {
  using Engine = Product<T>;
  using Packed = typename Engine::Packed;

  static int64_t size(int64_t rows, int64_t depth) { return Engine::left_size(rows, depth); }

  template <typename S>
  PackedLeft(Matrix<S> a, Packed* memory) : data(memory), rows(a.rows), cols(a.cols) {
    Engine::pack_left(a, memory);
  }

  const Packed* data;
  int64_t rows, cols;
};

// The right operand, packed once: panels of panel_columns columns, [panel][k][column].
template <typename T>
struct PackedRight {
  using Engine = Product<T>;
  using Packed = typename Engine::Packed;
  static constexpr int64_t panel_columns = Engine::columns;
  static constexpr int64_t row_unit = Engine::depth_unit;

  static int64_t size(int64_t depth, int64_t cols) { return Engine::right_size(depth, cols); }

  template <typename S>
  PackedRight(Matrix<S> b, Packed* memory)
      : data(memory), rows(b.rows), cols(b.cols), depth(round_up(b.rows, row_unit)) {
    product::pack_columns<Engine>(b, memory, depth);
  }
  // Memory that was packed before.
  PackedRight(const Packed* packed, int64_t rows, int64_t cols)
      : data(packed), rows(rows), cols(cols), depth(round_up(rows, row_unit)) {}

  // Part of the operand, without copying: first_row a multiple of row_unit (and rows too, unless
  // the block ends with the operand), first_col of panel_columns.
  PackedRight block(int64_t first_row, int64_t first_col, int64_t block_rows,
                    int64_t block_cols) const {
    PackedRight part = *this;
    part.data += first_col * depth + Engine::right_offset(first_row);
    part.rows = block_rows;
    part.cols = block_cols;
    return part;
  }

  const Packed* data;
  int64_t rows, cols;
  int64_t depth;  // of the operand that was packed: the distance between panels
};

namespace product {

template <typename Engine>
struct Buffers {
  Scratch left, right;
  static Buffers& mine() {
    static thread_local Buffers buffers;
    return buffers;
  }
};

// k in equal blocks of at most block_depth, whole steps of the engine.
template <typename Engine>
int64_t depth_block(int64_t depth) {
  const int64_t blocks = ceil_div(depth, Engine::block_depth);
  return round_up(ceil_div(depth, blocks), std::max<int64_t>(Engine::depth_unit, 16));
}

// A block of A, ready to multiply: these panels of it, from k0 on, are rows first_row... of C.
template <typename Engine>
struct LeftBlock {
  typename Engine::Left left;
  int64_t first_panel, last_panel, k0, first_row;
};

template <typename Engine, typename S>
struct LeftMatrix {
  Matrix<S> a;
  int64_t rows() const { return a.rows; }
  int64_t depth() const { return a.cols; }
  LeftBlock<Engine> block(int64_t first_panel, int64_t last_panel, int64_t k0, int64_t depth,
                          int64_t cols) const {
    const int64_t row = Engine::panel_start(a.rows, first_panel);
    const int64_t m = Engine::panel_start(a.rows, last_panel) - row;
    const Matrix<S> part = a.block(row, k0, m, depth);
    const int64_t n = Engine::panels(m);
    if constexpr (std::is_same_v<typename Engine::Packed, S>) {
      if (a.col_stride == 1 && Engine::reads_in_place(part, cols))
        return {{part.data, m, depth, part.row_stride, 1}, 0, n, 0, row};
    }
    auto* packed = Buffers<Engine>::mine().left.template get<typename Engine::Packed>(
        Engine::left_size(m, depth));
    Engine::pack_left(part, packed);
    return {{packed, m, depth}, 0, n, 0, row};
  }
};

template <typename Engine, typename T>
struct LeftPacked {
  PackedLeft<T> a;
  int64_t rows() const { return a.rows; }
  int64_t depth() const { return a.cols; }
  LeftBlock<Engine> block(int64_t first_panel, int64_t last_panel, int64_t k0, int64_t,
                          int64_t) const {
    return {{a.data, a.rows, a.cols}, first_panel, last_panel, k0, 0};
  }
};

template <typename P>
struct RightPanel {
  const P* data;
  int64_t stride;
};

template <typename Engine, typename S>
struct RightMatrix {
  Matrix<S> b;
  typename Engine::Packed* packed = nullptr;
  bool keep = false;

  int64_t cols() const { return b.cols; }
  // Columns packed at once.
  int64_t group_columns(bool fresh) const {
    return fresh && b.col_stride == 1 ? Engine::group_panels * Engine::columns : Engine::columns;
  }
  // Room for the panels of one block, or for one group where no other row block reads them.
  void reserve(int64_t depth, int64_t block_cols, bool several_row_blocks) {
    keep = several_row_blocks;
    packed = Buffers<Engine>::mine().right.template get<typename Engine::Packed>(
        Engine::right_size(depth, keep ? block_cols : std::min(block_cols, group_columns(true))));
  }
  // Packs the columns [j, j + n) of a block that starts at column `first`.
  void pack(int64_t k0, int64_t depth, int64_t first, int64_t j, int64_t n) const {
    auto* target = packed + (keep ? Engine::right_size(depth, j - first) : 0);
    pack_columns<Engine>(b.block(k0, j, depth, n), target, depth);
  }
  // The panel of column j, of the group that starts at `group`, of the block that starts at
  // `first`.
  RightPanel<typename Engine::Packed> panel(int64_t, int64_t depth, int64_t first, int64_t group,
                                            int64_t j) const {
    return {packed + Engine::right_size(depth, j - (keep ? first : group)),
            Engine::right_stride(depth)};
  }
  Prefetch prefetch(int64_t k0, int64_t depth, int64_t first, int64_t j, int64_t n,
                    bool fresh) const {
    constexpr int64_t size = sizeof(S);
    if (!fresh) {
      const int64_t elements = Engine::right_size(depth, Engine::columns);
      return {packed + Engine::right_size(depth, j - first),
              elements * int64_t(sizeof(typename Engine::Packed)), 1, 0};
    }
    if (b.col_stride == 1) return {b.at(k0, j), n * size, depth, b.row_stride * size};
    if (b.row_stride == 1) return {b.at(k0, j), depth * size, n, b.col_stride * size};
    return {};
  }
};

template <typename Engine, typename T>
struct RightPacked {
  PackedRight<T> b;
  int64_t cols() const { return b.cols; }
  int64_t group_columns(bool) const { return Engine::columns; }
  void reserve(int64_t, int64_t, bool) {}
  void pack(int64_t, int64_t, int64_t, int64_t, int64_t) const {}
  RightPanel<typename Engine::Packed> panel(int64_t k0, int64_t, int64_t, int64_t,
                                            int64_t j) const {
    return {b.data + j * b.depth + Engine::right_offset(k0), Engine::right_stride(b.depth)};
  }
  Prefetch prefetch(int64_t k0, int64_t depth, int64_t, int64_t j, int64_t, bool) const {
    constexpr int64_t size = sizeof(typename Engine::Packed);
    const int64_t part = Engine::right_offset(round_up(depth, Engine::depth_unit)) * size;
    const int64_t parts =
        Engine::right_size(1, Engine::columns) / Engine::right_offset(Engine::depth_unit);
    return {b.data + j * b.depth + Engine::right_offset(k0), part, parts,
            Engine::right_stride(b.depth) * size};
  }
};

template <typename Engine, typename Left, typename Right>
void multiply(Left a, Right b, typename Engine::Sum* c, int64_t ldc, bool accumulate) {
  const int64_t rows = a.rows(), cols = b.cols(), depth = a.depth();
  if (rows == 0 || cols == 0) return;
  if (depth == 0) {
    for (int64_t i = 0; i < rows && !accumulate; ++i) std::fill_n(c + i * ldc, cols, 0);
    return;
  }
  constexpr int64_t width = Engine::columns;
  const int64_t step = depth_block<Engine>(depth);
  const int64_t panels = Engine::panels(rows);
  const int64_t row_blocks = ceil_div(panels, Engine::block_panels);
  const int64_t block_panels = ceil_div(panels, row_blocks);
  const typename Engine::Session session;
  b.reserve(std::min(step, depth), std::min(cols, Engine::block_columns), row_blocks > 1);
  for (int64_t first = 0; first < cols; first += Engine::block_columns) {
    const int64_t last = std::min(cols, first + Engine::block_columns);
    for (int64_t k0 = 0; k0 < depth; k0 += step) {
      const int64_t k = std::min(step, depth - k0);
      for (int64_t p = 0; p < panels; p += block_panels) {
        const auto block = a.block(p, std::min(panels, p + block_panels), k0, k, cols);
        const bool fresh = p == 0;
        const int64_t group = b.group_columns(fresh);
        for (int64_t g = first; g < last; g += group) {
          const int64_t end = std::min(last, g + group);
          if (fresh) b.pack(k0, k, first, g, end - g);
          Prefetch prefetch;
          if (end < last)
            prefetch = b.prefetch(k0, k, first, end, std::min(group, last - end), fresh);
          for (int64_t j = g; j < end; j += width) {
            const auto panel = b.panel(k0, k, first, g, j);
            Engine::multiply(block.left, block.first_panel, block.last_panel, block.k0, k,
                             panel.data, panel.stride, int(std::min(width, end - j)),
                             c + block.first_row * ldc + j, ldc, accumulate || k0 > 0, prefetch);
          }
        }
      }
    }
  }
}

}  // namespace product

template <typename A, typename B>
void gemm(Matrix<A> a, Matrix<B> b, Acc<B>* c, int64_t ldc, bool accumulate = false) {
  using Engine = Product<A, B>;
  product::multiply<Engine>(product::LeftMatrix<Engine, A>{a}, product::RightMatrix<Engine, B>{b},
                            c, ldc, accumulate);
}
template <typename A, typename T>
void gemm(Matrix<A> a, const PackedRight<T>& b, Acc<T>* c, int64_t ldc, bool accumulate = false) {
  using Engine = Product<T>;
  product::multiply<Engine>(product::LeftMatrix<Engine, A>{a}, product::RightPacked<Engine, T>{b},
                            c, ldc, accumulate);
}
template <typename T, typename B>
void gemm(const PackedLeft<T>& a, Matrix<B> b, Acc<T>* c, int64_t ldc, bool accumulate = false) {
  using Engine = Product<T>;
  product::multiply<Engine>(product::LeftPacked<Engine, T>{a}, product::RightMatrix<Engine, B>{b},
                            c, ldc, accumulate);
}
template <typename T>
void gemm(const PackedLeft<T>& a, const PackedRight<T>& b, Acc<T>* c, int64_t ldc,
          bool accumulate = false) {
  using Engine = Product<T>;
  product::multiply<Engine>(product::LeftPacked<Engine, T>{a}, product::RightPacked<Engine, T>{b},
                            c, ldc, accumulate);
}

}  // namespace weft
