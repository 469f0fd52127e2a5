// Which scores of attention exist. A mask reaches an op as a program in postfix order, "" for none:
// leaves take their integers and tensors in order, the operators & | ~ take what stands before them
// (mask_leaves.h lists the leaves). Kernels ask for bounds of what a block of queries or keys can
// see, then for the state of each tile and, where that is partial, for its bits.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "common/types.h"
#include "cpu/registration.h"

namespace weft {

enum class Tile : uint8_t { empty = 0, partial = 1, full = 2 };

// Indices [begin, end); an empty one is [0, 0).
struct Range {
  int64_t begin = 0, end = 0;

  bool empty() const { return begin >= end; }
  int64_t size() const { return end - begin; }
};

// What a word of a tile belongs to: with by_key, bit r of word c is the pair (q0 + r, k0 + c); with
// by_query it is the pair (q0 + c, k0 + r).
enum class BitOrder { by_key, by_query };

class MaskNode;

class AttentionMask {
 public:
  AttentionMask(const std::string& program, std::vector<int64_t> ints, std::vector<Tensor> tensors,
                int64_t B, int64_t H, int64_t Nq, int64_t Nk);
  ~AttentionMask();
  AttentionMask(AttentionMask&&) noexcept;

  bool everything() const { return !root_; }

  // Bounds of the keys that some query of [q0, q0 + nq) sees, and of the queries that see some key
  // of [k0, k0 + nk): nothing outside them is visible, not all inside is. At least one query or
  // key; k0 a multiple of 64, q0 of 16.
  Range keys(int64_t b, int64_t h, int64_t q0, int64_t nq) const;
  Range queries(int64_t b, int64_t h, int64_t k0, int64_t nk) const;

  // The state of the pairs of [q0, q0 + nq) and [k0, k0 + nk), 1 to 64 each; k0 is a multiple of
  // 64, q0 of 16. If it is partial, all 64 words are written: bits beyond nq and nk are 0.
  Tile tile(int64_t b, int64_t h, int64_t q0, int64_t nq, int64_t k0, int64_t nk, uint64_t* words,
            BitOrder order = BitOrder::by_key) const;

  // Writes the words of whole rows, by query, if that is faster than tiles: row r of [q0, q0 + nq)
  // starts at words + r * stride, and bits beyond nk, of any size, are 0. False if it is not.
  bool rows(int64_t b, int64_t h, int64_t q0, int64_t nq, int64_t k0, int64_t nk, uint64_t* words,
            int64_t stride) const;

  // seen[j] = some query of the heads [group * kv_head, group * (kv_head + 1)) of batch b sees key
  // j, for all Nk keys. Slow: for what happens rarely.
  void visible_keys(int64_t b, int64_t kv_head, int64_t group, uint8_t* seen) const;

 private:
  int64_t Nq_, Nk_;
  std::vector<Tensor> tensors_;  // the nodes point into them
  std::unique_ptr<MaskNode> root_;
};

}  // namespace weft
