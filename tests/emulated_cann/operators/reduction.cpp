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
ACLNN(aclnnAll, (T, self)(Ints, dim)(bool, keepdim)(T, out)) { out = at::all(self, some_dims(dim), keepdim); }
ACLNN(aclnnAny, (T, self)(Ints, dim)(bool, keepdim)(T, out)) { out = at::any(self, some_dims(dim), keepdim); }
ACLNN(aclnnMax, (T, self)(T, out)) { out = at::max(self); }
ACLNN(aclnnArgMax, (T, self)(int64_t, dim)(bool, keepdim)(T, out)) { out = at::argmax(self, dim, keepdim); }
ACLNN(aclnnLinalgVectorNorm, (T, self)(S, ord)(Ints, dims)(bool, keepDims)(DataType, dtype)(T, out)) {
  out = at::linalg_vector_norm(self, ord, some_dims(dims), keepDims, scalar_type(dtype));
}
ACLNN(aclnnMseLoss, (T, self)(T, target)(int64_t, reduction)(T, out)) { out = at::mse_loss(self, target, reduction); }
ACLNN(aclnnMseLossBackward, (T, gradOutput)(T, self)(T, target)(int64_t, reduction)(T, out)) {
  out = at::mse_loss_backward(gradOutput, self, target, reduction);
}
