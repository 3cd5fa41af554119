// Enough of the Metal Shading Language's library for compute kernels, as ordinary C++17 (clang 16
// or newer, x86-64). Address spaces are erased here; include_lint/msllint.h type-checks them.
#pragma once
#include "msl/keywords.h"
