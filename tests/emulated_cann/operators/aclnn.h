// How an aclnn function is written here. One line makes both C functions of an operator:
//
//   ACLNN(aclnnAdd, (T, self)(T, other)(S, alpha)(T, out)) { out = at::add(self, other, alpha); }
//
// aclnnAddGetWorkspaceSize checks the tensors against the table and keeps the body for later, aclnnAdd runs it. Names and
// order of the parameters are those of CANN's documentation, by which the table names them too. The body computes with
// the CPU's kernels on the card's memory, which is the host's; `out = ...` writes into the tensor that the caller gave.
#pragma once
#include <ATen/ATen.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

// What stands behind CANN's opaque pointers.
struct aclTensor {
  std::vector<int64_t> sizes, strides;
  int type, format;
  int64_t offset;  // in elements
  char* data;

  at::Tensor view() const;
};
struct aclScalar {
  at::Scalar value;
};
template <class Value>
struct Array {
  std::vector<Value> values;
};
typedef Array<int64_t> aclIntArray;
typedef Array<char> aclBoolArray;
typedef Array<const aclTensor*> aclTensorList;
typedef Array<const aclScalar*> aclScalarList;
struct aclOpExecutor {
  const char* name;
  std::function<void()> work;
};

// The types of parameters. Each is one pointer, so it travels like the pointer it stands for.
struct T {  // a tensor, or none
  const aclTensor* acl;
  bool given() const { return acl != nullptr; }
  at::Tensor tensor() const { return acl ? acl->view() : at::Tensor(); }
  operator at::Tensor() const { return tensor(); }
  const T& operator=(const at::Tensor& result) const;
  void take(const at::Tensor& result) const;  // where only the result tells the shape: the caller's tensor has room for any
};
struct S {  // a scalar, or none
  const aclScalar* acl;
  bool given() const { return acl != nullptr; }
  operator at::Scalar() const { return acl->value; }
  std::optional<at::Scalar> maybe() const { return acl ? std::optional<at::Scalar>(acl->value) : std::nullopt; }
};
struct Ints {
  const aclIntArray* acl;
  bool given() const { return acl != nullptr; }
  operator at::IntArrayRef() const { return acl ? at::IntArrayRef(acl->values) : at::IntArrayRef(); }
  at::IntArrayRef list() const { return *this; }
};
struct Mask {  // which of several results are wanted
  const aclBoolArray* acl;
  template <size_t count>
  operator std::array<bool, count>() const {
    std::array<bool, count> wanted{};
    for (size_t i = 0; i < count; i++) wanted[i] = acl->values.at(i);
    return wanted;
  }
};
struct TL {  // tensors
  const aclTensorList* acl;
  std::vector<at::Tensor> tensors() const;
  void operator=(const std::vector<at::Tensor>& results) const;
};
struct SL {  // scalars
  const aclScalarList* acl;
  std::vector<at::Scalar> scalars() const;
};
typedef int DataType;  // aclDataType

// Texts are read in the first of the two calls: the caller's need not be there any more in the second.
char* kept(char* text);
template <class Other>
Other kept(Other value) {
  return value;
}

at::ScalarType scalar_type(int acl_type);
at::Generator generator(int64_t seed, int64_t offset);

// One parameter as the table knows it: its name, and the tensors given for it.
struct Given {
  const char* name;
  std::vector<const aclTensor*> tensors;
};
inline Given given(const char* name, T value) { return {name, {value.acl}}; }
inline Given given(const char* name, TL value) { return {name, value.acl ? value.acl->values : Given().tensors}; }
template <class Other>
Given given(const char* name, Other) {
  return {name, {}};
}

typedef uint64_t Bytes;
int prepare(const char* name, const std::vector<Given>& parameters, std::function<void()> work, Bytes* workspace,
            aclOpExecutor** executor);
int execute(aclOpExecutor* executor, void* stream);

// The preprocessor's way through a sequence (a, b)(c, d)...: two macros that call each other, the last one's name
// completed to one that is empty.
#define ENDED(...) ENDED_(__VA_ARGS__)
#define ENDED_(...) __VA_ARGS__##_END
#define TAIL(first, ...) __VA_ARGS__
#define TAIL_OF(...) TAIL(__VA_ARGS__)
#define DECLARED_A(type, name) , type name DECLARED_B
#define DECLARED_B(type, name) , type name DECLARED_A
#define DECLARED_A_END
#define DECLARED_B_END
#define NAMED_A(type, name) , name NAMED_B
#define NAMED_B(type, name) , name NAMED_A
#define NAMED_A_END
#define NAMED_B_END
#define GIVEN_A(type, name) , given(#name, name) GIVEN_B
#define GIVEN_B(type, name) , given(#name, name) GIVEN_A
#define GIVEN_A_END
#define GIVEN_B_END
#define KEPT_A(type, name) name = kept(name); KEPT_B
#define KEPT_B(type, name) name = kept(name); KEPT_A
#define KEPT_A_END
#define KEPT_B_END
#define KEPT(sequence) ENDED(KEPT_A sequence)
#define DECLARED(sequence) TAIL_OF(0 ENDED(DECLARED_A sequence))
#define NAMED(sequence) TAIL_OF(0 ENDED(NAMED_A sequence))
#define GIVEN(sequence) TAIL_OF(0 ENDED(GIVEN_A sequence))

#define ACLNN(name, sequence)                                                                              \
  static void name##_body(DECLARED(sequence));                                                             \
  API int name##GetWorkspaceSize(DECLARED(sequence), Bytes* workspace, aclOpExecutor** executor) {         \
    KEPT(sequence)                                                                                         \
    return prepare(#name, {GIVEN(sequence)}, [=] { name##_body(NAMED(sequence)); }, workspace, executor);  \
  }                                                                                                        \
  API int name(void*, Bytes, aclOpExecutor* executor, void* stream) { return execute(executor, stream); }  \
  static void name##_body(DECLARED(sequence))
