/* A small fuzzer for compilers without libFuzzer: replays files, and mutates them at random. Where the code was built
 * with -fsanitize-coverage=trace-pc, an input that reaches new edges is kept and mutated on.
 *
 *     fuzz-X [-max_total_time=S] [-runs=N] [-seed=N] [-max_len=N] [-artifact_prefix=P] [FOLDER | FILE ...]
 *
 * The names are libFuzzer's, but seconds are those that it computes. New inputs go to the first folder, an input that
 * crashes or takes longer than 5 s to P + crash or P + timeout. Without time and runs: replay. */
#define _GNU_SOURCE
#include "fuzz/fuzz.h"

#include <dirent.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { MAX_INPUTS = 1 << 16, HANG = 5, STUCK = 120, EDGES = 1 << 18 };

static struct {
    uint8_t * data;
    size_t size;
} inputs[MAX_INPUTS];

static int ninputs;
static long done; /* runs */
static size_t max_len = 4096;
static const char *folder, *prefix = "";
static uint64_t state = 1;
static uint8_t * current;
static size_t current_size;

/* ---- coverage ---- */

static uint8_t edges[EDGES];
static unsigned nedges;
static _Thread_local uintptr_t before;

#if defined(__GNUC__) && !defined(__clang__)
void __sanitizer_cov_trace_pc(void); /* called at every basic block */

__attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc(void) {
    const uintptr_t here = (uintptr_t) __builtin_return_address(0);
    const uintptr_t edge = (here ^ before << 1) * 0x9e3779b97f4a7c15u >> 46;
    before = here;
    if (!edges[edge]) { /* racing threads may count one twice */
        edges[edge] = 1;
        nedges++;
    }
}
#endif

/* ---- what ended it ---- */

static long computed(void) { /* seconds of all threads */
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (long) t.tv_sec;
}

static void told(void) {
    printf("runs: %ld, inputs: %d, edges: %u, seconds: %ld\n", done, ninputs, nedges, computed());
    fflush(stdout);
}

static void keep(const char * what) { /* from a signal handler */
    told();
    char path[4096];
    snprintf(path, sizeof path, "%s%s", prefix, what);
    FILE * f = fopen(path, "wb");
    if (f) {
        fwrite(current, 1, current_size, f);
        fclose(f);
        fprintf(stderr, "%s: %zu bytes in %s\n", what, current_size, path);
    }
}

static void on_signal(int number) {
    const bool slow = number == SIGALRM || number == SIGPROF;
    keep(slow ? "timeout" : "crash");
    signal(number, SIG_DFL);
    if (slow) {
        _exit(70);
    }
    raise(number);
}

static void on_death(void) {
    keep("crash");
}

void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

/* ---- mutation ---- */

static uint64_t rnd(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717u;
}

static size_t below(size_t n) {
    return n ? (size_t) (rnd() >> 16) % n : 0;
}

static size_t mutate(uint8_t * p, size_t n) {
    static const uint64_t special[] = {
        0,          1,          0x7f,       0x80,       0xff,       0xffff,     0x7fff,     0x8000,     0x7c00,
        0xfc00,     0x7e00,     0x7fffffff, 0x80000000, 0xffffffff, 0x7f800000, 0xff800000, 0x7fc00000, 0x00800000,
        0x3f800000, 0x411b0000, 0x7f7fffff, 1ull << 62, 1ull << 63, ~0ull,      ~0ull << 5,
    };
    for (size_t times = 1 + below(8); times; times--) {
        const size_t at = below(n), left = n - at, width = (size_t) 1 << below(4);
        switch (below(9)) {
            case 0:
                if (n) {
                    p[at] ^= (uint8_t) (1u << below(8));
                }
                break;
            case 1:
                if (n) {
                    p[at] = (uint8_t) rnd();
                }
                break;
            case 2:
                if (n) {
                    p[at] = (uint8_t) (p[at] + below(9) - 4);
                }
                break;
            case 3:
                if (left >= width) {
                    memcpy(p + at, &special[below(sizeof special / sizeof special[0])], width);
                }
                break;
            case 4: { /* take out */
                const size_t m = below(left < 64 ? left + 1 : 64);
                memmove(p + at, p + at + m, left - m);
                n -= m;
                break;
            }
            case 5: { /* put in */
                const size_t m = below(max_len - n < 64 ? max_len - n + 1 : 64);
                memmove(p + at + m, p + at, left);
                for (size_t i = 0; i < m; i++) {
                    p[at + i] = (uint8_t) rnd();
                }
                n += m;
                break;
            }
            case 6:
                if (n) { /* copy within */
                    const size_t from = below(n), room = n - (from > at ? from : at);
                    memmove(p + at, p + from, below(room + 1));
                }
                break;
            case 7: { /* the end of another */
                const size_t other = below((size_t) ninputs), from = below(inputs[other].size);
                size_t m = inputs[other].size - from;
                m = m < max_len - at ? m : max_len - at;
                memcpy(p + at, inputs[other].data + from, m);
                n = at + m > n ? at + m : n;
                break;
            }
            default:
                for (size_t i = 0; i < 64 && i < left; i++) {
                    p[at + i] = (uint8_t) rnd();
                }
        }
    }
    return n;
}

