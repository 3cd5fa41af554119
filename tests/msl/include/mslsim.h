// mslsim.h - enough of the Metal Shading Language standard library for compute kernels,
// as ordinary C++17 (clang >= 16, x86-64). Execution shim: address spaces are erased here;
// they are type-checked by the separate lint pass (msllint.h, C++ for OpenCL).
#pragma once
#include <stdint.h>
#include <stddef.h>
#include <type_traits>

// ------------------------------------------------------------------ runtime interface
extern "C" {
struct mslsim_slots {
  uint32_t active;
  uint32_t pad[7];
  unsigned char b[32][32];
};
void mslsim_tg_barrier(int flags, int line, int col);
void mslsim_simd_barrier(int flags, int line, int col);
const mslsim_slots* mslsim_exchange(const void* v, int n, int line, int col);
void mslsim_tg_register(void* p, size_t n, const char* name, int line);
void mslsim_atomic_access(const void* p, int n);
float mslsim_jitter(float);
int mslsim_lane();
extern int mslsim_order;       // simd reduction order: 0 butterfly, 1 ascending, 2 descending
extern int mslsim_jitter_ulp;  // 0 = libm result, k = +-k ulp pseudo-random error on transcendental
                               // results
void mslsim_fail(const char* what, int line, int col);
void mslsim_misaligned(int off, int need);
}
#define MSLSIM_SITE int line_ = __builtin_LINE(), int col_ = __builtin_COLUMN()
#define MSLSIM_NI __attribute__((no_sanitize("thread", "undefined")))
#define MSLSIM_AI                      \
  inline __attribute__((always_inline, \
                        nodebug))  // nodebug: shim code is attributed to the calling kernel line

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
static_assert(sizeof(long) == 8, "LP64 host needed");

// bfloat: 16-bit class. MSL rule: bfloat -> float is implicit, float/half -> bfloat must be
// explicit; bfloat op bfloat rounds to bfloat after every operation.
struct bfloat {
  uint16_t bits_;
  bfloat() = default;
  struct raw_t {};
  constexpr bfloat(raw_t, uint16_t b) : bits_(b) {}
  static constexpr uint16_t rne(float f) {
    uint32_t u = __builtin_bit_cast(uint32_t, f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  template <class S, class = std::enable_if_t<std::is_arithmetic_v<S> || std::is_same_v<S, half>>>
  explicit constexpr bfloat(S s) : bits_(rne(float(s))) {}
  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits_) << 16); }
  explicit constexpr operator half() const { return half(float(*this)); }
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>
  explicit constexpr operator I() const {
    return I(float(*this));
  }
#define MSLSIM_B(op)                                                                               \
  friend constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>                              \
  friend constexpr bfloat operator op(bfloat a, I b) {                                             \
    return bfloat(float(a) op float(bfloat(b)));                                                   \
  }                                                                                                \
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>                              \
  friend constexpr bfloat operator op(I a, bfloat b) {                                             \
    return bfloat(float(bfloat(a)) op float(b));                                                   \
  }                                                                                                \
  friend constexpr float operator op(bfloat a, float b) { return float(a) op b; }                  \
  friend constexpr float operator op(float a, bfloat b) { return a op float(b); }                  \
  constexpr bfloat& operator op##=(bfloat b) { return *this = bfloat(float(*this) op float(b)); }
  MSLSIM_B(+)
  MSLSIM_B(-) MSLSIM_B(*) MSLSIM_B(/)
#undef MSLSIM_B
      friend constexpr bfloat
      operator-(bfloat a) {
    return bfloat(raw_t{}, uint16_t(a.bits_ ^ 0x8000));
  }
#define MSLSIM_B(op)                                                                     \
  friend constexpr bool operator op(bfloat a, bfloat b) { return float(a) op float(b); } \
  friend constexpr bool operator op(bfloat a, float b) { return float(a) op b; }         \
  friend constexpr bool operator op(float a, bfloat b) { return a op float(b); }         \
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>                    \
  friend constexpr bool operator op(bfloat a, I b) {                                     \
    return float(a) op float(b);                                                         \
  }
  MSLSIM_B(<) MSLSIM_B(>) MSLSIM_B(<=) MSLSIM_B(>=) MSLSIM_B(==) MSLSIM_B(!=)
#undef MSLSIM_B
};
constexpr half operator""h(long double x) { return half(x); }
constexpr bfloat operator"" bf(long double x) { return bfloat(float(x)); }

