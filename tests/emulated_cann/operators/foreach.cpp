// The same for each tensor of a list: optimizers' steps, gradients' norms, and the check of a gradient scaler.
#include "aclnn.h"

// Results of `work(i)` for the tensors of a list.
template <class Work>
static std::vector<at::Tensor> for_each(TL x, Work work) {
  auto tensors = x.tensors();
  std::vector<at::Tensor> results;
  for (size_t i = 0; i < tensors.size(); i++) results.push_back(work(tensors[i], i));
  return results;
}
// The same with a second list, and a third.
template <class Work>
static std::vector<at::Tensor> for_pairs(TL x1, TL x2, Work work) {
  auto second = x2.tensors();
  return for_each(x1, [&](const at::Tensor& one, size_t i) { return work(one, second[i]); });
}
template <class Work>
static std::vector<at::Tensor> for_triples(TL x1, TL x2, TL x3, Work work) {
  auto second = x2.tensors(), third = x3.tensors();
  return for_each(x1, [&](const at::Tensor& one, size_t i) { return work(one, second[i], third[i], i); });
}

typedef const at::Tensor& Each;

ACLNN(aclnnForeachAddScalarV2, (TL, x)(S, scalar)(TL, out)) {
  out = for_each(x, [&](Each one, size_t) { return at::add(one, at::Scalar(scalar)); });
}
ACLNN(aclnnForeachMulScalarV2, (TL, x)(S, scalar)(TL, out)) {
  out = for_each(x, [&](Each one, size_t) { return at::mul(one, at::Scalar(scalar)); });
}
ACLNN(aclnnForeachDivScalarV2, (TL, x)(S, scalar)(TL, out)) {
  out = for_each(x, [&](Each one, size_t) { return at::div(one, at::Scalar(scalar)); });
}
ACLNN(aclnnForeachAddScalarList, (TL, x)(SL, scalars)(TL, out)) {
  auto all = scalars.scalars();
  out = for_each(x, [&](Each one, size_t i) { return at::add(one, all[i]); });
}
ACLNN(aclnnForeachMulScalarList, (TL, x)(SL, scalars)(TL, out)) {
  auto all = scalars.scalars();
  out = for_each(x, [&](Each one, size_t i) { return at::mul(one, all[i]); });
}
ACLNN(aclnnForeachDivScalarList, (TL, x)(SL, scalars)(TL, out)) {
  auto all = scalars.scalars();
  out = for_each(x, [&](Each one, size_t i) { return at::div(one, all[i]); });
}
ACLNN(aclnnForeachAddListV2, (TL, x1)(TL, x2)(S, alpha)(TL, out)) {
  out = for_pairs(x1, x2, [&](Each one, Each other) { return at::add(one, other, alpha); });
}
ACLNN(aclnnForeachMulList, (TL, x1)(TL, x2)(TL, out)) {
  out = for_pairs(x1, x2, [](Each one, Each other) { return at::mul(one, other); });
}
ACLNN(aclnnForeachDivList, (TL, x1)(TL, x2)(TL, out)) {
  out = for_pairs(x1, x2, [](Each one, Each other) { return at::div(one, other); });
}
ACLNN(aclnnForeachLerpScalar, (TL, x1)(TL, x2)(S, weight)(TL, out)) {
  out = for_pairs(x1, x2, [&](Each one, Each other) { return at::lerp(one, other, at::Scalar(weight)); });
}
ACLNN(aclnnForeachSqrt, (TL, x)(TL, out)) {
  out = for_each(x, [](Each one, size_t) { return at::sqrt(one); });
}
ACLNN(aclnnForeachNorm, (TL, x)(S, scalar)(TL, out)) {
  out = for_each(x, [&](Each one, size_t) { return at::linalg_vector_norm(one, scalar); });
}
ACLNN(aclnnForeachCopy, (TL, x)(TL, out)) { out = x.tensors(); }
ACLNN(aclnnForeachZeroInplace, (TL, x)) {
  x = for_each(x, [](Each one, size_t) { return at::zeros_like(one); });
}
ACLNN(aclnnForeachAddcmulScalarV2, (TL, x1)(TL, x2)(TL, x3)(S, scalar)(TL, out)) {
  out = for_triples(x1, x2, x3, [&](Each one, Each two, Each three, size_t) { return at::addcmul(one, two, three, scalar); });
}
ACLNN(aclnnForeachAddcdivScalarV2, (TL, x1)(TL, x2)(TL, x3)(S, scalar)(TL, out)) {
  out = for_triples(x1, x2, x3, [&](Each one, Each two, Each three, size_t) { return at::addcdiv(one, two, three, scalar); });
}
// Of the two lists of scalars, these come as one tensor.
ACLNN(aclnnForeachAddcmulScalarList, (TL, x1)(TL, x2)(TL, x3)(T, scalars)(TL, out)) {
  auto all = scalars.tensor();
  out = for_triples(x1, x2, x3, [&](Each one, Each two, Each three, size_t i) {
    return at::addcmul(one, two, three, all[i].item());
  });
}
ACLNN(aclnnForeachAddcdivScalarList, (TL, x1)(TL, x2)(TL, x3)(T, scalars)(TL, out)) {
  auto all = scalars.tensor();
  out = for_triples(x1, x2, x3, [&](Each one, Each two, Each three, size_t i) {
    return at::addcdiv(one, two, three, all[i].item());
  });
}

// Divides gradients by the loss scale; foundInf becomes 1 where one of them is not finite.
ACLNN(aclnnForeachNonFiniteCheckAndUnscale, (TL, scaledGrads)(T, foundInf)(T, invScale)) {
  bool finite = true;
  for (const auto& gradient : scaledGrads.tensors()) finite = finite && at::isfinite(gradient).all().item<bool>();
  if (!finite) foundInf = at::ones_like(foundInf);
  auto factor = invScale.tensor().item();
  scaledGrads = for_each(scaledGrads, [&](Each one, size_t) { return at::mul(one, factor); });
}

// The scale falls where something was not finite, and grows after growthInterval steps without.
ACLNN(aclnnAmpUpdateScale, (T, currentScale)(T, growthTracker)(T, foundInf)(double, growthFactor)(double, backoffFactor)
                           (int64_t, growthInterval)(T, updatedScale)(T, updatedGrowthTracker)) {
  auto scale = currentScale.tensor().clone(), tracker = growthTracker.tensor().clone();
  at::_amp_update_scale_(scale, tracker, foundInf, growthFactor, backoffFactor, growthInterval);
  updatedScale = scale;
  updatedGrowthTracker = tracker;
}
