// Barriers, and operations across a SIMD-group: a rendezvous per source line and column.
#pragma once
#include "math.h"

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
MSLSIM_AI void threadgroup_barrier(mem_flags f, MSLSIM_SITE) {
  mslsim_tg_barrier(int(f), line_, col_);
}
MSLSIM_AI void simdgroup_barrier(mem_flags f, MSLSIM_SITE) {
  mslsim_simd_barrier(int(f), line_, col_);
}

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
MSLSIM_RED(simd_product, a* b)
MSLSIM_RED(simd_max, max(a, b)) MSLSIM_RED(simd_min, min(a, b)) MSLSIM_RED(simd_and, a& b)
    MSLSIM_RED(simd_or, a | b) MSLSIM_RED(simd_xor, a ^ b)
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
MSLSIM_NI inline T simd_shuffle_and_fill_up(T v, T fill, ushort d, MSLSIM_SITE) {
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
}  // namespace metal
