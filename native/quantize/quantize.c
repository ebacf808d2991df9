/* The quantizers that need no calibration: `paper` (PTQTP as published) and `search`.
 *
 * The Python package holds the readable reference (ptqtp_gguf/quantize/); this is the same arithmetic in the same
 * order, so the bytes are equal. Two rules keep it so: no fused multiply-add (-ffp-contract=off), and every sum over
 * a group runs in eight lanes, lane l adding elements l, l+8, l+16, ..., joined at the end by halves. The lanes are
 * also what lets the compiler vectorise the sums.
 */
#include "quantize/quantize.h"

#include "codec/unit.h"
#include "quantize/planes.h"

#include <float.h>
#include <math.h>

enum { LANES = 8 };

static inline float join_f(const float acc[LANES]) {
    const float a = acc[0] + acc[4], b = acc[1] + acc[5], c = acc[2] + acc[6], d = acc[3] + acc[7];
    return (a + c) + (b + d);
}

static inline double join_d(const double acc[LANES]) {
    const double a = acc[0] + acc[4], b = acc[1] + acc[5], c = acc[2] + acc[6], d = acc[3] + acc[7];
    return (a + c) + (b + d);
}

/* ---- search, TP2_1 ----
 * The scale is one of 256 codes, so instead of refitting it, try the codes: those around max|w|/5 (the largest weight
 * on the outer level; the optimum lies -9..+13 codes from it on Gaussian, Laplace and Student-t data), and those next
 * to max|w|/2 and max|w|, which make weights that are exact on the inner levels exact.
 * What is smallest is the sum of h * error^2: h is the importance, and without one 2 mean|w| + |w|. */

/* The h of a group without an importance. */
static void own_weights(const float * x, float * h) {
    float acc[LANES];
    for (int l = 0; l < LANES; l++) {
        acc[l] = fabsf(x[l]) + fabsf(x[l + 8]) + fabsf(x[l + 16]) + fabsf(x[l + 24]);
    }
    const float twice = join_f(acc) * (2.0f / PTQTP_QK_TP2_1);
    for (int i = 0; i < PTQTP_QK_TP2_1; i++) {
        h[i] = twice + fabsf(x[i]);
    }
}

static int add_codes(uint8_t * codes, int n, int from, int to) {
    for (int c = from; c <= to; c++) {
        codes[n++] = (uint8_t) (c < 0 ? 0 : c > 255 ? 255 : c);
    }
    return n;
}

static inline float nearer(float best, float e) {
    const float d = fabsf(e);
    return d < best ? d : best;
}

/* Weighted squared error of magnitudes a at scale s: s times a level is exact, and rounding keeps order, so the
 * smallest of the five distances is the distance to the nearest level. Inlined into every clone of its caller. */
__attribute__((always_inline)) static inline float error_tp2_1(const float * a, float s, const float * h) {
    const float s2 = 2 * s, s3 = 3 * s, s5 = 5 * s;
    float e2[PTQTP_QK_TP2_1], acc[LANES];
    for (int i = 0; i < PTQTP_QK_TP2_1; i++) {
        const float e = nearer(nearer(nearer(nearer(a[i], a[i] - s), a[i] - s2), a[i] - s3), a[i] - s5);
        e2[i] = e * e * h[i];
    }
    for (int l = 0; l < LANES; l++) {
        acc[l] = e2[l] + e2[l + 8] + e2[l + 16] + e2[l + 24];
    }
    return join_f(acc);
}

PTQTP_CLONES
static void search_tp2_1(const float * x, const float * h, block_tp2_1 * dst, float * values) {
    enum { QK = PTQTP_QK_TP2_1 };
    float a[QK], top = 0;
    for (int i = 0; i < QK; i++) {
        a[i] = fabsf(x[i]);
        top = a[i] > top ? a[i] : top;
    }
    uint8_t codes[PTQTP_CANDIDATES];
    const int c5 = ptqtp_scale_from_float(top / 5), c2 = ptqtp_scale_from_float(top / 2);
    const int c1 = ptqtp_scale_from_float(top);
    int n = add_codes(codes, 0, c5 - PTQTP_BELOW, c5 + PTQTP_ABOVE);
    n = add_codes(codes, n, c2 - 1, c2 + 1);
    n = add_codes(codes, n, c1 - 1, c1 + 1);

    float best = FLT_MAX;
    uint8_t code = 0;
    for (int c = 0; c < n; c++) {
        const float s = ptqtp_scale_value(codes[c]);
        const float err = error_tp2_1(a, s, h);
        if (err < best) {
            best = err;
            code = codes[c];
        }
    }
    static const uint8_t digit_of[11] = { 0, 0, 1, 3, 2, 4, 6, 5, 7, 8, 8 }; /* by level + 5; -4 and 4 never occur */
    const float s = ptqtp_scale_value(code);
    uint8_t digits[QK];
    for (int i = 0; i < QK; i++) {
        const int level = (a[i] > 0.5f * s) + (a[i] > 1.5f * s) + (a[i] > 2.5f * s) + 2 * (a[i] > 4 * s);
        const int signed_level = x[i] < 0 ? -level : level;
        digits[i] = digit_of[5 + signed_level];
        if (values) {
            values[i] = s * (float) signed_level;
        }
    }
    ptqtp_unit_pack(digits, code, &dst->u);
}

