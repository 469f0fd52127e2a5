// The work of one block of threads of the Grassmann step: one class. The formulas are those of
// csrc/cpu/pairwise/grassmann_step.cpp, and the k × k functions are the same code.
//
// Its columns pass through shared memory in chunks of rows, one register tile of four results per
// thread and chunk. Where P and H of the whole class fit, they stay there and each operand is read
// and written once; else each pass reads its chunks again (from the second-level cache) and
// computes H again. Partial sums are combined in a fixed order.
#pragma once
#include <cstdint>

#include "common/grassmann.h"

namespace weft::grassmann {

constexpr int kThreads = 256;
constexpr int kMaxColumns = 32;
constexpr int kMatrices = 4 + kWork;

struct Operand {
  float* data;
  int64_t stride_c, stride_d, stride_k;
};

struct Step {
  Operand basis, buffer, grad;  // grad.data may be null
  const int64_t* dims;          // may be null
  int64_t D;
  int k;
  double alpha;
  float momentum, gain;
  Reorth reorth;
  bool transport, resident;
};

struct Block {
  static constexpr bool alone = false;
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
};

__host__ __device__ constexpr int padded(int k) { return (k + 3) / 4 * 4; }
// Rows of a chunk: a thread for each four columns of each row.
__host__ __device__ constexpr int chunk_rows(int columns) { return kThreads / (columns / 4); }
// Floats between rows of a tile: four more than columns spread them over the banks.
__host__ __device__ constexpr int row_stride(int columns) { return columns + 4; }

// Shared memory: matrices in double, sums of the threads in double, coefficients, tiles of P and H.
struct Layout {
  int64_t matrices, sums, coefficients, tile, bytes;
  __host__ __device__ Layout(int k, int64_t D, bool resident) {
    const int columns = padded(k), rows = chunk_rows(columns);
    const int64_t tile_rows = resident ? (D + rows - 1) / rows * rows : rows;
    matrices = 0;
    sums = matrices + int64_t(kMatrices * k * k + k + k % 2) * 8;
    coefficients = sums + kThreads * 4 * 8;
    tile = coefficients + 4 * columns * columns * 4;
    // A ragged class of few columns has chunks of at most 2048 floats.
    const int64_t floats = tile_rows * row_stride(columns);
    bytes = tile + 2 * (floats > 2048 ? floats : 2048) * 4;
  }
};

// Class c of the step is block c.
class Class {
 public:
  __device__ Class(const Step& step, char* shared)
      : step_(step), c_(blockIdx.x), layout_(step.k, step.D, step.resident) {
    int64_t used = step.k;
    if (step.dims) used = min(max(step.dims[c_], int64_t(0)), int64_t(step.k));
    k_ = int(used);
    columns_ = padded(k_), groups_ = columns_ / 4;
    rows_ = groups_ ? chunk_rows(columns_) : 1;
    chunks_ = (step.D + rows_ - 1) / rows_;
    matrices_ = reinterpret_cast<double*>(shared + layout_.matrices);
    sums_ = reinterpret_cast<double*>(shared + layout_.sums);
    coefficients_ = reinterpret_cast<float*>(shared + layout_.coefficients);
    p_ = reinterpret_cast<float*>(shared + layout_.tile);
    const int64_t tile_rows = step.resident ? chunks_ * rows_ : rows_;
    h_ = p_ + tile_rows * row_stride(columns_);
  }

  __device__ void run() {
    clear_padding();
    if (k_ == 0) return;
    double *m = matrix(0), *cosine = matrix(1), *sine = matrix(2), *radial = matrix(3);
    project();
    tangent(m);
    geodesic(Block(), k_, step_.alpha, m, cosine, sine, radial, matrix(4));
    coefficients(0, cosine, 1);
    coefficients(1, sine, 1);
    coefficients(2, radial, -1);
    move();
    if (step_.reorth != Reorth::none) orthonormalize();
  }

 private:
  __device__ double* matrix(int i) const { return matrices_ + i * step_.k * step_.k; }
  __device__ float* coefficient(int i) const { return coefficients_ + i * columns_ * columns_; }
  __device__ float* tile(float* first, int64_t chunk) const {
    return step_.resident ? first + chunk * rows_ * row_stride(columns_) : first;
  }
  __device__ float* global(const Operand& operand, int64_t d, int j) const {
    return operand.data + c_ * operand.stride_c + d * operand.stride_d + j * operand.stride_k;
  }

  __device__ void clear_padding() const {
    const int64_t empty = int64_t(step_.k - k_) * step_.D;
    for (int64_t e = threadIdx.x; e < empty; e += kThreads) {
      *global(step_.basis, e % step_.D, k_ + int(e / step_.D)) = 0;
      *global(step_.buffer, e % step_.D, k_ + int(e / step_.D)) = 0;
    }
  }

