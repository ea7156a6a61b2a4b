// Normalizations. All are computed in float32 and rounded once, as the card's kernels do.
#include "aclnn.h"

static at::Tensor wide(T given) { return given.given() ? given.tensor().to(at::kFloat) : at::Tensor(); }

ACLNN(aclnnLayerNorm, (T, input)(Ints, normalizedShape)(T, weightOptional)(T, biasOptional)(double, eps)(T, out)
                      (T, meanOutOptional)(T, rstdOutOptional)) {
  auto [result, mean, rstd] = at::native_layer_norm(wide(input), normalizedShape.list(), wide(weightOptional),
                                                    wide(biasOptional), eps);
  out = result;
  meanOutOptional = mean;
  rstdOutOptional = rstd;
}
ACLNN(aclnnLayerNormBackward, (T, gradOut)(T, input)(Ints, normalizedShape)(T, mean)(T, rstd)(T, weightOptional)
                              (T, biasOptional)(Mask, outputMask)(T, gradInputOut)(T, gradWeightOut)(T, gradBiasOut)) {
  std::array<bool, 3> wanted = outputMask;
  auto [to_input, to_weight, to_bias] =
      at::native_layer_norm_backward(wide(gradOut), wide(input), normalizedShape.list(), wide(mean), wide(rstd),
                                     wide(weightOptional), wide(biasOptional), wanted);
  gradInputOut = to_input;
  gradWeightOut = to_weight;
  gradBiasOut = to_bias;
}
ACLNN(aclnnGroupNorm, (T, self)(T, gamma)(T, beta)(int64_t, N)(int64_t, C)(int64_t, HxW)(int64_t, group)(double, eps)
                      (T, out)(T, meanOut)(T, rstdOut)) {
  auto [result, mean, rstd] = at::native_group_norm(wide(self).contiguous(), wide(gamma), wide(beta), N, C, HxW, group, eps);
  out = result;
  meanOut = mean;
  rstdOut = rstd;
}
ACLNN(aclnnGroupNormBackward, (T, gradOut)(T, input)(T, mean)(T, rstd)(T, gamma)(int64_t, N)(int64_t, C)(int64_t, HxW)
                              (int64_t, group)(Mask, outputMask)(T, gradInput)(T, gradGammaOut)(T, gradBetaOut)) {
  std::array<bool, 3> wanted = outputMask;
  auto [to_input, to_gamma, to_beta] =
      at::native_group_norm_backward(wide(gradOut).contiguous(), wide(input).contiguous(), wide(mean), wide(rstd),
                                     wide(gamma), N, C, HxW, group, wanted);
  gradInput = to_input;
  gradGammaOut = to_gamma;
  gradBetaOut = to_beta;
}

// y = x / sqrt(mean(x^2) + epsilon) * gamma over the last dimensions, those of gamma; rstd keeps them as 1.
static std::vector<int64_t> last_dims(const at::Tensor& gamma) {
  std::vector<int64_t> dims;
  for (int64_t d = -gamma.dim(); d < 0; d++) dims.push_back(d);
  return dims;
}
ACLNN(aclnnRmsNorm, (T, x)(T, gamma)(double, epsilon)(T, yOut)(T, rstdOut)) {
  auto values = wide(x), scale = wide(gamma);
  auto rstd = at::rsqrt(at::mean(values * values, last_dims(scale), true) + epsilon);
  yOut = values * rstd * scale;
  rstdOut = rstd;
}
ACLNN(aclnnRmsNormGrad, (T, dy)(T, x)(T, rstd)(T, gamma)(T, dxOut)(T, dgammaOut)) {
  auto values = wide(x), scale = wide(gamma), inverse = wide(rstd), gradient = wide(dy);
  auto normed = values * inverse, scaled = gradient * scale;
  dxOut = (scaled - normed * at::mean(scaled * normed, last_dims(scale), true)) * inverse;
  dgammaOut = at::sum_to(gradient * normed, scale.sizes());
}
