// The kernels of common/register_tile.h, one for every height, width and layout of a tile.
#include "common/register_tile.h"

#include <array>
#include <utility>

namespace weft {
namespace {

// A step of k in registers: vectors of B, one of A in every lane, sum += a b.
template <typename T>
struct Step {
  using Operand = Vec<T>;
  static Operand load(const T* b) { return Vec<T>::load(b); }
  static Operand broadcast(const T* a) { return Vec<T>(*a); }
  static Vec<T> multiply_add(Operand a, Operand b, Vec<T> sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// VDPBF16PS takes denormals as zero, as AMX does.
template <>
struct Step<bfloat16> {
  using Operand = __m512i;
  static Operand load(const bfloat16* b) { return _mm512_loadu_si512(b); }
  static Operand broadcast(const bfloat16* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Operand broadcast_half(const bfloat16* a) { return _mm512_set1_epi32(a->x); }
  static VecF multiply_add(Operand a, Operand b, VecF sum) {
    return _mm512_dpbf16_ps(sum.v, (__m512bh)b, (__m512bh)a);
  }
};
#endif

template <typename T, int H, int V, bool rows_adjacent>
void multiply(const RegisterTile<T>& t) {
  using Tile = RegisterTile<T>;
  using Sum = typename Tile::Sum;
  constexpr int W = Tile::W;
  Vec<Sum> sum[H][V];
  const T* a = t.a;
  const T* b = t.b;
  const auto step = [&](auto broadcast) __attribute__((always_inline)) {
    typename Step<T>::Operand bv[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) bv[v] = Step<T>::load(b + v * W * Tile::step);
#pragma GCC unroll 16
    for (int i = 0; i < H; ++i) {
      const auto ai = broadcast(a + (rows_adjacent ? i * Tile::step : i * t.a_stride));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = Step<T>::multiply_add(ai, bv[v], sum[i][v]);
    }
    a += rows_adjacent ? t.a_stride : Tile::step;
    b += Tile::columns * Tile::step;
  };
  // Between every four steps of k a line of memory is asked for: first those of C, then the
  // region that the caller wants next.
  Prefetch lines(t.c, V * W * int64_t(sizeof(Sum)), H, t.ldc * int64_t(sizeof(Sum)));
  bool own = true;
  const int64_t steps = rows_adjacent ? ceil_div(t.depth, Tile::step) : t.depth / Tile::step;
  for (int64_t k = steps / 4; k > 0; --k) {
    if (!lines.next() && own) {
      lines = *t.prefetch;
      own = false;
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) step(Step<T>::broadcast);
  }
  for (int64_t k = steps % 4; k > 0; --k) step(Step<T>::broadcast);
  if constexpr (Tile::step == 2 && !rows_adjacent) {
    if (t.depth % 2 != 0) step(Step<T>::broadcast_half);
  }
  if (!own) *t.prefetch = lines;

  const int64_t n = t.valid_columns - (V - 1) * W;  // of the last vector
  Sum* c = t.c;
  if (t.accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < H; ++i) {
      if constexpr (V == 2) sum[i][0] += Vec<Sum>::load(c + i * t.ldc);
      sum[i][V - 1] += Vec<Sum>::load(c + i * t.ldc + (V - 1) * W, n);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i) {
    if constexpr (V == 2) sum[i][0].store(c + i * t.ldc);
    sum[i][V - 1].store(c + i * t.ldc + (V - 1) * W, n);
  }
}

template <typename T>
using Kernel = void (*)(const RegisterTile<T>&);

template <typename T, int V, bool rows_adjacent, int... i>
constexpr std::array<Kernel<T>, sizeof...(i)> by_height(std::integer_sequence<int, i...>) {
  return {&multiply<T, i + 1, V, rows_adjacent>...};
}

}  // namespace

template <typename T>
void RegisterTile<T>::run(int height, bool rows_adjacent) const {
  using Heights = std::make_integer_sequence<int, max_height>;
  // [rows adjacent][second vector][height - 1]
  static constexpr std::array<Kernel<T>, max_height> kernels[2][2] = {
      {by_height<T, 1, false>(Heights{}), by_height<T, 2, false>(Heights{})},
      {by_height<T, 1, true>(Heights{}), by_height<T, 2, true>(Heights{})}};
  kernels[rows_adjacent][valid_columns > W][size_t(height - 1)](*this);
}

template struct RegisterTile<float>;
template struct RegisterTile<double>;
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template struct RegisterTile<bfloat16>;
#endif

}  // namespace weft
