// One element at a time: arithmetic, comparisons, logic, functions of one tensor and their gradients.
#include "aclnn.h"

ACLNN(aclnnAdd, (T, self)(T, other)(S, alpha)(T, out)) { out = at::add(self, other, alpha); }
ACLNN(aclnnAdds, (T, self)(S, other)(S, alpha)(T, out)) { out = at::add(self, other, alpha); }
ACLNN(aclnnInplaceAdd, (T, selfRef)(T, other)(S, alpha)) { selfRef = at::add(selfRef, other, alpha); }
ACLNN(aclnnInplaceAdds, (T, selfRef)(S, other)(S, alpha)) { selfRef = at::add(selfRef, other, alpha); }
ACLNN(aclnnSub, (T, self)(T, other)(S, alpha)(T, out)) { out = at::sub(self, other, alpha); }
ACLNN(aclnnSubs, (T, self)(S, other)(S, alpha)(T, out)) { out = at::sub(self, other, alpha); }
ACLNN(aclnnInplaceSub, (T, selfRef)(T, other)(S, alpha)) { selfRef = at::sub(selfRef, other, alpha); }
ACLNN(aclnnInplaceSubs, (T, selfRef)(S, other)(S, alpha)) { selfRef = at::sub(selfRef, other, alpha); }
ACLNN(aclnnRsubs, (T, self)(S, other)(S, alpha)(T, out)) { out = at::rsub(self, other, alpha); }
ACLNN(aclnnMul, (T, self)(T, other)(T, out)) { out = at::mul(self, other); }
ACLNN(aclnnMuls, (T, self)(S, other)(T, out)) { out = at::mul(self, other); }
ACLNN(aclnnInplaceMul, (T, selfRef)(T, other)) { selfRef = at::mul(selfRef, other); }
ACLNN(aclnnInplaceMuls, (T, selfRef)(S, other)) { selfRef = at::mul(selfRef, other); }
ACLNN(aclnnDiv, (T, self)(T, other)(T, out)) { out = at::div(self, other); }
ACLNN(aclnnDivs, (T, self)(S, other)(T, out)) { out = at::div(self, other); }
ACLNN(aclnnInplaceDiv, (T, selfRef)(T, other)) { selfRef = at::div(selfRef, other); }
ACLNN(aclnnInplaceDivs, (T, selfRef)(S, other)) { selfRef = at::div(selfRef, other); }
ACLNN(aclnnAddcmul, (T, self)(T, tensor1)(T, tensor2)(S, value)(T, out)) {
  out = at::addcmul(self, tensor1, tensor2, value);
}
ACLNN(aclnnInplaceAddcmul, (T, selfRef)(T, tensor1)(T, tensor2)(S, value)) {
  selfRef = at::addcmul(selfRef, tensor1, tensor2, value);
}
ACLNN(aclnnAddcdiv, (T, self)(T, tensor1)(T, tensor2)(S, value)(T, out)) {
  out = at::addcdiv(self, tensor1, tensor2, value);
}
ACLNN(aclnnInplaceAddcdiv, (T, selfRef)(T, tensor1)(T, tensor2)(S, value)) {
  selfRef = at::addcdiv(selfRef, tensor1, tensor2, value);
}
ACLNN(aclnnLerp, (T, self)(T, end)(T, weight)(T, out)) { out = at::lerp(self, end, weight.tensor()); }
ACLNN(aclnnLerps, (T, self)(T, end)(S, weight)(T, out)) { out = at::lerp(self, end, at::Scalar(weight)); }
ACLNN(aclnnInplaceLerps, (T, selfRef)(T, end)(S, weight)) { selfRef = at::lerp(selfRef, end, at::Scalar(weight)); }
ACLNN(aclnnPowTensorScalar, (T, self)(S, exponent)(T, out)) { out = at::pow(self, at::Scalar(exponent)); }
ACLNN(aclnnPowTensorTensor, (T, self)(T, exponent)(T, out)) { out = at::pow(self, exponent.tensor()); }
ACLNN(aclnnMaximum, (T, self)(T, other)(T, out)) { out = at::maximum(self, other); }
ACLNN(aclnnMinimum, (T, self)(T, other)(T, out)) { out = at::minimum(self, other); }

// Limits.
ACLNN(aclnnClamp, (T, self)(S, clipValueMin)(S, clipValueMax)(T, out)) {
  out = at::clamp(self, clipValueMin.maybe(), clipValueMax.maybe());
}
ACLNN(aclnnClampMin, (T, self)(S, clipValueMin)(T, out)) { out = at::clamp_min(self, at::Scalar(clipValueMin)); }
ACLNN(aclnnClampMax, (T, self)(S, clipValueMax)(T, out)) { out = at::clamp_max(self, at::Scalar(clipValueMax)); }
ACLNN(aclnnClampTensor, (T, self)(T, clipValueMin)(T, clipValueMax)(T, out)) {
  out = at::clamp(self, std::optional<at::Tensor>(clipValueMin.tensor()), std::optional<at::Tensor>(clipValueMax.tensor()));
}
ACLNN(aclnnNanToNum, (T, self)(float, nan)(float, posinf)(float, neginf)(T, out)) {
  out = at::nan_to_num(self, nan, posinf, neginf);
}