namespace metal {
using ::bfloat;
using ::half;
using ::uchar;
using ::uint;
using ::ulong;
using ::ushort;
// ------------------------------------------------------------------ traits
using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::decay_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible;
using std::is_convertible_v;
using std::is_enum;
using std::is_pointer;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_unsigned;
using std::is_void;
using std::make_signed;
using std::make_unsigned;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_reference;
using std::remove_reference_t;
using std::true_type;
template <class T>
using remove_addrspace_t = std::remove_cv_t<std::remove_reference_t<T>>;
template <class T>
struct remove_addrspace {
  using type = remove_addrspace_t<T>;
};
using std::is_const;
using std::is_integral;
using std::is_integral_v;
using std::is_trivially_copyable;
template <class... B>
using _disjunction = std::disjunction<B...>;
template <class T>
struct is_floating_point
    : bool_constant<is_same_v<std::remove_cv_t<T>, float> || is_same_v<std::remove_cv_t<T>, half> ||
                    is_same_v<std::remove_cv_t<T>, bfloat>> {};
template <class T>
inline constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : bool_constant<std::is_integral_v<T> || is_floating_point_v<T>> {};
template <class T>
inline constexpr bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T>
struct numeric_limits;
#define MSLSIM_LIM(T, MX, MN)                  \
  template <>                                  \
  struct numeric_limits<T> {                   \
    static constexpr bool is_integer = true;   \
    static constexpr T max() { return MX; }    \
    static constexpr T min() { return MN; }    \
    static constexpr T lowest() { return MN; } \
  };
MSLSIM_LIM(int8_t, 127, -128)
MSLSIM_LIM(uint8_t, 255, 0) MSLSIM_LIM(int16_t, 32767, -32768) MSLSIM_LIM(uint16_t, 65535, 0)
    MSLSIM_LIM(int, 2147483647, -2147483647 - 1) MSLSIM_LIM(uint, 4294967295u, 0)
        MSLSIM_LIM(long, 9223372036854775807l, -9223372036854775807l - 1)
            MSLSIM_LIM(ulong, 18446744073709551615ul, 0) MSLSIM_LIM(bool, true, false)
                MSLSIM_LIM(char, 127, -128)
#undef MSLSIM_LIM
                    template <>
                    struct numeric_limits<float> {
  static constexpr bool is_integer = false;
  static constexpr float max() { return 3.402823466e+38f; }
  static constexpr float min() { return 1.17549435e-38f; }
  static constexpr float lowest() { return -max(); }
  static constexpr float epsilon() { return 1.1920929e-7f; }
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
};
template <>
struct numeric_limits<half> {
  static constexpr bool is_integer = false;
  static constexpr half max() { return half(65504.f); }
  static constexpr half min() { return half(6.103515625e-05f); }
  static constexpr half lowest() { return half(-65504.f); }
  static constexpr half epsilon() { return half(9.765625e-04f); }
  static constexpr half infinity() { return half(__builtin_inff()); }
  static constexpr half quiet_NaN() { return half(__builtin_nanf("")); }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bool is_integer = false;
  static constexpr bfloat max() { return bfloat(bfloat::raw_t{}, 0x7f7f); }
  static constexpr bfloat min() { return bfloat(bfloat::raw_t{}, 0x0080); }
  static constexpr bfloat lowest() { return bfloat(bfloat::raw_t{}, 0xff7f); }
  static constexpr bfloat epsilon() { return bfloat(bfloat::raw_t{}, 0x3c00); }
  static constexpr bfloat infinity() { return bfloat(bfloat::raw_t{}, 0x7f80); }
  static constexpr bfloat quiet_NaN() { return bfloat(bfloat::raw_t{}, 0x7fc0); }
};

// ------------------------------------------------------------------ vectors
template <class T, int N>
struct vec;
template <class V>
struct vtraits {
  using elem = V;
  static constexpr int n = 1;
};
template <class T, int N>
struct vtraits<vec<T, N>> {
  using elem = T;
  static constexpr int n = N;
};
template <class T>
inline constexpr bool is_scalar_v = is_arithmetic_v<T>;
template <class T, int N, int... I>
struct swz {  // lives in a union over the elements
  T e_[N];
  constexpr operator vec<T, sizeof...(I)>() const { return vec<T, sizeof...(I)>(e_[I]...); }
  swz& operator=(vec<T, sizeof...(I)> v) {
    int k = 0;
    ((e_[I] = v[k++]), ...);
    return *this;
  }
  swz& operator=(const swz& o) { return *this = vec<T, sizeof...(I)>(o); }
  swz() = default;
  swz(const swz&) = default;
  template <class S>
  swz& operator+=(S s) {
    return *this = vec<T, sizeof...(I)>(*this) + s;
  }
  template <class S>
  swz& operator*=(S s) {
    return *this = vec<T, sizeof...(I)>(*this) * s;
  }
};
template <class T, int N, int... I>
struct vtraits<swz<T, N, I...>> {
  using elem = T;
  static constexpr int n = sizeof...(I);
};
#define MSLSIM_SW2(T, N) \
  swz<T, N, 0, 0> xx;    \
  swz<T, N, 0, 1> xy;    \
  swz<T, N, 1, 0> yx;    \
  swz<T, N, 1, 1> yy;
#define MSLSIM_SW3(T, N)               \
  MSLSIM_SW2(T, N) swz<T, N, 0, 2> xz; \
  swz<T, N, 1, 2> yz;                  \
  swz<T, N, 2, 0> zx;                  \
  swz<T, N, 2, 1> zy;                  \
  swz<T, N, 0, 1, 2> xyz, rgb;         \
  swz<T, N, 2, 1, 0> zyx;
template <class T, int N>
struct vstore;
template <class T>
struct alignas(2 * sizeof(T)) vstore<T, 2> {
  union {
    T e_[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    MSLSIM_SW2(T, 2)
  };
  vstore() = default;
};
template <class T>
struct alignas(4 * sizeof(T)) vstore<T, 3> {
  union {
    T e_[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    MSLSIM_SW3(T, 3)
  };
  vstore() = default;
};
template <class T>
struct alignas(4 * sizeof(T)) vstore<T, 4> {
  union {
    T e_[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    MSLSIM_SW3(T, 4) swz<T, 4, 2, 3> zw;
    swz<T, 4, 1, 3> yw;
    swz<T, 4, 0, 3> xw;
    swz<T, 4, 1, 2, 3> yzw;
    swz<T, 4, 3, 2, 1, 0> wzyx;
  };
  vstore() = default;
};
template <class S, class T>
inline constexpr bool splat_ok = is_scalar_v<S> && std::is_constructible_v<T, S>;
template <class T, int N>
struct vec : vstore<T, N> {
  using vstore<T, N>::e_;
  vec() = default;
#ifdef MSLSIM_CHECKED
  static MSLSIM_AI constexpr void al(const void* p) {
    if (!__builtin_is_constant_evaluated()) {
      uintptr_t a = (uintptr_t)p;
      asm("" : "+r"(a));
      if (__builtin_expect(a & (sizeof(vstore<T, N>) - 1), 0))
        mslsim_misaligned(int(a & 15), int(sizeof(vstore<T, N>)));
    }
  }
  MSLSIM_AI constexpr vec(const vec& o) {
    al(&o);
    for (int i = 0; i < N; i++) e_[i] = o.e_[i];
  }
  MSLSIM_AI constexpr vec& operator=(const vec& o) {
    al(this);
    for (int i = 0; i < N; i++) e_[i] = o.e_[i];
    return *this;
  }
#else
  vec(const vec&) = default;
  constexpr vec& operator=(const vec& o) {
    for (int i = 0; i < N; i++) e_[i] = o.e_[i];
    return *this;
  }
#endif
  template <class S, class = std::enable_if_t<splat_ok<S, T>>>
  constexpr vec(S s) {
    for (int i = 0; i < N; i++) e_[i] = T(s);
  }
  template <class A, class B, class... C>
  constexpr vec(A a, B b, C... c) {
    static_assert(vtraits<A>::n + vtraits<B>::n + (0 + ... + vtraits<C>::n) == N,
                  "vector constructor: component count mismatch");
    int k = 0;
    put(k, a);
    put(k, b);
    (put(k, c), ...);
  }
  template <class U, class = std::enable_if_t<!std::is_same_v<U, T>>>
  explicit constexpr vec(vec<U, N> o) {
    for (int i = 0; i < N; i++) e_[i] = T(o.e_[i]);
  }
  constexpr T& operator[](int i) { return e_[i]; }
  constexpr const T& operator[](int i) const { return e_[i]; }

