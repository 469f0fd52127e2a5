// Mask leaves that are rules: bands, lengths and neighbourhoods, evaluated in closed form.
#include "cpu/attention/mask_leaves.h"

namespace weft {
namespace {

// Sums of two of these and an index do not overflow, and no index reaches them.
constexpr int64_t kUnbounded = int64_t(1) << 60;

class Band : public MaskNode {
 public:
  Band(const MaskShape& shape, MaskArguments& arguments, bool with_shift) : MaskNode(shape) {
    lo_ = std::clamp(arguments.integer(), -2 * kUnbounded, 2 * kUnbounded);
    hi_ = std::clamp(arguments.integer(), -2 * kUnbounded, 2 * kUnbounded);
    if (!with_shift) return;
    const Tensor& shift = arguments.tensor(ScalarType::Long, {-1, shape.Nq});
    shift_ = data<int64_t>(shift), batches_ = shift.size(0);
  }

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    const Range centre = centres(at.b, {at.q0, at.q0 + at.nq});
    const int64_t first = centre.begin, last = centre.end - 1, k_last = at.k0 + at.nk - 1;
    if (last + hi_ < at.k0 || first + lo_ > k_last || lo_ > hi_) return Tile::empty;
    if (last + lo_ <= at.k0 && first + hi_ >= k_last) return Tile::full;
    if (!shift_ && order == BitOrder::by_key) {
      const int64_t begin = at.k0 - at.q0 - hi_, end = at.k0 - at.q0 - lo_ + 1;
      for (int64_t c = 0; c < 64; ++c) words[c] = bit_range(begin + c, end + c);
      return Tile::partial;
    }
    const int64_t begin = at.q0 - at.k0 + lo_, end = at.q0 - at.k0 + hi_ + 1;
    if (!shift_) {
      for (int64_t r = 0; r < 64; ++r) words[r] = bit_range(begin + r, end + r);
      return Tile::partial;
    }
    const int64_t* shift = shift_of(at.b) + at.q0;
    std::fill_n(words, 64, 0);
    for (int64_t r = 0; r < at.nq; ++r) {
      const int64_t s = bounded(shift[r]);
      words[r] = bit_range(begin + r + s, end + r + s);
    }
    if (order == BitOrder::by_key) transpose_bits(words);
    return Tile::partial;
  }

  Range keys(int64_t b, int64_t, Range queries) const override {
    if (lo_ > hi_) return {};
    const Range centre = centres(b, queries);
    return clipped(centre.begin + lo_, centre.end + hi_, shape_.Nk);
  }
  Range queries(int64_t, int64_t, Range keys) const override {
    if (shift_) return {0, shape_.Nq};
    return lo_ > hi_ ? Range{} : clipped(keys.begin - hi_, keys.end - lo_, shape_.Nq);
  }

 private:
  static int64_t bounded(int64_t shift) { return std::clamp(shift, -kUnbounded, kUnbounded); }
  const int64_t* shift_of(int64_t b) const { return shift_ + b % batches_ * shape_.Nq; }

  // The least and one beyond the largest i + shift.
  Range centres(int64_t b, Range queries) const {
    if (!shift_) return queries;
    const int64_t* shift = shift_of(b);
    int64_t least = 2 * kUnbounded, most = -2 * kUnbounded;
    for (int64_t i = queries.begin; i < queries.end; ++i) {
      const int64_t centre = i + bounded(shift[i]);
      least = std::min(least, centre), most = std::max(most, centre);
    }
    return {least, most + 1};
  }

  int64_t lo_, hi_, batches_ = 1;
  const int64_t* shift_ = nullptr;
};

class Lengths : public MaskNode {
 public:
  Lengths(const MaskShape& shape, MaskArguments& arguments, bool of_keys)
      : MaskNode(shape), of_keys_(of_keys) {
    const Tensor& lengths = arguments.tensor(ScalarType::Long, {-1});
    lengths_ = data<int64_t>(lengths), batches_ = lengths.size(0);
  }

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    const int64_t length = lengths_[at.b % batches_];
    const int64_t begin = of_keys_ ? at.k0 : at.q0, count = of_keys_ ? at.nk : at.nq;
    if (length <= begin) return Tile::empty;
    if (length >= begin + count) return Tile::full;
    spread_bits(bits_below(length - begin), of_keys_ == (order == BitOrder::by_key), words);
    return Tile::partial;
  }
  Range keys(int64_t b, int64_t, Range queries) const override {
    return seen(b, queries, of_keys_, shape_.Nk);
  }
  Range queries(int64_t b, int64_t, Range keys) const override {
    return seen(b, keys, !of_keys_, shape_.Nq);
  }

