// runtime.cpp - runtime of the emulator: one fiber per GPU thread, threadgroups run one after
// another. Also: exact bounds / race / uninitialised-read / unwritten-output checks, fed by the
// compiler's own -fsanitize=thread load/store hooks (the TSan runtime itself is NOT linked:
// __tsan_* are defined here).
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <math.h>
#include <signal.h>
#include <setjmp.h>
#include <sys/mman.h>
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
// ---------------------------------------------------------------- scheduling
static inline bool q_any() { return qh < Q.size(); }
// shuffle 0: in order, 1: random, 2: reversed, 3: greedy (one SIMD-group runs as far ahead as it
// can), 4: greedy + random
static inline int q_pop() {
  if (L->shuffle >= 3) {
    int i = Q.back();
    Q.pop_back();
    return i;
  }
  return Q[qh++];
}
static void flush_pend();
static bool has_pend;
static void yield_(void) {
  Thread* me = cur;
  L->n_switch++;
  if (has_pend) flush_pend();
  void* to;
  if (!aborted && q_any()) {
    cur = &T[q_pop()];
    to = cur->sp;
  } else {
    cur = nullptr;
    to = main_sp;
  }
  if (qh > 4096) {
    Q.erase(Q.begin(), Q.begin() + qh);
    qh = 0;
  }
  if (cur == me) return;
  mslsim_switch(&me->sp, to);
}
static void push_shuffled(std::vector<int>& v) {
  if (L->shuffle == 1)
    for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[rnd() % i]);
  else if (L->shuffle == 4 && v.size() > 32) {
    for (size_t i = v.size() / 32; i > 1; i--) {
      size_t j = rnd() % i;
      for (int k = 0; k < 32; k++) std::swap(v[(i - 1) * 32 + k], v[j * 32 + k]);
    }
  } else if (L->shuffle == 2)
    std::reverse(v.begin(), v.end());
  for (int i : v) {
    T[i].state = READY;
    Q.push_back(i);
  }
}
static void release_simd(int s, int line, int col, Thread* self) {
  static std::vector<int> rel;
  rel.clear();
  mslsim_slots* r = &S[s].res[S[s].ring++ & 3];
  r->active = 0;
  int bar = 0;
  for (int i = s * 32; i < std::min(nthr, s * 32 + 32); i++)
    if (T[i].state == W_SIMD && T[i].line == line && T[i].col == col) {
      r->active |= 1u << T[i].lane;
      memcpy(r->b[T[i].lane], T[i].dep, 32);
      T[i].res = r;
      bar |= T[i].bar;
      T[i].bar = 0;
      S[s].waiting--;
      if (&T[i] == self)
        T[i].state = READY;
      else
        rel.push_back(i);
    }
  if (bar)
    S[s].sync = ++clk;  // simdgroup_barrier with a memory flag orders this SIMD-group's accesses
  push_shuffled(rel);
}
static bool same_site(int s, int& line, int& col) {
  bool f = true;
  for (int i = s * 32; i < std::min(nthr, s * 32 + 32); i++)
    if (T[i].state == W_SIMD) {
      if (f) {
        line = T[i].line;
        col = T[i].col;
        f = false;
      } else if (T[i].line != line || T[i].col != col)
        return false;
    }
  return true;
}
extern "C" const mslsim_slots* mslsim_exchange(const void* v, int n, int line, int col) {
  Thread* t = cur;
  memcpy(t->dep, v, n);
  t->line = line;
  t->col = col;
  t->state = W_SIMD;
  Simd& s = S[t->simd];
  int l, c;
  if (++s.waiting == s.alive && same_site(t->simd, l, c)) {
    release_simd(t->simd, l, c, t);
    return t->res;
  }
  yield_();
  return t->res;
}
extern "C" void mslsim_simd_barrier(int flags, int line, int col) {
  unsigned char z = 0;
  cur->bar = flags;
  mslsim_exchange(&z, 1, line, col);
}
static void tg_release(int flags) {
  static std::vector<int> rel;
  rel.clear();
  for (int i = 0; i < nthr; i++)
    if (T[i].state == W_TG) rel.push_back(i);
  tgw = 0;
  ++clk;
  if (flags & 2) tg_last = clk;
  if (flags & 1) dev_last = clk;
  push_shuffled(rel);
}
static int tg_flags;
static void tg_try(void) {
  if (!tgw || tgw != alive) return;
  int line = 0, col = 0;
  bool f = true;
  for (int i = 0; i < nthr; i++)
    if (T[i].state == W_TG) {
      if (f) {
        line = T[i].line;
        col = T[i].col;
        f = false;
      } else if (T[i].line != line || T[i].col != col) {
        Report* r = report(
            K_BARRIER, "threads of one threadgroup wait at different threadgroup_barrier calls");
        if (r) {
          r->line = line;
          r->col = T[i].line;
        }
        aborted = true;
        return;
      }
    }
  if (L->strict && alive != nthr) {
    char m[120];
    snprintf(m, sizeof m, "threadgroup_barrier reached by %d of %d threads (others returned early)",
             alive, nthr);
    Report* r = report(K_BARRIER, m);
    if (r) r->line = line;
    aborted = true;
    return;
  }
  tg_release(tg_flags);
}
extern "C" void mslsim_tg_barrier(int flags, int line, int col) {
  Thread* t = cur;
  t->state = W_TG;
  t->line = line;
  t->col = col;
  tg_flags = flags;
  tgw++;
  tg_try();
  yield_();
}
extern "C" int mslsim_lane() { return cur->lane; }
extern "C" void mslsim_fail(const char* what, int line, int col) {
  for (int i = 0; i < L->nreports; i++)
    if (L->reports[i].kind == K_LANE && L->reports[i].line == line) return;
  Report* r = report(K_LANE, what);
  if (r) {
    r->line = line;
    r->col = col;
  }
}
static void** g_bufs;
static void fiber_main() {
  mslsim_kernel_entry(g_bufs, &cur->at);
  Thread* t = cur;
  t->state = DONE;
  alive--;
  Simd& s = S[t->simd];
  s.alive--;
  int l, c;
  if (s.waiting && s.waiting == s.alive && same_site(t->simd, l, c))
    release_simd(t->simd, l, c, nullptr);
  tg_try();
  yield_();
  abort();
}
static bool unstick() {  // no runnable thread: divergence
  for (size_t s = 0; s < S.size(); s++)
    if (S[s].waiting) {
      int bl = 1 << 30, bc = 0;
      uint32_t m = 0, o = 0;
      int ol = 0;
      for (int i = s * 32; i < std::min<int>(nthr, s * 32 + 32); i++)
        if (T[i].state == W_SIMD && (T[i].line < bl || (T[i].line == bl && T[i].col < bc))) {
          bl = T[i].line;
          bc = T[i].col;
        }
      for (int i = s * 32; i < std::min<int>(nthr, s * 32 + 32); i++) {
        if (T[i].state == W_SIMD && T[i].line == bl && T[i].col == bc)
          m |= 1u << T[i].lane;
        else if (T[i].state != DONE) {
          o |= 1u << T[i].lane;
          ol = T[i].line;
        }
      }
      if (L->strict) {
        char b[150];
        snprintf(b, sizeof b,
                 "divergent SIMD-group operation: lanes %08x are here, lanes %08x wait at line %d",
                 m, o, ol);
        Report* r = report(K_DIVERGE, b);
        if (r) {
          r->line = bl;
          r->col = bc;
        }
        return false;
      }
      release_simd(s, bl, bc, nullptr);
      return true;
    }
  return false;
}
// ---------------------------------------------------------------- shadow memory
struct Cell {
  uint32_t ws, wg, wpc, rs, rg, rpc;
  int16_t wt, rt, rt2;
  uint16_t init;
};
struct Region {
  uintptr_t lo, hi;
  Cell* c;
  const char* name;
  int buf, flags;
  bool dev;
  uint32_t gen;
};
static std::vector<Region> R;
static Region* lastR;
static uintptr_t arena_lo, arena_hi, tg_lo, tg_hi;
static uint64_t so_base;
static inline bool ordered(uint32_t stamp, int other, uint32_t last) {
  return stamp < last || (other / 32 == cur->idx / 32 && stamp < S[cur->simd].sync);
}
// write-write conflicts inside one threadgroup are judged after the store: equal values are benign
// (only counted)
static struct {
  uintptr_t a;
  int n;
  unsigned char old[16];
  Report r;
} pend;
static void flush_pend() {
  has_pend = false;
  if (memcmp((void*)pend.a, pend.old, pend.n) == 0) {
    L->same_value++;
    return;
  }
  Thread* c = cur;
  Report* q = report(pend.r.kind, pend.r.msg, pend.r.pc1);
  cur = c;
  if (q) {
    Report t = pend.r;
    *q = t;
  }
}
static void access(uintptr_t a, int n, bool wr, uint64_t pc) {
  if (__builtin_expect(has_pend, 0)) flush_pend();
  bool dev = a - arena_lo < arena_hi - arena_lo;
  if (!dev && !(a >= tg_lo && a < tg_hi)) return;
  L->n_access++;
  Region* r = lastR;
  if (!r || a < r->lo || a >= r->hi) {
    r = nullptr;
    for (auto& x : R)
      if (a >= x.lo && a < x.hi) {
        r = lastR = &x;
        break;
      }
  }
  if (!r || a + n > r->hi) {
    Region* b = nullptr;
    int64_t bd = INT64_MAX;
    for (auto& x : R) {
      if (x.dev != dev) continue;
      int64_t d = a < x.lo ? int64_t(x.lo - a) : int64_t(a + n - x.hi);
      if (d < bd) {
        bd = d;
        b = &x;
      }
    }
    char m[150];
    snprintf(m, sizeof m, "%s out of bounds: %s memory, byte offset %lld of '%s' (size %lld)",
             wr ? "write" : "read", dev ? "device" : "threadgroup",
             b ? (long long)(a - b->lo) : 0ll, b ? b->name : "?",
             b ? (long long)(b->hi - b->lo) : 0ll);
    Report* q = report(K_OOB, m, pc);
    if (q && b) {
      q->buf = b->buf;
      q->off = a - b->lo;
      q->size = n;
    }
    return;
  }
  if (wr && dev && !(r->flags & 1)) {
    Report* q = report(K_ROWRITE, "write to an input buffer", pc);
    if (q) q->buf = r->buf;
    return;
  }
  if (!r->c) return;
  int me = cur->idx;
  uint32_t last = dev ? dev_last : tg_last;
  uint16_t ig = dev ? 1 : (uint16_t)r->gen;
  for (int k = 0; k < n; k++) {
    Cell& c = r->c[a - r->lo + k];
    int bad = 0;
    int ot = -1;
    uint32_t og = 0, opc = 0;
    if (c.init == ig && c.ws && (c.wg != tgid ? dev : (c.wt != me && !ordered(c.ws, c.wt, last)))) {
      bad = 1;
      ot = c.wt;
      og = c.wg;
      opc = c.wpc;
    }
    if (wr && !bad && c.rs &&
        (c.rg != tgid ? dev
                      : ((c.rt != me && !ordered(c.rs, c.rt, last)) ||
                         (c.rt2 >= 0 && c.rt2 != me && !ordered(c.rs, c.rt2, last))))) {
      if (c.rg == tgid || dev) {
        bad = 2;
        ot = c.rt != me || c.rg != tgid ? c.rt : c.rt2;
        og = c.rg;
        opc = c.rpc;
      }
    }
    if (bad) {
      char m[150];
      snprintf(m, sizeof m, "data race on %s memory '%s' byte %lld: %s after unsynchronised %s",
               dev ? "device" : "threadgroup", r->name, (long long)(a - r->lo + k),
               wr ? "write" : "read", bad == 1 ? "write" : "read");
      if (wr && bad == 1 && og == tgid && n <= 16) {
        has_pend = true;
        pend.a = a;
        pend.n = n;
        memcpy(pend.old, (void*)a, n);
        Report& t = pend.r;
        memset(&t, 0, sizeof t);
        t.kind = dev ? K_RACE_DEV : K_RACE_TG;
        t.t1 = me;
        t.g1 = tgid;
        t.pc1 = pc;
        memcpy(t.msg, m, sizeof m);
        t.buf = r->buf;
        t.off = a - r->lo + k;
        t.t2 = ot;
        t.g2 = og;
        t.pc2 = so_base + opc;
      } else {
        Report* q = report(dev ? K_RACE_DEV : K_RACE_TG, m, pc);
        if (q) {
          q->buf = r->buf;
          q->off = a - r->lo + k;
          q->t2 = ot;
          q->g2 = og;
          q->pc2 = so_base + opc;
        }
      }
    }
    if (!wr && c.init != ig) {
      char m[150];
      snprintf(m, sizeof m, "read of uninitialised %s memory '%s' byte %lld",
               dev ? "output" : "threadgroup", r->name, (long long)(a - r->lo + k));
      report(dev ? K_UNINIT_DEV : K_UNINIT_TG, m, pc);
    }
    if (wr) {
      c.ws = clk;
      c.wg = tgid;
      c.wt = me;
      c.wpc = (uint32_t)(pc - so_base);
      c.init = ig;
    } else {
      if (c.rs == clk && c.rg == tgid) {
        if (c.rt != me) c.rt2 = me;
      } else {
        c.rt2 = -1;
        c.rt = me;
      }
      if (c.rs != clk || c.rg != tgid) {
        c.rs = clk;
        c.rg = tgid;
        c.rpc = (uint32_t)(pc - so_base);
      }
    }
    if (bad) break;
  }
}
extern "C" void mslsim_atomic_access(const void* p, int n) {
  uintptr_t a = (uintptr_t)p;
  for (auto& r : R)
    if (a >= r.lo && a < r.hi) {
      if (a + n > r.hi) break;
      if (r.c)
        for (int k = 0; k < n; k++) {
          Cell& c = r.c[a - r.lo + k];
          if (!r.dev && c.init != (uint16_t)r.gen) {
            report(K_UNINIT_TG, "atomic access to uninitialised threadgroup memory",
                   (uint64_t)__builtin_return_address(0));
          }
          c.init = r.dev ? 1 : (uint16_t)r.gen;
        }
      return;
    }
  if (!R.empty())
    report(K_OOB, "atomic access out of bounds", (uint64_t)__builtin_return_address(0));
}
#define PC ((uint64_t)__builtin_return_address(0))
// __tsan_readN is emitted where the compiler relied on natural alignment, __tsan_unaligned_readN
// where it did not
static inline void al(void* p, int n, uint64_t pc) {
  if (__builtin_expect((uintptr_t)p & (n - 1), 0)) {
    char m[100];
    snprintf(m, sizeof m, "misaligned %d-byte vector access (address %% %d = %d)", n, n,
             int((uintptr_t)p & (n - 1)));
    report(K_UB, m, pc);
  }
}
#define H(N)                                                                                \
  extern "C" void __tsan_read##N(void* p) {                                                 \
    al(p, N, PC);                                                                           \
    access((uintptr_t)p, N, false, PC);                                                     \
  }                                                                                         \
  extern "C" void __tsan_write##N(void* p) {                                                \
    al(p, N, PC);                                                                           \
    access((uintptr_t)p, N, true, PC);                                                      \
  }                                                                                         \
  extern "C" void __tsan_unaligned_read##N(void* p) { access((uintptr_t)p, N, false, PC); } \
  extern "C" void __tsan_unaligned_write##N(void* p) { access((uintptr_t)p, N, true, PC); } \
  extern "C" void __tsan_read_write##N(void* p) {                                           \
    access((uintptr_t)p, N, false, PC);                                                     \
    access((uintptr_t)p, N, true, PC);                                                      \
  }                                                                                         \
  extern "C" void __tsan_unaligned_read_write##N(void* p) {                                 \
    access((uintptr_t)p, N, false, PC);                                                     \
    access((uintptr_t)p, N, true, PC);                                                      \
  }
