// Mask leaves that are tensors: segments, blocks, dense and packed masks.
#include <limits>

#include "cpu/attention/mask_leaves.h"

namespace weft {
namespace {

// Where the planes of a tensor of shape (B', H', ...) are.
struct Planes {
  int64_t batches, heads, batch_stride, head_stride;

  explicit Planes(const Tensor& t)
      : batches(t.size(0)), heads(t.size(1)), batch_stride(t.stride(0)), head_stride(t.stride(1)) {}
  int64_t offset(int64_t b, int64_t h) const {
    return b % batches * batch_stride + h % heads * head_stride;
  }
  int64_t index(int64_t b, int64_t h) const { return b % batches * heads + h % heads; }
  int64_t count() const { return batches * heads; }
};

// ---- segments ----

// Identities of queries or keys, with the least and the largest of each 64.
class Ids {
 public:
  Ids(const Tensor& ids) : planes_(ids), ids_(data<int64_t>(ids)), n_(ids.size(2)) {
    const int64_t blocks = ceil_div(n_, 64);
    bounds_.resize(size_t(planes_.count() * blocks));
    parallel_for(0, planes_.count() * blocks, 256, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block % blocks * 64, last = std::min(first + 64, n_);
        const int64_t* of_plane = ids_ + block / blocks * n_;
        Bounds bounds;
        for (int64_t i = first; i < last; ++i) bounds.add({of_plane[i], of_plane[i]});
        bounds_[size_t(block)] = bounds;
      }
    });
  }

  struct Bounds {
    int64_t least = std::numeric_limits<int64_t>::max();
    int64_t most = std::numeric_limits<int64_t>::min();

    void add(Bounds other) {
      least = std::min(least, other.least), most = std::max(most, other.most);
    }
    bool meets(Bounds other) const { return least <= other.most && other.least <= most; }
    bool same(Bounds other) const {
      return least == most && other.least == least && other.most == least;
    }
  };

  const int64_t* plane(int64_t b, int64_t h) const { return ids_ + planes_.index(b, h) * n_; }

  // Of the blocks of 64 that the range touches.
  Bounds bounds(int64_t b, int64_t h, Range range) const {
    Bounds result;
    const Bounds* blocks = blocks_of(b, h);
    for (int64_t i = range.begin / 64; i * 64 < range.end; ++i) result.add(blocks[i]);
    return result;
  }
  // From the first to the last block of 64 that has ids within these bounds.
  Range meeting(int64_t b, int64_t h, Bounds bounds) const {
    const Bounds* blocks = blocks_of(b, h);
    int64_t begin = 0, end = ceil_div(n_, 64);
    while (begin < end && !blocks[begin].meets(bounds)) ++begin;
    while (begin < end && !blocks[end - 1].meets(bounds)) --end;
    return clipped(begin * 64, end * 64, n_);
  }

 private:
  const Bounds* blocks_of(int64_t b, int64_t h) const {
    return bounds_.data() + planes_.index(b, h) * ceil_div(n_, 64);
  }

  const Planes planes_;
  const int64_t* ids_;
  const int64_t n_;
  std::vector<Bounds> bounds_;
};

// Bit i: ids[i] == id.
uint64_t equal_bits(const int64_t* ids, int64_t id) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  const __m512i wanted = _mm512_set1_epi64(id);
  for (int i = 0; i < 64; i += 8)
    bits |= uint64_t(_mm512_cmpeq_epi64_mask(_mm512_loadu_si512(ids + i), wanted)) << i;
#elif defined(__AVX2__)
  const __m256i wanted = _mm256_set1_epi64x(id);
  for (int i = 0; i < 64; i += 4) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids + i));
    const __m256d equal = _mm256_castsi256_pd(_mm256_cmpeq_epi64(some, wanted));
    bits |= uint64_t(_mm256_movemask_pd(equal)) << i;
  }
#else
  for (int i = 0; i < 64; ++i) bits |= uint64_t(ids[i] == id) << i;
#endif
  return bits;
}

