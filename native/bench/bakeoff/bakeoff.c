/* The bake-off's driver: checks every candidate's integer sums against digits, then times them.
 *
 *     bakeoff [SECONDS] [THREADS] [FILTER]
 *
 * SECONDS: time a row of the table (default 0.3; 0 = only check). THREADS: default 2. FILTER: only kernels whose
 * "layout/isa" contains it. Prints CSV: candidate, isa, bits per weight in memory (padding counted), where, threads,
 * Gweights/s and GB/s of the best run. The kernels take turns, so that a busy moment of the machine hits them alike.
 *     l2         256 x 4096 weights, about 450 KB
 *     memory     256 MiB of weights
 *     qwen0.5b, qwen1.5b   the matrices of one decoded token, one after another, a barrier after each
 *     read       (candidate "probe") sum of 256 MiB of 64-bit integers
 * Timed on random bytes: every candidate decodes any bytes, and its time does not depend on them.
 *
 * The project's own build makes it: build/native/ptqtp-bakeoff.
 */
#define _GNU_SOURCE
#include "bench/bakeoff/bakeoff.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* ---- kernels ---- */

void bake_unit32_rows_scalar(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    for (long r = 0; r < rows; r++) {
        out[r] = 0;
        for (long g = 0; g < cols / 32; g++, w += sizeof(ptqtp_unit)) {
            const ptqtp_unit * u = (const ptqtp_unit *) w;
            uint8_t digits[PTQTP_UNIT];
            ptqtp_unit_unpack(u, digits);
            int sum = 0;
            for (int k = 0; k < PTQTP_UNIT; k++) {
                sum += ptqtp_level[digits[k]] * a->q[32 * g + k];
            }
            out[r] += ptqtp_scale_value(u->side) * a->d[g] * (float) sum;
        }
    }
}

struct kernel {
    const char *layout, *isa;
    bake_fn * fn;
    bake_order * order;
    bool (*supported)(void); /* on this CPU */
};

static const struct kernel kernels[] = {
#define BAKE_ROW(layout, isa, order) { #layout, #isa, bake_##layout##_##isa, bake_order_##order, ptqtp_cpu_##isa },
    BAKE_KERNELS(BAKE_ROW)
#undef BAKE_ROW
};
enum { KERNELS = sizeof kernels / sizeof kernels[0] };

/* ---- data ---- */

static uint64_t random_state = 1;

static uint32_t rnd(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t) (random_state >> 32);
}

static void * alloc(size_t n) {
    void * p = aligned_alloc(64, (n + 127) / 64 * 64);
    if (!p) {
        fputs("bakeoff: no memory\n", stderr);
        exit(1);
    }
    memset(p, 0, (n + 127) / 64 * 64);
    return p;
}

static long padded(const struct bake_layout * l, long cols) {
    return (cols + l->cols - 1) / l->cols * l->cols;
}

static size_t matrix_bytes(const struct bake_layout * l, long rows, long cols) {
    return (size_t) (rows / l->rows * (padded(l, cols) / l->cols) * l->bytes);
}

enum { MAX_COLS = 9216, SLACK = 256 };

struct acts {
    struct bake_acts a;
    int8_t * q;
    int32_t * bias;
    int16_t * bias16;
    float * d;
    ptqtp_block_q8_0 * q8_0;
};

static struct acts new_acts(void) {
    struct acts x = { .q = alloc(4 * MAX_COLS + SLACK),
                      .bias = alloc(MAX_COLS / 32 * sizeof(int32_t) + SLACK),
                      .bias16 = alloc(MAX_COLS / 32 * sizeof(int16_t) + SLACK),
                      .d = alloc(MAX_COLS / 32 * sizeof(float) + SLACK),
                      .q8_0 = alloc(MAX_COLS / 32 * sizeof(ptqtp_block_q8_0) + SLACK) };
    x.a = (struct bake_acts){ x.q, x.bias, x.bias16, x.d, x.q8_0 };
    return x;
}

