// msllint.h - declarations only. Type-checks MSL with clang's C++ for OpenCL front end, whose rules
// are close to Metal's: real address spaces, `threadgroup` variables only at kernel scope, no
// virtual/new/function pointers/VLA/double/varargs.
#pragma once
#pragma clang system_header
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
typedef __bf16 bfloat;
#define LV(T)                                         \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
LV(char)
LV(uchar) LV(short) LV(ushort) LV(int) LV(uint) LV(long) LV(ulong) LV(half) LV(float) LV(bfloat)
#undef LV
#define METAL_FUNC inline __attribute__((always_inline))
#define device __global
#define constant __constant
#define threadgroup __local
#define thread
#define kernel __kernel
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_PI_F 3.14159265358979323846f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define MAXFLOAT FLT_MAX
#define __METAL__ 1
#define __METAL_VERSION__ 310
    namespace metal {
  template <bool B, class T = void>
  struct enable_if {};
  template <class T>
  struct enable_if<true, T> {
    typedef T type;
  };
  template <bool B, class T = void>
  using enable_if_t = typename enable_if<B, T>::type;
  template <class T, T v>
  struct integral_constant {
    static constexpr constant T value = v;
  };
  template <bool B>
  using bool_constant = integral_constant<bool, B>;
  using true_type = bool_constant<true>;
  using false_type = bool_constant<false>;
  template <class A, class B>
  struct is_same : bool_constant<__is_same(A, B)> {};
  template <class A, class B>
  static constexpr constant bool is_same_v = __is_same(A, B);
  template <bool B, class A, class C>
  struct conditional {
    typedef A type;
  };
  template <class A, class C>
  struct conditional<false, A, C> {
    typedef C type;
  };
  template <bool B, class A, class C>
  using conditional_t = typename conditional<B, A, C>::type;
  template <class T>
  struct remove_cv {
    typedef __remove_cv(T) type;
  };
  template <class T>
  using remove_cv_t = __remove_cv(T);
  template <class T>
  struct is_integral : bool_constant<__is_integral(T)> {};
  template <class T>
  static constexpr constant bool is_integral_v = __is_integral(T);
  template <class T>
  struct is_floating_point : bool_constant<__is_floating_point(T)> {};
  template <class T>
  static constexpr constant bool is_floating_point_v = __is_floating_point(T);
  template <class T>
  static constexpr constant bool is_signed_v = __is_signed(T);
  template <class A, class B>
  static constexpr constant bool is_convertible_v = __is_convertible_to(A, B);
  template <class T>
  struct numeric_limits {
    static constexpr T max() { return T(1); }
    static constexpr T min() { return T(0); }
    static constexpr T lowest() { return T(0); }
    static constexpr T epsilon() { return T(0); }
    static constexpr T infinity() { return T(1); }
    static constexpr T quiet_NaN() { return T(1); }
  };
  template <class T, int N>
  struct vec_ {
    typedef T type __attribute__((ext_vector_type(N)));
  };
  template <class T, int N>
  using vec = T __attribute__((ext_vector_type(N)));
  template <class T>
  struct vt {
    typedef T e;
    static constexpr constant int n = 1;
    static constexpr constant bool v = false;
  };
#define LT(T)                                \
  template <>                                \
  struct vt<T##2> {                          \
    typedef T e;                             \
    static constexpr constant int n = 2;     \
    static constexpr constant bool v = true; \
  };                                         \
  template <>                                \
  struct vt<T##3> {                          \
    typedef T e;                             \
    static constexpr constant int n = 3;     \
    static constexpr constant bool v = true; \
  };                                         \
  template <>                                \
  struct vt<T##4> {                          \
    typedef T e;                             \
    static constexpr constant int n = 4;     \
    static constexpr constant bool v = true; \
  };
  LT(char)
  LT(uchar) LT(short) LT(ushort) LT(int) LT(uint) LT(long) LT(ulong) LT(half) LT(float) LT(bfloat)