class Segments : public MaskNode {
 public:
  Segments(const MaskShape& shape, const Tensor& queries, const Tensor& keys)
      : MaskNode(shape), queries_(queries), keys_(keys) {}

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    const auto queries = queries_.bounds(at.b, at.h, {at.q0, at.q0 + at.nq});
    const auto keys = keys_.bounds(at.b, at.h, {at.k0, at.k0 + at.nk});
    if (!queries.meets(keys)) return Tile::empty;
    if (queries.same(keys)) return Tile::full;
    const int64_t* of_queries = queries_.plane(at.b, at.h) + at.q0;
    const int64_t* of_keys = keys_.plane(at.b, at.h) + at.k0;
    if (order == BitOrder::by_key)
      compare(of_keys, at.nk, of_queries, at.nq, words);
    else
      compare(of_queries, at.nq, of_keys, at.nk, words);
    return Tile::partial;
  }
  Range keys(int64_t b, int64_t h, Range queries) const override {
    return keys_.meeting(b, h, queries_.bounds(b, h, queries));
  }
  Range queries(int64_t b, int64_t h, Range keys) const override {
    return queries_.meeting(b, h, keys_.bounds(b, h, keys));
  }

 private:
  static void compare(const int64_t* of_words, int64_t words_used, const int64_t* of_bits,
                      int64_t bits_used, uint64_t* words) {
    int64_t padded[64];
    if (bits_used < 64) {
      std::fill(std::copy_n(of_bits, bits_used, padded), padded + 64, 0);
      of_bits = padded;
    }
    std::fill(words + words_used, words + 64, 0);
    for (int64_t w = 0; w < words_used; ++w)  // ids come in runs
      words[w] =
          w > 0 && of_words[w] == of_words[w - 1] ? words[w - 1] : equal_bits(of_bits, of_words[w]);
  }

  const Ids queries_, keys_;
};

// ---- blocks ----

class Blocks : public MaskNode {
 public:
  Blocks(const MaskShape& shape, int64_t block_q, int64_t block_k, const Tensor& seen)
      : MaskNode(shape),
        planes_(seen),
        seen_(data<uint8_t>(seen)),
        block_q_(block_q),
        block_k_(block_k),
        columns_(seen.size(3)) {}

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    const uint8_t* seen = seen_ + planes_.offset(at.b, at.h);
    const int64_t q_end = at.q0 + at.nq, k_end = at.k0 + at.nk;
    bool some = false, every = true;
    for (int64_t i = at.q0 / block_q_; i * block_q_ < q_end; ++i)
      for (int64_t j = at.k0 / block_k_; j * block_k_ < k_end; ++j) {
        const bool one = seen[i * columns_ + j];
        some |= one, every &= one;
      }
    if (!some) return Tile::empty;
    if (every) return Tile::full;
    std::fill_n(words, 64, 0);
    if (order == BitOrder::by_key)
      fill(seen, at.k0, at.nk, block_k_, 1, at.q0, at.nq, block_q_, columns_, words);
    else
      fill(seen, at.q0, at.nq, block_q_, columns_, at.k0, at.nk, block_k_, 1, words);
    return Tile::partial;
  }
  Range keys(int64_t b, int64_t h, Range queries) const override {
    return hull(seen_ + planes_.offset(b, h), queries, block_q_, columns_, block_k_, 1, shape_.Nk);
  }
  Range queries(int64_t b, int64_t h, Range keys) const override {
    return hull(seen_ + planes_.offset(b, h), keys, block_k_, 1, block_q_, columns_, shape_.Nq);
  }

 private:
  static void fill(const uint8_t* seen, int64_t w0, int64_t nw, int64_t block_w, int64_t stride_w,
                   int64_t x0, int64_t nx, int64_t block_x, int64_t stride_x, uint64_t* words) {
    for (int64_t i = w0 / block_w; i * block_w < w0 + nw; ++i) {
      uint64_t bits = 0;
      for (int64_t j = x0 / block_x; j * block_x < x0 + nx; ++j)
        if (seen[i * stride_w + j * stride_x])
          bits |= bit_range(j * block_x - x0, (j + 1) * block_x - x0);
      const int64_t first = std::max<int64_t>(i * block_w - w0, 0);
      std::fill(words + first, words + std::min((i + 1) * block_w - w0, nw), bits);
    }
  }
  // The bounds, on the other side of n, of what the blocks of `from` have to do with.
  static Range hull(const uint8_t* seen, Range from, int64_t block, int64_t stride, int64_t other,
                    int64_t other_stride, int64_t n) {
    const int64_t first = from.begin / block, last = ceil_div(from.end, block);
    const auto any = [&](int64_t j) {
      for (int64_t i = first; i < last; ++i)
        if (seen[i * stride + j * other_stride]) return true;
      return false;
    };
    int64_t begin = 0, end = ceil_div(n, other);
    while (begin < end && !any(begin)) ++begin;
    while (begin < end && !any(end - 1)) --end;
    return clipped(begin * other, end * other, n);
  }

  const Planes planes_;
  const uint8_t* seen_;
  const int64_t block_q_, block_k_, columns_;
};

