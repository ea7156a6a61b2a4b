// Reading the table, and holding calls against it.
#include "table.h"

#include <dlfcn.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "aclnn.h"

API void emulated_note(const char* variable, const char* line);

namespace {
struct Allowed {
  std::set<std::string> types;
  bool strided;  // whether a tensor that is not contiguous is taken
};
typedef std::map<std::string, std::map<std::string, Allowed>> Table;  // function -> parameter -> what it takes

const std::map<at::ScalarType, std::string> NAMES = {
    {at::kFloat, "FLOAT"}, {at::kHalf, "FLOAT16"}, {at::kBFloat16, "BFLOAT16"}, {at::kDouble, "DOUBLE"},
    {at::kLong, "INT64"},  {at::kInt, "INT32"},    {at::kShort, "INT16"},       {at::kChar, "INT8"},
    {at::kByte, "UINT8"},  {at::kBool, "BOOL"},    {at::kComplexFloat, "COMPLEX64"}, {at::kComplexDouble, "COMPLEX128"},
};

std::string type_name(const aclTensor* tensor) { return NAMES.at(scalar_type(tensor->type)); }

std::string table_path() {
  Dl_info here;
  dladdr(reinterpret_cast<void*>(&table_path), &here);
  std::string path = here.dli_fname;
  return path.substr(0, path.rfind('/') + 1) + "operators.tsv";
}

std::set<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::set<std::string> found;
  for (std::string word; stream >> word;) found.insert(word);
  return found;
}

// Columns: function, parameter, types, "strided" or "contiguous", source.
Table read_table() {
  std::string path = table_path(), line;
  std::ifstream file(path);
  TORCH_CHECK(file, path, " cannot be read");
  Table table;
  while (std::getline(file, line)) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream columns(line);
    std::string function, parameter, types, layout;
    for (auto* column : {&function, &parameter, &types, &layout}) std::getline(columns, *column, '\t');
    table[function][parameter] = {words(types), layout == "strided"};
  }
  return table;
}

bool strict() {
  static const char* value = getenv("EMULATED_CANN_STRICT");
  return !value || std::string(value) != "0";
}

// As torch sees it: strides of dimensions of size 1 do not count.
bool contiguous(const aclTensor* tensor) {
  int64_t expected = 1;
  for (size_t d = tensor->sizes.size(); d-- > 0;) {
    if (tensor->sizes[d] == 0) return true;
    if (tensor->sizes[d] != 1 && tensor->strides[d] != expected) return false;
    expected *= tensor->sizes[d];
  }
  return true;
}

void check_tensor(const Given& parameter, const aclTensor* tensor, const Allowed& allowed) {
  TORCH_CHECK(allowed.types.count(type_name(tensor)), parameter.name, " is of type ", type_name(tensor),
              ", which the table of operators does not list");
  TORCH_CHECK(allowed.strided || contiguous(tensor), parameter.name,
              " is not contiguous, which this operator does not take");
}
}  // namespace

void note_operator(const char* name, const std::vector<Given>& parameters) {
  static bool wanted = getenv("EMULATED_CANN_OPERATORS") != nullptr;
  if (!wanted) return;
  std::string line = name;
  for (const auto& parameter : parameters) {
    std::set<std::string> kinds;
    for (auto* tensor : parameter.tensors)
      if (tensor) kinds.insert(type_name(tensor) + (contiguous(tensor) ? "" : ":strided"));
    for (const auto& kind : kinds) line += std::string(" ") + parameter.name + "=" + kind;
  }
  emulated_note("EMULATED_CANN_OPERATORS", line.c_str());
}

void check_operator(const char* name, const std::vector<Given>& parameters) {
  if (!strict()) return;
  static const Table table = read_table();
  auto row = table.find(name);
  TORCH_CHECK(row != table.end(), "this operator is not in the table of operators");
  for (const auto& parameter : parameters) {
    for (auto* tensor : parameter.tensors) {
      if (!tensor) continue;
      auto allowed = row->second.find(parameter.name);
      TORCH_CHECK(allowed != row->second.end(), parameter.name, " is not in the table of operators");
      check_tensor(parameter, tensor, allowed->second);
    }
  }
}