 private:
  template <class A>
  constexpr void put(int& k, const A& a) {
    if constexpr (vtraits<A>::n == 1)
      e_[k++] = T(a);
    else {
      vec<typename vtraits<A>::elem, vtraits<A>::n> v(a);
      for (int i = 0; i < vtraits<A>::n; i++) e_[k++] = T(v.e_[i]);
    }
  }
};
// binary operators: vec op vec (same type), vec op scalar. A float scalar on an integer/half/bfloat
// vector is refused: Metal's rule there was not verified, so the portable spelling is an explicit
// cast.
template <class S, class T>
inline constexpr bool vs_ok =
    is_scalar_v<S> && (std::is_same_v<S, T> || std::is_integral_v<S> || (std::is_same_v<T, float>));
#define MSLSIM_V(op)                                                        \
  template <class T, int N>                                                 \
  constexpr vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {               \
    vec<T, N> r;                                                            \
    for (int i = 0; i < N; i++) r.e_[i] = T(a.e_[i] op b.e_[i]);            \
    return r;                                                               \
  }                                                                         \
  template <class T, int N, class S, class = std::enable_if_t<vs_ok<S, T>>> \
  constexpr vec<T, N> operator op(vec<T, N> a, S s) {                       \
    return a op vec<T, N>(T(s));                                            \
  }                                                                         \
  template <class T, int N, class S, class = std::enable_if_t<vs_ok<S, T>>> \
  constexpr vec<T, N> operator op(S s, vec<T, N> b) {                       \
    return vec<T, N>(T(s)) op b;                                            \
  }                                                                         \
  template <class T, int N, class S>                                        \
  constexpr vec<T, N>& operator op##=(vec<T, N>& a, S s) {                  \
    return a = a op s;                                                      \
  }
MSLSIM_V(+)
MSLSIM_V(-) MSLSIM_V(*) MSLSIM_V(/) MSLSIM_V(%) MSLSIM_V(&) MSLSIM_V(|) MSLSIM_V(^) MSLSIM_V(<<)
    MSLSIM_V(>>)
#undef MSLSIM_V
#define MSLSIM_V(op)                                                        \
  template <class T, int N>                                                 \
  constexpr vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) {            \
    vec<bool, N> r;                                                         \
    for (int i = 0; i < N; i++) r.e_[i] = a.e_[i] op b.e_[i];               \
    return r;                                                               \
  }                                                                         \
  template <class T, int N, class S, class = std::enable_if_t<vs_ok<S, T>>> \
  constexpr vec<bool, N> operator op(vec<T, N> a, S s) {                    \
    return a op vec<T, N>(T(s));                                            \
  }
        MSLSIM_V(<) MSLSIM_V(>) MSLSIM_V(<=) MSLSIM_V(>=) MSLSIM_V(==) MSLSIM_V(!=)
#undef MSLSIM_V
            template <class T, int N>
            constexpr vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; i++) a.e_[i] = -a.e_[i];
  return a;
}
template <class T, int N>
constexpr vec<T, N> operator~(vec<T, N> a) {
  for (int i = 0; i < N; i++) a.e_[i] = ~a.e_[i];
  return a;
}
template <int N>
constexpr vec<bool, N> operator!(vec<bool, N> a) {
  for (int i = 0; i < N; i++) a.e_[i] = !a.e_[i];
  return a;
}
template <int N>
constexpr bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= a.e_[i];
  return r;
}
template <int N>
constexpr bool all(vec<bool, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= a.e_[i];
  return r;
}
#define MSLSIM_VT(T)      \
  using T##2 = vec<T, 2>; \
  using T##3 = vec<T, 3>; \
  using T##4 = vec<T, 4>;
