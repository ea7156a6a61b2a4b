// Random numbers, from the seed and the offset that the NPU's generator hands over.
#include "aclnn.h"

ACLNN(aclnnInplaceNormal, (T, selfRef)(float, mean)(float, std)(int64_t, seed)(int64_t, offset)) {
  selfRef = at::empty_like(selfRef).normal_(mean, std, generator(seed, offset));
}
ACLNN(aclnnNormalFloatFloat, (float, mean)(float, std)(int64_t, seed)(int64_t, offset)(T, out)) {
  out = at::empty_like(out).normal_(mean, std, generator(seed, offset));
}
ACLNN(aclnnInplaceUniform, (T, selfRef)(double, from)(double, to)(uint64_t, seed)(uint64_t, offset)) {
  selfRef = at::empty_like(selfRef).uniform_(from, to, generator(seed, offset));
}
ACLNN(aclnnRandperm, (int64_t, n)(int64_t, seed)(int64_t, offset)(T, out)) {
  out = at::randperm(n, generator(seed, offset), out.tensor().options());
}

// Dropout's mask has a bit for each element, the lowest first: 1 keeps it.
ACLNN(aclnnDropoutGenMaskV2, (Ints, shape)(double, prob)(int64_t, seed)(int64_t, offset)(DataType, probDataType)(T, out)) {
  auto bits = at::empty({out.tensor().numel(), 8}, at::kFloat).bernoulli_(1 - prob, generator(seed, offset));
  auto weights = at::pow(at::Scalar(2), at::arange(8, at::kFloat));
  out = at::matmul(bits, weights).to(at::kByte).view(out.tensor().sizes());
}
ACLNN(aclnnDropoutDoMask, (T, self)(T, mask)(double, prob)(T, out)) {
  auto values = self.tensor();
  auto bits = at::bitwise_and(mask.tensor().flatten().unsqueeze(1), at::pow(at::Scalar(2), at::arange(8)).to(at::kByte));
  auto kept_elements = bits.ne(0).flatten().narrow(0, 0, values.numel()).view(values.sizes());
  out = at::where(kept_elements, values / (1 - prob), at::zeros_like(values));
}