// Comparisons and logic.
ACLNN(aclnnEqTensor, (T, self)(T, other)(T, out)) { out = at::eq(self, other.tensor()); }
ACLNN(aclnnEqScalar, (T, self)(S, other)(T, out)) { out = at::eq(self, at::Scalar(other)); }
ACLNN(aclnnNeTensor, (T, self)(T, other)(T, out)) { out = at::ne(self, other.tensor()); }
ACLNN(aclnnNeScalar, (T, self)(S, other)(T, out)) { out = at::ne(self, at::Scalar(other)); }
ACLNN(aclnnLtTensor, (T, self)(T, other)(T, out)) { out = at::lt(self, other.tensor()); }
ACLNN(aclnnLtScalar, (T, self)(S, other)(T, out)) { out = at::lt(self, at::Scalar(other)); }
ACLNN(aclnnLeTensor, (T, self)(T, other)(T, out)) { out = at::le(self, other.tensor()); }
ACLNN(aclnnLeScalar, (T, self)(S, other)(T, out)) { out = at::le(self, at::Scalar(other)); }
ACLNN(aclnnGtTensor, (T, self)(T, other)(T, out)) { out = at::gt(self, other.tensor()); }
ACLNN(aclnnGtScalar, (T, self)(S, other)(T, out)) { out = at::gt(self, at::Scalar(other)); }
ACLNN(aclnnGeTensor, (T, self)(T, other)(T, out)) { out = at::ge(self, other.tensor()); }
ACLNN(aclnnGeScalar, (T, self)(S, other)(T, out)) { out = at::ge(self, at::Scalar(other)); }
ACLNN(aclnnEqual, (T, self)(T, other)(T, out)) { out = at::full_like(out, at::equal(self, other)); }
ACLNN(aclnnIsFinite, (T, self)(T, out)) { out = at::isfinite(self); }
ACLNN(aclnnIsNegInf, (T, self)(T, out)) { out = at::isneginf(self); }
ACLNN(aclnnLogicalOr, (T, self)(T, other)(T, out)) { out = at::logical_or(self, other); }
ACLNN(aclnnInplaceLogicalOr, (T, selfRef)(T, other)) { selfRef = at::logical_or(selfRef, other); }
ACLNN(aclnnLogicalNot, (T, self)(T, out)) { out = at::logical_not(self); }
ACLNN(aclnnBitwiseAndTensor, (T, self)(T, other)(T, out)) { out = at::bitwise_and(self, other.tensor()); }

// Functions of one tensor.
ACLNN(aclnnAbs, (T, self)(T, out)) { out = at::abs(self); }
ACLNN(aclnnNeg, (T, self)(T, out)) { out = at::neg(self); }
ACLNN(aclnnReciprocal, (T, self)(T, out)) { out = at::reciprocal(self); }
ACLNN(aclnnSqrt, (T, self)(T, out)) { out = at::sqrt(self); }
ACLNN(aclnnRsqrt, (T, self)(T, out)) { out = at::rsqrt(self); }
ACLNN(aclnnExp, (T, self)(T, out)) { out = at::exp(self); }
ACLNN(aclnnLog, (T, self)(T, out)) { out = at::log(self); }
ACLNN(aclnnSin, (T, self)(T, out)) { out = at::sin(self); }
ACLNN(aclnnCos, (T, input)(T, out)) { out = at::cos(input); }

// Activations.
ACLNN(aclnnRelu, (T, self)(T, out)) { out = at::relu(self); }
ACLNN(aclnnThresholdBackward, (T, gradOutput)(T, self)(S, threshold)(T, out)) {
  out = at::threshold_backward(gradOutput, self, threshold);
}
ACLNN(aclnnSigmoid, (T, self)(T, out)) { out = at::sigmoid(self); }
ACLNN(aclnnSigmoidBackward, (T, gradOutput)(T, output)(T, gradInput)) {
  gradInput = at::sigmoid_backward(gradOutput, output);
}
ACLNN(aclnnTanh, (T, self)(T, out)) { out = at::tanh(self); }
ACLNN(aclnnTanhBackward, (T, gradOutput)(T, output)(T, gradInput)) {
  gradInput = at::tanh_backward(gradOutput, output);
}
ACLNN(aclnnSilu, (T, self)(T, out)) { out = at::silu(self); }
ACLNN(aclnnSiluBackward, (T, gradOutput)(T, self)(T, gradInput)) { gradInput = at::silu_backward(gradOutput, self); }
ACLNN(aclnnGelu, (T, self)(T, out)) { out = at::gelu(self); }
ACLNN(aclnnGeluBackward, (T, gradOutput)(T, self)(T, gradInput)) { gradInput = at::gelu_backward(gradOutput, self); }
ACLNN(aclnnGeluV2, (T, x)(int64_t, approximate)(T, y)) { y = at::gelu(x, approximate == 1 ? "tanh" : "none"); }
ACLNN(aclnnGeluBackwardV2, (T, gradOutput)(T, self)(char*, approximate)(T, gradInput)) {
  gradInput = at::gelu_backward(gradOutput, self, approximate);
}
ACLNN(aclnnSoftmax, (T, self)(int64_t, dim)(T, out)) { out = at::softmax(self, dim); }
ACLNN(aclnnSoftmaxBackward, (T, gradOutput)(T, output)(int64_t, dim)(T, out)) {
  out = at::_softmax_backward_data(gradOutput, output, dim, output.tensor().scalar_type());
}
