/* The sums that least squares of two planes needs, from sorted magnitudes instead of from every weight. Private.
 *
 * For scales a1, a2 the nearest pair of a weight w depends on which of five levels 0 < .. < |a1| + |a2| is nearest to
 * |w|, so with magnitudes sorted and summed up once, an iteration needs four places in the order and nothing else.
 * The result is that of the loops over all weights to the last bit, because it is used only where it must be:
 *   - all sums are exact in float64: the weights' bits span few enough places (usable);
 *   - no weight is so near to the middle between two levels, and no two levels so near to one another, that rounding or
 *     the order of trying could decide (ptqtp_sums_at says no). */
#ifndef PTQTP_QUANTIZE_PLANES_H
#define PTQTP_QUANTIZE_PLANES_H

#include "ptqtp.h"

enum { PTQTP_SORT_LANES = 8 }; /* groups sorted at once */

struct ptqtp_sums {
    double s11, s22, s12, b1, b2; /* t1.t1, t2.t2, t1.t2, t1.w, t2.w */
};

struct ptqtp_sorted {
    double a[PTQTP_QK_TP2_0 + 2];   /* -Inf, the magnitudes in ascending order, Inf */
    double sum[PTQTP_QK_TP2_0 + 1]; /* of the first k magnitudes */
    bool usable;
};

/* x: ngroups <= PTQTP_SORT_LANES groups of 128 finite weights */
void ptqtp_sort_groups(const float * x, int ngroups, struct ptqtp_sorted * out);

/* The nearest pair of each weight: digit 4 + step of |w|, or 4 - step where w < 0; step is that of the number of cuts
 * below |w|. */
struct ptqtp_cuts {
    float cut[4];
    int32_t step[5];
};

/* The sums at scales a1, a2. plus, minus: |a1| + |a2| and ||a1| - |a2|| as the quantizer rounds them. slack: how near
 * to the middle of two levels rounding can decide, as a part of their distance. cuts: NULL if not wanted. */
bool ptqtp_sums_at(const struct ptqtp_sorted * g, double a1, double a2, double plus, double minus, double slack,
                   struct ptqtp_sums * sums, struct ptqtp_cuts * cuts);

/* digits of 128 weights */
void ptqtp_cut_digits(const float * x, const struct ptqtp_cuts * cuts, uint8_t * digits);

#endif
