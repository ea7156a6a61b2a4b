// Copies, casts, filling, joining, selecting, resizing: what moves values and computes nothing.
#include "aclnn.h"

ACLNN(aclnnInplaceCopy, (T, selfRef)(T, src)) { selfRef = src.tensor().expand(selfRef.tensor().sizes()); }
ACLNN(aclnnCast, (T, self)(DataType, dtype)(T, out)) { out = self.tensor().to(scalar_type(dtype)); }
ACLNN(aclnnInplaceZero, (T, selfRef)) { selfRef = at::zeros_like(selfRef); }
ACLNN(aclnnInplaceOne, (T, selfRef)) { selfRef = at::ones_like(selfRef); }
ACLNN(aclnnInplaceFillScalar, (T, selfRef)(S, value)) { selfRef = at::full_like(selfRef, value); }
ACLNN(aclnnInplaceFillTensor, (T, selfRef)(T, value)) { selfRef = value.tensor().expand(selfRef.tensor().sizes()); }
ACLNN(aclnnArange, (S, start)(S, end)(S, step)(T, out)) {
  out = at::arange(start, end, step, out.tensor().options());
}

ACLNN(aclnnCat, (TL, tensors)(int64_t, dim)(T, out)) { out = at::cat(tensors.tensors(), dim); }
ACLNN(aclnnStack, (TL, tensors)(int64_t, dim)(T, out)) { out = at::stack(tensors.tensors(), dim); }
ACLNN(aclnnRepeat, (T, self)(Ints, repeats)(T, out)) { out = self.tensor().repeat(repeats.list()); }
ACLNN(aclnnRepeatInterleaveInt, (T, self)(int64_t, repeats)(int64_t, outputSize)(T, out)) {
  out = at::repeat_interleave(self, repeats);
}
ACLNN(aclnnRepeatInterleaveIntWithDim, (T, self)(int64_t, repeats)(int64_t, dim)(int64_t, outputSize)(T, out)) {
  out = at::repeat_interleave(self, repeats, dim);
}
ACLNN(aclnnConstantPadNd, (T, self)(Ints, pad)(S, value)(T, out)) { out = at::constant_pad_nd(self, pad.list(), value); }

ACLNN(aclnnUpsampleNearest2d, (T, self)(Ints, outputSize)(T, out)) {
  out = at::upsample_nearest2d(self, outputSize.list());
}
ACLNN(aclnnUpsampleNearest2dV2, (T, self)(Ints, outputSize)(float, scalesH)(float, scalesW)(T, out)) {
  out = at::upsample_nearest2d(self, outputSize.list());
}
ACLNN(aclnnUpsampleBicubic2d, (T, self)(Ints, outputSize)(bool, alignCorners)(double, scalesH)(double, scalesW)(T, out)) {
  out = at::upsample_bicubic2d(self, outputSize.list(), alignCorners);
}

// Selecting by index or mask.
ACLNN(aclnnSWhere, (T, condition)(T, self)(T, other)(T, out)) { out = at::where(condition, self.tensor(), other.tensor()); }
ACLNN(aclnnInplaceMaskedFillScalar, (T, selfRef)(T, mask)(S, value)) {
  selfRef = at::masked_fill(selfRef, mask, at::Scalar(value));
}
ACLNN(aclnnInplaceMaskedFillTensor, (T, selfRef)(T, mask)(T, value)) {
  selfRef = at::masked_fill(selfRef, mask, value.tensor());
}
ACLNN(aclnnNonzero, (T, self)(T, out)) { out.take(at::nonzero(self)); }
ACLNN(aclnnNonzeroV2, (T, self)(T, out)) { out.take(at::nonzero(self).transpose(0, 1)); }
ACLNN(aclnnIndexSelect, (T, self)(int64_t, dim)(T, index)(T, out)) { out = at::index_select(self, dim, index); }
ACLNN(aclnnGather, (T, self)(int64_t, dim)(T, index)(T, out)) { out = at::gather(self, dim, index); }

// A dimension that is not indexed has an empty tensor.
static c10::List<std::optional<at::Tensor>> index_list(TL indices) {
  c10::List<std::optional<at::Tensor>> list;
  for (const auto& index : indices.tensors())
    list.push_back(index.defined() && index.numel() ? std::optional<at::Tensor>(index) : std::nullopt);
  return list;
}
ACLNN(aclnnIndex, (T, self)(TL, indices)(T, out)) { out = at::index(self, index_list(indices)); }
ACLNN(aclnnIndexPutImpl, (T, selfRef)(TL, indices)(T, values)(bool, accumulate)(bool, unsafe)) {
  selfRef = at::index_put(selfRef, index_list(indices), values, accumulate);
}
ACLNN(aclnnEmbedding, (T, weight)(T, indices)(T, out)) { out = at::embedding(weight, indices); }
ACLNN(aclnnEmbeddingDenseBackward, (T, grad)(T, indices)(uint64_t, numWeights)(uint64_t, paddingIdx)
                                   (bool, scaleGradByFreq)(T, out)) {
  out = at::embedding_dense_backward(grad, indices, numWeights, static_cast<int64_t>(paddingIdx), scaleGradByFreq);
}
