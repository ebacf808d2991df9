/* Every kernel of kernels/kernels.inc on the same bytes, valid or not. What is promised for any bytes: all decode them
 * to the same digits, so the integer sums are equal and only the order of the float sum differs. Input: byte 0 type,
 * byte 1 rows and form, then blocks of weights, then activations. */
#include "codec/unit.h"
#include "fuzz/fuzz.h"
#include "kernels/kernels.h"

#include <math.h>

enum { MAX_BLOCKS = 64 };

/* Sum of the magnitudes of all terms; NaN or Inf where one is. */
static double magnitude(const struct ptqtp_type_traits * t, const uint8_t * w, const ptqtp_block_q8_0 * y, int64_t n) {
    static float values[MAX_BLOCKS * PTQTP_QK_TP2_0];
    t->dequantize(w, values, n);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += fabs((double) values[i] * y[i / 32].qs[i % 32] * (double) ptqtp_half_to_float(y[i / 32].d));
        if (t->type == PTQTP_TP2_0) { /* its two planes may cancel */
            const block_tp2_0 * b = (const block_tp2_0 *) w + i / PTQTP_QK_TP2_0;
            for (int plane = 0; plane < 2; plane++) {
                sum += fabs((double) ptqtp_half_to_float(ptqtp_alpha_bits(b, plane)) * y[i / 32].qs[i % 32] *
                            (double) ptqtp_half_to_float(y[i / 32].d));
            }
        }
    }
    return sum;
}

/* Scales with which every sum is a small integer: 1, and 2 and 1. A new type needs a case. */
static void exact_scales(const struct ptqtp_type_traits * t, uint8_t * w, int64_t nblocks) {
    static const uint8_t one[] = { 0xf0 }, two_one[] = { 0, 0x3c, 0, 0x40 };
    const bool coded = t->type == PTQTP_TP2_1 || t->type == PTQTP_TP2_2;
    const uint8_t * sides = t->type == PTQTP_TP2_0 ? two_one : coded ? one : NULL;
    MUST(sides, "%s", t->name);
    const int64_t units = t->block / PTQTP_UNIT;
    for (int64_t i = 0; i < nblocks * units; i++) {
        ((ptqtp_unit *) w)[i].side = sides[i % units];
    }
}

static void dots(const struct ptqtp_type_traits * t, uint8_t * w, ptqtp_block_q8_0 * y, int64_t nblocks) {
    const int64_t n = nblocks * t->block, ny = n / 32;
    int count;
    const struct ptqtp_kernel * all = ptqtp_kernels(&count);
    for (int exact = 0; exact < 2; exact++) {
        if (exact) {
            exact_scales(t, w, nblocks);
            for (int64_t i = 0; i < ny; i++) {
                y[i].d = 0x3c00;
            }
        }
        const double bound = exact ? 0 : magnitude(t, w, y, n) * (double) (ny + 16) * 0x1p-22 + 1e-37;
        const float want = ptqtp_dot_scalar(t->type)(n, w, y);
        for (int k = 0; k < count; k++) {
            if (all[k].type == t->type && all[k].supported()) {
                const float got = all[k].dot(n, w, y);
                MUST(!(bound < 3e38) || fabs((double) got - (double) want) <= bound,
                     "%s, %s, %d blocks, exact %d: %a, reference %a, bound %a", all[k].name, t->name, (int) nblocks,
                     exact, (double) got, (double) want, bound);
            }
        }
    }
}

