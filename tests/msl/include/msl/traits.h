// Type traits and numeric limits.
#pragma once
#include "interface.h"

namespace metal {
using ::bfloat;
using ::half;
using ::uchar;
using ::uint;
using ::ulong;
using ::ushort;
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
MSLSIM_LIM(uint8_t, 255, 0)
MSLSIM_LIM(int16_t, 32767, -32768) MSLSIM_LIM(uint16_t, 65535, 0)
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
}  // namespace metal
