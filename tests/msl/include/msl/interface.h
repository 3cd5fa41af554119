// What a kernel calls in the runtime, the scalar types, and bfloat's rules.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <type_traits>

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
  MSLSIM_B(-)
  MSLSIM_B(*) MSLSIM_B(/)
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