/* The same rows in panels, times integers that quantize to themselves. */
static void panels(const struct ptqtp_type_traits * type, int form, const uint8_t * w, const int8_t * a, int64_t nrows,
                   int64_t n) {
    enum { COLS = 3 };
    const int64_t nb = n / 32, npanels = (nrows + 15) / 16;
    float * x = fuzz_bytes((size_t) n * sizeof *x);
    float * y = fuzz_bytes((size_t) (nrows * COLS) * sizeof *y);
    double * want = fuzz_bytes((size_t) nrows * sizeof *want);
    uint8_t * in = fuzz_bytes(ptqtp_panels_size(form, nrows, n));
    ptqtp_panels_from_rows(type->type, form, w, in, 0, nrows, n);
    for (int64_t i = 0; i < n; i++) { /* a 127 in each block: d is 1 */
        x[i] = i % 32 == 5 ? 127 : a[i] < -127 ? -127 : a[i];
    }
    for (int64_t r = 0; r < nrows; r++) {
        want[r] = 0;
        for (int64_t b = 0; b < nb; b++) {
            float values[PTQTP_UNIT];
            type->dequantize(w + (r * nb + b) * (int64_t) sizeof(ptqtp_unit), values, PTQTP_UNIT);
            for (int i = 0; i < PTQTP_UNIT; i++) {
                want[r] += (double) values[i] * (double) x[b * 32 + i];
            }
        }
    }
    void * scratch = aligned_alloc(64, PTQTP_GEMM_SCRATCH);
    MUST(scratch, "aligned_alloc");
    const double bound = 6.0 * 127 * 2 * (double) n * (double) (nb + 16) * 0x1p-23;
    int count;
    const struct ptqtp_panel_kernel * const * all = ptqtp_panel_kernels(&count);
    for (int k = 0; k < count; k++) {
        if (!ptqtp_panel_kernel_supported(all[k])) {
            continue;
        }
        ptqtp_act * acts = aligned_alloc(64, (size_t) (nb + 7) / 8 * 8 * sizeof *acts);
        void * one = fuzz_bytes((size_t) nb * ptqtp_gemv_act_size(all[k], type->type, form));
        MUST(acts, "aligned_alloc");
        const ptqtp_act * act_of[COLS];
        float * y_of[COLS];
        for (int c = 0; c < COLS; c++) {
            act_of[c] = acts;
            y_of[c] = y + c * nrows;
        }
        ptqtp_gemm_quantize(all[k], x, acts, n);
        ptqtp_gemv_quantize(all[k], type->type, form, x, one, n);
        for (int gemm = 0; gemm < 2; gemm++) {
            if (gemm) {
                ptqtp_gemm(all[k], type->type, form, n, nrows, in, 0, npanels, COLS, act_of, y_of, scratch);
            } else {
                ptqtp_gemv(all[k], type->type, form, n, nrows, in, 0, npanels, one, y);
            }
            for (int64_t i = 0; i < nrows * (gemm ? COLS : 1); i++) {
                MUST(fabs((double) y[i] - want[i % nrows]) <= bound,
                     "%s, form %d, gemm %d, row %d of %d, n %d: %a, not %a", ptqtp_panel_kernel_name(all[k]), form,
                     gemm, (int) (i % nrows), (int) nrows, (int) n, (double) y[i], want[i % nrows]);
            }
        }
        free(acts);
        free(one);
    }
    free(scratch);
    free(x);
    free(y);
    free(want);
    free(in);
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 2) {
        return 0;
    }
    const struct ptqtp_type_traits * t = fuzz_type(data[0]);
    const int rows = 1 + data[1] % 40, form = data[1] >> 7;
    const size_t weights = (size_t) t->block;
    size_t nblocks = (size - 2) / (t->size + weights / 32 * sizeof(ptqtp_block_q8_0));
    if (nblocks == 0) {
        return 0;
    }
    nblocks = nblocks < MAX_BLOCKS ? nblocks : MAX_BLOCKS;
    uint8_t * w = fuzz_copy(data + 2, nblocks * t->size);
    ptqtp_block_q8_0 * y = fuzz_copy(data + 2 + nblocks * t->size, nblocks * weights / 32 * sizeof *y);
    if (t->panels) {
        const int64_t cols = (int64_t) nblocks / rows * 32;
        if (cols) {
            panels(t, form, w, (const int8_t *) y, rows, cols);
        }
    }
    dots(t, w, y, (int64_t) nblocks);
    free(w);
    free(y);
    return 0;
}