#undef LT
      template <class... A>
      struct nsum {
    static constexpr constant int value = 0;
  };
  template <class H, class... A>
  struct nsum<H, A...> {
    static constexpr constant int value = vt<H>::n + nsum<A...>::value;
  };
  template <class V, class... A>
  V mk(A... a) {
    static_assert(sizeof...(A) <= 1 ? true : nsum<A...>::value == vt<V>::n,
                  "vector constructor: component count mismatch");
    static_assert(sizeof...(A) != 1 || nsum<A...>::value == 1 || nsum<A...>::value == vt<V>::n ||
                      sizeof...(A) == 0,
                  "vector conversion: component count mismatch");
    V v = V(0);
    return v;
  }
  template <class D, class S>
  D as_type(S s) {
    static_assert(sizeof(D) == sizeof(S), "as_type: size mismatch");
    D d = D(0);
    return d;
  }
  template <class T>
  static constexpr constant bool fl =
      __is_same(T, float) || __is_same(T, half) || __is_same(T, float2) || __is_same(T, float3) ||
      __is_same(T, float4) || __is_same(T, half2) || __is_same(T, half3) || __is_same(T, half4);
#define L1(F)                                                                                     \
  template <class T, class = enable_if_t<fl<T>>>                                                  \
  T F(T);                                                                                         \
  template <class T, class = enable_if_t<__is_integral(T) || __is_same(T, bfloat)>, class = void> \
  float F(T);
#define L2(F)                                    \
  template <class T, class = enable_if_t<fl<T>>> \
  T F(T, T);
#define LM                                                                                         \
  L1(exp)                                                                                          \
  L1(exp2) L1(exp10) L1(log) L1(log2) L1(log10) L1(sin) L1(cos) L1(tan) L1(tanh) L1(sinh) L1(cosh) \
      L1(asin) L1(acos) L1(atan) L1(asinh) L1(acosh) L1(atanh) L1(sqrt) L1(rsqrt) L1(fabs)         \
          L1(floor) L1(ceil) L1(trunc) L1(round) L1(rint) L1(fract) L1(sign) L1(saturate) L2(pow)  \
              L2(powr) L2(atan2) L2(divide) L2(fmax) L2(fmin) L2(fmod) L2(copysign)
  LM namespace precise { LM }
  namespace fast {
  LM
  }
  template <class T>
  T fma(T, T, T);
  template <class T>
  T max(T, T);
  template <class T>
  T min(T, T);
  template <class T>
  T max3(T, T, T);
  template <class T>
  T min3(T, T, T);
  template <class T>
  T clamp(T, T, T);
  template <class T>
  T abs(T);
  template <class T>
  T select(T, T, bool);
  template <class T, class B>
  T select(T, T, B);
  template <class T>
  T mix(T, T, T);
  template <class T>
  typename vt<T>::e dot(T, T);
  template <class T>
  typename vt<T>::e length(T);
  template <class T>
  bool any(T);
  template <class T>
  bool all(T);
  bool isnan(float);
  bool isinf(float);
  bool isfinite(float);
  bool signbit(float);
  float ldexp(float, int);
  template <class T>
  T popcount(T);
  template <class T>
  T clz(T);
  template <class T>
  T ctz(T);
  template <class T>
  T extract_bits(T, uint, uint);
  uint mulhi(uint, uint);
  enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
  constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
  void threadgroup_barrier(mem_flags);
  void simdgroup_barrier(mem_flags);
  template <class T>
  static constexpr constant bool so =
      (fl<T> ||
       (__is_integral(typename vt<T>::e) && sizeof(typename vt<T>::e) <= 4 && !__is_same(T, bool)));
#define LR(F)                                    \
  template <class T, class = enable_if_t<so<T>>> \
  T F(T);
  LR(simd_sum)
  LR(simd_product) LR(simd_max) LR(simd_min) LR(simd_and) LR(simd_or) LR(simd_xor)
      LR(simd_broadcast_first) LR(simd_prefix_inclusive_sum) LR(simd_prefix_exclusive_sum)
          LR(quad_sum) LR(quad_max)
