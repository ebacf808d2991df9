// What the kernels need of CUDA, for the host: the threads of a block are fibers, run in turn; a shuffle or a vote
// stores a value, lets the 31 others store theirs, and reads. Slots alternate, so that a fast thread overwrites
// nothing. A barrier is a vote that nobody counts.
#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__ inline
#define __shared__ static thread_local

enum { WARP = 32, STACK = 256 << 10 };

struct Index {
    unsigned x;
};
static thread_local Index blockIdx, blockDim = { WARP }, threadIdx;

static inline unsigned __float_as_uint(float f) {
    unsigned u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float __uint_as_float(unsigned u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static thread_local struct {
    ucontext_t home, fiber[WARP];
    std::vector<char> stack = std::vector<char>((size_t) WARP * STACK);
    unsigned long long slot[2][WARP];
    unsigned turn[WARP];
    bool done[WARP];
    const std::function<void()> * body;
} warp;

template <typename T> const unsigned long long * exchange(T v) {
    const unsigned lane = threadIdx.x, turn = warp.turn[lane]++ % 2;
    memcpy(&warp.slot[turn][lane], &v, sizeof v);
    swapcontext(&warp.fiber[lane], &warp.home);
    return warp.slot[turn];
}

template <typename T> T __shfl_xor_sync(unsigned, T v, int mask) {
    const unsigned lane = threadIdx.x;
    memcpy(&v, &exchange(v)[lane ^ (unsigned) mask], sizeof v);
    return v;
}

template <typename T> T __shfl_sync(unsigned, T v, int from, int width) {
    const unsigned lane = threadIdx.x, group = lane / (unsigned) width * (unsigned) width;
    memcpy(&v, &exchange(v)[group + (unsigned) from % (unsigned) width], sizeof v);
    return v;
}

static inline bool __all_sync(unsigned, int v) {
    const unsigned long long * all = exchange((unsigned long long) v);
    bool yes = true;
    for (int i = 0; i < WARP; i++) {
        yes = yes && all[i] != 0;
    }
    return yes;
}

static inline void __syncthreads() {
    exchange(0ull);
}

static inline void __syncwarp() {
    exchange(0ull);
}

static void fiber_main() {
    (*warp.body)();
    warp.done[threadIdx.x] = true;
}

// body() once for each of n threads, n rounded up to whole warps.
static void launch(unsigned n, const std::function<void()> & body) {
    warp.body = &body;
    for (blockIdx.x = 0; blockIdx.x * WARP < n; blockIdx.x++) {
        for (unsigned i = 0; i < WARP; i++) {
            warp.done[i] = false;
            warp.turn[i] = 0;
            getcontext(&warp.fiber[i]);
            warp.fiber[i].uc_stack.ss_sp = &warp.stack[(size_t) i * STACK];
            warp.fiber[i].uc_stack.ss_size = STACK;
            warp.fiber[i].uc_link = &warp.home;
            makecontext(&warp.fiber[i], fiber_main, 0);
        }
        for (bool any = true; any;) {
            any = false;
            for (unsigned i = 0; i < WARP; i++) {
                if (!warp.done[i]) {
                    threadIdx.x = i;
                    swapcontext(&warp.home, &warp.fiber[i]);
                    any = any || !warp.done[i];
                }
            }
        }
    }
}