MSLSIM_VT(bool)
MSLSIM_VT(char) MSLSIM_VT(uchar) MSLSIM_VT(short) MSLSIM_VT(ushort) MSLSIM_VT(int) MSLSIM_VT(uint)
    MSLSIM_VT(long) MSLSIM_VT(ulong) MSLSIM_VT(half) MSLSIM_VT(float) MSLSIM_VT(bfloat)
#undef MSLSIM_VT
        template <class T, int N>
        struct packed_vec {
  T e_[N];
  operator vec<T, N>() const {
    vec<T, N> v;
    for (int i = 0; i < N; i++) v[i] = e_[i];
    return v;
  }
  packed_vec& operator=(vec<T, N> v) {
    for (int i = 0; i < N; i++) e_[i] = v[i];
    return *this;
  }
  T& operator[](int i) { return e_[i]; }
  const T& operator[](int i) const { return e_[i]; }
};
using packed_float2 = packed_vec<float, 2>;
using packed_float3 = packed_vec<float, 3>;
using packed_float4 = packed_vec<float, 4>;
using packed_half4 = packed_vec<half, 4>;
using packed_uchar4 = packed_vec<uchar, 4>;
template <class D, class S>
MSLSIM_AI D as_type(S s) {
  static_assert(sizeof(D) == sizeof(S), "as_type: size mismatch");
  D d;
  __builtin_memcpy(&d, &s, sizeof d);
  return d;
}

