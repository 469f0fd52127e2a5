// Mask programs: the tree of their leaves and operators, and what kernels ask of it.
//
// A tile is evaluated as deep as it needs: an empty side of & and a full side of | spare the other.
#include "cpu/attention/masks.h"

#include <sstream>

#include "cpu/attention/mask_leaves.h"

namespace weft {
namespace {

using Node = std::unique_ptr<MaskNode>;

class And : public MaskNode {
 public:
  And(const MaskShape& shape, Node left, Node right)
      : MaskNode(shape), left_(std::move(left)), right_(std::move(right)) {}

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    const Tile left = left_->tile(at, order, words);
    if (left == Tile::empty) return Tile::empty;
    if (left == Tile::full) return right_->tile(at, order, words);
    uint64_t others[64];
    const Tile right = right_->tile(at, order, others);
    if (right == Tile::partial)
      for (int i = 0; i < 64; ++i) words[i] &= others[i];
    return right == Tile::empty ? Tile::empty : Tile::partial;
  }
  Range keys(int64_t b, int64_t h, Range queries) const override {
    return both(left_->keys(b, h, queries), right_->keys(b, h, queries));
  }
  Range queries(int64_t b, int64_t h, Range keys) const override {
    return both(left_->queries(b, h, keys), right_->queries(b, h, keys));
  }

 private:
  static Range both(Range a, Range b) { return clipped(std::max(a.begin, b.begin), a.end, b.end); }

  const Node left_, right_;
};

class Or : public MaskNode {
 public:
  Or(const MaskShape& shape, Node left, Node right)
      : MaskNode(shape), left_(std::move(left)), right_(std::move(right)) {}

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    const Tile left = left_->tile(at, order, words);
    if (left == Tile::full) return Tile::full;
    if (left == Tile::empty) return right_->tile(at, order, words);
    uint64_t others[64];
    const Tile right = right_->tile(at, order, others);
    if (right == Tile::partial)
      for (int i = 0; i < 64; ++i) words[i] |= others[i];
    return right == Tile::full ? Tile::full : Tile::partial;
  }
  Range keys(int64_t b, int64_t h, Range queries) const override {
    return hull(left_->keys(b, h, queries), right_->keys(b, h, queries));
  }
  Range queries(int64_t b, int64_t h, Range keys) const override {
    return hull(left_->queries(b, h, keys), right_->queries(b, h, keys));
  }

 private:
  static Range hull(Range a, Range b) {
    if (a.empty() || b.empty()) return a.empty() ? b : a;
    return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
  }

  const Node left_, right_;
};

class Not : public MaskNode {
 public:
  Not(const MaskShape& shape, Node inner) : MaskNode(shape), inner_(std::move(inner)) {}

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    const Tile inner = inner_->tile(at, order, words);
    if (inner == Tile::empty) return Tile::full;
    if (inner == Tile::full) return Tile::empty;
    for (int i = 0; i < 64; ++i) words[i] = ~words[i];
    return Tile::partial;
  }

 private:
  const Node inner_;
};

Node parse(const std::string& program, const MaskShape& shape, MaskArguments& arguments) {
  std::vector<Node> stack;
  const auto take = [&] {
    STD_TORCH_CHECK(!stack.empty(), "attention mask: an operand is missing in '", program, "'");
    Node top = std::move(stack.back());
    stack.pop_back();
    return top;
  };
  std::istringstream tokens(program);
  for (std::string token; tokens >> token;) {
    if (token == "~") {
      stack.push_back(std::make_unique<Not>(shape, take()));
    } else if (token == "&" || token == "|") {
      Node right = take(), left = take();
      if (token == "&")
        stack.push_back(std::make_unique<And>(shape, std::move(left), std::move(right)));
      else
        stack.push_back(std::make_unique<Or>(shape, std::move(left), std::move(right)));
    } else {
      Node leaf = mask_rule(token, shape, arguments);
      if (!leaf) leaf = mask_of_tensors(token, shape, arguments);
      STD_TORCH_CHECK(leaf, "attention mask: unknown token '", token, "'");
      stack.push_back(std::move(leaf));
    }
  }
  if (stack.empty()) return nullptr;
  Node root = take();
  STD_TORCH_CHECK(stack.empty() && arguments.all_taken(),
                  "attention mask: operands are left over in '", program, "'");
  return root;
}

}  // namespace