  // (row, column) of element e of a chunk, so that neighbouring threads are neighbours in memory.
  __device__ void place(const Operand& operand, int e, int& row, int& column) const {
    if (operand.stride_d == 1) {
      row = e % rows_, column = e / rows_;
    } else {
      row = e / columns_, column = e % columns_;
    }
  }

  __device__ void load(const Operand& operand, int64_t chunk, float* to, float factor,
                       bool accumulate) const {
    for (int e = threadIdx.x; e < rows_ * columns_; e += kThreads) {
      int row, column;
      place(operand, e, row, column);
      const int64_t d = chunk * rows_ + row;
      const bool inside = d < step_.D && column < k_;
      const float value = inside ? factor * *global(operand, d, column) : 0.f;
      float& at = to[row * row_stride(columns_) + column];
      at = accumulate ? at + value : value;
    }
  }

  __device__ void store(const Operand& operand, int64_t chunk, const float* from) const {
    for (int e = threadIdx.x; e < rows_ * columns_; e += kThreads) {
      int row, column;
      place(operand, e, row, column);
      const int64_t d = chunk * rows_ + row;
      if (d < step_.D && column < k_)
        *global(operand, d, column) = from[row * row_stride(columns_) + column];
    }
  }

  // sum[4] += Σ over this thread's rows of a[row][i] b[row][j..j+3]; a chunk in T, chunks in
  // double.
  template <typename T>
  __device__ void gram(const float* a, const float* b, double (&sum)[4]) const {
    const int tiles = columns_ * groups_, slices = kThreads / tiles;
    const int slice = threadIdx.x / tiles, i = threadIdx.x % tiles / groups_;
    const int j = threadIdx.x % groups_ * 4;
    if (slice >= slices) return;
    T part[4] = {};
    for (int row = slice; row < rows_; row += slices) {
      const T left = a[row * row_stride(columns_) + i];
      const float4 right = *reinterpret_cast<const float4*>(b + row * row_stride(columns_) + j);
      part[0] += left * T(right.x), part[1] += left * T(right.y);
      part[2] += left * T(right.z), part[3] += left * T(right.w);
    }
    for (int n = 0; n < 4; ++n) sum[n] += part[n];
  }

  // The matrix of all threads' sums.
  __device__ void reduce(const double (&sum)[4], double* out) {
    const int tiles = columns_ * groups_, slices = kThreads / tiles;
    __syncthreads();
    for (int n = 0; n < 4; ++n) sums_[threadIdx.x * 4 + n] = sum[n];
    __syncthreads();
    for (int e = threadIdx.x; e < k_ * k_; e += kThreads) {
      const int i = e / k_, j = e % k_;
      double total = 0;
      for (int s = 0; s < slices; ++s)
        total += sums_[(s * tiles + i * groups_ + j / 4) * 4 + j % 4];
      out[e] = total;
    }
    __syncthreads();
  }

  __device__ void coefficients(int number, const double* matrix, double factor) {
    float* out = coefficient(number);
    for (int e = threadIdx.x; e < columns_ * columns_; e += kThreads) {
      const int i = e / columns_, j = e % columns_;
      out[e] = i < k_ && j < k_ ? float(factor * matrix[i * k_ + j]) : 0.f;
    }
    __syncthreads();
  }

  // sum (+)= Σ_i a[row][i] c[i][j..j+3] for this thread's row and columns.
  __device__ void combine(const float* a, const float* c, float4& sum) const {
    const int row = threadIdx.x / groups_, j = threadIdx.x % groups_ * 4;
    if (row >= rows_) return;
    for (int i = 0; i < columns_; ++i) {
      const float value = a[row * row_stride(columns_) + i];
      const float4 factor = *reinterpret_cast<const float4*>(c + i * columns_ + j);
      sum.x += value * factor.x, sum.y += value * factor.y;
      sum.z += value * factor.z, sum.w += value * factor.w;
    }
  }
  __device__ float4* own(float* t) const {
    const int row = threadIdx.x / groups_, j = threadIdx.x % groups_ * 4;
    return reinterpret_cast<float4*>(t + row * row_stride(columns_) + j);
  }
  __device__ bool has_own() const { return threadIdx.x / groups_ < rows_; }

