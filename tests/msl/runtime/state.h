// What a launch is told and reports, and the state of its threads; part of runtime.cpp.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <math.h>
#include <signal.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <xmmintrin.h>
#include <vector>
#include <algorithm>

extern "C" {
struct mslsim_slots {
  uint32_t active;
  uint32_t pad[7];
  unsigned char b[32][32];
};
struct u3 {
  union {
    uint32_t e[3];
    struct {
      uint32_t x, y, z;
    };
  };
  uint32_t pad;
} __attribute__((aligned(16)));
struct mslsim_attrs {
  u3 tpig, tpit, tgpig, tpg, tgpg, tptg, dtptg;
  uint32_t tiit, tiis, sgit, sgptg, tps;
};
void mslsim_kernel_entry(void** bufs, const mslsim_attrs* a);
struct Report {
  int kind;
  int buf;
  int64_t off;
  int size;
  int t1, t2;
  uint32_t g1, g2;
  uint64_t pc1, pc2;
  int line, col;
  char msg[160];
};
struct Launch {
  uint32_t grid[3], tg[3];
  int nbuf;
  void** bufs;
  uint64_t* sizes;
  int* flags;  // flags: 1 output, 2 initialised
  uint64_t seed;
  int shuffle, strict, ftz, order, jitter, timeout_s, max_reports;
  Report* reports;
  int nreports;
  uint64_t base;  // out
  uint64_t n_switch, n_threads, n_access;
  uint32_t tg_bytes;
  int64_t unwritten[32];
  uint64_t same_value;
};
int mslsim_order = 0, mslsim_jitter_ulp = 0;
}
enum {
  K_OOB = 1,
  K_RACE_TG,
  K_RACE_DEV,
  K_UNINIT_TG,
  K_UNINIT_DEV,
  K_DIVERGE,
  K_BARRIER,
  K_UB,
  K_SEGV,
  K_TIMEOUT,
  K_LANE,
  K_LIMIT,
  K_UNWRITTEN,
  K_ROWRITE
};

static Launch* L;
enum { READY, W_SIMD, W_TG, DONE };
struct Thread {
  void* sp;
  int state, idx, lane, simd, line, col;
  const mslsim_slots* res;
  unsigned char dep[32];
  int bar;
  mslsim_attrs at;
};
struct Simd {
  int alive, waiting;
  uint32_t sync;
  int ring;
  mslsim_slots res[4];
};
static std::vector<Thread> T;
static std::vector<Simd> S;
static int nthr, alive, tgw;
static Thread* cur;
static void* main_sp;
static std::vector<int> Q;
static size_t qh;
static char* stacks;
static const size_t STK = 256 << 10;
static uint64_t rng;
static inline uint32_t rnd() {
  rng ^= rng << 13;
  rng ^= rng >> 7;
  rng ^= rng << 17;
  return (uint32_t)(rng >> 16);
}
static uint32_t clk = 1, tg_last, dev_last, tgid;
static bool aborted;
static sigjmp_buf jb;

extern "C" void mslsim_switch(void** from, void* to);
asm(".text\n.globl mslsim_switch\n.hidden mslsim_switch\n.type "
    "mslsim_switch,@function\nmslsim_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov "
    "%rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size "
    "mslsim_switch,.-mslsim_switch\n");

static Report* report(int kind, const char* msg, uint64_t pc = 0) {
  if (L->nreports >= L->max_reports) {
    if (kind == K_DIVERGE || kind == K_BARRIER) aborted = true;
    return nullptr;
  }
  for (int i = 0; i < L->nreports; i++)
    if (L->reports[i].kind == kind && L->reports[i].pc1 == pc && pc) return nullptr;
  Report* r = &L->reports[L->nreports++];
  memset(r, 0, sizeof *r);
  r->kind = kind;
  r->buf = -1;
  r->pc1 = pc;
  r->t2 = -1;
  r->t1 = cur ? cur->idx : -1;
  r->g1 = tgid;
  snprintf(r->msg, sizeof r->msg, "%s", msg);
  return r;
}
