// Shadow memory behind the compiler's load and store hooks; part of runtime.cpp.
#pragma once
#include "scheduling.h"

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
// __tsan_readN is emitted where the compiler relied on natural alignment, or for 16 bytes on one of 8
// (what two reads of 8 bytes became); __tsan_unaligned_readN elsewhere. What a vector type of 16 bytes
// needs, mslsim_misaligned tells.
static inline void al(void* p, int size, uint64_t pc) {
  const int n = size < 8 ? size : 8;
  if (__builtin_expect((uintptr_t)p & (n - 1), 0)) {
    char m[100];
    snprintf(m, sizeof m, "misaligned %d-byte vector access (address %% %d = %d)", size, n,
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