#define LS(F)                                    \
  template <class T, class = enable_if_t<so<T>>> \
  T F(T, ushort);
              LS(simd_shuffle) LS(simd_broadcast) LS(simd_shuffle_xor) LS(simd_shuffle_down)
                  LS(simd_shuffle_up) LS(simd_shuffle_rotate_down) LS(simd_shuffle_rotate_up)
                      LS(quad_broadcast)
                          LS(quad_shuffle_xor) template <class T, class = enable_if_t<so<T>>>
                          T simd_shuffle_and_fill_up(T, T, ushort);
  template <class T, class = enable_if_t<so<T>>>
  T simd_shuffle_and_fill_down(T, T, ushort);
  struct simd_vote {
    ulong v;
    explicit operator ulong() const { return v; }
    bool all() const;
    bool any() const;
  };
  simd_vote simd_ballot(bool);
  bool simd_any(bool);
  bool simd_all(bool);
  bool simd_is_first();
  template <class T, int R = 8, int C = 8>
  struct simdgroup_matrix {
    static_assert(R == 8 && C == 8, "only 8x8");
    typedef vec<T, 2> st;
    st t;
    simdgroup_matrix() = default;
    explicit simdgroup_matrix(T) {}
    st& thread_elements() { return t; }
  };
  typedef simdgroup_matrix<half> simdgroup_half8x8;
  typedef simdgroup_matrix<float> simdgroup_float8x8;
  typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;
  template <class T, int R, int C>
  simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
#define LL(AS)                                                                                    \
  template <class T>                                                                              \
  void simdgroup_load(simdgroup_matrix<T>& d, const AS T* s, ulong epr = 8, ulong2 o = ulong2(0), \
                      bool tr = false);                                                           \
  template <class T>                                                                              \
  void simdgroup_store(simdgroup_matrix<T> d, AS T* s, ulong epr = 8, ulong2 o = ulong2(0),       \
                       bool tr = false);
  LL(device)
  LL(threadgroup) template <class D, class A, class B, class C>
  void simdgroup_multiply_accumulate(simdgroup_matrix<D> & d, simdgroup_matrix<A> a,
                                     simdgroup_matrix<B> b, simdgroup_matrix<C> c);
  template <class D, class A, class B>
  void simdgroup_multiply(simdgroup_matrix<D> & d, simdgroup_matrix<A> a, simdgroup_matrix<B> b);
  enum memory_order { memory_order_relaxed };
  template <class T>
  struct nd {
    typedef T type;
  };
  template <class T>
  struct atomic {
    T v_;
    static_assert(__is_same(T, int) || __is_same(T, uint) || __is_same(T, float) ||
                      __is_same(T, bool) || __is_same(T, ulong),
                  "atomic<T>: T not supported by MSL");
  };
#define atomic_int atomic<int>
#define atomic_uint atomic<uint>
#define atomic_float atomic<float>
#define atomic_ulong atomic<ulong>
  using atomic_bool = atomic<bool>;
// using atomic_uint = atomic<uint>; using atomic_float = atomic<float>; using atomic_bool =
// atomic<bool>; using atomic_ulong = atomic<ulong>;
#define LA(AS)                                                                                 \
  template <class T>                                                                           \
  T atomic_load_explicit(const volatile AS atomic<T>*, memory_order);                          \
  template <class T>                                                                           \
  void atomic_store_explicit(volatile AS atomic<T>*, typename nd<T>::type, memory_order);      \
  template <class T>                                                                           \
  T atomic_exchange_explicit(volatile AS atomic<T>*, typename nd<T>::type, memory_order);      \
  template <class T>                                                                           \
  bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T>*, T*, typename nd<T>::type, \
                                             memory_order, memory_order);                      \
  template <class T>                                                                           \
  T atomic_fetch_add_explicit(volatile AS atomic<T>*, typename nd<T>::type, memory_order);     \
  template <class T>                                                                           \
  T atomic_fetch_sub_explicit(volatile AS atomic<T>*, typename nd<T>::type, memory_order);     \
  template <class T>                                                                           \
  T atomic_fetch_max_explicit(volatile AS atomic<T>*, typename nd<T>::type, memory_order);     \
  template <class T>                                                                           \
  T atomic_fetch_min_explicit(volatile AS atomic<T>*, typename nd<T>::type, memory_order);     \
  template <class T>                                                                           \
  T atomic_fetch_or_explicit(volatile AS atomic<T>*, typename nd<T>::type, memory_order);      \
  template <class T>                                                                           \
  T atomic_fetch_and_explicit(volatile AS atomic<T>*, typename nd<T>::type, memory_order);
  LA(device) LA(threadgroup)
}
// constructor spelling float4(a, b, c, d): function-like macros (not re-expanded, so plain `float4
// x` is untouched)