/* ---- paper ----
 * Algorithm 1 of arXiv 2509.16989 on one group, in float64. The nine pairs are tried in lexicographic order and the
 * first smallest error wins: on the first step both scales are equal, and the order decides which optimum follows. */

enum { QK0 = PTQTP_QK_TP2_0 };

struct paper_state {
    double a1, a2, lambda;
    double t1[QK0], t2[QK0];
};

static void paper_init(const float * x, struct paper_state * st) {
    st->a1 = st->a2 = 1;
    st->lambda = 1e-8;
    for (int i = 0; i < QK0; i++) {
        st->t1[i] = st->t2[i] = x[i] < 0 ? -1 : 1;
    }
}

/* The sums at the planes of st. */
PTQTP_CLONES
static void paper_sums(const float * x, const struct paper_state * st, struct ptqtp_sums * sums) {
    double n11[LANES] = { 0 }, n22[LANES] = { 0 }, n12[LANES] = { 0 }, v1[LANES] = { 0 }, v2[LANES] = { 0 };
    for (int k = 0; k < QK0; k += LANES) {
        for (int l = 0; l < LANES; l++) {
            const double t1 = st->t1[k + l], t2 = st->t2[k + l], w = x[k + l];
            n11[l] += t1 * t1;
            n22[l] += t2 * t2;
            n12[l] += t1 * t2;
            v1[l] += t1 * w;
            v2[l] += t2 * w;
        }
    }
    *sums = (struct ptqtp_sums){ join_d(n11), join_d(n22), join_d(n12), join_d(v1), join_d(v2) };
}

/* The next scales of st. Returns the length of their change. */
static double paper_solve(const struct ptqtp_sums * sums, struct paper_state * st) {
    const double kappa_max = 1e12, lambda_max = 1;
    const double s12 = sums->s12, b1 = sums->b1, b2 = sums->b2;
    double a11, a22, det;
    for (;;) {
        a11 = sums->s11 + st->lambda;
        a22 = sums->s22 + st->lambda;
        det = a11 * a22 - s12 * s12;
        /* ||A||_F * ||A^-1||_F of a 2x2 matrix */
        const double kappa = (a11 * a11 + a22 * a22 + 2 * (s12 * s12)) / det;
        if (kappa < kappa_max || st->lambda >= lambda_max) {
            break;
        }
        const double grown = st->lambda * sqrt(kappa / kappa_max);
        st->lambda = grown < lambda_max ? grown : lambda_max;
    }
    const double a1 = (b1 * a22 - b2 * s12) / det, a2 = (b2 * a11 - b1 * s12) / det;
    const double d1 = a1 - st->a1, d2 = a2 - st->a2;
    st->a1 = a1;
    st->a2 = a2;
    return sqrt(d1 * d1 + d2 * d2);
}

/* The planes at the scales of st. */
PTQTP_CLONES
static void paper_assign(const float * x, struct paper_state * st) {
    const double a1 = st->a1, a2 = st->a2;
    for (int i = 0; i < QK0; i++) {
        double best = DBL_MAX, t1 = 0, t2 = 0;
        for (int c1 = -1; c1 <= 1; c1++) {
            for (int c2 = -1; c2 <= 1; c2++) {
                const double e = x[i] - (a1 * c1 + a2 * c2), e2 = e * e;
                const bool less = e2 < best;
                best = less ? e2 : best;
                t1 = less ? c1 : t1;
                t2 = less ? c2 : t2;
            }
        }
        st->t1[i] = t1;
        st->t2[i] = t2;
    }
}

/* Up to iters iterations, or until nothing moves any more; changes: where to raise the largest change of each, or NULL.
 * The planes are left unassigned. */
