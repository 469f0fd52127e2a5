// What AttentionMask says of one plane, as a private op for tests only.
#include "cpu/attention/masks.h"

namespace weft {
namespace {

// Tiles of `height` queries: states, words, bounds of their keys; bounds of the queries of each 64
// keys; the keys that are seen at all.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_mask_tiles(
    const Tensor& like, std::string program, std::vector<int64_t> ints, std::vector<Tensor> tensors,
    int64_t B, int64_t H, int64_t Nq, int64_t Nk, int64_t b, int64_t h, int64_t height,
    bool by_query) {
  const AttentionMask mask(program, std::move(ints), std::move(tensors), B, H, Nq, Nk);
  const int64_t rows = ceil_div(Nq, height), columns = ceil_div(Nk, 64);
  const auto zeros = [&](std::vector<int64_t> size, ScalarType dtype) {
    return torch::stable::new_zeros(like, size, dtype);
  };
  Tensor states = zeros({rows, columns}, ScalarType::Byte);
  Tensor words = zeros({rows, columns, 64}, ScalarType::Long);
  Tensor keys = zeros({rows, 2}, ScalarType::Long), queries = zeros({columns, 2}, ScalarType::Long);
  Tensor seen = zeros({Nk}, ScalarType::Byte);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t q0 = i * height, nq = std::min(height, Nq - q0);
    const Range bounds = mask.keys(b, h, q0, nq);
    mutable_data<Range>(keys)[i] = bounds;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = i * columns + j, k0 = j * 64;
      mutable_data<Tile>(states)[at] = mask.tile(b, h, q0, nq, k0, std::min<int64_t>(64, Nk - k0),
                                                 mutable_data<uint64_t>(words) + at * 64,
                                                 by_query ? BitOrder::by_query : BitOrder::by_key);
    }
  }
  for (int64_t j = 0; j < columns; ++j)
    mutable_data<Range>(queries)[j] =
        mask.queries(b, h, j * 64, std::min<int64_t>(64, Nk - j * 64));
  mask.visible_keys(b, h, 1, mutable_data<uint8_t>(seen));
  return {states, words, keys, queries, seen};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "attention_mask_tiles(Tensor like, str mask_program, int[] mask_ints, Tensor[] mask_tensors, "
      "int B, int H, int Nq, int Nk, int b, int h, int height, bool by_query) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) { m.impl("attention_mask_tiles", TORCH_BOX(&attention_mask_tiles)); }

}  // namespace weft
