// Attention: softmax(query key^T scale) value, computed in float32 from what is given, rounded once.
#include <limits>

#include "aclnn.h"

namespace {
constexpr double INFINITE = std::numeric_limits<double>::infinity();

// [B, N, S, D], whatever the layout; heads share nothing in SD3, so key and value have as many as query.
at::Tensor by_head(const at::Tensor& tensor, const std::string& layout, int64_t heads) {
  auto wide = tensor.to(at::kFloat);
  if (layout == "BNSD") return wide;
  if (layout == "BSND") return wide.transpose(1, 2);
  auto split = [&] { return wide.reshape({wide.size(0), wide.size(1), heads, -1}); };
  if (layout == "BSH") return split().transpose(1, 2);
  TORCH_CHECK(layout == "SBH", "the layout ", layout, " is not emulated");
  return split().permute({1, 2, 0, 3});
}

at::Tensor in_layout(const at::Tensor& tensor, const std::string& layout) {
  if (layout == "BNSD") return tensor;
  if (layout == "BSND") return tensor.transpose(1, 2);
  if (layout == "BSH") return tensor.transpose(1, 2).flatten(2);
  return tensor.permute({2, 0, 1, 3}).flatten(2);
}

// Scores [B, N, Sq, Skv]. The mask is true where nothing is seen; mode 2 and 3 are causal, from the upper left and from
// the lower right corner.
at::Tensor scores(const at::Tensor& query, const at::Tensor& key, T mask, double scale, int64_t mode) {
  auto all = at::matmul(query, key.transpose(-2, -1)) * scale;
  if (mode == 0) return mask.given() ? all.masked_fill(mask.tensor().to(at::kBool), -INFINITE) : all;
  TORCH_CHECK(mode == 2 || mode == 3, "sparse mode ", mode, " is not emulated");
  auto seen = at::ones({all.size(-2), all.size(-1)}, at::kBool);
  return all.masked_fill(seen.tril(mode == 3 ? all.size(-1) - all.size(-2) : 0).logical_not(), -INFINITE);
}

// The softmax's maximum and sum come back in eight equal columns.
at::Tensor in_columns(const at::Tensor& tensor) {
  auto sizes = tensor.sizes().vec();
  sizes.back() = 8;
  return tensor.expand(sizes);
}

void check_plain(T pse, T drop_mask, T padding_mask, Ints prefix, double keep_probability) {
  TORCH_CHECK(!pse.given() && !padding_mask.given() && prefix.list().empty(), "pse, padding masks and prefixes are not emulated");
  TORCH_CHECK(!drop_mask.given() && keep_probability == 1, "dropout in attention is not emulated");
}
}  // namespace

ACLNN(aclnnFlashAttentionScore,
      (T, query)(T, key)(T, value)(T, realShiftOptional)(T, dropMaskOptional)(T, paddingMaskOptional)(T, attenMaskOptional)
      (Ints, prefixOptional)(double, scaleValue)(double, keepProb)(int64_t, preTokens)(int64_t, nextTokens)
      (int64_t, headNum)(char*, inputLayout)(int64_t, innerPrecise)(int64_t, sparseMode)(T, softmaxMaxOut)
      (T, softmaxSumOut)(T, softmaxOutOut)(T, attentionOutOut)) {
  check_plain(realShiftOptional, dropMaskOptional, paddingMaskOptional, prefixOptional, keepProb);
  std::string layout(inputLayout);
  auto q = by_head(query, layout, headNum), k = by_head(key, layout, headNum), v = by_head(value, layout, headNum);
  auto all = scores(q, k, attenMaskOptional, scaleValue, sparseMode);
  auto top = at::amax(all, {-1}, true);
  top = top.masked_fill(at::isinf(top), 0);  // a row that sees nothing: its result is zero
  auto weights = at::exp(all - top);
  auto sum = weights.sum(-1, true);
  attentionOutOut = in_layout(at::matmul(weights / at::clamp_min(sum, 1e-38), v), layout);
  softmaxMaxOut = in_columns(top);
  softmaxSumOut = in_columns(sum);
}

ACLNN(aclnnFlashAttentionScoreGrad,
      (T, query)(T, keyIn)(T, value)(T, dy)(T, pseShiftOptional)(T, dropMaskOptional)(T, paddingMaskOptional)
      (T, attenMaskOptional)(T, softmaxMaxOptional)(T, softmaxSumOptional)(T, softmaxInOptional)(T, attentionInOptional)
      (Ints, prefixOptional)(double, scaleValue)(double, keepProb)(int64_t, preTokens)(int64_t, nextTokens)
      (int64_t, headNum)(char*, inputLayout)(int64_t, innerPrecise)(int64_t, sparseMode)(T, dqOut)(T, dkOut)(T, dvOut)
      (T, dpseOut)) {
  check_plain(pseShiftOptional, dropMaskOptional, paddingMaskOptional, prefixOptional, keepProb);
  std::string layout(inputLayout);
  auto wide = [&](T tensor) { return by_head(tensor, layout, headNum); };
  auto q = wide(query), k = wide(keyIn), v = wide(value), gradient = wide(dy);
  auto all = scores(q, k, attenMaskOptional, scaleValue, sparseMode);
  auto first_column = [](T tensor) { return tensor.tensor().narrow(-1, 0, 1); };
  auto weights = at::exp(all - first_column(softmaxMaxOptional)) / at::clamp_min(first_column(softmaxSumOptional), 1e-38);
  auto to_weights = at::matmul(gradient, v.transpose(-2, -1));
  auto to_scores = weights * (to_weights - (to_weights * weights).sum(-1, true)) * scaleValue;
  dqOut = in_layout(at::matmul(to_scores, k), layout);
  dkOut = in_layout(at::matmul(to_scores.transpose(-2, -1), q), layout);
  dvOut = in_layout(at::matmul(weights.transpose(-2, -1), gradient), layout);
}
