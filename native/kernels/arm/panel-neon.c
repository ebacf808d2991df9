/* Panel kernel for any AArch64: plain NEON. */
#include "kernels/kernels.h"

#ifdef PTQTP_ARM64
#    include "kernels/arm/panel-neon.inc"

/* 16 rows by ncols columns, a constant where this is inlined. */
PTQTP_INLINE void gemm_block(int64_t ntiles, const uint8_t * codes, const float * scales, const int ncols,
                             const ptqtp_act * const * acts, float * const * y, bool add) {
    float32x4_t out[4][2];
    const ptqtp_act * act[2];
    for (int c = 0; c < ncols; c++) {
        act[c] = acts[c];
        for (int g = 0; g < 4; g++) {
            out[g][c] = add ? vld1q_f32(y[c] + 4 * g) : vdupq_n_f32(0);
        }
    }
    const int8_t * code = (const int8_t *) codes;
    for (int64_t t = 0; t < ntiles; t++, code += PTQTP_CODES_SIZE, scales += PTQTP_PANEL_ROWS) {
        if (ncols == 2) {
            PTQTP_LOOP("gemm 16x2");
        }
        struct products p[4][2];
#    pragma GCC unroll 8
        for (int k = 0; k < PTQTP_QUADS; k++) {
            int8x16_t q[2];
#    pragma GCC unroll 2
            for (int c = 0; c < ncols; c++) {
                q[c] = repeat_quad(act[c]->q + 4 * k);
            }
#    pragma GCC unroll 4
            for (int g = 0; g < 4; g++) {
                const int8x16_t levels = vld1q_s8(code + 64 * k + 16 * g);
#    pragma GCC unroll 2
                for (int c = 0; c < ncols; c++) {
                    if (k == 0) {
                        p[g][c] = multiply(levels, q[c]);
                    } else {
                        multiply_add(&p[g][c], levels, q[c]);
                    }
                }
            }
            PTQTP_AFTER("r", code, p[0][0].low); /* or the next loads push sums out of the registers */
        }
#    pragma GCC unroll 2
        for (int c = 0; c < ncols; c++) {
#    pragma GCC unroll 4
            for (int g = 0; g < 4; g++) {
                const float32x4_t scale = vmulq_n_f32(vld1q_f32(scales + 4 * g), act[c]->d);
                out[g][c] = vfmaq_f32(out[g][c], products_float(&p[g][c]), scale);
            }
            act[c]++;
        }
    }
    for (int c = 0; c < ncols; c++) {
        for (int g = 0; g < 4; g++) {
            vst1q_f32(y[c] + 4 * g, out[g][c]);
        }
    }
}

static void gemm(int64_t ntiles, const uint8_t * codes, const float * scales, int ncols, const ptqtp_act * const * acts,
                 float * const * y, bool add) {
    for (; ncols >= 2; ncols -= 2, acts += 2, y += 2) {
        gemm_block(ntiles, codes, scales, 2, acts, y, add);
    }
    if (ncols > 0) {
        gemm_block(ntiles, codes, scales, 1, acts, y, add);
    }
}

PTQTP_NEON_KERNEL(neon);

#endif