H(1) H(2) H(4) H(8) H(16) extern "C" void mslsim_misaligned(int off, int need) {
  char m[100];
  snprintf(m, sizeof m, "misaligned vector access: address %% 16 = %d, type needs %d", off, need);
  if (L) report(K_UB, m, PC);
}
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_ignore_thread_begin() {}
void __tsan_ignore_thread_end() {}
void* __tsan_memcpy(void* d, const void* s, size_t n) {
  access((uintptr_t)s, n, false, PC);
  access((uintptr_t)d, n, true, PC);
  return memcpy(d, s, n);
}
void* __tsan_memmove(void* d, const void* s, size_t n) {
  access((uintptr_t)s, n, false, PC);
  access((uintptr_t)d, n, true, PC);
  return memmove(d, s, n);
}
void* __tsan_memset(void* d, int v, size_t n) {
  access((uintptr_t)d, n, true, PC);
  return memset(d, v, n);
}
}
// UBSan recover handlers: first field of every data block is the source location
struct SL {
  const char* f;
  uint32_t line, col;
};
static void ub(void* d, const char* m) {
  SL* s = (SL*)d;
  for (int i = 0; i < L->nreports; i++)
    if (L->reports[i].kind == K_UB && L->reports[i].line == (int)s->line) return;
  Report* r = report(K_UB, m);
  if (r) {
    r->line = s->line;
    r->col = s->col;
    const char* b = s->f ? strrchr(s->f, '/') : nullptr;
    snprintf(r->msg, sizeof r->msg, "%s [%s]", m, b ? b + 1 : s->f);
  }
}
extern "C" {
void __ubsan_handle_out_of_bounds(void* d, uintptr_t i) {
  char m[80];
  snprintf(m, sizeof m, "array index %ld out of bounds", (long)(int32_t)i);
  ub(d, m);
}
void __ubsan_handle_shift_out_of_bounds(void* d, uintptr_t, uintptr_t) {
  ub(d, "shift amount out of range");
}
void __ubsan_handle_divrem_overflow(void* d, uintptr_t, uintptr_t) {
  ub(d, "integer division by zero or overflow");
}
void __ubsan_handle_type_mismatch_v1(void* d, uintptr_t p) {
  char m[100];
  snprintf(m, sizeof m, "misaligned or null pointer access (address %% 16 = %d)", int(p & 15));
  ub(d, m);
}
void __ubsan_handle_float_cast_overflow(void* d, uintptr_t) {
  ub(d, "float to integer conversion out of range");
}
void __ubsan_handle_builtin_unreachable(void* d) { ub(d, "unreachable code reached"); }
void __ubsan_handle_missing_return(void* d) { ub(d, "missing return"); }
}