/* q: cols values in natural order; padding is zero. */
static void prepare(struct acts * x, const struct kernel * k, const int8_t * q, const float * d, long cols) {
    const struct bake_layout * l = bake_find_layout(k->layout);
    const long wide = padded(l, cols);
    int16_t order[BAKE_MAX_ORDER];
    const int n = k->order(order);
    if (n == 0) {
        memset(x->q, 0, (size_t) wide);
        memcpy(x->q, q, (size_t) cols);
    }
    const int step = n == 64 || n == 48 || n == 32 ? 32 : l->cols; /* orders of a unit of 32 or of the layout's unit */
    for (long u = 0; n && u < wide / step; u++) {
        for (int i = 0; i < n; i++) {
            const long at = u * step + order[i];
            x->q[u * n + i] = order[i] < 0 || at >= cols ? 0 : q[at];
        }
    }
    memset(x->bias, 0, (size_t) wide / 32 * sizeof *x->bias);
    memset(x->bias16, 0, (size_t) wide / 32 * sizeof *x->bias16);
    memset(x->d, 0, (size_t) wide / 32 * sizeof *x->d);
    for (long g = 0; g < cols / 32; g++) {
        int sum = 0;
        for (int i = 0; i < 32; i++) {
            sum += q[32 * g + i];
        }
        x->bias[g] = -5 * sum;
        x->bias16[g] = (int16_t) (-5 * sum);
        x->d[g] = d[g];
        x->q8_0[g].d = ptqtp_half_from_float(d[g]);
        memcpy(x->q8_0[g].qs, q + 32 * g, 32);
    }
}

/* ---- parity ---- */

/* With the activation scale 1 for one group and 0 for all others, a row's result is that group's integer sum times
 * its weight scale, both exact in a float. */
static int check(const struct kernel * k, long rows, long cols) {
    const struct bake_layout * l = bake_find_layout(k->layout);
    const long wide = padded(l, cols), groups = cols / 32;
    uint8_t *digits = alloc((size_t) (rows * wide)), *codes = alloc((size_t) (rows * wide / 32));
    uint8_t * w = alloc(matrix_bytes(l, rows, cols) + SLACK);
    int8_t * q = alloc((size_t) cols);
    float *d = alloc((size_t) groups * sizeof *d), *out = alloc((size_t) rows * sizeof *out);
    struct acts x = new_acts();
    memset(digits, 4, (size_t) (rows * wide));
    for (long r = 0; r < rows; r++) {
        for (long c = 0; c < cols; c++) {
            digits[r * wide + c] = (uint8_t) (r == 0 ? 8 : r == 1 ? 0 : rnd() % 9);
        }
        for (long g = 0; g < groups; g++) {
            codes[r * wide / 32 + g] = (uint8_t) rnd();
        }
    }
    for (long c = 0; c < cols; c++) { /* the first group all +127, the second all -127 */
        q[c] = (int8_t) (c < 32 ? 127 : c < 64 ? -127 : (int) (rnd() % 255) - 127);
    }
    uint8_t * at = w;
    for (long r = 0; r < rows; r += l->rows) {
        for (long c = 0; c < wide; c += l->cols, at += l->bytes) {
            l->pack(digits + r * wide + c, wide, codes + (r * wide + c) / 32, wide / 32, at);
        }
    }
    int bad = 0;
    for (long g = 0; g < groups; g++) {
        for (long i = 0; i < groups; i++) {
            d[i] = i == g;
        }
        prepare(&x, k, q, d, cols);
        k->fn(w, &x.a, out, rows, wide);
        for (long r = 0; r < rows; r++) {
            int sum = 0;
            for (long c = 32 * g; c < 32 * g + 32; c++) {
                sum += ptqtp_level[digits[r * wide + c]] * q[c];
            }
            const float want = ptqtp_scale_value(codes[r * wide / 32 + g]) * (float) sum;
            if (out[r] != want && bad++ == 0) {
                fprintf(stderr, "bakeoff: %s/%s, %ld columns: row %ld group %ld is %g, should be %g\n", k->layout,
                        k->isa, cols, r, g, out[r], want);
            }
        }
    }
    void * all[] = { digits, codes, w, q, d, out, x.q, x.bias, x.bias16, x.d, x.q8_0 };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
    return bad;
}

/* ---- what is timed ---- */

struct matrix {
    long rows, cols, count;
};

struct place {
    const char * name;
    struct matrix matrices[8]; /* ends with rows = 0; the whole list `layers` times, then `head` */
    long layers;
    struct matrix head;
};

enum { MEMORY_ROWS = 149808 }; /* of 4096: 256 MiB at 3.5 bits */

static const struct place places[] = {
    { "l2", { { 256, 4096, 1 } }, 1, { 0, 0, 0 } },
    { "memory", { { MEMORY_ROWS, 4096, 1 } }, 1, { 0, 0, 0 } },
    { "qwen0.5b", { { 896, 896, 2 }, { 128, 896, 2 }, { 4864, 896, 2 }, { 896, 4864, 1 } }, 24, { 151936, 896, 1 } },
    { "qwen1.5b",
      { { 1536, 1536, 2 }, { 256, 1536, 2 }, { 8960, 1536, 2 }, { 1536, 8960, 1 } },
      28,
      { 151936, 1536, 1 } },
};
enum { PLACES = sizeof places / sizeof places[0] };

