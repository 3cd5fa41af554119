// Replaces MLX's bf16_math.h (which is written over Apple's __metal_* builtins): the same overload
// set for bfloat, computed in float and rounded. Same effect: metal::exp(bfloat) etc. exist and
// return bfloat.
#pragma once
namespace metal {
#define B1(F) \
  inline bfloat16_t F(bfloat16_t x) { return bfloat16_t(F(float(x))); }
#define B2(F) \
  inline bfloat16_t F(bfloat16_t x, bfloat16_t y) { return bfloat16_t(F(float(x), float(y))); }
#define BALL                                                                                  \
  B1(acos)                                                                                    \
  B1(acosh) B1(asin) B1(asinh) B1(atan) B1(atanh) B1(ceil) B1(cos) B1(cosh) B1(exp) B1(exp10) \
      B1(exp2) B1(fabs) B1(floor) B1(fract) B1(log) B1(log10) B1(log2) B1(rint) B1(round)     \
          B1(rsqrt) B1(sin) B1(sinh) B1(sqrt) B1(tan) B1(tanh) B1(trunc) B2(atan2) B2(divide) \
              B2(fmax) B2(fmin) B2(fmod) B2(pow) B2(powr)
BALL namespace fast { BALL }
namespace precise {
BALL
}
inline bfloat16_t fma(bfloat16_t a, bfloat16_t b, bfloat16_t c) {
  return bfloat16_t(__builtin_fmaf(float(a), float(b), float(c)));
}
// SIMD-group functions: shuffles move the 16 bits, reductions run in float
#define BR(F) \
  inline bfloat16_t F(bfloat16_t x, MSLSIM_SITE) { return bfloat16_t(F(float(x), line_, col_)); }
BR(simd_sum)
BR(simd_max) BR(simd_min) BR(simd_product)
#define BS(F)                                                            \
  inline bfloat16_t F(bfloat16_t x, ushort k, MSLSIM_SITE) {             \
    return uint16_to_bfloat16(F(bfloat16_to_uint16(x), k, line_, col_)); \
  }
    BS(simd_broadcast) BS(simd_shuffle) BS(simd_shuffle_down) BS(simd_shuffle_up)
        BS(simd_shuffle_xor) BS(simd_shuffle_rotate_down) BS(simd_shuffle_rotate_up)
#undef B1
#undef B2
#undef BALL
#undef BR
#undef BS
}  // namespace metal