// ------------------------------------------------------------------ math
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
#define MSLSIM_MATH                                                                                \
  MSLSIM_F1(exp, jit_(__builtin_expf(x)))                                                          \
  MSLSIM_F1(exp2, jit_(__builtin_exp2f(x))) MSLSIM_F1(exp10, jit_(__builtin_powf(10.f, x)))        \
      MSLSIM_F1(log, jit_(__builtin_logf(x))) MSLSIM_F1(log2, jit_(__builtin_log2f(x))) MSLSIM_F1( \
          log10, jit_(__builtin_log10f(x))) MSLSIM_F1(sin, jit_(__builtin_sinf(x)))                \
          MSLSIM_F1(cos, jit_(__builtin_cosf(x))) MSLSIM_F1(tan, jit_(__builtin_tanf(x)))          \
              MSLSIM_F1(tanh, jit_(__builtin_tanhf(x))) MSLSIM_F1(sinh, jit_(__builtin_sinhf(x)))  \
                  MSLSIM_F1(cosh, jit_(__builtin_coshf(x))) MSLSIM_F1(                             \
                      asin, jit_(__builtin_asinf(x))) MSLSIM_F1(acos, jit_(__builtin_acosf(x)))    \
                      MSLSIM_F1(atan, jit_(__builtin_atanf(x)))                                    \
                          MSLSIM_F1(asinh, jit_(__builtin_asinhf(x)))                              \
                              MSLSIM_F1(acosh, jit_(__builtin_acoshf(x)))                          \
                                  MSLSIM_F1(atanh, jit_(__builtin_atanhf(x)))                      \
                                      MSLSIM_F1(sqrt, jit_(__builtin_sqrtf(x))) MSLSIM_F1(         \
                                          rsqrt, jit_(1.f / __builtin_sqrtf(x)))                   \
                                          MSLSIM_F2(pow, jit_(__builtin_powf(x, y)))               \
                                              MSLSIM_F2(powr, jit_(__builtin_powf(x, y)))          \
                                                  MSLSIM_F2(atan2, jit_(__builtin_atan2f(x, y)))   \
                                                      MSLSIM_F2(divide, jit_(x / y))
#define MSLSIM_MATHX                                                                        \
  MSLSIM_F1(fabs, __builtin_fabsf(x))                                                       \
  MSLSIM_F1(floor, __builtin_floorf(x)) MSLSIM_F1(ceil, __builtin_ceilf(x))                 \
      MSLSIM_F1(trunc, __builtin_truncf(x)) MSLSIM_F1(round, __builtin_roundf(x))           \
          MSLSIM_F1(rint, __builtin_rintf(x)) MSLSIM_F1(fract, (x - __builtin_floorf(x)))   \
              MSLSIM_F2(fmax, __builtin_fmaxf(x, y)) MSLSIM_F2(fmin, __builtin_fminf(x, y)) \
                  MSLSIM_F2(fmod, __builtin_fmodf(x, y))                                    \
                      MSLSIM_F2(copysign, __builtin_copysignf(x, y))                        \
                          MSLSIM_F1(sign, (x > 0   ? 1.f                                    \
                                           : x < 0 ? -1.f                                   \
                                                   : 0.f))                                  \
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

// ------------------------------------------------------------------ synchronisation
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
MSLSIM_AI void threadgroup_barrier(mem_flags f, MSLSIM_SITE) {
  mslsim_tg_barrier(int(f), line_, col_);
}
MSLSIM_AI void simdgroup_barrier(mem_flags f, MSLSIM_SITE) {
  mslsim_simd_barrier(int(f), line_, col_);
}

// ------------------------------------------------------------------ SIMD-group functions
template <class T>
inline constexpr bool simd_type_ok =
    std::is_same_v<T, float> || std::is_same_v<T, half> ||
    (std::is_integral_v<T> && sizeof(T) <= 4 && !std::is_same_v<T, bool>);
template <class T, int N>
inline constexpr bool simd_type_ok<vec<T, N>> = simd_type_ok<T>;
template <class T>
MSLSIM_AI T slot_(const mslsim_slots* s, int l) {
  T v;
  __builtin_memcpy(&v, s->b[l], sizeof v);
  return v;
}
template <class T, class F>
MSLSIM_NI inline T reduce_(T v, F f, int line_, int col_) {
  static_assert(sizeof(T) <= 32);
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  if (mslsim_order == 0 && s->active == 0xffffffffu) {  // butterfly over 32 lanes
    T a[32];
    for (int i = 0; i < 32; i++) a[i] = slot_<T>(s, i);
    for (int o = 1; o < 32; o <<= 1)
      for (int i = 0; i < 32; i += 2 * o)
        a[i] = f(a[i], a[i + o]);  // xor 1,2,4,8,16: what mlx-lm documents for current GPUs
    return a[0];
  }
  bool first = true;
  T r{};
  for (int k = 0; k < 32; k++) {
    int i = mslsim_order == 2 ? 31 - k : k;
    if (!((s->active >> i) & 1)) continue;
    T x = slot_<T>(s, i);
    r = first ? x : f(r, x);
    first = false;
  }
  return r;
}
#define MSLSIM_RED(NAME, EXPR)                                             \
  template <class T, class = std::enable_if_t<simd_type_ok<T>>>            \
  inline T NAME(T v, MSLSIM_SITE) {                                        \
    return reduce_(v, [](T a, T b) -> T { return T(EXPR); }, line_, col_); \
  }