  // P and G into their tiles; coefficients 3 are −PᵀG.
  __device__ void project() {
    double sum[4] = {};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      float *p = tile(p_, chunk), *g = tile(h_, chunk);
      load(step_.basis, chunk, p, 1, false);
      load(step_.buffer, chunk, g, step_.grad.data ? step_.momentum : 1, false);
      __syncthreads();
      if (step_.grad.data) {
        load(step_.grad, chunk, g, step_.gain, true);
        __syncthreads();
        if (!step_.transport || !step_.resident) store(step_.buffer, chunk, g);
      }
      gram<float>(p, g, sum);
      if (!step_.resident) __syncthreads();
    }
    reduce(sum, matrix(0));
    coefficients(3, matrix(0), -1);
  }

  // P and H of a chunk, in their tiles; `again` finds them there where they are resident.
  __device__ void tangent_chunk(int64_t chunk, bool again) {
    float *p = tile(p_, chunk), *h = tile(h_, chunk);
    if (!step_.resident) {
      __syncthreads();
      load(step_.basis, chunk, p, 1, false);
      load(step_.buffer, chunk, h, 1, false);
      __syncthreads();
    }
    if (step_.resident && again) return;
    if (has_own()) {
      float4 value = *own(h);
      combine(p, coefficient(3), value);
      *own(h) = value;
    }
    __syncthreads();
  }

  // H and M = HᵀH, in double where the angles are large: their squares magnify its rounding.
  __device__ void tangent(double* m) {
    double sum[4] = {};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      tangent_chunk(chunk, false);
      gram<float>(tile(h_, chunk), tile(h_, chunk), sum);
    }
    reduce(sum, m);
    if (!(step_.alpha * step_.alpha * small_matrix::trace(k_, m) > 1)) return;
    double exact[4] = {};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      tangent_chunk(chunk, true);
      gram<double>(tile(h_, chunk), tile(h_, chunk), exact);
    }
    reduce(exact, m);
  }

  // Both results. A new basis that will be made orthonormal stays in its tile where it can.
  __device__ void move() {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      tangent_chunk(chunk, true);
      float *p = tile(p_, chunk), *h = tile(h_, chunk);
      float4 moved = {}, velocity = {};
      combine(p, coefficient(0), moved);
      combine(h, coefficient(1), moved);
      combine(h, coefficient(0), velocity);
      combine(p, coefficient(2), velocity);
      __syncthreads();
      if (has_own()) {
        *own(p) = moved;
        *own(h) = velocity;
      }
      __syncthreads();
      if (step_.transport) store(step_.buffer, chunk, h);
      if (step_.reorth == Reorth::none || !step_.resident) store(step_.basis, chunk, p);
    }
    __syncthreads();
  }

  // The new basis of a chunk, in its tile.
  __device__ float* basis_chunk(int64_t chunk) {
    float* p = tile(p_, chunk);
    if (!step_.resident) {
      __syncthreads();
      load(step_.basis, chunk, p, 1, false);
      __syncthreads();
    }
    return p;
  }

  template <typename T>
  __device__ void basis_gram(double* w) {
    double sum[4] = {};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const float* p = basis_chunk(chunk);
      gram<T>(p, p, sum);
    }
    reduce(sum, w);
  }

  __device__ void orthonormalize() {
    double *w = matrix(0), *factor = matrix(1), *work = matrix(4);
    bool last = false;
    for (int round = 0; !last; ++round) {
      basis_gram<float>(w);
      double distance = from_identity(k_, w);
      if (!(distance <= kNear)) {
        basis_gram<double>(w);
        distance = from_identity(k_, w);
      }
      __syncthreads();
      last = orthonormalizer(Block(), k_, step_.reorth, round, distance, 1e-4, w, factor, work);
      if (last && step_.reorth == Reorth::gcr) flip(factor);
      coefficients(0, factor, 1);
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        float* p = basis_chunk(chunk);
        float4 turned = {};
        combine(p, coefficient(0), turned);
        __syncthreads();
        if (has_own()) *own(p) = turned;
        __syncthreads();
        if (last || !step_.resident) store(step_.basis, chunk, p);
      }
      __syncthreads();
    }
  }

  __device__ void flip(double* factor) {
    double* top = matrix(4);
    for (int e = threadIdx.x; e < k_ * k_; e += kThreads) {
      const int d = e / k_, j = e % k_;
      top[e] = step_.resident ? tile(p_, d / rows_)[d % rows_ * row_stride(columns_) + j]
                              : *global(step_.basis, d, j);
    }
    __syncthreads();
    double* sign = matrices_ + kMatrices * step_.k * step_.k;
    flip_columns(Block(), k_, top, step_.D == k_, factor, matrix(5), sign);
  }

  const Step& step_;
  const int64_t c_;
  const Layout layout_;
  int k_, columns_, groups_, rows_;  // columns of this class, padded, in fours; rows of a chunk
  int64_t chunks_;
  double *matrices_, *sums_;
  float *coefficients_, *p_, *h_;
};

}  // namespace weft::grassmann
