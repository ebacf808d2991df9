/* Speed of the quantizers and of a converter's loops, one thread, for every instruction set that this CPU runs.
 *
 *     ptqtp-bench-quantize [SECONDS]     time budget a row, default 0.3
 *
 * Prints CSV: what, instruction set, type, million weights a second of CPU time (best of the runs within the budget).
 * Timed: the calls only. 512 rows of 1024 Gaussian weights. `rows`: ptqtp_quantize_rows, what ggml calls. gptq-N, cd-N:
 * the inner loops of calibrated quantization on blocks of 128 columns, window N. */
#define _GNU_SOURCE
#include "quantize/quantize.h"
#include "bulk/bulk.h"
#include "bulk/calibrate.h"
#include "codec/check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { COLS = 1024, ROWS = 512, N = COLS * ROWS, BLOCK = 128, BLOCK_ROWS = N / BLOCK };

static float *x, *r;
static uint8_t * out;
static float importance[COLS];
static int8_t levels[N];
static uint8_t codes[N / 32];
static struct ptqtp_calib second_moment, factor;
static volatile uint64_t sink;
static const struct ptqtp_bulk * bulk;

static double now(void) { /* CPU time: other processes do not count */
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static void search_2_1(void) {
    bulk->search_tp2_1(x, NULL, COLS / 32, out, NULL, N / 32);
}

static void search_2_1_importance(void) {
    bulk->search_tp2_1(x, importance, COLS / 32, out, NULL, N / 32);
}

static void hash(void) {
    sink = bulk->hash(x, N, 0);
}

static void compare(void) {
    double e[PTQTP_ERROR_LANES] = { 0 }, p[PTQTP_ERROR_LANES] = { 0 };
    bulk->compare(x, r, N, e, p);
}

static void check(void) {
    uint64_t sum = 0;
    ptqtp_check_piece(PTQTP_TP2_1, out, N / 32, 0, bulk->hash, &sum);
    sink = sum;
}

static void scan(void) {
    struct ptqtp_scan_result result;
    bulk->scan(x, N, 32, 1e-4f, &result);
}

static void to_q8_0(void) {
    bulk->to_q8_0(x, (ptqtp_block_q8_0 *) (void *) r, N);
}

static void to_f16(void) {
    bulk->to_f16(x, (uint16_t *) (void *) r, N);
}

static void from_f16(void) {
    bulk->from_f16((const uint16_t *) (const void *) r, x + N, N);
}

static void from_bf16(void) {
    bulk->from_bf16((const uint16_t *) (const void *) r, x + N, N);
}

static void rows_2_1(void) {
    ptqtp_quantize_rows(PTQTP_TP2_1, PTQTP_SEARCH, x, NULL, out, ROWS, COLS);
}

static void rows_2_0(void) {
    ptqtp_quantize_rows(PTQTP_TP2_0, PTQTP_SEARCH, x, NULL, out, ROWS / 8, COLS);
}

static void rows_2_0_importance(void) {
    ptqtp_quantize_rows(PTQTP_TP2_0, PTQTP_SEARCH, x, importance, out, ROWS / 8, COLS);
}

static void paper(void) {
    ptqtp_quantize_rows(PTQTP_TP2_0, PTQTP_PAPER, x, NULL, out, ROWS / 8, COLS);
}

/* Correlated inputs: 0.9^|i-j|. The factor of its inverse has 1/d on the diagonal and -0.9/d above it, d the root of
 * 1 - 0.9^2, but for the last row. */
static void lay_out_blocks(void) {
    static float h[BLOCK * BLOCK], u[BLOCK * BLOCK], buffers[2][PTQTP_CALIB_BUFFER(BLOCK)];
    const float d = sqrtf(1 - 0.9f * 0.9f);
    for (int j = 0; j < BLOCK; j++) {
        for (int k = j; k < BLOCK; k++) {
            h[j * BLOCK + k] = powf(0.9f, (float) (k - j));
            u[j * BLOCK + k] = k == j ? 1 / d : k == j + 1 ? -0.9f / d : 0;
        }
    }
    u[BLOCK * BLOCK - 1] = 1;
    ptqtp_calib_lay_out(true, h, BLOCK, BLOCK, buffers[0], &second_moment);
    ptqtp_calib_lay_out(false, u, BLOCK, BLOCK, buffers[1], &factor);
}

static void gptq(int type, int window) {
    const struct ptqtp_calib_rows rows = { x, BLOCK, levels, BLOCK, codes, BLOCK / 32, r, BLOCK };
    bulk->gptq(type, &factor, &rows, BLOCK_ROWS, window);
}

static void cd(int type, int window) { /* from levels that fit badly, so that most of them change */
    const struct ptqtp_calib_rows rows = { x, BLOCK, levels, BLOCK, codes, BLOCK / 32, r, BLOCK };
    memset(levels, 0, N);
    memset(codes, 150, N / 32);
    bulk->cd(type, &second_moment, &rows, BLOCK_ROWS, window);
}

static void gptq_2_1_0(void) {
    gptq(PTQTP_TP2_1, 0);
}

static void gptq_2_1_2(void) {
    gptq(PTQTP_TP2_1, 2);
}

static void gptq_2_2_0(void) {
    gptq(PTQTP_TP2_2, 0);
}

static void gptq_2_2_1(void) {
    gptq(PTQTP_TP2_2, 1);
}

static void cd_2_1_0(void) {
    cd(PTQTP_TP2_1, 0);
}

static void cd_2_1_2(void) {
    cd(PTQTP_TP2_1, 2);
}

static void cd_2_2_0(void) {
    cd(PTQTP_TP2_2, 0);
}

static void cd_2_2_1(void) {
    cd(PTQTP_TP2_2, 1);
}

static void measure(const char * what, int type, void (*run)(void), double weights, double budget) {
    double best = 1e30;
    const double end = now() + budget;
    do {
        const double t = now();
        run();
        best = fmin(best, now() - t);
    } while (now() < end);
    printf("%s,%s,%d,%.1f\n", what, bulk->name, type, weights / best * 1e-6);
}

int main(int argc, char ** argv) {
    const double budget = argc > 1 ? atof(argv[1]) : 0.3;
    x = malloc(2 * N * sizeof *x);
    r = malloc(N * sizeof *r);
    out = malloc(N / 32 * sizeof(block_tp2_1));
    if (!x || !r || !out || budget <= 0) {
        fputs("ptqtp-bench-quantize: no memory, or SECONDS is not a positive number\n", stderr);
        return 1;
    }
    srand(1);
    for (int i = 0; i < N; i++) {
        const double u = (rand() + 1.0) / (RAND_MAX + 2.0), v = rand() / (RAND_MAX + 1.0);
        x[i] = r[i] = (float) (0.02 * sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
        importance[i % COLS] = (float) v;
    }
    ptqtp_check_init();
    lay_out_blocks();
    puts("what,name,type,millions_per_s");
    int count;
    const struct ptqtp_bulk * const * all = ptqtp_bulk_all(&count);
    for (int i = 0; i < count; i++) {
        bulk = all[i];
        measure("search", PTQTP_TP2_1, search_2_1, N, budget);
        measure("search-importance", PTQTP_TP2_1, search_2_1_importance, N, budget);
        measure("gptq-0", PTQTP_TP2_1, gptq_2_1_0, N, budget);
        measure("gptq-2", PTQTP_TP2_1, gptq_2_1_2, N, budget);
        measure("gptq-0", PTQTP_TP2_2, gptq_2_2_0, N, budget);
        measure("gptq-1", PTQTP_TP2_2, gptq_2_2_1, N, budget);
        measure("cd-0", PTQTP_TP2_1, cd_2_1_0, N, budget);
        measure("cd-2", PTQTP_TP2_1, cd_2_1_2, N, budget);
        measure("cd-0", PTQTP_TP2_2, cd_2_2_0, N, budget);
        measure("cd-1", PTQTP_TP2_2, cd_2_2_1, N, budget);
        measure("check", PTQTP_TP2_1, check, N, budget);
        measure("compare", 0, compare, N, budget);
        measure("hash", 0, hash, N, budget);
        measure("scan", 0, scan, N, budget);
        measure("to_f16", 1, to_f16, N, budget);
        measure("from_f16", 1, from_f16, N, budget);
        measure("from_bf16", 30, from_bf16, N, budget);
        measure("to_q8_0", 8, to_q8_0, N, budget);
    }
    measure("rows", PTQTP_TP2_1, rows_2_1, N, budget);
    measure("rows", PTQTP_TP2_0, rows_2_0, N / 8, budget);
    measure("rows-importance", PTQTP_TP2_0, rows_2_0_importance, N / 8, budget);
    measure("rows-paper", PTQTP_TP2_0, paper, N / 8, budget);
    free(x);
    free(r);
    free(out);
    return 0;
}
