/* Speed of every kernel and quantizer on this machine, one thread.
 *
 *     ptqtp-bench [SECONDS]      time budget a row, default 0.5
 *
 * Prints CSV: what, type, name, weights, million weights a second (best of the runs within the budget).
 * Dot products: rows of 4096 against one activation row, 256 rows (458 KB of weights: in L2 on most machines).
 * Quantizers: 512 rows of 1024 Gaussian weights. Timed: the calls only; data is made before.
 */
#define _GNU_SOURCE
#include "ptqtp.h"

#include <math.h>
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

int main(int argc, char ** argv) {
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
    puts("what,type,name,weights,Mweights_per_s");
    const struct {
        const char * name;
        int type, method;
    } quantizers[] = { { "search", PTQTP_TP2_1, PTQTP_SEARCH },
                       { "search", PTQTP_TP2_0, PTQTP_SEARCH },
                       { "paper", PTQTP_TP2_0, PTQTP_PAPER } };
    for (int q = 0; q < 3; q++) {
        double best = 1e30;
        const double end = now() + budget;
        do {
            const double t = now();
            ptqtp_quantize_rows(quantizers[q].type, quantizers[q].method, x, NULL, w, 512, 1024);
            best = fmin(best, now() - t);
        } while (now() < end);
        printf("quantize,%d,%s,%d,%.1f\n", quantizers[q].type, quantizers[q].name, 512 * 1024,
               512 * 1024 / best * 1e-6);
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
        printf("dot,%d,%s,%d,%.1f\n", k[i].type, k[i].name, N, N / best * 1e-6);
    }
    free(x);
    free(w);
    free(y);
    return 0;
}
