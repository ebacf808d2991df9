/* How a method makes a type, in the pieces that host/parallel.cpp spreads over threads. Private. */
#ifndef PTQTP_QUANTIZE_METHODS_H
#define PTQTP_QUANTIZE_METHODS_H

#include "ptqtp.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PTQTP_SEEN = 50 }; /* what a first pass finds out */

struct ptqtp_maker {
    int method, type;
    /* Checked rows to blocks. values: where the reconstruction of every weight goes, or NULL. settled: what the first
     * pass came to, or 0. Returns a status. */
    int (*rows)(const float * x, const float * importance, void * dst, float * values, int64_t nrows, int64_t n_per_row,
                int settled);
    /* A method that looks at the whole matrix makes two passes. The first raises seen to the largest values of these
     * rows, the other makes one number of the largest of all rows. NULL where a row stands for itself. */
    void (*probe)(const float * x, int64_t nrows, int64_t n_per_row, double seen[PTQTP_SEEN]);
    int (*settle)(const double seen[PTQTP_SEEN]);
};

const struct ptqtp_maker * ptqtp_maker_of(int method, int type); /* NULL if the method does not make the type */

/* Type, method, lengths, and every value: finite, in reach, importance >= 0. */
int ptqtp_quantize_check(int type, int method, const float * x, const float * importance, int64_t nrows,
                         int64_t n_per_row);

#ifdef __cplusplus
}
#endif
#endif
