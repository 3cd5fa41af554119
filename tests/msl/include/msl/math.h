// Functions on scalars and vectors; transcendental results can be jittered by a few ulp.
#pragma once
#include "vectors.h"

namespace metal {
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_PI_F 3.14159265358979323846f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define HALF_MAX half(65504.f)
#define MAXFLOAT FLT_MAX
MSLSIM_AI float jit_(float x) {
  return __builtin_expect(mslsim_jitter_ulp, 0) ? mslsim_jitter(x) : x;
}
// exact = correctly rounded on the GPU as well (IEEE basic ops); transcendental = jittered on
// request
#define MSLSIM_F1(NAME, EXPR)                            \
  MSLSIM_AI float NAME(float x) { return EXPR; }         \
  MSLSIM_AI half NAME(half h) {                          \
    float x = float(h);                                  \
    return half(EXPR);                                   \
  }                                                      \
  template <class T, int N>                              \
  MSLSIM_AI vec<T, N> NAME(vec<T, N> v) {                \
    for (int i = 0; i < N; i++) v.e_[i] = NAME(v.e_[i]); \
    return v;                                            \
  }
#define MSLSIM_F2(NAME, EXPR)                                     \
  MSLSIM_AI float NAME(float x, float y) { return EXPR; }         \
  MSLSIM_AI half NAME(half a, half b) {                           \
    float x = float(a), y = float(b);                             \
    return half(EXPR);                                            \
  }                                                               \
  template <class T, int N>                                       \
  MSLSIM_AI vec<T, N> NAME(vec<T, N> v, vec<T, N> w) {            \
    for (int i = 0; i < N; i++) v.e_[i] = NAME(v.e_[i], w.e_[i]); \
    return v;                                                     \
  }
#define MSLSIM_MATH                                                                               \
  MSLSIM_F1(exp, jit_(__builtin_expf(x)))                                                         \
  MSLSIM_F1(exp2, jit_(__builtin_exp2f(x)))                                                       \
  MSLSIM_F1(exp10, jit_(__builtin_powf(10.f, x))) MSLSIM_F1(log, jit_(__builtin_logf(x)))         \
      MSLSIM_F1(log2, jit_(__builtin_log2f(x))) MSLSIM_F1(log10, jit_(__builtin_log10f(x)))       \
          MSLSIM_F1(sin, jit_(__builtin_sinf(x))) MSLSIM_F1(cos, jit_(__builtin_cosf(x)))         \
              MSLSIM_F1(tan, jit_(__builtin_tanf(x))) MSLSIM_F1(tanh, jit_(__builtin_tanhf(x)))   \
                  MSLSIM_F1(sinh, jit_(__builtin_sinhf(x))) MSLSIM_F1(                            \
                      cosh, jit_(__builtin_coshf(x))) MSLSIM_F1(asin, jit_(__builtin_asinf(x)))   \
                      MSLSIM_F1(acos, jit_(__builtin_acosf(x)))                                   \
                          MSLSIM_F1(atan, jit_(__builtin_atanf(x)))                               \
                              MSLSIM_F1(asinh, jit_(__builtin_asinhf(x)))                         \
                                  MSLSIM_F1(acosh, jit_(__builtin_acoshf(x)))                     \
                                      MSLSIM_F1(atanh, jit_(__builtin_atanhf(x)))                 \
                                          MSLSIM_F1(sqrt, jit_(__builtin_sqrtf(x)))               \
                                              MSLSIM_F1(rsqrt, jit_(1.f / __builtin_sqrtf(x)))    \
                                                  MSLSIM_F2(pow, jit_(__builtin_powf(x, y)))      \
                                                      MSLSIM_F2(powr, jit_(__builtin_powf(x, y))) \
                                                          MSLSIM_F2(atan2,                        \
                                                                    jit_(__builtin_atan2f(x, y))) \
                                                              MSLSIM_F2(divide, jit_(x / y))
#define MSLSIM_MATHX                                                                              \
  MSLSIM_F1(fabs, __builtin_fabsf(x))                                                             \
  MSLSIM_F1(floor, __builtin_floorf(x))                                                           \
  MSLSIM_F1(ceil, __builtin_ceilf(x)) MSLSIM_F1(trunc, __builtin_truncf(x))                       \
      MSLSIM_F1(round, __builtin_roundf(x)) MSLSIM_F1(rint, __builtin_rintf(x))                   \
          MSLSIM_F1(fract, (x - __builtin_floorf(x))) MSLSIM_F2(fmax, __builtin_fmaxf(x, y))      \
              MSLSIM_F2(fmin, __builtin_fminf(x, y)) MSLSIM_F2(fmod, __builtin_fmodf(x, y))       \
                  MSLSIM_F2(copysign, __builtin_copysignf(x, y)) MSLSIM_F1(sign, (x > 0   ? 1.f   \
                                                                                  : x < 0 ? -1.f  \
                                                                                          : 0.f)) \
                      MSLSIM_F1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.f), 1.f))
