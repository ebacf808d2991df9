/* Speed of every kernel and quantizer on this machine, one thread.
 *
 *     ptqtp-bench [SECONDS]              time budget a row, default 0.5
 *     ptqtp-bench --read THREADS [SECONDS]   read bandwidth of memory instead, GB/s: 256 MB a thread, summed
 *     ptqtp-bench --sweep [SECONDS [TYPE]]   the chosen kernel over lengths of rows and numbers of columns
 *
 * Prints CSV: what, kernel or method, type, million weights a second (best of the runs within the budget; for gemm,
 * million multiply-adds). Timed: the calls only; data is made before.
 *     quantize   512 rows of 1024 Gaussian weights
 *     dot        256 rows of 4096 against one activation row, row by row (459 KB of weights: in L2 on most machines)
 *     gemv       the same, in panels; gemm: the same with 128 columns, activations in L2 or L3
 *     act        quantizing activations for gemv
 *     ...-wide   the same for wide panels
 */
#define _GNU_SOURCE
#include "ptqtp.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static volatile float sink;

/* ---- read bandwidth ---- */

enum { READ_BYTES = 1 << 28, MAX_THREADS = 256 };

struct reader {
    const void * data;
    uint64_t sum;
    pthread_t thread;
};

static void * read_all(void * arg) {
    struct reader * r = arg;
    r->sum = ptqtp_read_sum(r->data, READ_BYTES);
    return NULL;
}

static int read_bandwidth(int threads, double budget) {
    static struct reader readers[MAX_THREADS];
    if (threads < 1 || threads > MAX_THREADS || budget <= 0) {
        fputs("ptqtp-bench: THREADS is 1 to 256, SECONDS positive\n", stderr);
        return 1;
    }
    for (int t = 0; t < threads; t++) {
        void * data = aligned_alloc(64, READ_BYTES);
        if (!data) {
            fputs("ptqtp-bench: no memory\n", stderr);
            return 1;
        }
        memset(data, t + 1, READ_BYTES);
        readers[t].data = data;
    }
    double best = 1e30;
    const double end = now() + budget;
    do {
        const double start = now();
        for (int t = 0; t < threads; t++) {
            if (pthread_create(&readers[t].thread, NULL, read_all, &readers[t])) {
                fputs("ptqtp-bench: no thread\n", stderr);
                return 1;
            }
        }
        for (int t = 0; t < threads; t++) {
            pthread_join(readers[t].thread, NULL);
            sink = (float) readers[t].sum;
        }
        best = fmin(best, now() - start);
    } while (now() < end);
    printf("%.2f\n", READ_BYTES * 1e-9 * threads / best);
    return 0;
}

/* ---- rows short and long, columns few and many ---- */

