// Reductions. No dimensions means all of them.
#include "aclnn.h"

static at::OptionalIntArrayRef some_dims(Ints dims) {
  return dims.list().empty() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims.list());
}

ACLNN(aclnnReduceSum, (T, self)(Ints, dims)(bool, keepDims)(DataType, dtype)(T, out)) {
  out = at::sum(self, some_dims(dims), keepDims, scalar_type(dtype));
}
ACLNN(aclnnMean, (T, self)(Ints, dim)(bool, keepDim)(DataType, dtype)(T, out)) {
  out = at::mean(self, some_dims(dim), keepDim, scalar_type(dtype));
}
ACLNN(aclnnMeanV2, (T, self)(Ints, dim)(bool, keepDim)(bool, noopWithEmptyAxes)(T, out)) {
  out = at::mean(self, some_dims(dim), keepDim);
}
ACLNN(aclnnVar, (T, self)(Ints, dim)(bool, unbiased)(bool, keepdim)(T, out)) {
  out = at::var(self, some_dims(dim), unbiased, keepdim);
}
ACLNN(aclnnAll, (T, self)(Ints, dim)(bool, keepdim)(T, out)) { out = at::all(self, some_dims(dim), keepdim); }
ACLNN(aclnnAny, (T, self)(Ints, dim)(bool, keepdim)(T, out)) { out = at::any(self, some_dims(dim), keepdim); }
ACLNN(aclnnMax, (T, self)(T, out)) { out = at::max(self); }
ACLNN(aclnnMin, (T, self)(T, out)) { out = at::min(self); }
ACLNN(aclnnAmax, (T, self)(Ints, dim)(bool, keepDim)(T, out)) { out = at::amax(self, dim.list(), keepDim); }
ACLNN(aclnnAmin, (T, self)(Ints, dim)(bool, keepDim)(T, out)) { out = at::amin(self, dim.list(), keepDim); }
ACLNN(aclnnArgMax, (T, self)(int64_t, dim)(bool, keepdim)(T, out)) { out = at::argmax(self, dim, keepdim); }
ACLNN(aclnnCumsum, (T, self)(int64_t, dim)(DataType, dtype)(T, out)) { out = at::cumsum(self, dim, scalar_type(dtype)); }
ACLNN(aclnnLinalgVectorNorm, (T, self)(S, ord)(Ints, dims)(bool, keepDims)(DataType, dtype)(T, out)) {
  out = at::linalg_vector_norm(self, ord, some_dims(dims), keepDims, scalar_type(dtype));
}
ACLNN(aclnnSort, (T, self)(bool, stable)(int64_t, dim)(bool, descending)(T, valuesOut)(T, indicesOut)) {
  auto [values, indices] = at::sort(self, stable, dim, descending);
  valuesOut = values;
  indicesOut = indices;
}
ACLNN(aclnnTopk, (T, self)(int64_t, k)(int64_t, dim)(bool, largest)(bool, sorted)(T, valuesOut)(T, indicesOut)) {
  auto [values, indices] = at::topk(self, k, dim, largest, sorted);
  valuesOut = values;
  indicesOut = indices;
}
ACLNN(aclnnMseLoss, (T, self)(T, target)(int64_t, reduction)(T, out)) { out = at::mse_loss(self, target, reduction); }
ACLNN(aclnnMseLossBackward, (T, gradOutput)(T, self)(T, target)(int64_t, reduction)(T, out)) {
  out = at::mse_loss_backward(gradOutput, self, target, reduction);
}
