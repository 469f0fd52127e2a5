// The k nearest codes:  d_ij = popcount(q_i xor c_j),  the first k of a row by (d, j).
//
// A code is words of 64 bits. Loop order: blocks of queries × parts of the database > blocks of
// codes, transposed to [word][code] in the second-level cache > vectors of codes > four queries, so
// that a word of a code is read once for four of them > words. Distances stay in registers: those
// not below the k-th best so far, nearly all, cost one comparison; the others go to a buffer of
// 2k or more, which is cut to its best k when it is full. Parts are merged at the end. The limit is
// the rate of xor, popcount and add: 3 instructions for 64 bits of 8 codes with AVX-512's popcount.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/registration.h"

namespace weft {
namespace {

constexpr int64_t kQueries = 32, kBlockBytes = 256 << 10, kTasks = 32;
constexpr int kTogether = 4;

// Order of candidates: distance, then index; both in one word, for codes below 2^40.
constexpr int kIndexBits = 40;
constexpr int64_t kIndexMask = (int64_t(1) << kIndexBits) - 1;

struct Best {
  std::vector<int64_t> keys;
  size_t k;
  int64_t bound = std::numeric_limits<int64_t>::max();  // distances from here on are of no use

  explicit Best(size_t k) : k(k) { keys.reserve(std::max<size_t>(2 * k, k + 64)); }

  void add(int64_t distance, int64_t index) {
    keys.push_back(distance << kIndexBits | index);
    if (keys.size() == keys.capacity()) cut();
  }
  void cut() {
    if (keys.size() < k) return;
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end());
    keys.resize(k);
    // Later codes have larger indices: at the same distance they come after.
    bound = keys[k - 1] >> kIndexBits;
  }
};

#if defined(__AVX512F__)
using Words = __m512i;
constexpr int64_t kLanes = 8;

inline Words popcount(Words x) {
#if defined(__AVX512VPOPCNTDQ__)
  return _mm512_popcnt_epi64(x);
#else
  const Words nibble = _mm512_set1_epi8(15);
  const Words table = _mm512_maskz_broadcast_i32x4(
      0xffff, _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Words low = _mm512_shuffle_epi8(table, _mm512_and_si512(x, nibble));
  const Words high =
      _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_maskz_srli_epi64(0xff, x, 4), nibble));
  return _mm512_sad_epu8(_mm512_add_epi8(low, high), _mm512_setzero_si512());
#endif
}
inline Words load(const uint64_t* p) { return _mm512_loadu_si512(p); }
inline Words broadcast(uint64_t x) { return _mm512_set1_epi64(int64_t(x)); }
inline Words zero() { return _mm512_setzero_si512(); }
inline Words add_difference(Words sum, Words a, Words b) {
  return _mm512_add_epi64(sum, popcount(_mm512_xor_si512(a, b)));
}
// One bit for each lane below the bound.
inline unsigned below(Words distance, Words bound) {
  return _mm512_cmplt_epi64_mask(distance, bound);
}
inline void store(Words x, int64_t* p) { _mm512_storeu_si512(p, x); }
#elif defined(__AVX2__)
using Words = __m256i;
constexpr int64_t kLanes = 4;

