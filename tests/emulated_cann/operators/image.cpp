// What Inception needs, which KID and FID measure with: batch norm in evaluation, and pooling.
#include "aclnn.h"

ACLNN(aclnnBatchNorm, (T, input)(T, weight)(T, bias)(T, runningMean)(T, runningVar)(bool, training)(double, momentum)
                      (double, eps)(T, output)(T, saveMean)(T, saveInvstd)) {
  TORCH_CHECK(!training, "batch norm in training is not emulated");
  output = at::batch_norm(input, weight.tensor(), bias.tensor(), runningMean.tensor(), runningVar.tensor(), false,
                          momentum, eps, false);
}
ACLNN(aclnnInplaceRelu, (T, selfRef)) { selfRef = at::relu(selfRef); }
ACLNN(aclnnMaxPool, (T, self)(Ints, kernelShape)(Ints, strides)(int64_t, autoPad)(Ints, pads)(Ints, dilations)
                    (int64_t, ceilMode)(T, out)) {
  out = at::max_pool2d(self, kernelShape.list(), strides.list(), pads.list().slice(0, 2), dilations.list(), ceilMode);
}
// The mask is the card's own form of the indices, which only the gradient reads.
ACLNN(aclnnMaxPool2dWithMask, (T, self)(Ints, kernelSize)(Ints, stride)(Ints, padding)(Ints, dilation)(bool, ceilMode)
                              (T, out)(T, indices)) {
  out = at::max_pool2d(self, kernelSize.list(), stride.list(), padding.list(), dilation.list(), ceilMode);
}
ACLNN(aclnnAvgPool2d, (T, self)(Ints, kernelSize)(Ints, strides)(Ints, paddings)(bool, ceilMode)(bool, countIncludePad)
                      (int64_t, divisorOverride)(int8_t, cubeMathType)(T, out)) {
  std::optional<int64_t> divisor = divisorOverride ? std::optional<int64_t>(divisorOverride) : std::nullopt;
  out = at::avg_pool2d(self, kernelSize.list(), strides.list(), paddings.list(), ceilMode, countIncludePad, divisor);
}
ACLNN(aclnnAdaptiveAvgPool2d, (T, self)(Ints, outputSize)(T, out)) {
  out = at::adaptive_avg_pool2d(self, outputSize.list());
}
