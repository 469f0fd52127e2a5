// A mask as packed bits and the states of its tiles, the form of the leaf `bits`: evaluated once,
// read by every layer.
//
// Loop order: planes, tiles of 64 queries and runs of kRun tiles of keys are the tasks > tiles. As
// many planes as the tensors of the mask tell apart are made, and one row where all queries see the
// same keys. A dense mask is read once, at the speed of memory.
#include <algorithm>
#include <sstream>

#include "common/bits.h"
#include "cpu/attention/masks.h"

namespace weft {
namespace {

constexpr int64_t kRun = 64;

// Whether all queries see the same keys, as far as the shapes tell.
bool has_one_row(const std::string& program, const std::vector<Tensor>& tensors) {
  std::istringstream tokens(program);
  for (std::string token; tokens >> token;)
    if (token != "dense" && token != "key_lengths" && token != "&" && token != "|" && token != "~")
      return false;
  return std::all_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t.dim() != 4 || t.size(2) == 1; });
}

// How many planes differ where each tensor repeats after some of its own, of n.
int64_t different(const std::vector<int64_t>& sizes, int64_t n) {
  int64_t most = 1;
  for (const int64_t size : sizes) most = std::max(most, size);
  for (const int64_t size : sizes)
    if (size == 0 || most % size != 0) return n;
  return most;
}

struct Plan {
  int64_t rows, tile_rows, columns;
  uint64_t* bits;
  Tile* states;
};

// The tiles [first, last) of one tile row of one plane.
void make_tiles(const AttentionMask& mask, const Plan& plan, int64_t b, int64_t h, int64_t plane,
                int64_t tile_row, int64_t first, int64_t last, int64_t Nk) {
  const int64_t q0 = tile_row * 64, nq = std::min<int64_t>(64, plan.rows - q0);
  uint64_t* bits = plan.bits + (plane * plan.rows + q0) * plan.columns;
  Tile* states = plan.states + (plane * plan.tile_rows + tile_row) * plan.columns;
  if (mask.rows(b, h, q0, nq, first * 64, std::min(last * 64, Nk) - first * 64, bits + first,
                plan.columns)) {
    uint64_t any[kRun], all[kRun];
    for (int64_t r = 0; r < nq; ++r)
      for (int64_t j = first; j < last; ++j) {
        const uint64_t word = bits[r * plan.columns + j];
        any[j - first] = r > 0 ? any[j - first] | word : word;
        all[j - first] = r > 0 ? all[j - first] & word : word;
      }
    for (int64_t j = first; j < last; ++j) {
      const uint64_t every = bits_below(Nk - j * 64);
      states[j] = any[j - first] == 0       ? Tile::empty
                  : all[j - first] == every ? Tile::full
                                            : Tile::partial;
    }
    return;
  }
  for (int64_t j = first; j < last; ++j) {
    uint64_t words[64];
    const int64_t nk = std::min<int64_t>(64, Nk - j * 64);
    states[j] = mask.tile(b, h, q0, nq, j * 64, nk, words, BitOrder::by_query);
    const uint64_t every = states[j] == Tile::full ? bits_below(nk) : 0;
    for (int64_t r = 0; r < nq; ++r)
      bits[r * plan.columns + j] = states[j] == Tile::partial ? words[r] : every;
  }
}

std::tuple<Tensor, Tensor> attention_mask_plan(const Tensor& like, std::string program,
                                               std::vector<int64_t> ints,
                                               std::vector<Tensor> tensors, int64_t B, int64_t H,
                                               int64_t Nq, int64_t Nk) {
  std::vector<int64_t> of_batches, of_heads;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.dim() >= 1, "attention mask: a tensor without dimensions");
    of_batches.push_back(t.size(0));
    if (t.dim() > 2) of_heads.push_back(t.size(1));
  }
  const int64_t batches = different(of_batches, B), heads = different(of_heads, H);
  const int64_t rows = has_one_row(program, tensors) ? 1 : Nq;
  const AttentionMask mask(program, std::move(ints), std::move(tensors), B, H, Nq, Nk);
  Plan plan{rows, ceil_div(rows, 64), ceil_div(Nk, 64), nullptr, nullptr};
  Tensor bits =
      torch::stable::new_empty(like, {batches, heads, rows, plan.columns}, ScalarType::Long);
  Tensor states = torch::stable::new_empty(like, {batches, heads, plan.tile_rows, plan.columns},
                                           ScalarType::Byte);
  plan.bits = mutable_data<uint64_t>(bits), plan.states = mutable_data<Tile>(states);
  const int64_t runs = ceil_div(plan.columns, kRun), per_plane = plan.tile_rows * runs;
  parallel_for(0, batches * heads * per_plane, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / per_plane, tile_row = task % per_plane / runs;
      const int64_t first = task % runs * kRun, last = std::min(first + kRun, plan.columns);
      make_tiles(mask, plan, plane / heads, plane % heads, plane, tile_row, first, last, Nk);
    }
  });
  return {bits, states};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "attention_mask_plan(Tensor like, str mask_program, int[] mask_ints, Tensor[] mask_tensors, "
      "int B, int H, int Nq, int Nk) -> (Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) { m.impl("attention_mask_plan", TORCH_BOX(&attention_mask_plan)); }

}  // namespace weft