#define float2(...) metal::mk<float2>(__VA_ARGS__)
#define float3(...) metal::mk<float3>(__VA_ARGS__)
#define float4(...) metal::mk<float4>(__VA_ARGS__)
#define half2(...) metal::mk<half2>(__VA_ARGS__)
#define half3(...) metal::mk<half3>(__VA_ARGS__)
#define half4(...) metal::mk<half4>(__VA_ARGS__)
#define bfloat2(...) metal::mk<bfloat2>(__VA_ARGS__)
#define bfloat4(...) metal::mk<bfloat4>(__VA_ARGS__)
#define uint2(...) metal::mk<uint2>(__VA_ARGS__)
#define uint3(...) metal::mk<uint3>(__VA_ARGS__)
#define uint4(...) metal::mk<uint4>(__VA_ARGS__)
#define int2(...) metal::mk<int2>(__VA_ARGS__)
#define int3(...) metal::mk<int3>(__VA_ARGS__)
#define int4(...) metal::mk<int4>(__VA_ARGS__)
#define ushort2(...) metal::mk<ushort2>(__VA_ARGS__)
#define ushort4(...) metal::mk<ushort4>(__VA_ARGS__)
#define short2(...) metal::mk<short2>(__VA_ARGS__)
#define uchar4(...) metal::mk<uchar4>(__VA_ARGS__)
#define ulong2(...) metal::mk<ulong2>(__VA_ARGS__)
// the part of MLX's prelude (metal::utils()) that kernels use
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
namespace metal {
#define B1(F) bfloat F(bfloat);
#define B2(F) bfloat F(bfloat, bfloat);
#define BALL                                                                                       \
  B1(acos)                                                                                         \
  B1(asin) B1(atan) B1(ceil) B1(cos) B1(exp) B1(exp2) B1(fabs) B1(floor) B1(log) B1(log2) B1(rint) \
      B1(round) B1(rsqrt) B1(sin) B1(sqrt) B1(tan) B1(tanh) B1(trunc) B2(fmax) B2(fmin) B2(pow)
BALL namespace precise { BALL }
namespace fast {
BALL
}
B1(simd_sum) B1(simd_max) B1(simd_min) bfloat simd_broadcast(bfloat, ushort);
bfloat simd_shuffle(bfloat, ushort);
bfloat simd_shuffle_xor(bfloat, ushort);
bfloat simd_shuffle_down(bfloat, ushort);
bfloat simd_shuffle_up(bfloat, ushort);
}  // namespace metal
template <class U>
struct Limits {
  static constexpr constant U max = U(1);
  static constexpr constant U min = U(0);
  static constexpr constant U finite_max = U(1);
  static constexpr constant U finite_min = U(0);
};
template <class IdxT = int64_t>
IdxT elem_to_loc(IdxT elem, constant const int* shape, constant const int64_t* strides, int ndim);
template <class IdxT = int64_t>
IdxT elem_to_loc(uint3 elem, constant const int* shape, constant const int64_t* strides, int ndim);
template <class T, class U>
T ceildiv(T N, U M) {
  return (N + M - 1) / M;
}
