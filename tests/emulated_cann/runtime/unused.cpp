// Functions that torch_npu links to and that have nothing to do here: profiling, dumps, sharing between processes, and
// the older interface of operators, which torch_npu takes where an aclnn function is missing. That one refuses.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "common.h"

#define NOTHING(name) \
  API aclError name(...) { return OK; }
NOTHING(aclDestroyDataBuffer)
NOTHING(aclSetCompileopt)
NOTHING(aclSetTensorFormat)
NOTHING(aclSetTensorPlaceMent)
NOTHING(aclSetTensorShape)
NOTHING(aclmdlFinalizeDump)
NOTHING(aclmdlInitDump)
NOTHING(aclmdlSetDump)
NOTHING(aclopSetAttrBool)
NOTHING(aclopSetAttrDataType)
NOTHING(aclopSetAttrFloat)
NOTHING(aclopSetAttrInt)
NOTHING(aclopSetAttrListBool)
NOTHING(aclopSetAttrListFloat)
NOTHING(aclopSetAttrListInt)
NOTHING(aclopSetAttrListListInt)
NOTHING(aclopSetAttrString)
NOTHING(aclopSetCompileFlag)
NOTHING(aclrtBinaryGetFunction)
NOTHING(aclrtBinaryLoadFromData)
NOTHING(aclrtDeviceEnablePeerAccess)
NOTHING(aclrtGetFunctionAddr)
NOTHING(aclrtGetLastError)
NOTHING(aclrtHostUnregister)
NOTHING(aclrtMemExportToShareableHandle)
NOTHING(aclrtMemImportFromShareableHandle)
NOTHING(aclrtMemSetPidToShareableHandle)
NOTHING(aclrtPeekAtLastError)
NOTHING(aclrtResetEvent)
NOTHING(aclrtSetDeviceSatMode)
NOTHING(aclrtSetOpExecuteTimeOut)
NOTHING(aclrtSetOpExecuteTimeOutV2)
NOTHING(aclrtSetOpWaitTimeout)
NOTHING(aclrtSetStreamFailureMode)
NOTHING(aclrtSetStreamOverflowSwitch)
NOTHING(aclrtSubscribeReport)
NOTHING(aclrtUnSubscribeReport)
NOTHING(MsprofRegisterCallback)
NOTHING(MsprofReportAdditionalInfo)
NOTHING(MsprofReportApi)
NOTHING(MsprofReportCompactInfo)
NOTHING(rtDevBinaryRegister)
NOTHING(rtFunctionRegister)
NOTHING(rtKernelLaunch)

API uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
API uint64_t MsprofSysCycleTime() { return static_cast<uint64_t>(now_ms() * 1e6); }
API void aclAppLog(int, const char*, const char*, uint32_t, const char*, ...) {}
API void* aclCreateDataBuffer(void*, size_t) { return calloc(1, 64); }
API void* aclCreateTensorDesc(int, int, const int64_t*, int) { return calloc(1, 64); }
API void aclDestroyTensorDesc(void* description) { free(description); }
API void* aclopCreateAttr() { return calloc(1, 64); }
API void aclopDestroyAttr(void* attribute) { free(attribute); }
API void aclSetTensorDescName(void*, const char*) {}
API aclError aclGetTensorDescDimV2(const void*, size_t, int64_t* size) {
  *size = 0;
  return OK;
}
API int aclGetTensorDescFormat(const void*) { return 2; }
API size_t aclGetTensorDescNumDims(const void*) { return 0; }
API int aclGetTensorDescType(const void*) { return 0; }

static thread_local std::string recent_error;
API void emulated_set_error(const char* text) { recent_error = text; }
API const char* aclGetRecentErrMsg() { return recent_error.c_str(); }

static aclError refuse(const char* name) {
  std::string text = std::string("emulated CANN has no aclnn function for the operator ") + name + ".";
  emulated_note("EMULATED_CANN_MISSING", name);
  emulated_set_error(text.c_str());
  return INTERNAL;
}
API aclError aclopCompileAndExecute(const char* name, ...) { return refuse(name); }
API aclError aclopCompileAndExecuteV2(const char* name, ...) { return refuse(name); }
