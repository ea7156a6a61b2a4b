// The table of what CANN's documentation allows each aclnn function to be given: operators.tsv, beside this library.
#pragma once
#include <vector>

struct Given;

// A line for EMULATED_CANN_OPERATORS: the function, and each tensor's parameter, type and whether it is contiguous.
void note_operator(const char* name, const std::vector<Given>& parameters);

// Throws where the function has no row, or a tensor has a type or a layout that its row does not allow. EMULATED_CANN_STRICT=0
// lets everything pass.
void check_operator(const char* name, const std::vector<Given>& parameters);