typedef void visit_fn(const struct matrix * m, void * data);

static void visit(const struct place * p, visit_fn * fn, void * data) {
    for (long layer = 0; layer < p->layers; layer++) {
        for (const struct matrix * m = p->matrices; m->rows; m++) {
            for (long i = 0; i < m->count; i++) {
                fn(m, data);
            }
        }
    }
    if (p->head.rows) {
        fn(&p->head, data);
    }
}

struct total {
    const struct bake_layout * layout;
    double weights, bytes;
};

static void add_matrix(const struct matrix * m, void * data) {
    struct total * t = data;
    t->weights += (double) m->rows * (double) m->cols;
    t->bytes += (double) matrix_bytes(t->layout, m->rows, m->cols);
}

static struct total total_of(const struct place * p, const struct bake_layout * l) {
    struct total t = { l, 0, 0 };
    visit(p, add_matrix, &t);
    return t;
}

/* ---- threads: they spin between matrices, as ggml's do ---- */

struct job {
    const struct kernel * kernel; /* NULL: the read probe */
    const struct bake_layout * layout;
    const struct place * place;
    const struct bake_acts * acts;
    const uint8_t * weights;
    size_t bytes; /* of the probe */
    int passes, threads;
    int arrived, phase; /* of the barrier */
};

struct worker {
    struct job * job;
    int index;
    const uint8_t * at;
    float * out;
    uint64_t sum;
};

static void barrier(struct job * j) {
    if (j->threads == 1) {
        return;
    }
    const int phase = __atomic_load_n(&j->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&j->arrived, 1, __ATOMIC_ACQ_REL) == j->threads) {
        __atomic_store_n(&j->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&j->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&j->phase, __ATOMIC_ACQUIRE) == phase; spins++) {
        if (spins > 10000) {
            sched_yield();
        }
    }
}

static void run_matrix(const struct matrix * m, void * data) {
    struct worker * t = data;
    struct job * j = t->job;
    const long units = m->rows / 16, begin = units * t->index / j->threads, end = units * (t->index + 1) / j->threads;
    const long wide = padded(j->layout, m->cols);
    j->kernel->fn(t->at + matrix_bytes(j->layout, 16 * begin, m->cols), j->acts, t->out, 16 * (end - begin), wide);
    t->at += matrix_bytes(j->layout, m->rows, m->cols);
    barrier(j);
}