/* ---- the loop ---- */

static void run(void) {
    const struct itimerval limit = { { 0, 0 }, { HANG, 0 } }, none = { { 0, 0 }, { 0, 0 } };
    setitimer(ITIMER_PROF, &limit, NULL); /* time that it computes: the machine may be busy */
    alarm(STUCK);
    before = 0;
    LLVMFuzzerTestOneInput(current, current_size);
    alarm(0);
    setitimer(ITIMER_PROF, &none, NULL);
}

static void add(const uint8_t * data, size_t size) {
    if (ninputs < MAX_INPUTS) {
        inputs[ninputs].data = fuzz_copy(data, size);
        inputs[ninputs++].size = size;
    }
}

static void load(const char * path) {
    struct stat st;
    if (stat(path, &st)) {
        return;
    }
    if (S_ISDIR(st.st_mode)) {
        folder = folder ? folder : path;
        DIR * dir = opendir(path);
        for (struct dirent * e; dir && (e = readdir(dir));) {
            char name[4096];
            snprintf(name, sizeof name, "%s/%s", path, e->d_name);
            if (e->d_name[0] != '.') {
                load(name);
            }
        }
        if (dir) {
            closedir(dir);
        }
        return;
    }
    FILE * f = fopen(path, "rb");
    if (f) {
        current_size = fread(current, 1, max_len, f);
        fclose(f);
        add(current, current_size);
    }
}

static void save(void) {
    if (folder) {
        uint64_t h = 0xcbf29ce484222325u;
        for (size_t i = 0; i < current_size; i++) {
            h = (h ^ current[i]) * 0x100000001b3u;
        }
        char path[4096];
        snprintf(path, sizeof path, "%s/%016llx", folder, (unsigned long long) h);
        FILE * f = fopen(path, "wb");
        if (f) {
            fwrite(current, 1, current_size, f);
            fclose(f);
        }
    }
}

int main(int argc, char ** argv) {
    long seconds = 0, runs = -1;
    for (int i = 1; i < argc; i++) {
        const char * value = strchr(argv[i], '=');
        const long number = value ? atol(value + 1) : 0;
        if (!strncmp(argv[i], "-max_total_time=", 16)) {
            seconds = number;
        } else if (!strncmp(argv[i], "-runs=", 6)) {
            runs = number;
        } else if (!strncmp(argv[i], "-seed=", 6)) {
            state = (uint64_t) number * 0x9e3779b97f4a7c15u + 1;
        } else if (!strncmp(argv[i], "-max_len=", 9)) {
            max_len = (size_t) number;
        } else if (!strncmp(argv[i], "-artifact_prefix=", 17)) {
            prefix = value + 1;
        }
    }
    current = fuzz_bytes(max_len);
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] != '-') {
            load(argv[i]);
        }
    }
    const int numbers[] = { SIGALRM, SIGPROF, SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL };
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        if (i < 2 || !__sanitizer_set_death_callback || numbers[i] == SIGABRT) {
            signal(numbers[i], on_signal);
        }
    }
    if (__sanitizer_set_death_callback) {
        __sanitizer_set_death_callback(on_death);
    }
    const int given = ninputs;
    for (int i = 0; i < given; i++, done++) {
        memcpy(current, inputs[i].data, current_size = inputs[i].size);
        run();
    }
    const long end = computed() + seconds;
    if (ninputs == 0) {
        add((const uint8_t *) "", 0);
    }
    while ((seconds && computed() < end && (runs < 0 || done < runs)) || (!seconds && done < runs)) {
        const size_t chosen = below((size_t) ninputs);
        memcpy(current, inputs[chosen].data, current_size = inputs[chosen].size);
        current_size = mutate(current, current_size);
        const unsigned known = nedges;
        run();
        done++;
        if (nedges > known) {
            add(current, current_size);
            save();
        }
    }
    told();
    for (int i = 0; i < ninputs; i++) {
        free(inputs[i].data);
    }
    free(current);
    return 0;
}