static void paper_group(const float * x, const struct ptqtp_sorted * sorted, int iters, double * changes,
                        struct paper_state * st) {
    struct ptqtp_sums sums;
    if (sorted->usable) { /* both planes are the signs, and this sum is exact */
        const double all = sorted->sum[QK0];
        st->a1 = st->a2 = 1;
        st->lambda = 1e-8;
        sums = (struct ptqtp_sums){ QK0, QK0, QK0, all, all };
    } else {
        paper_init(x, st);
        paper_sums(x, st, &sums);
    }
    for (int t = 0; t < iters; t++) {
        const double change = paper_solve(&sums, st);
        if (changes) {
            changes[t] = change > changes[t] ? change : changes[t];
        }
        if ((change == 0 && t > 0) || t == iters - 1) {
            break;
        }
        const double m1 = fabs(st->a1), m2 = fabs(st->a2);
        if (!ptqtp_sums_at(sorted, st->a1, st->a2, m1 + m2, fabs(m1 - m2), 0x1p-48, &sums, NULL)) {
            paper_assign(x, st);
            paper_sums(x, st, &sums);
        }
    }
}

void ptqtp_paper_probe(const float * x, int64_t nrows, int64_t n_per_row, double largest[PTQTP_SEEN]) {
    const int64_t ngroups = nrows * n_per_row / QK0;
    struct ptqtp_sorted sorted[PTQTP_SORT_LANES];
    for (int64_t i = 0; i < ngroups; i++, x += QK0) {
        const int k = (int) (i % PTQTP_SORT_LANES);
        if (k == 0) {
            ptqtp_sort_groups(x, (int) (ngroups - i < PTQTP_SORT_LANES ? ngroups - i : PTQTP_SORT_LANES), sorted);
        }
        struct paper_state st;
        paper_group(x, &sorted[k], PTQTP_PAPER_MAX_ITERS, largest, &st);
    }
}

int ptqtp_paper_iters(const double largest[PTQTP_SEEN]) {
    for (int t = 0; t < PTQTP_PAPER_MAX_ITERS; t++) {
        if (largest[t] < 1e-4) { /* absolute, as published */
            return t + 1;
        }
    }
    return PTQTP_PAPER_MAX_ITERS;
}

static int put_tp2_0(const uint8_t * digits, uint16_t h1, uint16_t h2, block_tp2_0 * dst, float * values) {
    const uint16_t alphas[2] = { h1, h2 };
    if ((h1 & 0x7c00) == 0x7c00 || (h2 & 0x7c00) == 0x7c00) {
        return PTQTP_TOO_LARGE;
    }
    const float a1 = ptqtp_half_to_float(h1), a2 = ptqtp_half_to_float(h2);
    for (int i = 0; values && i < QK0; i++) {
        values[i] = a1 * (float) ptqtp_t1(digits[i]) + a2 * (float) ptqtp_t2(digits[i]);
    }
    return ptqtp_pack_tp2_0(digits, alphas, dst, QK0);
}

int ptqtp_paper_rows(const float * x, const float * importance, void * dst, float * values, int64_t nrows,
                     int64_t n_per_row, int iters) {
    block_tp2_0 * b = dst;
    (void) importance;
    const int64_t ngroups = nrows * n_per_row / QK0;
    struct ptqtp_sorted sorted[PTQTP_SORT_LANES];
    for (int64_t i = 0; i < ngroups; i++, x += QK0, b++) {
        const int k = (int) (i % PTQTP_SORT_LANES);
        if (k == 0) {
            ptqtp_sort_groups(x, (int) (ngroups - i < PTQTP_SORT_LANES ? ngroups - i : PTQTP_SORT_LANES), sorted);
        }
        struct paper_state st;
        uint8_t digits[QK0];
        paper_group(x, &sorted[k], iters, NULL, &st);
        const double m1 = fabs(st.a1), m2 = fabs(st.a2);
        struct ptqtp_sums sums;
        struct ptqtp_cuts cuts;
        if (ptqtp_sums_at(&sorted[k], st.a1, st.a2, m1 + m2, fabs(m1 - m2), 0x1p-48, &sums, &cuts)) {
            ptqtp_cut_digits(x, &cuts, digits);
        } else {
            paper_assign(x, &st);
            for (int j = 0; j < QK0; j++) {
                digits[j] = (uint8_t) (3 * (int) (st.t1[j] + 1) + (int) (st.t2[j] + 1));
            }
        }
        const int status = put_tp2_0(digits, ptqtp_half_from_float((float) st.a1), ptqtp_half_from_float((float) st.a2),
                                     b, values ? values + i * QK0 : NULL);
        if (status != PTQTP_OK) {
            return status;
        }
    }
    return PTQTP_OK;
}

