// The leaves of a mask program, with the integers and tensors that they take. i is a query, j a
// key; the first axis of a tensor is indexed by b modulo its size, the heads' axis by h modulo its
// own.
//
//   band              lo, hi                      lo <= j - i <= hi
//   band_rows         lo, hi; shift (B, Nq)       lo + shift[b, i] <= j - i <= hi + shift[b, i]
//   query_lengths     lengths (B,)                i < lengths[b]
//   key_lengths       lengths (B,)                j < lengths[b]
//   segments          ids (B, H, Nq), (B, H, Nk)  equal ids
//   neighborhood      n, shape, kernel, dilation  j in the window of i along each of n dimensions
//   blocks            bq, bk; (B, H, ceil(Nq / bq), ceil(Nk / bk)) bool
//   dense             (B, H, Nq or 1, Nk or 1) bool
//   bits              (B, H, Nq or 1, ceil(Nk / 64)) int64, states of the tiles of 64 x 64, uint8
#pragma once
#include "common/bits.h"
#include "cpu/attention/masks.h"

namespace weft {

struct MaskShape {
  int64_t B, H, Nq, Nk;
};

struct MaskBlock {
  int64_t b, h, q0, nq, k0, nk;
};

class MaskNode {
 public:
  explicit MaskNode(const MaskShape& shape) : shape_(shape) {}
  virtual ~MaskNode() = default;

  // As AttentionMask::tile, except that a partial tile may turn out to be empty or full, and that
  // bits beyond nq and nk are anything.
  virtual Tile tile(const MaskBlock& block, BitOrder order, uint64_t* words) const = 0;
  // As AttentionMask::rows.
  virtual bool rows(const MaskBlock&, uint64_t*, int64_t) const { return false; }
  virtual Range keys(int64_t, int64_t, Range) const { return {0, shape_.Nk}; }
  virtual Range queries(int64_t, int64_t, Range) const { return {0, shape_.Nq}; }

 protected:
  const MaskShape shape_;
};

// The integers and tensors that the leaves of a program take one after the other.
class MaskArguments {
 public:
  MaskArguments(std::vector<int64_t> ints, std::vector<Tensor>& tensors)
      : ints_(std::move(ints)), tensors_(tensors) {}

  int64_t integer() {
    STD_TORCH_CHECK(next_int_ < ints_.size(), "attention mask: too few integers");
    return ints_[next_int_++];
  }
  // The next tensor; a dimension of `sizes` that is -1 is any.
  const Tensor& tensor(ScalarType dtype, std::vector<int64_t> sizes, bool contiguous = true);
  bool all_taken() const { return next_int_ == ints_.size() && next_tensor_ == tensors_.size(); }

 private:
  const std::vector<int64_t> ints_;
  std::vector<Tensor>& tensors_;
  size_t next_int_ = 0, next_tensor_ = 0;
};

// The leaf of this name; null if there is none.
std::unique_ptr<MaskNode> mask_rule(const std::string& name, const MaskShape& shape,
                                    MaskArguments& arguments);
std::unique_ptr<MaskNode> mask_of_tensors(const std::string& name, const MaskShape& shape,
                                          MaskArguments& arguments);

// Each word becomes `bits`, or (across) word i becomes 64 times bit i.
inline void spread_bits(uint64_t bits, bool across, uint64_t* words) {
  for (int i = 0; i < 64; ++i) words[i] = across ? -(bits >> i & 1) : bits;
}

inline Range clipped(int64_t begin, int64_t end, int64_t n) {
  begin = std::max<int64_t>(begin, 0), end = std::min(end, n);
  return begin < end ? Range{begin, end} : Range{};
}

}  // namespace weft