// ---- dense ----

class Dense : public MaskNode {
 public:
  Dense(const MaskShape& shape, const Tensor& seen)
      : MaskNode(shape),
        planes_(seen),
        seen_(data<uint8_t>(seen)),
        query_stride_(seen.size(2) == 1 ? 0 : seen.stride(2)),
        key_stride_(seen.size(3) == 1 ? 0 : seen.stride(3)) {}

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    const uint8_t* seen = seen_ + planes_.offset(at.b, at.h);
    seen += at.q0 * query_stride_ + at.k0 * key_stride_;
    if (query_stride_ == 0 || key_stride_ == 0) {
      const bool per_key = query_stride_ == 0;
      const int64_t n = per_key ? at.nk : at.nq;
      const uint64_t some = bits_of(seen, per_key ? key_stride_ : query_stride_, n);
      if (some == 0 || some == bits_below(n)) return some == 0 ? Tile::empty : Tile::full;
      spread_bits(some, per_key == (order == BitOrder::by_key), words);
      return Tile::partial;
    }
    const bool by_key = std::abs(query_stride_) < std::abs(key_stride_);  // as it lies in memory
    const int64_t n = by_key ? at.nk : at.nq, inner = by_key ? at.nq : at.nk;
    const int64_t stride = by_key ? key_stride_ : query_stride_;
    for (int64_t i = 0; i < n; ++i) {
      __builtin_prefetch(seen + i * stride + 128);
      words[i] = bits_of(seen + i * stride, by_key ? query_stride_ : key_stride_, inner);
    }
    std::fill(words + n, words + 64, 0);
    if (by_key != (order == BitOrder::by_key)) transpose_bits(words);
    return Tile::partial;
  }
  bool rows(const MaskBlock& at, uint64_t* words, int64_t stride) const override {
    if (key_stride_ != 1) return false;
    const uint8_t* seen = seen_ + planes_.offset(at.b, at.h) + at.q0 * query_stride_ + at.k0;
    for (int64_t r = 0; r < at.nq; ++r, seen += query_stride_, words += stride)
      for (int64_t c = 0; c < at.nk; c += 64)
        words[c / 64] = bytes_to_bits(seen + c, std::min<int64_t>(64, at.nk - c));
    return true;
  }

 private:
  static uint64_t bits_of(const uint8_t* seen, int64_t stride, int64_t n) {
    if (stride == 1) return bytes_to_bits(seen, n);
    if (stride == 0) return *seen ? bits_below(n) : 0;
    uint64_t bits = 0;
    for (int64_t i = 0; i < n; ++i) bits |= uint64_t(seen[i * stride] != 0) << i;
    return bits;
  }

  const Planes planes_;
  const uint8_t* seen_;
  const int64_t query_stride_, key_stride_;
};

// ---- bits ----