MSLSIM_RED(simd_sum, a + b)
MSLSIM_RED(simd_product, a* b) MSLSIM_RED(simd_max, max(a, b)) MSLSIM_RED(simd_min, min(a, b))
    MSLSIM_RED(simd_and, a& b) MSLSIM_RED(simd_or, a | b) MSLSIM_RED(simd_xor, a ^ b)
#undef MSLSIM_RED
        template <class T>
        MSLSIM_NI inline T
    lane_read_(T v, int src, bool inrange, const char* what, int line_, int col_) {
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  if (!inrange) return v;  // shuffle_up/down: out of range keeps own value
  if (src < 0 || src > 31 || !((s->active >> src) & 1)) {
    mslsim_fail(what, line_, col_);
    T p;
    __builtin_memset(&p, 0xFF, sizeof p);
    return p;
  }
  return slot_<T>(s, src);
}
#define MSLSIM_SH(NAME, ARG, SRC, INR)                                                             \
  template <class T, class = std::enable_if_t<simd_type_ok<T>>>                                    \
  inline T NAME(T v, ushort ARG, MSLSIM_SITE) {                                                    \
    int l = mslsim_lane();                                                                         \
    (void)l;                                                                                       \
    return lane_read_(v, SRC, INR, #NAME ": reads an inactive or out-of-range lane", line_, col_); \
  }
MSLSIM_SH(simd_shuffle, lane, int(lane), true)
MSLSIM_SH(simd_broadcast, lane, int(lane), true)
    MSLSIM_SH(simd_shuffle_xor, mask, (l ^ int(mask)), true)
        MSLSIM_SH(simd_shuffle_down, d, l + int(d), (l + int(d) < 32))
            MSLSIM_SH(simd_shuffle_up, d, l - int(d), (l - int(d) >= 0))
                MSLSIM_SH(simd_shuffle_rotate_down, d, (l + int(d)) & 31, true)
                    MSLSIM_SH(simd_shuffle_rotate_up, d, (l - int(d)) & 31, true)
#undef MSLSIM_SH
                        template <class T>
                        MSLSIM_NI inline T
    simd_shuffle_and_fill_up(T v, T fill, ushort d, MSLSIM_SITE) {
  int l = mslsim_lane();
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  return l >= d ? slot_<T>(s, l - d) : fill;
}
template <class T>
MSLSIM_NI inline T simd_shuffle_and_fill_down(T v, T fill, ushort d, MSLSIM_SITE) {
  int l = mslsim_lane();
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  return l + d < 32 ? slot_<T>(s, l + d) : fill;
}
template <class T>
MSLSIM_NI inline T simd_broadcast_first(T v, MSLSIM_SITE) {
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  return slot_<T>(s, __builtin_ctz(s->active));
}
template <class T>
MSLSIM_NI inline T simd_prefix_inclusive_sum(T v, MSLSIM_SITE) {
  int l = mslsim_lane();
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  T r = T(0);
  for (int i = 0; i <= l; i++)
    if ((s->active >> i) & 1) r = T(r + slot_<T>(s, i));
  return r;
}
template <class T>
MSLSIM_NI inline T simd_prefix_exclusive_sum(T v, MSLSIM_SITE) {
  int l = mslsim_lane();
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  T r = T(0);
  for (int i = 0; i < l; i++)
    if ((s->active >> i) & 1) r = T(r + slot_<T>(s, i));
  return r;
}
// quad-group (4 lanes): emulated with the SIMD-group rendezvous
template <class T, class = std::enable_if_t<simd_type_ok<T>>>
MSLSIM_NI inline T quad_sum(T v, MSLSIM_SITE) {
  int q = mslsim_lane() & ~3;
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  return T(T(slot_<T>(s, q) + slot_<T>(s, q + 1)) + T(slot_<T>(s, q + 2) + slot_<T>(s, q + 3)));
}
template <class T, class = std::enable_if_t<simd_type_ok<T>>>
MSLSIM_NI inline T quad_max(T v, MSLSIM_SITE) {
  int q = mslsim_lane() & ~3;
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  return max(max(slot_<T>(s, q), slot_<T>(s, q + 1)), max(slot_<T>(s, q + 2), slot_<T>(s, q + 3)));
}
template <class T, class = std::enable_if_t<simd_type_ok<T>>>
MSLSIM_NI inline T quad_broadcast(T v, ushort k, MSLSIM_SITE) {
  int q = mslsim_lane() & ~3;
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  return slot_<T>(s, q + (k & 3));
}
template <class T, class = std::enable_if_t<simd_type_ok<T>>>
MSLSIM_NI inline T quad_shuffle_xor(T v, ushort k, MSLSIM_SITE) {
  int l = mslsim_lane();
  const mslsim_slots* s = mslsim_exchange(&v, sizeof v, line_, col_);
  return slot_<T>(s, l ^ (k & 3));
}
struct simd_vote {
  ulong v;
  explicit simd_vote(ulong x = 0) : v(x) {}
  explicit operator ulong() const { return v; }
  bool all() const { return v == 0xffffffffu; }
  bool any() const { return v != 0; }
};
MSLSIM_NI inline simd_vote simd_ballot(bool p, MSLSIM_SITE) {
  unsigned char c = p;
  const mslsim_slots* s = mslsim_exchange(&c, 1, line_, col_);
  ulong r = 0;
  for (int i = 0; i < 32; i++)
    if (((s->active >> i) & 1) && s->b[i][0]) r |= 1ul << i;
  return simd_vote(r);
}
inline bool simd_any(bool p, MSLSIM_SITE) { return ulong(simd_ballot(p, line_, col_)) != 0; }
inline bool simd_all(bool p, MSLSIM_SITE) { return ulong(simd_ballot(!p, line_, col_)) == 0; }
MSLSIM_NI inline bool simd_is_first(MSLSIM_SITE) {
  unsigned char c = 0;
  const mslsim_slots* s = mslsim_exchange(&c, 1, line_, col_);
  return __builtin_ctz(s->active) == mslsim_lane();
}

// ------------------------------------------------------------------ simdgroup_matrix 8x8 (lane
// layout as MLX steel assumes)
template <class T, int R = 8, int C = 8>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "only 8x8 exists in MSL");
  using storage_type = vec<T, 2>;
  storage_type t_;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T d) {
    int r, c;
    rc(r, c);
    t_ = storage_type(c == r ? d : T(0), c + 1 == r ? d : T(0));
  }
  storage_type& thread_elements() { return t_; }
  const storage_type& thread_elements() const { return t_; }
  static MSLSIM_AI void rc(int& r, int& c) {
    int l = mslsim_lane(), q = l >> 2;
    r = (q & 4) + ((l >> 1) & 3);
    c = (q & 2) * 2 + (l & 1) * 2;
  }
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C>
MSLSIM_AI simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.t_ = vec<T, 2>(v, v);
  return m;
}
template <class T, class P>
MSLSIM_AI void simdgroup_load(simdgroup_matrix<T>& d, const P* src, ulong epr = 8,
                              ulong2 org = ulong2(0), bool tr = false, MSLSIM_SITE) {
  static_assert(std::is_same_v<std::remove_cv_t<P>, T>,
                "simdgroup_load: pointer and matrix element types must match");
  unsigned char z = 0;
  mslsim_exchange(&z, 1, line_, col_);  // collective: all lanes must arrive
  int r, c;
  d.rc(r, c);
  for (int k = 0; k < 2; k++)
    d.t_.e_[k] =
        tr ? src[(org.y + c + k) * epr + org.x + r] : src[(org.y + r) * epr + org.x + c + k];
}
template <class T, class P>
MSLSIM_AI void simdgroup_store(const simdgroup_matrix<T>& d, P* dst, ulong epr = 8,
                               ulong2 org = ulong2(0), bool tr = false, MSLSIM_SITE) {
  static_assert(std::is_same_v<P, T>,
                "simdgroup_store: pointer and matrix element types must match");
  unsigned char z = 0;
  mslsim_exchange(&z, 1, line_, col_);
  int r, c;
  d.rc(r, c);
  for (int k = 0; k < 2; k++)
    (tr ? dst[(org.y + c + k) * epr + org.x + r] : dst[(org.y + r) * epr + org.x + c + k]) =
        d.t_.e_[k];
}
template <class D, class A, class B, class C>
MSLSIM_NI inline void mma_(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a,
                           const simdgroup_matrix<B>& b, const simdgroup_matrix<C>* c, int line_,
                           int col_) {
  float v[4] = {float(a.t_.e_[0]), float(a.t_.e_[1]), float(b.t_.e_[0]), float(b.t_.e_[1])};
  const mslsim_slots* s = mslsim_exchange(v, sizeof v, line_, col_);
  if (s->active != 0xffffffffu)
    mslsim_fail("simdgroup_multiply: not all 32 lanes active", line_, col_);
  int r, cc;
  d.rc(r, cc);
  float acc[2] = {c ? float(c->t_.e_[0]) : 0.f, c ? float(c->t_.e_[1]) : 0.f};
  for (int k = 0; k < 8; k++) {  // lane holding (row, col): inverse of rc()
    auto lane = [](int row, int col) {
      return ((row & 4) << 2) | ((col & 4) << 1) | ((row & 3) << 1) | ((col >> 1) & 1);
    };
    float av = ((const float*)s->b[lane(r, k)])[k & 1];
    const float* bp = (const float*)s->b[lane(k, cc)] + 2;
    acc[0] = acc[0] + av * bp[0];
    acc[1] = acc[1] + av * bp[1];  // accumulation order/precision on the GPU is unspecified
  }
  d.t_ = vec<D, 2>(D(acc[0]), D(acc[1]));
}
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a,
                                          const simdgroup_matrix<B>& b,
                                          const simdgroup_matrix<C>& c, MSLSIM_SITE) {
  simdgroup_matrix<C> cc = c;
  mma_(d, a, b, &cc, line_, col_);
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a,
                               const simdgroup_matrix<B>& b, MSLSIM_SITE) {
  mma_(d, a, b, (const simdgroup_matrix<D>*)nullptr, line_, col_);
}

