// Atomics; MSL before 3.2 has relaxed order only.
#pragma once
#include "matrix.h"

namespace metal {
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
MSLSIM_AT(atomic_fetch_sub_explicit, o - x)
MSLSIM_AT(atomic_fetch_max_explicit, o < x ? x : o)
    MSLSIM_AT(atomic_fetch_min_explicit, x < o ? x : o) MSLSIM_AT(atomic_fetch_and_explicit, o& x)
        MSLSIM_AT(atomic_fetch_or_explicit, o | x) MSLSIM_AT(atomic_fetch_xor_explicit, o ^ x)
#undef MSLSIM_AT
}  // namespace metal
