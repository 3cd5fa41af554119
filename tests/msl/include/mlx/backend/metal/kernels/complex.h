// complex_t overloads member functions on address space, which this shim erases; LLM kernels do not
// use it.
#pragma once
#include <metal_stdlib>
#include "mlx/backend/metal/kernels/bf16.h"
template <typename T>
struct complex_t {
  using value_type = T;
  T real, imag;
  constexpr complex_t(T r = T(0), T i = T(0)) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
