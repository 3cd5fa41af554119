// Fibers: who runs next, SIMD-group rendezvous, barriers, divergence; part of runtime.cpp.
#pragma once
#include "state.h"

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