static int sweep(double budget, int type) {
    static const int64_t lengths[] = { 32, 64, 128, 576, 896, 1536, 4864, 8960, 18944 };
    static const int columns[] = { 1, 2, 3, 4, 8, 16, 17, 64, 128 };
    enum { WEIGHTS = 1 << 21, MAX_COLS = 128 };
    const struct ptqtp_panel_kernel * k = ptqtp_panel_kernel_chosen();
    const struct ptqtp_type_traits * traits = ptqtp_traits(type);
    if (!k || budget <= 0 || !traits || !traits->panels) {
        fputs("ptqtp-bench: PTQTP_KERNEL names no kernel of this CPU, SECONDS is not positive, or TYPE has no panels\n",
              stderr);
        return 1;
    }
    printf("%s: millions of multiply-adds a second\nlength", ptqtp_panel_kernel_name(k));
    for (size_t c = 0; c < sizeof columns / sizeof columns[0]; c++) {
        printf(",%d", columns[c]);
    }
    putchar('\n');
    void * scratch = aligned_alloc(64, PTQTP_GEMM_SCRATCH);
    for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; l++) {
        const int64_t n = lengths[l], nrows = WEIGHTS / n / 16 * 16;
        const size_t size = ptqtp_panels_size(PTQTP_PACKED, nrows, n);
        uint8_t * panels = malloc(size);
        float * x = malloc((size_t) n * sizeof *x);
        ptqtp_act * acts = malloc((size_t) (n / 32) * sizeof *acts);
        void * one = malloc((size_t) (n / 32) * ptqtp_gemv_act_size(k, type, PTQTP_PACKED));
        float * y = malloc((size_t) nrows * MAX_COLS * sizeof *y);
        if (!panels || !x || !acts || !one || !y || !scratch) {
            fputs("ptqtp-bench: no memory\n", stderr);
            return 1;
        }
        for (size_t i = 0; i < size; i++) {
            panels[i] = (uint8_t) rand();
        }
        for (int64_t i = 0; i < n; i++) {
            x[i] = (float) rand() / (float) RAND_MAX - 0.5f;
        }
        ptqtp_gemv_quantize(k, type, PTQTP_PACKED, x, one, n);
        ptqtp_gemm_quantize(k, x, acts, n);
        const ptqtp_act * act_of[MAX_COLS];
        float * y_of[MAX_COLS];
        for (int c = 0; c < MAX_COLS; c++) {
            act_of[c] = acts;
            y_of[c] = y + c * nrows;
        }
        printf("%d", (int) n);
        for (size_t c = 0; c < sizeof columns / sizeof columns[0]; c++) {
            double best = 1e30;
            const double end = now() + budget;
            do {
                const double t = now();
                if (columns[c] == 1) {
                    ptqtp_gemv(k, type, PTQTP_PACKED, n, nrows, panels, 0, nrows / 16, one, y);
                } else {
                    ptqtp_gemm(k, type, PTQTP_PACKED, n, nrows, panels, 0, nrows / 16, columns[c], act_of, y_of,
                               scratch);
                }
                best = fmin(best, now() - t);
            } while (now() < end);
            printf(",%.0f", (double) (nrows * n) * columns[c] / best * 1e-6);
        }
        putchar('\n');
        free(panels);
        free(x);
        free(acts);
        free(one);
        free(y);
    }
    free(scratch);
    return 0;
}