const Tensor& MaskArguments::tensor(ScalarType dtype, std::vector<int64_t> sizes, bool contiguous) {
  STD_TORCH_CHECK(next_tensor_ < tensors_.size(), "attention mask: too few tensors");
  Tensor& tensor = tensors_[next_tensor_++];
  bool fits = tensor.scalar_type() == dtype && tensor.dim() == int64_t(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d)
    fits = sizes[d] == -1 || tensor.size(int64_t(d)) == sizes[d];
  STD_TORCH_CHECK(fits, "attention mask: tensor ", next_tensor_ - 1, " has a wrong shape or dtype");
  if (contiguous && !tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
  return tensor;
}

AttentionMask::AttentionMask(const std::string& program, std::vector<int64_t> ints,
                             std::vector<Tensor> tensors, int64_t B, int64_t H, int64_t Nq,
                             int64_t Nk)
    : Nq_(Nq), Nk_(Nk), tensors_(std::move(tensors)) {
  MaskArguments arguments(std::move(ints), tensors_);
  root_ = parse(program, {B, H, Nq, Nk}, arguments);
}
AttentionMask::~AttentionMask() = default;
AttentionMask::AttentionMask(AttentionMask&&) noexcept = default;

Range AttentionMask::keys(int64_t b, int64_t h, int64_t q0, int64_t nq) const {
  return root_ ? root_->keys(b, h, {q0, q0 + nq}) : Range{0, Nk_};
}
Range AttentionMask::queries(int64_t b, int64_t h, int64_t k0, int64_t nk) const {
  return root_ ? root_->queries(b, h, {k0, k0 + nk}) : Range{0, Nq_};
}

Tile AttentionMask::tile(int64_t b, int64_t h, int64_t q0, int64_t nq, int64_t k0, int64_t nk,
                         uint64_t* words, BitOrder order) const {
  if (!root_) return Tile::full;
  const Tile state = root_->tile({b, h, q0, nq, k0, nk}, order, words);
  if (state != Tile::partial) return state;
  const bool by_key = order == BitOrder::by_key;
  const int64_t used = by_key ? nk : nq;
  const uint64_t valid = bits_below(by_key ? nq : nk);
  uint64_t any = 0, all = valid;
  if (used == 64) {
    for (int64_t i = 0; i < 64; ++i) any |= words[i] &= valid, all &= words[i];
  } else {
    for (int64_t i = 0; i < used; ++i) any |= words[i] &= valid, all &= words[i];
    std::fill(words + used, words + 64, 0);
  }
  return any == 0 ? Tile::empty : all == valid ? Tile::full : Tile::partial;
}

bool AttentionMask::rows(int64_t b, int64_t h, int64_t q0, int64_t nq, int64_t k0, int64_t nk,
                         uint64_t* words, int64_t stride) const {
  return root_ && root_->rows({b, h, q0, nq, k0, nk}, words, stride);
}

void AttentionMask::visible_keys(int64_t b, int64_t kv_head, int64_t group, uint8_t* seen) const {
  std::fill_n(seen, Nk_, uint8_t(0));
  uint64_t words[64];
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    for (int64_t q0 = 0; q0 < Nq_; q0 += 64) {
      const int64_t nq = std::min<int64_t>(64, Nq_ - q0);
      const Range bounds = keys(b, h, q0, nq);
      for (int64_t k0 = bounds.begin / 64 * 64; k0 < bounds.end; k0 += 64) {
        const int64_t nk = std::min<int64_t>(64, Nk_ - k0);
        const Tile state = tile(b, h, q0, nq, k0, nk, words);
        if (state == Tile::empty) continue;
        for (int64_t c = 0; c < nk; ++c)
          seen[k0 + c] |= uint8_t(state == Tile::full || words[c] != 0);
      }
    }
}

}  // namespace weft