MSLSIM_MATH MSLSIM_MATHX namespace precise { MSLSIM_MATH MSLSIM_MATHX }
namespace fast {
MSLSIM_MATH MSLSIM_MATHX
}
MSLSIM_AI float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MSLSIM_AI half fma(half a, half b, half c) { return half(double(a) * double(b) + double(c)); }
template <class T, int N>
MSLSIM_AI vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) a.e_[i] = fma(a.e_[i], b.e_[i], c.e_[i]);
  return a;
}
// max/min/clamp/abs/select: same-type arguments only (mixed types are ambiguous in MSL's overload
// set)
template <class T, class = std::enable_if_t<is_scalar_v<T>>>
MSLSIM_AI T max(T a, T b) {
  if constexpr (is_floating_point_v<T>)
    return T(__builtin_fmaxf(float(a), float(b)));
  else
    return a < b ? b : a;
}
template <class T, class = std::enable_if_t<is_scalar_v<T>>>
MSLSIM_AI T min(T a, T b) {
  if constexpr (is_floating_point_v<T>)
    return T(__builtin_fminf(float(a), float(b)));
  else
    return b < a ? b : a;
}
template <class T, int N>
MSLSIM_AI vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a.e_[i] = max(a.e_[i], b.e_[i]);
  return a;
}
template <class T, int N>
MSLSIM_AI vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a.e_[i] = min(a.e_[i], b.e_[i]);
  return a;
}
template <class T>
MSLSIM_AI T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <class T>
MSLSIM_AI T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
template <class T>
MSLSIM_AI T clamp(T x, T lo, T hi) {
  return min(max(x, lo), hi);
}
template <class T, class = std::enable_if_t<is_scalar_v<T>>>
MSLSIM_AI T abs(T a) {
  if constexpr (is_floating_point_v<T>)
    return T(__builtin_fabsf(float(a)));
  else
    return a < 0 ? T(-a) : a;
}
template <class T, class = std::enable_if_t<is_scalar_v<T>>>
MSLSIM_AI T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N>
MSLSIM_AI vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++) a.e_[i] = c.e_[i] ? b.e_[i] : a.e_[i];
  return a;
}
template <class T>
MSLSIM_AI T mix(T a, T b, T t) {
  return a + (b - a) * t;
}
template <class T, int N>
MSLSIM_AI T dot(vec<T, N> a, vec<T, N> b) {
  T s = a.e_[0] * b.e_[0];
  for (int i = 1; i < N; i++) s = T(s + a.e_[i] * b.e_[i]);
  return s;
}
template <class T, int N>
MSLSIM_AI T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
MSLSIM_AI bool isnan(float x) { return __builtin_isnan(x); }
MSLSIM_AI bool isinf(float x) { return __builtin_isinf(x); }
MSLSIM_AI bool isfinite(float x) { return __builtin_isfinite(x); }
MSLSIM_AI bool signbit(float x) { return __builtin_signbit(x); }
MSLSIM_AI float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
template <class T>
MSLSIM_AI T popcount(T x) {
  return T(__builtin_popcountll((unsigned long long)(std::make_unsigned_t<T>)x));
}
template <class T>
MSLSIM_AI T clz(T x) {
  using U = std::make_unsigned_t<T>;
  return x == 0 ? T(sizeof(T) * 8)
                : T(__builtin_clzll((unsigned long long)U(x)) - (64 - int(sizeof(T)) * 8));
}
template <class T>
MSLSIM_AI T ctz(T x) {
  return x == 0 ? T(sizeof(T) * 8) : T(__builtin_ctzll((unsigned long long)x));
}
template <class T>
MSLSIM_AI T extract_bits(T x, uint off, uint bits) {
  return bits == 0 ? T(0)
                   : T((x >> off) & (bits >= sizeof(T) * 8 ? T(~T(0)) : T((T(1) << bits) - 1)));
}
MSLSIM_AI uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }
}  // namespace metal
