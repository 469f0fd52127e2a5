// The arguments of the attention ops, checked, as the kernels read them.
#pragma once
#include <limits>
#include <string>
#include <vector>

#include "common/matrix.h"
#include "cpu/attention/masks.h"
#include "cpu/registration.h"

// The part that the schemas share (weft/ops/attention/inputs.py).
#define WEFT_ATTENTION_SCHEMA                                                                \
  "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sink, Tensor? key_weight, " \
  "Tensor? query_weight, Tensor? seed, str mask_program, int[] mask_ints, Tensor[] "         \
  "mask_tensors, float scale, float softcap, float dropout_p"

namespace weft {

using OptionalTensor = std::optional<Tensor>;

// (B, H, N, D) with any strides.
template <typename T>
struct Heads {
  T* data = nullptr;
  int64_t count = 0, width = 0;  // N, D
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, col_stride = 0;

  Matrix<std::remove_const_t<T>> operator()(int64_t b, int64_t h) const {
    return {data + b * batch_stride + h * head_stride, count, width, row_stride, col_stride};
  }
};

// A bias as it lies in memory: strides are 0 along the dimensions of size 1.
struct BiasView {
  const void* data = nullptr;
  bool wide = false;  // elements are of the type of sums, not of the query
  int64_t sizes[4] = {}, strides[4] = {};
  double masked = 0;  // values up to this one hide the pair

  explicit operator bool() const { return data != nullptr; }
};

// Weights (B, 1 or H, N) in the dtype of sums.
template <typename A>
struct WeightView {
  const A* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  const A* operator()(int64_t b, int64_t h) const {
    return data + b * batch_stride + h * head_stride;
  }
};

// Dropout is a function of these and of the place (weft/reference/attention/dropout.py).
struct DropoutView {
  uint32_t low = 0, high = 0;  // halves of the seed
  uint32_t threshold = 0;      // a hash from here on keeps its weight
  double factor = 1;           // of the weights that are kept
};

template <typename T>
struct AttentionProblem {
  using A = Acc<T>;

