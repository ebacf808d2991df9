/* Sorted magnitudes and sums over them: see quantize/planes.h. */
#include "quantize/planes.h"

#include "quantize/quantize.h"

#include <math.h>
#include <string.h>

enum { QK = PTQTP_QK_TP2_0, LANES = PTQTP_SORT_LANES };

static inline void exchange(float * restrict a, float * restrict b, int n) {
    for (int i = 0; i < n; i++) {
        const float u = a[i], v = b[i];
        a[i] = u < v ? u : v;
        b[i] = u < v ? v : u;
    }
}

/* Batcher's odd-even merge sort of eight groups, a lane each: no branch depends on a weight. */
PTQTP_CLONES
static void sort_lanes(float (*a)[LANES]) {
    for (int p = 1; p < QK; p *= 2) {
        for (int k = p; k >= 1; k /= 2) {
            for (int j = k % p; j + k < QK; j += 2 * k) {
                if ((j + k) % (2 * p)) { /* both within one run of 2p */
                    if (k == 1) {
                        exchange(a[j], a[j + 1], LANES);
                    } else {
                        exchange(a[j], a[j + k], k * LANES);
                    }
                }
            }
        }
    }
}

void ptqtp_sort_groups(const float * x, int ngroups, struct ptqtp_sorted * out) {
    float a[QK][LANES];
    uint32_t bits[LANES] = { 0 };
    for (int l = 0; l < LANES; l++) {
        const float * w = x + (l < ngroups ? l : 0) * QK;
        for (int i = 0; i < QK; i++) {
            uint32_t b;
            memcpy(&b, w + i, sizeof b);
            bits[l] |= b;
            a[i][l] = fabsf(w[i]);
        }
    }
    sort_lanes(a);
    for (int l = 0; l < ngroups; l++) {
        struct ptqtp_sorted * g = &out[l];
        double sum = 0, least = 0;
        g->a[0] = -INFINITY;
        g->a[QK + 1] = INFINITY;
        g->sum[0] = 0;
        for (int i = 0; i < QK; i++) {
            const double v = a[i][l];
            least = least == 0 ? v : least;
            g->a[i + 1] = v;
            g->sum[i + 1] = sum += v;
        }
        /* Every weight is a multiple of 2^zeros times the last place of the least one, more than least * 2^-24, and no
         * sum exceeds 128 times the largest: exact in 53 bits if 128 * top <= 2^53 * 2^(zeros - 24) * least. */
        int zeros = 0;
        while (zeros < 23 && !(bits[l] >> zeros & 1)) {
            zeros++;
        }
        g->usable = a[QK - 1][l] >= 0x1p-40f && (double) a[QK - 1][l] <= ldexp(least, 22 + zeros);
    }
}

/* How many magnitudes are <= m, or -1 where one lies within slack of m. */
static inline int place(const struct ptqtp_sorted * g, double m, double slack) {
    const double * a = g->a + 1;
    int n = 0;
    for (int step = QK / 2; step; step /= 2) {
        n += a[n + step - 1] <= m ? step : 0;
    }
    n += a[n] <= m;
    return a[n - 1] < m - slack && a[n] > m + slack ? n : -1;
}

/* Largest float <= m, so that comparing floats with it is comparing them with m. */
static inline float float_below(double m) {
    const float f = (float) m;
    return (double) f > m ? nextafterf(f, 0) : f;
}

bool ptqtp_sums_at(const struct ptqtp_sorted * g, double a1, double a2, double plus, double minus, double slack,
                   struct ptqtp_sums * sums, struct ptqtp_cuts * cuts) {
    const double m1 = fabs(a1), m2 = fabs(a2);
    const bool swapped = m2 > m1;
    const double big = swapped ? m2 : m1, small = swapped ? m1 : m2;
    /* levels: 0, then small (0, 1) and minus (1, -1) in their order, big (1, 0), plus (1, 1) */
    const bool minus_first = minus < small;
    const double low = minus_first ? minus : small, high = minus_first ? small : minus;
    const double gap[4] = { low, high - low, big - high, plus - big };
    const double near = 0x1p-18 * (g->a[QK] + plus);
    if (!g->usable || !(gap[0] > near && gap[1] > near && gap[2] > near && gap[3] > near)) {
        return false;
    }
    const double middle[4] = { 0.5 * low, 0.5 * (low + high), 0.5 * (high + big), 0.5 * (big + plus) };
    const int p0 = place(g, middle[0], slack * gap[0]), p1 = place(g, middle[1], slack * gap[1]);
    const int p2 = place(g, middle[2], slack * gap[2]), p3 = place(g, middle[3], slack * gap[3]);
    if ((p0 | p1 | p2 | p3) < 0) {
        return false;
    }
    const double n_low = p1 - p0, n_high = p2 - p1, n_plus = QK - p3;
    const double w_low = g->sum[p1] - g->sum[p0], w_high = g->sum[p2] - g->sum[p1];
    const double w_plus = g->sum[QK] - g->sum[p3], w_outer = g->sum[QK] - g->sum[p2];
    const double n_minus = minus_first ? n_low : n_high, n_small = minus_first ? n_high : n_low;
    const double w_minus = minus_first ? w_low : w_high, w_small = minus_first ? w_high : w_low;
    const double nb = n_minus + (QK - p2), ns = n_small + n_minus + n_plus;
    const double wb = w_minus + w_outer, ws = w_small - w_minus + w_plus;
    const double sign1 = a1 < 0 ? -1 : 1, sign2 = a2 < 0 ? -1 : 1;
    sums->s11 = swapped ? ns : nb;
    sums->s22 = swapped ? nb : ns;
    /* + 0: no -0, which sums that begin at 0 never are */
    sums->s12 = sign1 * sign2 * (n_plus - n_minus) + 0.0;
    sums->b1 = sign1 * (swapped ? ws : wb) + 0.0;
    sums->b2 = sign2 * (swapped ? wb : ws) + 0.0;
    if (cuts) {
        const int step1 = a1 < 0 ? -3 : 3, step2 = a2 < 0 ? -1 : 1;
        const int big_step = swapped ? step2 : step1, small_step = swapped ? step1 : step2;
        for (int k = 0; k < 4; k++) {
            cuts->cut[k] = float_below(middle[k]);
        }
        cuts->step[0] = 0;
        cuts->step[minus_first ? 1 : 2] = big_step - small_step;
        cuts->step[minus_first ? 2 : 1] = small_step;
        cuts->step[3] = big_step;
        cuts->step[4] = big_step + small_step;
    }
    return true;
}

PTQTP_CLONES
static void cut_digits(const float * x, const struct ptqtp_cuts * cuts, uint8_t * digits) {
    const float c0 = cuts->cut[0], c1 = cuts->cut[1], c2 = cuts->cut[2], c3 = cuts->cut[3];
    const int32_t d0 = cuts->step[1], d1 = cuts->step[2] - d0, d2 = cuts->step[3] - cuts->step[2];
    const int32_t d3 = cuts->step[4] - cuts->step[3];
    int32_t digit[QK];
    for (int i = 0; i < QK; i++) {
        const float a = fabsf(x[i]);
        const int32_t step = (a > c0 ? d0 : 0) + (a > c1 ? d1 : 0) + (a > c2 ? d2 : 0) + (a > c3 ? d3 : 0);
        digit[i] = x[i] < 0 ? 4 - step : 4 + step;
    }
    for (int i = 0; i < QK; i++) {
        digits[i] = (uint8_t) digit[i];
    }
}

void ptqtp_cut_digits(const float * x, const struct ptqtp_cuts * cuts, uint8_t * digits) {
    cut_digits(x, cuts, digits);
}