int main(int argc, char ** argv) {
    if (argc > 1 && !strcmp(argv[1], "--sweep")) {
        return sweep(argc > 2 ? atof(argv[2]) : 0.1, argc > 3 ? atoi(argv[3]) : PTQTP_TP2_1);
    }
    if (argc > 2 && !strcmp(argv[1], "--read")) {
        return read_bandwidth(atoi(argv[2]), argc > 3 ? atof(argv[3]) : 2.0);
    }
    const double budget = argc > 1 ? atof(argv[1]) : 0.5;
    enum { COLS = 4096, ROWS = 256, N = COLS * ROWS };
    float * x = malloc(N * sizeof *x);
    uint8_t * w = malloc(N / 32 * 14);
    ptqtp_block_q8_0 * y = malloc(COLS / 32 * sizeof *y);
    if (!x || !w || !y || budget <= 0) {
        fputs("ptqtp-bench: no memory, or SECONDS is not a positive number\n", stderr);
        return 1;
    }
    srand(1);
    for (int i = 0; i < N; i++) {
        x[i] = 0;
        for (int k = 0; k < 12; k++) { /* near enough to a Gaussian */
            x[i] += 0.02f * ((float) rand() / (float) RAND_MAX - 0.5f);
        }
    }
    for (int i = 0; i < COLS / 32; i++) {
        y[i].d = 0x2000;
        for (int k = 0; k < 32; k++) {
            y[i].qs[k] = (int8_t) (rand() % 255 - 127);
        }
    }
    puts("what,name,type,millions_per_s");
    int nmethods, ntypes;
    const struct ptqtp_method_traits * methods = ptqtp_method_table(&nmethods);
    const struct ptqtp_type_traits * types = ptqtp_type_table(&ntypes);
    for (int q = 0; q < nmethods * ntypes; q++) {
        const struct ptqtp_method_traits * m = &methods[q / ntypes];
        const int type = types[q % ntypes].type;
        if (!ptqtp_method_makes(m->method, type)) {
            continue;
        }
        double best = 1e30;
        const double end = now() + budget;
        do {
            const double t = now();
            ptqtp_quantize_rows(type, m->method, x, NULL, w, 512, 1024);
            best = fmin(best, now() - t);
        } while (now() < end);
        printf("quantize,%s,%d,%.1f\n", m->name, type, 512 * 1024 / best * 1e-6);
    }
    int count;
    const struct ptqtp_kernel * k = ptqtp_kernels(&count);
    for (int i = 0; i < count; i++) {
        if (!k[i].supported()) {
            continue;
        }
        ptqtp_quantize_rows(k[i].type, PTQTP_SEARCH, x, NULL, w, ROWS, COLS);
        const size_t row = COLS / (size_t) ptqtp_block_size(k[i].type) * ptqtp_type_size(k[i].type);
        double best = 1e30;
        const double end = now() + budget;
        do {
            const double t = now();
            float sum = 0;
            for (int r = 0; r < ROWS; r++) {
                sum += k[i].dot(COLS, w + (size_t) r * row, y);
            }
            sink = sum;
            best = fmin(best, now() - t);
        } while (now() < end);
        printf("dot,%s,%d,%.1f\n", k[i].name, k[i].type, N / best * 1e-6);
    }
    enum { NCOLS = 128 };
    uint8_t * panels = malloc(ptqtp_panels_size(PTQTP_WIDE, ROWS, COLS));
    ptqtp_act * acts = malloc(NCOLS * (COLS / 32) * sizeof *acts);
    void * one = malloc(COLS / 32 * 128);
    float * out = malloc(NCOLS * ROWS * sizeof *out);
    void * scratch = aligned_alloc(64, PTQTP_GEMM_SCRATCH);
    if (!panels || !acts || !one || !out || !scratch) {
        fputs("ptqtp-bench: no memory\n", stderr);
        return 1;
    }
    const struct ptqtp_panel_kernel * const * panel = ptqtp_panel_kernels(&count);
    for (int i = 0; i < count; i++) {
        if (!ptqtp_panel_kernel_supported(panel[i])) {
            continue;
        }
        const char * name = ptqtp_panel_kernel_name(panel[i]);
        const ptqtp_act * act_of[NCOLS];
        float * out_of[NCOLS];
        for (int c = 0; c < NCOLS; c++) {
            act_of[c] = acts + c * (COLS / 32);
            out_of[c] = out + c * ROWS;
            ptqtp_gemm_quantize(panel[i], x + c * COLS, acts + c * (COLS / 32), COLS);
        }
        for (int of = 0; of < 3; of++) { /* wide panels are alike */
            const int type = of == 2 ? PTQTP_TP2_2 : PTQTP_TP2_1, form = of == 1 ? PTQTP_WIDE : PTQTP_PACKED;
            ptqtp_quantize_rows(type, PTQTP_SEARCH, x, NULL, w, ROWS, COLS);
            ptqtp_panels_from_rows(type, form, w, panels, 0, ROWS, COLS);
            ptqtp_gemv_quantize(panel[i], type, form, x, one, COLS);
            for (int what = 0; what < 3; what++) {
                double best = 1e30;
                const double end = now() + budget;
                do {
                    const double t = now();
                    if (what == 0) {
                        ptqtp_gemv(panel[i], type, form, COLS, ROWS, panels, 0, ROWS / PTQTP_PANEL_ROWS, one, out);
                    } else if (what == 1) {
                        ptqtp_gemm(panel[i], type, form, COLS, ROWS, panels, 0, ROWS / PTQTP_PANEL_ROWS, NCOLS, act_of,
                                   out_of, scratch);
                    } else {
                        for (int c = 0; c < NCOLS; c++) {
                            ptqtp_gemv_quantize(panel[i], type, form, x + c * COLS, one, COLS);
                        }
                    }
                    best = fmin(best, now() - t);
                } while (now() < end);
                const char * const names[] = { "gemv", "gemm", "act" };
                const double work = what == 0 ? N : what == 1 ? (double) N * NCOLS : COLS * NCOLS;
                printf("%s%s,%s,%d,%.1f\n", names[what], form == PTQTP_WIDE ? "-wide" : "", name, type,
                       work / best * 1e-6);
            }
        }
    }
    free(panels);
    free(acts);
    free(one);
    free(out);
    free(scratch);
    free(x);
    free(w);
    free(y);
    return 0;
}
