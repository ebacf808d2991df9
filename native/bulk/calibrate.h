/* The inner loops of calibrated quantization, between the checks (host/calibrate.cpp) and the builds for each
 * instruction set (bulk/calibrate.inc). Private. */
#ifndef PTQTP_BULK_CALIBRATE_H
#define PTQTP_BULK_CALIBRATE_H

#include "ptqtp.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PTQTP_CALIB_PANEL = 8 };

/* Of each group's own block of H, or of a factor of all: the upper U with inv(H) = U^T U. A column whose u_jj is not
 * > 0 has no say and feeds nothing back. */
struct ptqtp_calib_factor {
    const float * diag;       /* ncols: u_jj */
    const float * weight;     /* ncols: of a squared error, 1 / u_jj^2, or 0 */
    const float * importance; /* ncols: the same for the trellis' search: finite, a group's largest near 1 */
    const float * rows;       /* ncols x 32: [j][k] = row j, column k of j's group, from k = j on */
};

/* The upper triangle of a block on the diagonal, laid out in the order of its use. Group g has the columns from 32*g
 * on; column k belongs to group k/32. */
struct ptqtp_calib {
    int ncols;
    const float * diag;  /* ncols */
    const float * inner; /* ncols x 32: [k][i] = row i of k's group, column k */
    const float * outer; /* ncols/8 panels of ncols x 8: [p][j][k] = row j, column 8*p + k */
    struct ptqtp_calib_factor u;
};

/* Rows of one call, as they lie in the caller's memory. */
struct ptqtp_calib_rows {
    const float * x; /* weights, or E H */
    int64_t ldx;
    int8_t * levels;
    int64_t ldl;
    uint8_t * codes;
    int64_t ldc;
    float * moved; /* err, or delta */
    int64_t ldm;
};

static inline struct ptqtp_calib_rows ptqtp_calib_from(const struct ptqtp_calib_rows * rows, int64_t first) {
    struct ptqtp_calib_rows from = *rows;
    from.x += first * rows->ldx;
    from.levels += first * rows->ldl;
    from.codes += first * rows->ldc;
    from.moved += first * rows->ldm;
    return from;
}

/* m: of U, or, for the descent, of H, from which U of each group is made. buffer: PTQTP_CALIB_BUFFER(ncols) floats, in
 * which block then points. */
#define PTQTP_CALIB_BUFFER(ncols) ((ncols) * ((ncols) + 2 * PTQTP_UNIT + 4))
void ptqtp_calib_lay_out(bool descent, const float * m, int64_t ldm, int ncols, float * buffer,
                         struct ptqtp_calib * block);

#ifdef __cplusplus
}
#endif
#endif
