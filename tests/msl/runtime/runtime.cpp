// Runtime of the emulator: one fiber per GPU thread, threadgroups run one after another. The checks
// are fed by the compiler's own -fsanitize=thread hooks; the TSan runtime itself is not linked.
#include "checks.h"

// Memory: each buffer sits right-aligned between inaccessible guards of 1 GiB.
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
  // Of this thread's own processor time: a busy machine is no endless loop.
  timer_t timer;
  struct sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGALRM;
  event._sigev_un._tid = gettid();
  struct itimerspec limit = {{0, 0}, {l->timeout_s, 0}};
  if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) || timer_settime(timer, 0, &limit, 0))
    abort();
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
        // Stacks at equal distances would share their cache lines' sets: each starts a bit lower.
        void** sp = (void**)(stacks + STK * (i + 1) - 64 - i % 128 * 576);
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
  timer_delete(timer);
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
