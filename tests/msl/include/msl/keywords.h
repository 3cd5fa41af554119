// Address spaces erased; threadgroup arrays between red zones; thread attributes.
#pragma once
#include "atomics.h"

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