// ------------------------------------------------------------------ atomics (MSL: relaxed only)
enum memory_order { memory_order_relaxed };
template <class T>
struct nd_ {
  using type = T;
};
template <class T>
struct atomic {
  T v_;
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, uint> || std::is_same_v<T, float> ||
                    std::is_same_v<T, bool> || std::is_same_v<T, ulong>,
                "atomic<T>: T not supported by MSL");
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;
using atomic_ulong = atomic<ulong>;
template <class T>
MSLSIM_NI inline T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  mslsim_atomic_access((const void*)p, sizeof(T));
  return p->v_;
}
template <class T>
MSLSIM_NI inline void atomic_store_explicit(volatile atomic<T>* p, typename nd_<T>::type x,
                                            memory_order) {
  mslsim_atomic_access((const void*)p, sizeof(T));
  p->v_ = x;
}
template <class T>
MSLSIM_NI inline T atomic_exchange_explicit(volatile atomic<T>* p, typename nd_<T>::type x,
                                            memory_order) {
  mslsim_atomic_access((const void*)p, sizeof(T));
  T o = p->v_;
  p->v_ = x;
  return o;
}
template <class T>
MSLSIM_NI inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* e,
                                                            typename nd_<T>::type d, memory_order,
                                                            memory_order) {
  mslsim_atomic_access((const void*)p, sizeof(T));
  T o = p->v_;
  if (o == *e) {
    p->v_ = d;
    return true;
  }
  *e = o;
  return false;
}
#define MSLSIM_AT(NAME, EXPR)                                                             \
  template <class T>                                                                      \
  MSLSIM_NI inline T NAME(volatile atomic<T>* p, typename nd_<T>::type x, memory_order) { \
    mslsim_atomic_access((const void*)p, sizeof(T));                                      \
    T o = p->v_;                                                                          \
    p->v_ = T(EXPR);                                                                      \
    return o;                                                                             \
  }
