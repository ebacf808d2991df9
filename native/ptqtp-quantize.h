/* Pieces of the data-free quantizers that ptqtp-parallel.cpp spreads over threads. Private. */
#ifndef PTQTP_QUANTIZE_H
#define PTQTP_QUANTIZE_H

#include "ptqtp.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PTQTP_PAPER_MAX_ITERS 50

/* Type, method, lengths, and every value: finite, in reach, importance >= 0. */
int ptqtp_quantize_check(int type, int method, const float * x, const float * importance, int64_t nrows,
                         int64_t n_per_row);

/* `search` on checked rows. */
int ptqtp_search_rows(int type, const float * x, const float * importance, void * dst, int64_t nrows,
                      int64_t n_per_row);

/* `paper` stops the whole matrix at once, so it takes two passes: the first raises largest[t] to the largest change
 * of a scale pair in iteration t over these rows, the second runs every group for exactly `iters` iterations. */
void ptqtp_paper_probe(const float * x, int64_t nrows, int64_t n_per_row, double largest[PTQTP_PAPER_MAX_ITERS]);
int ptqtp_paper_iters(const double largest[PTQTP_PAPER_MAX_ITERS]);
int ptqtp_paper_rows(const float * x, void * dst, int64_t nrows, int64_t n_per_row, int iters);

#ifdef __cplusplus
}
#endif
#endif