 private:
  Range seen(int64_t b, Range from, bool cut, int64_t n) const {
    const int64_t length = lengths_[b % batches_];
    if (cut) return clipped(0, length, n);
    return from.begin < length ? Range{0, n} : Range{};
  }

  const bool of_keys_;
  const int64_t* lengths_;
  int64_t batches_;
};

// One dimension of a neighbourhood: position p sees first[p], first[p] + dilation, ..., last[p].
// Index x of the sequence has the position x / step % length.
struct Axis {
  int64_t length, dilation, step = 1;
  uint64_t pattern = 0;  // bits 0, dilation, 2 dilation, ...
  std::vector<int64_t> first, last;

  Axis(int64_t length, int64_t kernel, int64_t dilation) : length(length), dilation(dilation) {
    STD_TORCH_CHECK(
        length >= 0 && kernel >= 1 && dilation >= 1 && (length == 0 || kernel <= length / dilation),
        "attention mask: a neighborhood needs 1 <= kernel * dilation <= shape, got ", kernel, " * ",
        dilation, " and ", length);
    for (int64_t bit = 0; bit < 64; bit += dilation) pattern |= uint64_t(1) << bit;
    for (int64_t p = 0; p < length; ++p) {
      const int64_t rest = p % dilation, members = ceil_div(length - rest, dilation);
      const int64_t start = std::clamp<int64_t>(p / dilation - kernel / 2, 0, members - kernel);
      first.push_back(start * dilation + rest);
      last.push_back((start + kernel - 1) * dilation + rest);
    }
  }

  int64_t period() const { return length * step; }

  // Where index x is, and a step on, without divisions.
  struct Place {
    int64_t position, within;
  };
  Place place(int64_t x) const { return {x / step % length, x % step}; }
  void advance(Place& place) const {
    if (++place.within < step) return;
    place.within = 0;
    if (++place.position == length) place.position = 0;
  }

  // The positions of [x0, x0 + n), without gaps.
  Range positions(int64_t x0, int64_t n) const {
    const int64_t from = x0 / step, to = (x0 + n - 1) / step;
    if (to / length != from / length) return {0, length};
    return {from % length, to % length + 1};
  }
  // What the positions of a range see lies in here.
  Range reach(Range positions) const {
    if (positions.size() == length) return positions;
    int64_t least = length, most = -1;
    for (int64_t p = positions.begin; p < positions.end; ++p)
      least = std::min(least, first[size_t(p)]), most = std::max(most, last[size_t(p)]);
    return {least, most + 1};
  }

  // Which of 64 indices in a row position p sees; x is the place of the first.
  uint64_t window(int64_t p, Place x) const {
    const int64_t begin = first[size_t(p)], end = last[size_t(p)] + 1;
    uint64_t bits = 0;
    int64_t other = x.position, within = x.within;
    for (int64_t at = 0; at < 64;) {
      if (step == 1) {  // positions other, other + 1, ... until the dimension ends
        const int64_t n = std::min(64 - at, length - other), from = begin - other;
        // The next member of the class at or after the start of the run.
        const int64_t skip = from >= 0       ? from
                             : dilation == 1 ? 0
                                             : from % dilation + dilation * (from % dilation < 0);
        if (skip < n) bits |= ((pattern << skip) & bits_below(std::min(end - other, n))) << at;
        at += n;
        other = 0;
      } else {  // the same position until the next multiple of step
        const int64_t n = std::min(64 - at, step - within);
        if (other >= begin && other < end && (dilation == 1 || (other - begin) % dilation == 0))
          bits |= bit_range(at, at + n);
        at += n;
        within = 0;
        if (++other == length) other = 0;
      }
    }
    return bits;
  }
};