static void * work(void * data) {
    struct worker * t = data;
    struct job * j = t->job;
    for (int pass = 0; pass < j->passes; pass++) {
        t->at = j->weights;
        if (j->kernel) {
            visit(j->place, run_matrix, t);
            continue;
        }
        const size_t share = j->bytes / 64 / (size_t) j->threads * 8;
        const uint64_t * p = (const uint64_t *) (const void *) j->weights + share * (size_t) t->index;
        uint64_t s[8] = { 0 };
        for (size_t i = 0; i < share; i += 8) {
            for (int k = 0; k < 8; k++) {
                s[k] += p[i + k];
            }
        }
        t->sum += s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
    }
    return NULL;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static volatile uint64_t sink;

static double timed(struct job * j, float ** outs) {
    struct worker workers[256];
    pthread_t threads[256];
    for (int i = 0; i < j->threads; i++) {
        workers[i] = (struct worker){ .job = j, .index = i, .out = outs[i] };
    }
    const double start = now();
    for (int i = 1; i < j->threads; i++) {
        if (pthread_create(&threads[i], NULL, work, &workers[i]) != 0) {
            fputs("bakeoff: cannot start a thread\n", stderr);
            exit(1);
        }
    }
    work(&workers[0]);
    for (int i = 1; i < j->threads; i++) {
        pthread_join(threads[i], NULL);
    }
    sink = workers[0].sum;
    return (now() - start) / j->passes;
}

int main(int argc, char ** argv) {
    const double budget = argc > 1 ? atof(argv[1]) : 0.3;
    const int max_threads = argc > 2 ? atoi(argv[2]) : 2;
    const char * filter = argc > 3 ? argv[3] : "";
    if (budget < 0 || max_threads < 1 || max_threads > 256) {
        fputs("usage: bakeoff [SECONDS] [THREADS 1..256] [FILTER]\n", stderr);
        return 1;
    }
    bool on[KERNELS];
    int bad = 0;
    for (int i = 0; i < KERNELS; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s/%s", kernels[i].layout, kernels[i].isa);
        on[i] = kernels[i].supported() && strstr(name, filter);
        if (on[i]) {
            static const long cols[] = { 64, 192, 256, 896, 1536, 2048 };
            for (size_t c = 0; c < sizeof cols / sizeof cols[0]; c++) {
                bad += check(&kernels[i], 32, cols[c]);
            }
        }
        fprintf(stderr, "%-24s %s\n", name, on[i] ? "checked" : "not run here");
    }
    if (bad) {
        fprintf(stderr, "bakeoff: %d wrong sums\n", bad);
        return 1;
    }
    if (budget == 0) {
        return 0;
    }

    size_t bytes = 256u << 20;
    for (int p = 0; p < PLACES; p++) {
        for (int i = 0; i < KERNELS; i++) {
            if (on[i]) {
                bytes = (size_t) fmax((double) bytes, total_of(&places[p], bake_find_layout(kernels[i].layout)).bytes);
            }
        }
    }
    uint8_t * weights = alloc(bytes + SLACK);
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        const uint64_t v = (uint64_t) rnd() << 32 | rnd();
        memcpy(weights + i, &v, 8);
    }
    int8_t q[MAX_COLS];
    float d[MAX_COLS / 32];
    for (int i = 0; i < MAX_COLS; i++) {
        q[i] = (int8_t) (rnd() % 255 - 127);
        d[i / 32] = 0.01f;
    }
    struct acts acts[KERNELS];
    for (int i = 0; i < KERNELS; i++) {
        acts[i] = new_acts();
        prepare(&acts[i], &kernels[i], q, d, MAX_COLS);
    }
    float * outs[256];
    for (int i = 0; i < max_threads; i++) {
        outs[i] = alloc(151936 * sizeof(float));
    }

    puts("candidate,isa,bits_per_weight,where,threads,Gweights_per_s,GB_per_s");
    for (int step = 0; step < 2 * PLACES; step++) {
        const struct place * p = &places[step / 2];
        const int threads = step % 2 ? max_threads : 1;
        const bool in_cache = step < 2;
        if (step % 2 && (in_cache || max_threads == 1)) {
            continue;
        }
        double best[KERNELS + 1]; /* the probe last */
        for (int i = 0; i <= KERNELS; i++) {
            best[i] = 1e30;
        }
        const double end = now() + budget * KERNELS;
        do {
            for (int i = 0; i <= KERNELS; i++) {
                const bool probe = i == KERNELS;
                if (probe ? strcmp(p->name, "memory") != 0
                          : !on[i] || (!in_cache && strcmp(kernels[i].isa, "scalar") == 0)) {
                    continue;
                }
                struct job j = { .kernel = probe ? NULL : &kernels[i],
                                 .layout = probe ? NULL : bake_find_layout(kernels[i].layout),
                                 .place = p,
                                 .acts = probe ? NULL : &acts[i].a,
                                 .weights = weights,
                                 .bytes = 256u << 20,
                                 .passes = in_cache ? 16 : 1,
                                 .threads = threads };
                best[i] = fmin(best[i], timed(&j, outs));
            }
        } while (now() < end);
        for (int i = 0; i < KERNELS; i++) {
            if (best[i] < 1e30) {
                const struct total t = total_of(p, bake_find_layout(kernels[i].layout));
                printf("%s,%s,%.3f,%s,%d,%.2f,%.2f\n", kernels[i].layout, kernels[i].isa, 8 * t.bytes / t.weights,
                       p->name, threads, t.weights / best[i] * 1e-9, t.bytes / best[i] * 1e-9);
            }
        }
        if (best[KERNELS] < 1e30) {
            printf("probe,,,read,%d,,%.2f\n", threads, (256u << 20) / best[KERNELS] * 1e-9);
        }
        fflush(stdout);
    }
    for (int i = 0; i < KERNELS; i++) {
        void * all[] = { acts[i].q, acts[i].bias, acts[i].bias16, acts[i].d, acts[i].q8_0 };
        for (size_t m = 0; m < sizeof all / sizeof all[0]; m++) {
            free(all[m]);
        }
    }
    for (int i = 0; i < max_threads; i++) {
        free(outs[i]);
    }
    free(weights);
    return 0;
}