/* ---- search, TP2_0 ----
 * Alternate nearest pair (float32) and least squares (float64) from five starts; each result is rounded to fp16,
 * assigned once more, and the smallest error wins. One start is the paper's own result. */

enum { SEARCH_ITERS = 24 };

/* Nearest pair for each weight: first smallest in lexicographic order. */
PTQTP_CLONES
static void assign_tp2_0(const float * x, float a1, float a2, uint8_t * digits) {
    for (int i = 0; i < QK0; i++) {
        float best = FLT_MAX;
        int32_t digit = 0;
        for (int c = 0; c < 9; c++) {
            const float v = a1 * (float) ptqtp_t1(c) + a2 * (float) ptqtp_t2(c);
            const float e = x[i] - v, e2 = e * e;
            digit = e2 < best ? c : digit;
            best = e2 < best ? e2 : best;
        }
        digits[i] = (uint8_t) digit;
    }
}

/* The (weighted) error alone: the square of the smallest distance is the smallest square. */
PTQTP_CLONES
static float error_tp2_0(const float * x, const float * h, float a1, float a2) {
    float acc[LANES] = { 0 }, v[9];
    for (int c = 0; c < 9; c++) {
        v[c] = a1 * (float) ptqtp_t1(c) + a2 * (float) ptqtp_t2(c);
    }
    for (int k = 0; k < QK0; k += LANES) {
        for (int l = 0; l < LANES; l++) {
            float e = fabsf(x[k + l] - v[0]);
            for (int c = 1; c < 9; c++) {
                e = nearer(e, x[k + l] - v[c]);
            }
            acc[l] += h ? e * e * h[k + l] : e * e;
        }
    }
    return join_f(acc);
}

PTQTP_CLONES
static void sums_tp2_0(const float * x, const float * h, const uint8_t * digits, struct ptqtp_sums * sums) {
    double n11[LANES] = { 0 }, n22[LANES] = { 0 }, n12[LANES] = { 0 }, v1[LANES] = { 0 }, v2[LANES] = { 0 };
    float p1[QK0], p2[QK0];
    for (int k = 0; k < QK0; k++) {
        const int32_t d = digits[k], third = (d > 2) + (d > 5);
        p1[k] = (float) (third - 1);
        p2[k] = (float) (d - 3 * third - 1);
    }
    for (int k = 0; k < QK0; k += LANES) {
        for (int l = 0; l < LANES; l++) {
            const double t1 = p1[k + l], t2 = p2[k + l];
            const double w = x[k + l], g = h ? h[k + l] : 1.0;
            n11[l] += g * (t1 * t1);
            n22[l] += g * (t2 * t2);
            n12[l] += g * (t1 * t2);
            v1[l] += g * (t1 * w);
            v2[l] += g * (t2 * w);
        }
    }
    *sums = (struct ptqtp_sums){ join_d(n11), join_d(n22), join_d(n12), join_d(v1), join_d(v2) };
}

/* Digits of the nearest pairs: the short way if it decides, else the long one. */
static void nearest_tp2_0(const float * x, const struct ptqtp_sorted * sorted, float a1, float a2, uint8_t * digits) {
    const float m1 = fabsf(a1), m2 = fabsf(a2);
    struct ptqtp_sums sums;
    struct ptqtp_cuts cuts;
    if (ptqtp_sums_at(sorted, a1, a2, m1 + m2, fabsf(m1 - m2), 0x1p-22, &sums, &cuts)) {
        ptqtp_cut_digits(x, &cuts, digits);
    } else {
        assign_tp2_0(x, a1, a2, digits);
    }
}

static void solve_tp2_0(const struct ptqtp_sums * sums, float * a1, float * a2) {
    const double s11 = sums->s11, s22 = sums->s22, s12 = sums->s12, b1 = sums->b1, b2 = sums->b2;
    const double det = s11 * s22 - s12 * s12;
    if (det > 1e-9 * (s11 * s22)) {
        *a1 = (float) ((s22 * b1 - s12 * b2) / det);
        *a2 = (float) ((s11 * b2 - s12 * b1) / det);
    } else { /* the planes are proportional, or one is empty: one scale does it all */
        *a1 = s11 > 0 ? (float) (b1 / s11) : 0;
        *a2 = 0;
    }
}