class Neighborhood : public MaskNode {
 public:
  Neighborhood(const MaskShape& shape, MaskArguments& arguments) : MaskNode(shape) {
    const int64_t n = arguments.integer();
    STD_TORCH_CHECK(n >= 1 && n <= 8, "attention mask: a neighborhood of ", n, " dimensions");
    std::vector<int64_t> of[3];
    for (std::vector<int64_t>& values : of)
      for (int64_t d = 0; d < n; ++d) values.push_back(arguments.integer());
    for (size_t d = 0; d < size_t(n); ++d) axes_.emplace_back(of[0][d], of[1][d], of[2][d]);
    for (size_t d = size_t(n) - 1; d > 0; --d) axes_[d - 1].step = axes_[d].period();
    STD_TORCH_CHECK(axes_[0].period() == shape.Nq && axes_[0].period() == shape.Nk,
                    "attention mask: a neighborhood of ", axes_[0].period(), " positions for ",
                    shape.Nq, " queries and ", shape.Nk, " keys");
  }

  Tile tile(const MaskBlock& at, BitOrder order, uint64_t* words) const override {
    for (const Axis& axis : axes_) {
      const Range seen = axis.reach(axis.positions(at.q0, at.nq));
      const Range there = axis.positions(at.k0, at.nk);
      if (seen.end <= there.begin || there.end <= seen.begin) return Tile::empty;
    }
    std::fill_n(words, 64, ~uint64_t(0));
    for (const Axis& axis : axes_) {
      uint64_t windows[64];
      const Axis::Place k0 = axis.place(at.k0);
      Axis::Place query = axis.place(at.q0);
      for (int64_t r = 0; r < at.nq; ++r, axis.advance(query)) {
        windows[r] = r >= axis.period()          ? windows[r - axis.period()]
                     : r > 0 && query.within > 0 ? windows[r - 1]
                                                 : axis.window(query.position, k0);
        words[r] &= windows[r];
      }
    }
    if (order == BitOrder::by_key) transpose_bits(words);
    return Tile::partial;
  }

  Range keys(int64_t, int64_t, Range queries) const override {
    // Of the outer dimensions; the innermost one moves the bounds by less than it is long.
    int64_t begin = 0, end = 0;
    for (const Axis& axis : axes_) {
      const Range seen = axis.reach(axis.positions(queries.begin, queries.size()));
      begin += seen.begin * axis.step, end += (seen.end - 1) * axis.step;
    }
    return {begin, end + 1};
  }
  // By the outermost dimension only. In each class those who see a position are neighbours and it
  // is one of them: `dilation` positions in a row that see none of the keys end the search.
  Range queries(int64_t, int64_t, Range keys) const override {
    const Axis& outer = axes_[0];
    const Range there = outer.positions(keys.begin, keys.size());
    const auto sees = [&](int64_t p) {
      return outer.first[size_t(p)] < there.end && outer.last[size_t(p)] >= there.begin;
    };
    int64_t begin = there.begin, end = there.end;
    for (int64_t p = begin - 1; p >= 0 && begin - p <= outer.dilation; --p)
      if (sees(p)) begin = p;
    for (int64_t p = end; p < outer.length && p - end < outer.dilation; ++p)
      if (sees(p)) end = p + 1;
    return {begin * outer.step, end * outer.step};
  }

 private:
  std::vector<Axis> axes_;
};

}  // namespace

std::unique_ptr<MaskNode> mask_rule(const std::string& name, const MaskShape& shape,
                                    MaskArguments& arguments) {
  if (name == "band" || name == "band_rows")
    return std::make_unique<Band>(shape, arguments, name == "band_rows");
  if (name == "query_lengths" || name == "key_lengths")
    return std::make_unique<Lengths>(shape, arguments, name == "key_lengths");
  if (name == "neighborhood") return std::make_unique<Neighborhood>(shape, arguments);
  return nullptr;
}

}  // namespace weft
