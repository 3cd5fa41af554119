// vec<T, N> with swizzles, packed vectors, as_type.
#pragma once
#include "traits.h"

namespace metal {
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
MSLSIM_V(-)
MSLSIM_V(*) MSLSIM_V(/) MSLSIM_V(%) MSLSIM_V(&) MSLSIM_V(|) MSLSIM_V(^) MSLSIM_V(<<) MSLSIM_V(>>)
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
MSLSIM_VT(char)
MSLSIM_VT(uchar) MSLSIM_VT(short) MSLSIM_VT(ushort) MSLSIM_VT(int) MSLSIM_VT(uint) MSLSIM_VT(long)
    MSLSIM_VT(ulong) MSLSIM_VT(half) MSLSIM_VT(float) MSLSIM_VT(bfloat)
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
}  // namespace metal