  int64_t B, Hq, Hkv, group;  // group: query heads of each key head
  int64_t Nq, Nk, D, Dv;
  Heads<const T> query, key, value;
  BiasView bias;
  const A* sink;  // (Hq) or null
  WeightView<A> key_weight, query_weight;
  const DropoutView* dropout;  // or null
  const AttentionMask* mask;
  A scale, softcap;  // no softcap: 0
};

// Keeps what the views of a problem point to.
class AttentionArguments {
 public:
  AttentionArguments(const Tensor& query, const Tensor& key, const Tensor& value,
                     const OptionalTensor& bias, const OptionalTensor& sink,
                     const OptionalTensor& key_weight, const OptionalTensor& query_weight,
                     const OptionalTensor& seed, const std::string& program,
                     const std::vector<int64_t>& ints, const std::vector<Tensor>& tensors,
                     double scale, double softcap, double dropout_p)
      : query(query),
        key(key),
        value(value),
        bias(bias),
        B(query.size(0)),
        Hq(query.size(1)),
        Hkv(key.size(1)),
        Nq(query.size(2)),
        Nk(key.size(2)),
        mask(program, ints, tensors, B, Hq, Nq, Nk),
        scale_(scale),
        softcap_(softcap) {
    const auto type = query.scalar_type();
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                    "weft: query, key and value must be (B, H, N, D)");
    STD_TORCH_CHECK(key.scalar_type() == type && value.scalar_type() == type,
                    "weft: dtypes of query, key and value differ");
    STD_TORCH_CHECK(key.size(0) == B && value.size(0) == B && value.size(1) == Hkv &&
                        value.size(2) == Nk && key.size(3) == query.size(3),
                    "weft: shapes of query, key and value do not match");
    STD_TORCH_CHECK(Hq == Hkv || (Hkv > 0 && Hq % Hkv == 0),
                    "weft: query heads must be a multiple of key heads");
    if (bias) {
      const bool kind = bias->scalar_type() == type || bias->scalar_type() == wide_type();
      STD_TORCH_CHECK(bias->dim() == 4 && kind, "weft: bias must have 4 dimensions");
      const int64_t full[4] = {B, Hq, Nq, Nk};
      for (int d = 0; d < 4; ++d)
        STD_TORCH_CHECK(bias->size(d) == 1 || bias->size(d) == full[d],
                        "weft: bias must broadcast to (B, H, Nq, Nk)");
    }
    if (sink) {
      STD_TORCH_CHECK(sink->dim() == 1 && sink->size(0) == Hq && sink->scalar_type() == wide_type(),
                      "weft: sink must be (H,) in the dtype of sums");
      sink_ = torch::stable::contiguous(*sink);
    }
    key_weight_ = weight(key_weight, Nk);
    query_weight_ = weight(query_weight, Nq);
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                      "weft: dropout needs a seed, one int64");
      const auto bits = uint64_t(*data<int64_t>(*seed));
      dropout_ = {uint32_t(bits), uint32_t(bits >> 32), uint32_t(dropout_p * 4294967296.0),
                  1 / (1 - dropout_p)};
      drops_ = true;
    }
  }
  AttentionArguments(const AttentionArguments&) = delete;
  AttentionArguments& operator=(const AttentionArguments&) = delete;

  Tensor query, key, value;
  OptionalTensor bias;
  int64_t B, Hq, Hkv, Nq, Nk;
  AttentionMask mask;

  ScalarType wide_type() const {
    return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // What T computes: T is the type of query.
  template <typename T>
  AttentionProblem<T> problem() const {
    using A = Acc<T>;
    AttentionProblem<T> p{};
    p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.group = Hkv ? Hq / Hkv : 1;
    p.Nq = Nq, p.Nk = Nk, p.D = query.size(3), p.Dv = value.size(3);
    p.query = heads<T>(query), p.key = heads<T>(key), p.value = heads<T>(value);
    if (bias) {
      p.bias.data = bias->const_data_ptr();
      p.bias.wide = bias->scalar_type() == wide_type();
      for (int d = 0; d < 4; ++d) {
        p.bias.sizes[d] = bias->size(d);
        p.bias.strides[d] = bias->size(d) == 1 ? 0 : bias->stride(d);
      }
      p.bias.masked = lowest(bias->scalar_type()) / 2;
    }
    p.sink = sink_ ? data<A>(*sink_) : nullptr;
    p.key_weight = view<A>(key_weight_), p.query_weight = view<A>(query_weight_);
    p.dropout = drops_ ? &dropout_ : nullptr;
    p.mask = &mask;
    p.scale = A(scale_), p.softcap = A(softcap_);
    return p;
  }

  template <typename T>
  static Heads<const T> heads(const Tensor& t) {
    return {data<T>(t), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }

 private:
  OptionalTensor weight(const OptionalTensor& t, int64_t n) const {
    if (!t) return std::nullopt;
    STD_TORCH_CHECK(t->dim() == 3 && t->size(0) == B && (t->size(1) == 1 || t->size(1) == Hq) &&
                        t->size(2) == n && t->scalar_type() == wide_type(),
                    "weft: weights must be (B, 1 or H, N) in the dtype of sums");
    return torch::stable::contiguous(*t);
  }
  template <typename A>
  static WeightView<A> view(const OptionalTensor& t) {
    if (!t) return {};
    return {data<A>(*t), t->stride(0), t->size(1) == 1 ? 0 : t->stride(1)};
  }
  // The smallest finite number of a type.
  static double lowest(ScalarType type) {
    switch (type) {
      case ScalarType::Double:
        return std::numeric_limits<double>::lowest();
      case ScalarType::Half:
        return -65504.0;
      case ScalarType::BFloat16:
        return -3.3895313892515355e38;
      default:
        return double(std::numeric_limits<float>::lowest());
    }
  }

  OptionalTensor sink_, key_weight_, query_weight_;
  DropoutView dropout_;
  bool drops_ = false;
  double scale_, softcap_;
};

}  // namespace weft