extern "C" void mslsim_tg_register(void* p, size_t n, const char* name, int line) {
  uintptr_t a = (uintptr_t)p;
  for (size_t i = 0; i < R.size(); i++)
    if (R[i].lo == a) {
      if (R[i].gen != (uint16_t)tgid) {
        R[i].gen = (uint16_t)tgid;
        memset(p, 0xFF, n);
      }
      return;
    }
  L->tg_bytes += n;
  memset(p, 0xFF, n);  // poison: float NaN / int -1
  if (L->tg_bytes > 32768) {
    char m[120];
    snprintf(m, sizeof m, "threadgroup memory %u bytes > 32768", L->tg_bytes);
    report(K_LIMIT, m);
  }
  tg_lo = std::min(tg_lo, a - 256);
  tg_hi = std::max(tg_hi, a + n + 256);
  lastR = nullptr;
  R.push_back({a, a + n, (Cell*)calloc(n, sizeof(Cell)), name, -1, 3, false, (uint16_t)tgid});
}
extern "C" float mslsim_jitter(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7f800000) == 0x7f800000 || (u & 0x7fffffff) < 0x01000000) return x;
  uint32_t h = u * 2654435761u ^ (uint32_t)L->seed * 40503u;
  h ^= h >> 15;
  int k = int(h % (2 * mslsim_jitter_ulp + 1)) - mslsim_jitter_ulp;
  u += k;
  memcpy(&x, &u, 4);
  return x;
}
// ---------------------------------------------------------------- memory: each buffer sits between
// 1 GiB inaccessible guards
static const size_t G = 1ull << 30, ARENA = 64ull << 30;
static char* arena;
static size_t bump;
extern "C" void* mslsim_alloc(size_t n, size_t align) {
  if (!arena) {
    arena = (char*)mmap(0, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    bump = G;
  }
  size_t pg = (n + 4095) & ~4095ull;
  if (!pg) pg = 4096;
  char* b = arena + bump;
  bump += pg + G;
  if (bump > ARENA) abort();
  mprotect(b, pg, PROT_READ | PROT_WRITE);
  return b + ((pg - n) & ~(align - 1));  // right-aligned: overruns fault
}
extern "C" void mslsim_free_all() {
  if (arena) {
    mmap(arena, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    bump = G;
  }
}
extern "C" void mslsim_protect(void* p, size_t n) {
  size_t pg = (n + 4095) & ~4095ull;
  if (!pg) pg = 4096;
  mprotect((void*)((uintptr_t)p & ~4095ull), pg, PROT_READ);
}
static void on_signal(int sig, siginfo_t* si, void* uc) {
  if (sig == SIGALRM)
    report(K_TIMEOUT, "kernel did not finish (infinite loop or lost wake-up)");
  else if (sig == SIGFPE)
    report(K_UB, "integer division by zero or overflow");
  else {
    char m[150];
    uintptr_t a = (uintptr_t)si->si_addr;
    int b = -1;
    int64_t off = 0;
    for (int i = 0; i < L->nbuf; i++) {
      uintptr_t lo = (uintptr_t)L->bufs[i];
      if (a >= lo - G && a < lo + L->sizes[i] + G) {
        b = i;
        off = a - lo;
      }
    }
    snprintf(m, sizeof m, "memory fault: buffer %d byte offset %lld (size %lld)", b, (long long)off,
             b >= 0 ? (long long)L->sizes[b] : 0ll);
    Report* r = report(K_SEGV, m, ((ucontext_t*)uc)->uc_mcontext.gregs[REG_RIP]);
    if (r) {
      r->buf = b;
      r->off = off;
    }
  }
  siglongjmp(jb, 1);
}
extern "C" int mslsim_launch(Launch* l) {
  L = l;
  mslsim_order = l->order;
  mslsim_jitter_ulp = l->jitter;
  rng = l->seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  aborted = false;
  cur = nullptr;
  l->nreports = 0;
  l->n_switch = l->n_threads = l->n_access = l->same_value = 0;
  has_pend = false;
  l->tg_bytes = 0;
  g_bufs = l->bufs;
  clk = 1;
  R.clear();
  lastR = nullptr;
  tg_lo = ~0ull;
  tg_hi = 0;
  arena_lo = ~0ull;
  arena_hi = 0;
  tgid = 0;
  l->base = so_base = (uint64_t)l->base;
  for (int i = 0; i < l->nbuf; i++) {
    uintptr_t a = (uintptr_t)l->bufs[i];
    arena_lo = (uintptr_t)arena;
    arena_hi = arena_lo + ARENA;
    Cell* c = nullptr;
    if (l->flags[i] & 1 && !(l->flags[i] & 8)) {
      c = (Cell*)calloc(l->sizes[i] + 1, sizeof(Cell));
      if (l->flags[i] & 2)
        for (size_t k = 0; k < l->sizes[i]; k++) c[k].init = 1;
    }
    char* nm = (char*)malloc(16);
    snprintf(nm, 16, "#%d", i);
    R.push_back({a, a + l->sizes[i], c, nm, i, l->flags[i], true, 0});
  }
  size_t nbR = R.size();
  uint32_t ng[3];
  for (int d = 0; d < 3; d++) {
    if (l->tg[d] > l->grid[d]) l->tg[d] = l->grid[d];
    ng[d] = l->tg[d] ? (l->grid[d] + l->tg[d] - 1) / l->tg[d] : 0;
  }
  uint32_t maxthr = l->tg[0] * l->tg[1] * l->tg[2];
  if (maxthr > 1024) {
    report(K_LIMIT, "threads per threadgroup > 1024");
    return l->nreports;
  }
  if (!stacks) {
    stacks = (char*)mmap(0, STK * 1024, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  stack_t ss = {}, oss;
  static char* alt = (char*)malloc(65536);
  ss.ss_sp = alt;
  ss.ss_size = 65536;
  sigaltstack(&ss, &oss);
  struct sigaction sa = {}, o1, o2, o3, o4;
  sa.sa_sigaction = on_signal;
  sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &sa, &o1);
  sigaction(SIGBUS, &sa, &o2);
  sigaction(SIGALRM, &sa, &o3);
  sigaction(SIGFPE, &sa, &o4);
  alarm(l->timeout_s);
  unsigned csr = _mm_getcsr();
  _mm_setcsr(l->ftz ? csr | 0x8040 : csr);
  if (!sigsetjmp(jb, 1)) {
    std::vector<uint32_t> order(ng[0] * ng[1] * ng[2]);
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    if (l->shuffle == 1)
      for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[rnd() % i]);
    else if (l->shuffle == 2)
      std::reverse(order.begin(), order.end());
    for (uint32_t gi : order) {
      tgid++;
      ++clk;
      tg_last = dev_last = clk;
      uint32_t gx = gi % ng[0], gy = gi / ng[0] % ng[1], gz = gi / ng[0] / ng[1],
               g[3] = {gx, gy, gz}, sz[3];
      for (int d = 0; d < 3; d++) sz[d] = std::min(l->tg[d], l->grid[d] - g[d] * l->tg[d]);
      nthr = alive = sz[0] * sz[1] * sz[2];
      tgw = 0;
      T.assign(nthr, Thread());
      int ns = (nthr + 31) / 32;
      S.resize(ns);
      l->n_threads += nthr;
      for (int s = 0; s < ns; s++) {
        S[s].alive = std::min(32, nthr - s * 32);
        S[s].waiting = 0;
        S[s].sync = clk;
        S[s].ring = 0;
      }
      for (int i = 0; i < nthr; i++) {
        Thread& t = T[i];
        t.idx = i;
        t.lane = i & 31;
        t.simd = i >> 5;
        mslsim_attrs& a = t.at;
        uint32_t p[3] = {i % sz[0], i / sz[0] % sz[1], i / (sz[0] * sz[1])};
        for (int d = 0; d < 3; d++) {
          a.tpit.e[d] = p[d];
          a.tgpig.e[d] = g[d];
          a.tpig.e[d] = g[d] * l->tg[d] + p[d];
          a.tpg.e[d] = l->grid[d];
          a.tgpg.e[d] = ng[d];
          a.tptg.e[d] = sz[d];
          a.dtptg.e[d] = l->tg[d];
        }
        a.tiit = i;
        a.tiis = t.lane;
        a.sgit = t.simd;
        a.sgptg = ns;
        a.tps = 32;
        void** sp = (void**)(stacks + STK * (i + 1) - 64);
        *--sp = 0;
        *--sp = (void*)fiber_main;
        for (int k = 0; k < 6; k++) *--sp = 0;
        t.sp = sp;
      }
      std::vector<int> all(nthr);
      for (int i = 0; i < nthr; i++) all[i] = i;
      Q.clear();
      qh = 0;
      push_shuffled(all);
      while (alive && !aborted) {
        if (q_any()) {
          cur = &T[q_pop()];
          mslsim_switch(&main_sp, cur->sp);
        } else if (!unstick())
          break;
      }
      if (alive && !aborted && !l->nreports) report(K_BARRIER, "deadlock");
      if (aborted || alive) break;
    }
  }
  alarm(0);
  _mm_setcsr(csr);
  sigaction(SIGSEGV, &o1, 0);
  sigaction(SIGBUS, &o2, 0);
  sigaction(SIGALRM, &o3, 0);
  sigaction(SIGFPE, &o4, 0);
  sigaltstack(&oss, 0);
  cur = nullptr;
  for (size_t i = 0; i < R.size(); i++) {
    if (i < nbR && i < 32) {
      l->unwritten[i] = -1;
      if (R[i].c) {
        int64_t n = 0, first = -1;
        for (size_t k = 0; k < l->sizes[i]; k++)
          if (!R[i].c[k].init) {
            n++;
            if (first < 0) first = k;
          }
        l->unwritten[i] = n;
      }
    }
    free(R[i].c);
  }
  return l->nreports;
}
