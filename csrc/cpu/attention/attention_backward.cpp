// weft::attention_backward: from the op's arguments to AttentionBackward.
#include "cpu/attention/backward.h"

namespace weft {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_backward(const Tensor& query, const Tensor& key, const Tensor& value,
                             const OptionalTensor& bias, const OptionalTensor& sink,
                             const OptionalTensor& key_weight, const OptionalTensor& query_weight,
                             const OptionalTensor& seed, const std::string& mask_program,
                             const std::vector<int64_t>& mask_ints,
                             const std::vector<Tensor>& mask_tensors, double scale, double softcap,
                             double dropout_p, const OptionalTensor& grad_out,
                             const OptionalTensor& grad_lse, const OptionalTensor& grad_sums,
                             const Tensor& out, const Tensor& lse, const Tensor& normalizer,
                             int64_t wanted) {
  const AttentionArguments in(query, key, value, bias, sink, key_weight, query_weight, seed,
                              mask_program, mask_ints, mask_tensors, scale, softcap, dropout_p);
  const int64_t D = query.size(3), Dv = value.size(3);
  const ScalarType type = query.scalar_type(), wide = in.wide_type();
  const auto check = [](const Tensor& t, std::vector<int64_t> shape, ScalarType dtype) {
    bool fits = t.scalar_type() == dtype && t.dim() == int64_t(shape.size());
    for (size_t d = 0; fits && d < shape.size(); ++d) fits = t.size(int64_t(d)) == shape[d];
    STD_TORCH_CHECK(fits, "weft: a result of attention, or its gradient, has a wrong shape");
  };
  check(out, {in.B, in.Nq, in.Hq, Dv}, type);
  if (grad_out) check(*grad_out, {in.B, in.Nq, in.Hq, Dv}, type);
  check(lse, {in.B, in.Hq, in.Nq}, wide);
  check(normalizer, {in.B, in.Hq, 2, in.Nq}, wide);
  if (grad_lse) check(*grad_lse, {in.B, in.Hq, in.Nq}, wide);
  if (grad_sums) check(*grad_sums, {in.B, in.Hq, in.Nk}, wide);
  const auto whole = [](const OptionalTensor& t) {
    return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
  };
  const OptionalTensor lse_whole = whole(lse), lse_up = whole(grad_lse), sums_up = whole(grad_sums);
  const OptionalTensor divisor = whole(normalizer);

  const auto result = [&](int n, bool exists, std::vector<int64_t> shape, ScalarType dtype) {
    const bool made = exists && (wanted >> n & 1);
    return torch::stable::new_empty(query, made ? shape : std::vector<int64_t>{0},
                                    exists ? dtype : type);
  };
  const auto sizes = [](const OptionalTensor& t) {
    std::vector<int64_t> shape;
    for (int64_t d = 0; t && d < t->dim(); ++d) shape.push_back(t->size(d));
    return shape;
  };
  Gradients grads{result(0, true, {in.B, in.Nq, in.Hq, D}, type),
                  result(1, true, {in.B, in.Nk, in.Hkv, D}, type),
                  result(2, true, {in.B, in.Nk, in.Hkv, Dv}, type),
                  result(3, bias.has_value(), sizes(bias), bias ? bias->scalar_type() : type),
                  result(4, sink.has_value(), sizes(sink), wide),
                  result(5, key_weight.has_value(), sizes(key_weight), wide),
                  result(6, query_weight.has_value(), sizes(query_weight), wide)};
  with_float(query, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const AttentionProblem<T> problem = in.template problem<T>();
    const auto by_rows = [](const Tensor& t) {
      return Heads<const T>{data<T>(t),  t.size(1),   t.size(3),  t.stride(0),
                            t.stride(2), t.stride(1), t.stride(3)};
    };
    const auto wide_data = [](const OptionalTensor& t) { return t ? data<A>(*t) : nullptr; };
    const BackwardUpstream<T> upstream{
        by_rows(out),         grad_out ? by_rows(*grad_out) : Heads<const T>{},
        wide_data(lse_whole), wide_data(lse_up),
        wide_data(sums_up),   wide_data(divisor)};
    const auto wants = [&](int n, bool exists) { return exists && (wanted >> n & 1); };
    const BackwardResults<T> results{
        wants(0, true) ? mutable_data<T>(std::get<0>(grads)) : nullptr,
        wants(1, true) ? mutable_data<T>(std::get<1>(grads)) : nullptr,
        wants(2, true) ? mutable_data<T>(std::get<2>(grads)) : nullptr,
        wants(3, bias.has_value()) ? std::get<3>(grads).mutable_data_ptr() : nullptr,
        wants(4, sink.has_value()) ? mutable_data<A>(std::get<4>(grads)) : nullptr,
        wants(5, key_weight.has_value()) ? mutable_data<A>(std::get<5>(grads)) : nullptr,
        wants(6, query_weight.has_value()) ? mutable_data<A>(std::get<6>(grads)) : nullptr,
        key_weight ? key_weight->size(1) : 1,
        query_weight ? query_weight->size(1) : 1};
    AttentionBackward<T>(problem, upstream, results).run();
  });
  return grads;
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "attention_backward(" WEFT_ATTENTION_SCHEMA
      ", Tensor? grad_out, Tensor? grad_lse, Tensor? grad_sums, Tensor out, Tensor lse, "
      "Tensor normalizer, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
WEFT_CPU_KERNELS(m) { m.impl("attention_backward", TORCH_BOX(&attention_backward)); }

}  // namespace weft