class PackedBits : public MaskNode {
 public:
  PackedBits(const MaskShape& shape, const Tensor& bits, const Tensor& states)
      : MaskNode(shape),
        planes_(bits),
        bits_(data<uint64_t>(bits)),
        states_(data<Tile>(states)),
        one_row_(bits.size(2) == 1),
        tile_rows_(states.size(2)),
        columns_(bits.size(3)) {}

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    const Range rows = tile_rows({at.q0, at.q0 + at.nq});
    const Tile* states = states_of(at.b, at.h) + at.k0 / 64;
    Tile state = states[rows.begin * columns_];
    for (int64_t i = rows.begin + 1; i < rows.end; ++i)
      if (states[i * columns_] != state) state = Tile::partial;
    if (state != Tile::partial) return state;
    const int64_t height = one_row_ ? 1 : shape_.Nq;
    const uint64_t* bits = bits_ + planes_.index(at.b, at.h) * height * columns_ + at.k0 / 64;
    if (one_row_) {
      spread_bits(*bits, order == BitOrder::by_key, words);
      return Tile::partial;
    }
    bits += at.q0 * columns_;
    for (int64_t r = 0; r < at.nq; ++r) words[r] = bits[r * columns_];
    std::fill(words + at.nq, words + 64, 0);
    if (order == BitOrder::by_key) transpose_bits(words);
    return Tile::partial;
  }
  Range keys(int64_t b, int64_t h, Range queries) const override {
    return hull(states_of(b, h), tile_rows(queries), columns_, columns_, 1, shape_.Nk);
  }
  Range queries(int64_t b, int64_t h, Range keys) const override {
    const Range columns{keys.begin / 64, ceil_div(keys.end, 64)};
    const Range seen = hull(states_of(b, h), columns, 1, tile_rows_, columns_, shape_.Nq);
    return one_row_ && !seen.empty() ? Range{0, shape_.Nq} : seen;
  }

 private:
  Range tile_rows(Range queries) const {
    return one_row_ ? Range{0, 1} : Range{queries.begin / 64, ceil_div(queries.end, 64)};
  }
  const Tile* states_of(int64_t b, int64_t h) const {
    return states_ + planes_.index(b, h) * tile_rows_ * columns_;
  }
  static Range hull(const Tile* states, Range from, int64_t stride, int64_t tiles,
                    int64_t tile_stride, int64_t n) {
    const auto any = [&](int64_t j) {
      for (int64_t i = from.begin; i < from.end; ++i)
        if (states[i * stride + j * tile_stride] != Tile::empty) return true;
      return false;
    };
    int64_t begin = 0, end = tiles;
    while (begin < end && !any(begin)) ++begin;
    while (begin < end && !any(end - 1)) --end;
    return clipped(begin * 64, end * 64, n);
  }

  const Planes planes_;
  const uint64_t* bits_;
  const Tile* states_;
  const bool one_row_;
  const int64_t tile_rows_, columns_;
};

// A dimension that may be 1 in place of n.
int64_t rows_or_one(const Tensor& t, int64_t dim, int64_t n) {
  return t.dim() > dim && t.size(dim) == 1 ? 1 : n;
}

}  // namespace

std::unique_ptr<MaskNode> mask_of_tensors(const std::string& name, const MaskShape& shape,
                                          MaskArguments& arguments) {
  if (name == "segments") {
    const Tensor& queries = arguments.tensor(ScalarType::Long, {-1, -1, shape.Nq});
    const Tensor& keys = arguments.tensor(ScalarType::Long, {-1, -1, shape.Nk});
    return std::make_unique<Segments>(shape, queries, keys);
  }
  if (name == "blocks") {
    const int64_t block_q = arguments.integer(), block_k = arguments.integer();
    STD_TORCH_CHECK(block_q >= 1 && block_k >= 1, "attention mask: blocks must be at least 1 x 1");
    const Tensor& seen = arguments.tensor(
        ScalarType::Bool, {-1, -1, ceil_div(shape.Nq, block_q), ceil_div(shape.Nk, block_k)});
    return std::make_unique<Blocks>(shape, block_q, block_k, seen);
  }
  if (name == "dense") {
    const Tensor& seen = arguments.tensor(ScalarType::Bool, {-1, -1, -1, -1}, false);
    for (int64_t dim : {2, 3}) {
      const int64_t n = dim == 2 ? shape.Nq : shape.Nk;
      STD_TORCH_CHECK(seen.size(dim) == rows_or_one(seen, dim, n),
                      "attention mask: a dense mask has ", seen.size(dim), " in place of ", n);
    }
    return std::make_unique<Dense>(shape, seen);
  }
  if (name == "bits") {
    const int64_t columns = ceil_div(shape.Nk, 64);
    const Tensor& bits = arguments.tensor(ScalarType::Long, {-1, -1, -1, columns});
    const int64_t rows = rows_or_one(bits, 2, shape.Nq);
    STD_TORCH_CHECK(bits.size(2) == rows, "attention mask: packed bits have ", bits.size(2),
                    " rows in place of ", rows);
    const Tensor& states = arguments.tensor(
        ScalarType::Byte, {bits.size(0), bits.size(1), ceil_div(rows, 64), columns});
    return std::make_unique<PackedBits>(shape, bits, states);
  }
  return nullptr;
}

}  // namespace weft
