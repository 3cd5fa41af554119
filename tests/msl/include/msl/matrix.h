// simdgroup_matrix 8x8, with the lane layout that MLX's steel kernels rely on.
#pragma once
#include "simd.h"

namespace metal {
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
}  // namespace metal
