// Products of matrices and convolutions. cubeMathType (which precision the cube unit may fall to) changes nothing here.
#include "aclnn.h"

ACLNN(aclnnMatmul, (T, self)(T, mat2)(T, out)(int8_t, cubeMathType)) { out = at::matmul(self, mat2); }
ACLNN(aclnnMm, (T, self)(T, mat2)(T, out)(int8_t, cubeMathType)) { out = at::mm(self, mat2); }
ACLNN(aclnnBatchMatMul, (T, self)(T, mat2)(T, out)(int8_t, cubeMathType)) { out = at::bmm(self, mat2); }
ACLNN(aclnnAddmm, (T, self)(T, mat1)(T, mat2)(S, beta)(S, alpha)(T, out)(int8_t, cubeMathType)) {
  out = at::addmm(self, mat1, mat2, beta, alpha);
}
ACLNN(aclnnInplaceAddmm, (T, selfRef)(T, mat1)(T, mat2)(S, beta)(S, alpha)(int8_t, cubeMathType)) {
  selfRef = at::addmm(selfRef, mat1, mat2, beta, alpha);
}
ACLNN(aclnnBaddbmm, (T, self)(T, batch1)(T, batch2)(S, beta)(S, alpha)(T, out)(int8_t, cubeMathType)) {
  out = at::baddbmm(self, batch1, batch2, beta, alpha);
}

ACLNN(aclnnConvolution, (T, input)(T, weight)(T, bias)(Ints, stride)(Ints, padding)(Ints, dilation)(bool, transposed)
                        (Ints, outputPadding)(int64_t, groups)(T, output)(int8_t, cubeMathType)) {
  output = at::convolution(input, weight, bias.tensor(), stride.list(), padding.list(), dilation.list(), transposed,
                           outputPadding.list(), groups);
}
ACLNN(aclnnConvolutionBackward, (T, gradOutput)(T, input)(T, weight)(Ints, biasSizes)(Ints, stride)(Ints, padding)
                                (Ints, dilation)(bool, transposed)(Ints, outputPadding)(int, groups)(Mask, outputMask)
                                (int8_t, cubeMathType)(T, gradInput)(T, gradWeight)(T, gradBias)) {
  std::array<bool, 3> wanted = outputMask;
  at::OptionalIntArrayRef bias_sizes = biasSizes.given() ? at::OptionalIntArrayRef(biasSizes.list()) : std::nullopt;
  auto [to_input, to_weight, to_bias] =
      at::convolution_backward(gradOutput, input, weight, bias_sizes, stride.list(), padding.list(), dilation.list(),
                               transposed, outputPadding.list(), groups, wanted);
  gradInput = to_input;
  gradWeight = to_weight;
  gradBias = to_bias;
}