static int search_tp2_0(const float * x, const float * h, const struct ptqtp_sorted * sorted, block_tp2_0 * dst,
                        float * values) {
    static const float ratios[4] = { 0.35f, 0.6f, 0.75f, 0.9f };
    const float top = (float) sorted->a[QK0];
    float best = FLT_MAX;
    uint16_t tried[5][2], h1 = 0, h2 = 0;
    int ntried = 0;
    for (int start = 0; start < 5; start++) {
        float a1, a2;
        if (start < 4) {
            a1 = 0.9f * top / (1 + ratios[start]);
            a2 = a1 * ratios[start];
        } else {
            struct paper_state st;
            paper_group(x, sorted, PTQTP_PAPER_MAX_ITERS, NULL, &st);
            a1 = (float) st.a1;
            a2 = (float) st.a2;
        }
        for (int t = 0; t < SEARCH_ITERS; t++) {
            const float before1 = a1, before2 = a2, m1 = fabsf(a1), m2 = fabsf(a2);
            struct ptqtp_sums sums;
            if (h || !ptqtp_sums_at(sorted, a1, a2, m1 + m2, fabsf(m1 - m2), 0x1p-22, &sums, NULL)) {
                uint8_t digits[QK0];
                nearest_tp2_0(x, sorted, a1, a2, digits);
                sums_tp2_0(x, h, digits, &sums);
            }
            solve_tp2_0(&sums, &a1, &a2);
            if (a1 == before1 && a2 == before2) { /* the scales alone decide what comes next: nothing new */
                break;
            }
        }
        const uint16_t r1 = ptqtp_half_from_float(a1), r2 = ptqtp_half_from_float(a2);
        bool known = (r1 & 0x7c00) == 0x7c00 || (r2 & 0x7c00) == 0x7c00; /* an infinite error never wins */
        for (int k = 0; k < ntried; k++) {
            known |= tried[k][0] == r1 && tried[k][1] == r2;
        }
        if (known) {
            continue;
        }
        tried[ntried][0] = r1;
        tried[ntried++][1] = r2;
        const float err = error_tp2_0(x, h, ptqtp_half_to_float(r1), ptqtp_half_to_float(r2));
        if (err < best) {
            best = err;
            h1 = r1;
            h2 = r2;
        }
    }
    uint8_t digits[QK0];
    nearest_tp2_0(x, sorted, ptqtp_half_to_float(h1), ptqtp_half_to_float(h2), digits);
    return put_tp2_0(digits, h1, h2, dst, values);
}

/* ---- rows ---- */

/* A group whose inputs never fire has no preference: quantize it unweighted. */
static const float * weights_of(const float * h, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (h[i] > 0) {
            return h;
        }
    }
    return NULL;
}

int ptqtp_search_rows_tp2_1(const float * x, const float * importance, void * dst, float * values, int64_t nrows,
                            int64_t n_per_row, int settled) {
    enum { QK = PTQTP_QK_TP2_1 };
    const int64_t groups = n_per_row / QK;
    block_tp2_1 * b = dst;
    (void) settled;
    for (int64_t i = 0; i < nrows * groups; i++, x += QK) {
        const float * h = importance ? weights_of(importance + i % groups * QK, QK) : NULL;
        float own[QK];
        for (int k = 0; k < QK; k++) {
            own[k] = 1;
        }
        if (!importance) {
            own_weights(x, own);
        }
        search_tp2_1(x, h ? h : own, &b[i], values ? values + i * QK : NULL);
    }
    return PTQTP_OK;
}

int ptqtp_search_rows_tp2_0(const float * x, const float * importance, void * dst, float * values, int64_t nrows,
                            int64_t n_per_row, int settled) {
    const int64_t groups = n_per_row / QK0, ngroups = nrows * groups;
    struct ptqtp_sorted sorted[PTQTP_SORT_LANES];
    block_tp2_0 * b = dst;
    (void) settled;
    for (int64_t i = 0; i < ngroups; i++, x += QK0) {
        const float * h = importance ? weights_of(importance + i % groups * QK0, QK0) : NULL;
        const int k = (int) (i % PTQTP_SORT_LANES);
        if (k == 0) {
            ptqtp_sort_groups(x, (int) (ngroups - i < PTQTP_SORT_LANES ? ngroups - i : PTQTP_SORT_LANES), sorted);
        }
        const int status = search_tp2_0(x, h, &sorted[k], &b[i], values ? values + i * QK0 : NULL);
        if (status != PTQTP_OK) {
            return status;
        }
    }
    return PTQTP_OK;
}