MSLSIM_AT(atomic_fetch_add_explicit, o + x)
MSLSIM_AT(atomic_fetch_sub_explicit, o - x) MSLSIM_AT(atomic_fetch_max_explicit, o < x ? x : o)
    MSLSIM_AT(atomic_fetch_min_explicit, x < o ? x : o) MSLSIM_AT(atomic_fetch_and_explicit, o& x)
        MSLSIM_AT(atomic_fetch_or_explicit, o | x) MSLSIM_AT(atomic_fetch_xor_explicit, o ^ x)
#undef MSLSIM_AT
}  // namespace metal

// ------------------------------------------------------------------ language keywords
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define kernel
#define device
#define constant const  // constant memory is read-only
#define thread
#define threadgroup
// harness rewrites a threadgroup declaration statement into this (256-byte redzones, registered for
// race/bounds checks)
#define MSLSIM_TG(NAME, DIMS, ...)      \
  static struct alignas(256) {          \
    unsigned char lo_[256];             \
    __VA_ARGS__ v DIMS;                 \
    alignas(16) unsigned char hi_[256]; \
  } NAME##_tg_;                         \
  auto& NAME = NAME##_tg_.v;            \
  mslsim_tg_register((void*)&NAME, sizeof(NAME), #NAME, __LINE__);
struct mslsim_attrs {
  metal::uint3 tpig, tpit, tgpig, tpg, tgpg, tptg, dtptg;
  uint tiit, tiis, sgit, sgptg, tps;
};
extern "C" void mslsim_kernel_entry(void** bufs, const mslsim_attrs* a);
