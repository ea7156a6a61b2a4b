// The objects of CANN's operator library, and how an operator runs.
#include "aclnn.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>

#include <complex>
#include <cstring>
#include <mutex>
#include <set>

#include "table.h"

API int aclrtSynchronizeStream(void* stream);  // the runtime's
API void emulated_set_error(const char* text);
API void emulated_note(const char* variable, const char* line);

namespace {
constexpr int OK = 0, BAD_PARAMETER = 161002, FAILED = 361001;  // aclnn's own numbers

// aclDataType and torch's name for it.
const std::pair<int, at::ScalarType> TYPES[] = {
    {0, at::kFloat}, {1, at::kHalf}, {2, at::kChar},    {3, at::kInt},           {4, at::kByte},           {6, at::kShort},
    {9, at::kLong},  {11, at::kDouble}, {12, at::kBool}, {16, at::kComplexFloat}, {17, at::kComplexDouble}, {27, at::kBFloat16},
};

template <class Value>
at::Scalar read(const void* value) {
  Value copy;
  memcpy(&copy, value, sizeof copy);
  return at::Scalar(copy);
}

at::Scalar read_scalar(const void* value, int type) {
  switch (scalar_type(type)) {
    case at::kDouble: return read<double>(value);
    case at::kFloat: return read<float>(value);
    case at::kHalf: return read<at::Half>(value);
    case at::kBFloat16: return read<at::BFloat16>(value);
    case at::kLong: return read<int64_t>(value);
    case at::kInt: return read<int32_t>(value);
    case at::kBool: return read<bool>(value);
    default: TORCH_CHECK(false, "emulated CANN: no scalar of type ", scalar_type(type));
  }
}

// Runs `work`; an exception becomes the error text of CANN and its code.
int reported(const char* name, int code, const std::function<void()>& work) {
  try {
    work();
    return OK;
  } catch (const c10::Error& error) {
    emulated_set_error((std::string("emulated CANN: ") + name + ": " + error.what_without_backtrace()).c_str());
  } catch (const std::exception& error) {
    emulated_set_error((std::string("emulated CANN: ") + name + ": " + error.what()).c_str());
  }
  return code;
}
}  // namespace

at::ScalarType scalar_type(int acl_type) {
  for (const auto& [number, type] : TYPES)
    if (number == acl_type) return type;
  TORCH_CHECK(false, "emulated CANN: aclDataType ", acl_type, " is not known");
}

at::Tensor aclTensor::view() const {
  auto options = at::TensorOptions().dtype(scalar_type(type));
  int64_t elements = 1;
  for (auto size : sizes) elements *= size;
  if (!elements) return at::empty_strided(sizes, strides, options);
  char* first = data + offset * c10::elementSize(scalar_type(type));
  return at::for_blob(first, sizes).strides(strides).options(options).make_tensor();
}

const T& T::operator=(const at::Tensor& result) const {
  if (!acl || !result.defined()) return *this;  // a result that nobody wants
  at::Tensor out = tensor();
  TORCH_CHECK(out.sizes() == result.sizes(), "the result has shape ", result.sizes(), ", the caller expects ", out.sizes());
  out.copy_(result);
  return *this;
}

void T::take(const at::Tensor& result) const {
  auto* shaped = const_cast<aclTensor*>(acl);  // aclGetViewShape tells the caller
  shaped->sizes = result.sizes().vec();
  shaped->strides = result.contiguous().strides().vec();
  *this = result;
}

std::vector<at::Tensor> TL::tensors() const {
  std::vector<at::Tensor> all;
  for (auto* tensor : acl->values) all.push_back(T{tensor});
  return all;
}

void TL::operator=(const std::vector<at::Tensor>& results) const {
  TORCH_CHECK(results.size() == acl->values.size(), "the caller expects ", acl->values.size(), " results");
  for (size_t i = 0; i < results.size(); i++) T{acl->values[i]} = results[i];
}

std::vector<at::Scalar> SL::scalars() const {
  std::vector<at::Scalar> all;
  for (auto* scalar : acl->values) all.push_back(scalar->value);
  return all;
}

char* kept(char* text) {
  static std::mutex guard;
  static std::set<std::string> texts;
  std::lock_guard<std::mutex> lock(guard);
  return const_cast<char*>(texts.insert(text).first->c_str());
}

// A generator of its own for every call: what the NPU's generator says decides, the CPU's is left as it is. The first
// numbers after a seed are the CPU's after the same seed, so that a run can be compared with one on a CPU.
at::Generator generator(int64_t seed, int64_t offset) {
  return at::detail::createCPUGenerator(static_cast<uint64_t>(seed) + static_cast<uint64_t>(offset) * 0x9e3779b97f4a7c15ull);
}

int prepare(const char* name, const std::vector<Given>& parameters, std::function<void()> work, Bytes* workspace,
            aclOpExecutor** executor) {
  *workspace = 0;
  return reported(name, BAD_PARAMETER, [&] {
    note_operator(name, parameters);
    check_operator(name, parameters);
    *executor = new aclOpExecutor{name, std::move(work)};
  });
}

int execute(aclOpExecutor* executor, void* stream) {
  std::unique_ptr<aclOpExecutor> owned(executor);
  if (int error = aclrtSynchronizeStream(stream)) return error;  // what was asked of the stream before
  return reported(owned->name, FAILED, [&] {
    c10::NoGradGuard no_gradients;
    at::AutoDispatchBelowADInplaceOrView below;
    owned->work();
  });
}

API aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dims, int type, const int64_t* strides, int64_t offset,
                               int format, const int64_t*, uint64_t, void* data) {
  return new aclTensor{{sizes, sizes + dims}, {strides, strides + dims}, type, format, offset, static_cast<char*>(data)};
}
API int aclGetViewShape(const aclTensor* tensor, int64_t** dims, uint64_t* count) {  // the caller deletes it
  *count = tensor->sizes.size();
  *dims = new int64_t[*count];
  std::copy(tensor->sizes.begin(), tensor->sizes.end(), *dims);
  return OK;
}
API aclScalar* aclCreateScalar(void* value, int type) { return new aclScalar{read_scalar(value, type)}; }
API aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return new aclIntArray{{values, values + count}};
}
API aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) {
  return new aclBoolArray{{values, values + count}};
}
API aclTensorList* aclCreateTensorList(const aclTensor* const* values, uint64_t count) {
  return new aclTensorList{{values, values + count}};
}
API aclScalarList* aclCreateScalarList(const aclScalar* const* values, uint64_t count) {
  return new aclScalarList{{values, values + count}};
}
API int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return OK;
}
API int aclDestroyScalar(const aclScalar* scalar) {
  delete scalar;
  return OK;
}
API int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return OK;
}
API int aclDestroyBoolArray(const aclBoolArray* array) {
  delete array;
  return OK;
}
API int aclDestroyTensorList(const aclTensorList* list) {  // and what is in it, as CANN does
  for (auto* tensor : list->values) delete tensor;
  delete list;
  return OK;
}
API int aclDestroyScalarList(const aclScalarList* list) {
  for (auto* scalar : list->values) delete scalar;
  delete list;
  return OK;
}
