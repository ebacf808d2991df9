/* The data-free quantizers, as quantize/methods.c lists them. Private. */
#ifndef PTQTP_QUANTIZE_H
#define PTQTP_QUANTIZE_H

#include "quantize/methods.h"

/* One copy of the hot loops for AVX2 next to the baseline's, picked at load time. Not with sanitizers: they are not
 * ready yet when the picking runs. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) &&                           \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(PTQTP_NO_CLONES)
#    define PTQTP_CLONES __attribute__((target_clones("avx2", "default")))
#else
#    define PTQTP_CLONES
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { PTQTP_PAPER_MAX_ITERS = PTQTP_SEEN };

/* Scale codes that `search` tries for TP2_1: from the code of max|w|/5 - BELOW to + ABOVE, and three more at max|w|/2
 * and at max|w| each. */
enum { PTQTP_BELOW = 12, PTQTP_ABOVE = 13, PTQTP_CANDIDATES = PTQTP_BELOW + PTQTP_ABOVE + 1 + 3 + 3 };

/* `search`; settled is not looked at. */
int ptqtp_search_rows_tp2_0(const float * x, const float * importance, void * dst, float * values, int64_t nrows,
                            int64_t n_per_row, int settled);
int ptqtp_search_rows_tp2_1(const float * x, const float * importance, void * dst, float * values, int64_t nrows,
                            int64_t n_per_row, int settled);
int ptqtp_search_rows_tp2_2(const float * x, const float * importance, void * dst, float * values, int64_t nrows,
                            int64_t n_per_row, int settled);

/* `paper` stops the whole matrix at once, so it takes two passes: the first raises largest[t] to the largest change
 * of a scale pair in iteration t over these rows, the second runs every group for exactly `iters` iterations. The
 * importance is NULL. */
void ptqtp_paper_probe(const float * x, int64_t nrows, int64_t n_per_row, double largest[PTQTP_SEEN]);
int ptqtp_paper_iters(const double largest[PTQTP_SEEN]);
int ptqtp_paper_rows(const float * x, const float * importance, void * dst, float * values, int64_t nrows,
                     int64_t n_per_row, int iters);

#ifdef __cplusplus
}
#endif
#endif