inline Words load(const uint64_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Words broadcast(uint64_t x) { return _mm256_set1_epi64x(int64_t(x)); }
inline Words zero() { return _mm256_setzero_si256(); }
inline Words add_difference(Words sum, Words a, Words b) {
  const Words x = _mm256_xor_si256(a, b), nibble = _mm256_set1_epi8(15);
  const Words table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Words low = _mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble));
  const Words high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi64(x, 4), nibble));
  return _mm256_add_epi64(sum, _mm256_sad_epu8(_mm256_add_epi8(low, high), zero()));
}
inline unsigned below(Words distance, Words bound) {
  return unsigned(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(bound, distance))));
}
inline void store(Words x, int64_t* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
#else
using Words = uint64_t;
constexpr int64_t kLanes = 1;

inline Words load(const uint64_t* p) { return *p; }
inline Words broadcast(uint64_t x) { return x; }
inline Words zero() { return 0; }
inline Words add_difference(Words sum, Words a, Words b) {
  return sum + uint64_t(std::popcount(a ^ b));
}
inline unsigned below(Words distance, Words bound) { return distance < bound; }
inline void store(Words x, int64_t* p) { *p = int64_t(x); }
#endif

struct Codes {
  const uint8_t* data;
  int64_t count, bytes;

  int64_t words() const { return (bytes + 7) / 8; }
  uint64_t word(int64_t i, int64_t w) const {  // the bytes that are not there are 0 on both sides
    uint64_t value = 0;
    std::memcpy(&value, data + i * bytes + 8 * w, size_t(std::min<int64_t>(8, bytes - 8 * w)));
    return value;
  }
};

// Adds the lanes that are hits: distances of the codes from j on, of which `left` exist. Out of
// line: it is rare, and inlined it takes registers from the scan.
[[gnu::noinline]] void take(Words sum, unsigned hits, int64_t left, int64_t j, Best& best) {
  int64_t distance[kLanes];
  store(sum, distance);
  for (; hits; hits &= hits - 1) {
    const int lane = std::countr_zero(hits);
    if (lane < left && distance[lane] < best.bound) best.add(distance[lane], j + lane);
  }
}

// The first n of kTogether queries against m transposed codes, the first of which is j0. The words
// of the queries stay in registers where their number is known.
template <int kWords>
void scan(const uint64_t* queries, int64_t words, int n, const uint64_t* codes, int64_t stride,
          int64_t m, int64_t j0, Best* best) {
  if (kWords) words = kWords;
  Words query[kTogether][std::max(kWords, 1)], bound[kTogether];
  for (int q = 0; q < kTogether; ++q) {
    for (int w = 0; w < kWords; ++w) query[q][w] = broadcast(queries[q * words + w]);
    bound[q] = broadcast(q < n ? uint64_t(best[q].bound) : 0);  // of none, no distance is below
  }
  for (int64_t j = 0; j < m; j += kLanes) {
    Words sum[kTogether] = {zero(), zero(), zero(), zero()};
#pragma GCC unroll 4
    for (int64_t w = 0; w < words; ++w) {
      const Words code = load(codes + w * stride + j);
#pragma GCC unroll 4
      for (int q = 0; q < kTogether; ++q)
        sum[q] = add_difference(
            sum[q], kWords ? query[q][kWords ? w : 0] : broadcast(queries[q * words + w]), code);
    }
    unsigned hits[kTogether], any = 0;
#pragma GCC unroll 4
    for (int q = 0; q < kTogether; ++q) any |= hits[q] = below(sum[q], bound[q]);
    if (!any) continue;
#pragma GCC unroll 4
    for (int q = 0; q < kTogether; ++q) {
      if (!hits[q]) continue;
      take(sum[q], hits[q], m - j, j0 + j, best[q]);
      bound[q] = broadcast(uint64_t(best[q].bound));
    }
  }
}

// The best of a block of queries among the codes [begin, end).
void search(const Codes& queries, int64_t q0, int64_t n, const Codes& codes, int64_t begin,
            int64_t end, Best* best) {
  static thread_local Scratch query_storage, code_storage;
  const int64_t words = codes.words();
  const int64_t block =
      std::max<int64_t>(64, kBlockBytes / (8 * std::max<int64_t>(words, 1)) / 64 * 64);
  uint64_t* packed = query_storage.get<uint64_t>((n + kTogether) * words);
  std::fill_n(packed, (n + kTogether) * words, 0);
  for (int64_t q = 0; q < n; ++q)
    for (int64_t w = 0; w < words; ++w) packed[q * words + w] = queries.word(q0 + q, w);
  const auto chosen = words == 1 ? scan<1> : words == 2 ? scan<2> : words == 4 ? scan<4> : scan<0>;
  uint64_t* transposed = code_storage.get<uint64_t>(words * block + 8);
  for (int64_t j0 = begin; j0 < end; j0 += block) {
    const int64_t m = std::min(block, end - j0);
    for (int64_t j = 0; j < m; ++j)
      for (int64_t w = 0; w < words; ++w) transposed[w * block + j] = codes.word(j0 + j, w);
    for (int64_t q = 0; q < n; q += kTogether)
      chosen(packed + q * words, words, int(std::min<int64_t>(kTogether, n - q)), transposed, block,
             m, j0, best + q);
  }
}

void hamming(const Codes& queries, const Codes& codes, int64_t k, int32_t* distances,
             int64_t* indices) {
  const int64_t blocks = (queries.count + kQueries - 1) / kQueries;
  if (blocks == 0 || k == 0) return;
  const int64_t parts = std::max<int64_t>(
      1, std::min<int64_t>((kTasks + blocks - 1) / blocks, codes.count / (4 * (k + 64))));
  std::vector<Best> best(size_t(blocks * kQueries * parts), Best(0));
  parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t q0 = task / parts * kQueries, part = task % parts;
      const int64_t n = std::min(kQueries, queries.count - q0);
      Best* mine = best.data() + task * kQueries;
      for (int64_t q = 0; q < n; ++q) mine[q] = Best(size_t(std::min(k, codes.count)));
      search(queries, q0, n, codes, codes.count * part / parts, codes.count * (part + 1) / parts,
             mine);
    }
  });
  parallel_for(0, queries.count, 16, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> keys;
    for (int64_t q = begin; q < end; ++q) {
      keys.clear();
      for (int64_t part = 0; part < parts; ++part) {
        const auto& some = best[size_t((q / kQueries * parts + part) * kQueries + q % kQueries)];
        keys.insert(keys.end(), some.keys.begin(), some.keys.end());
      }
      const int64_t found = std::min(k, int64_t(keys.size()));
      std::partial_sort(keys.begin(), keys.begin() + found, keys.end());
      for (int64_t r = 0; r < k; ++r) {
        const bool there = r < found;
        distances[q * k + r] =
            there ? int32_t(keys[size_t(r)] >> kIndexBits) : std::numeric_limits<int32_t>::max();
        indices[q * k + r] = there ? keys[size_t(r)] & kIndexMask : -1;
      }
    }
  });
}

Codes codes_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.dim() == 2 && t.is_contiguous(),
                  "hamming_topk: ", name, " must be 2-d, uint8 and contiguous");
  return {data<uint8_t>(t), t.size(0), t.size(1)};
}

std::tuple<Tensor, Tensor> hamming_topk(const Tensor& queries, const Tensor& database, int64_t k) {
  const Codes of_queries = codes_of(queries, "queries"), codes = codes_of(database, "database");
  STD_TORCH_CHECK(of_queries.bytes == codes.bytes && k >= 0,
                  "hamming_topk: codes must have one length");
  STD_TORCH_CHECK(codes.count <= kIndexMask && codes.bytes <= (1 << 20),
                  "hamming_topk: too many codes, or too long");
  Tensor distances = torch::stable::new_empty(queries, {queries.size(0), k}, ScalarType::Int);
  Tensor indices = torch::stable::new_empty(queries, {queries.size(0), k}, ScalarType::Long);
  hamming(of_queries, codes, k, mutable_data<int32_t>(distances), mutable_data<int64_t>(indices));
  return {distances, indices};
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("hamming_topk(Tensor queries, Tensor database, int k) -> (Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) { m.impl("hamming_topk", TORCH_BOX(&hamming_topk)); }

}  // namespace weft
