/* Panel kernel for AArch64 with the dot-product extension. */
#include "kernels/kernels.h"

#ifdef PTQTP_ARM64
#    define PTQTP_DOTPROD
#    include "kernels/arm/panel-neon.inc"

#    define DOT_QUAD(k)                                                                                                \
        _Pragma("GCC unroll 4") for (int g = 0; g < groups; g++) {                                                     \
            const int8x16_t levels = vld1q_s8(code + 64 * (k) + 16 * g);                                               \
            _Pragma("GCC unroll 4") for (int c = 0; c < ncols; c++) {                                                  \
                sum[g][c] = vdotq_laneq_s32(sum[g][c], levels, q[c], (k) % 4);                                         \
            }                                                                                                          \
        }

/* 4 * groups rows from row on by ncols columns; both are constants where this is inlined. */
PTQTP_INLINE void gemm_block(int64_t ntiles, const uint8_t * codes, const float * scales, const int row,
                             const int groups, const int ncols, const ptqtp_act * const * acts, float * const * y,
                             bool add) {
    float32x4_t out[4][4];
    for (int g = 0; g < groups; g++) {
        for (int c = 0; c < ncols; c++) {
            out[g][c] = add ? vld1q_f32(y[c] + row + 4 * g) : vdupq_n_f32(0);
        }
    }
    const int8_t * code = (const int8_t *) codes + 4 * row;
    const float * scale = scales + row;
    const ptqtp_act * act[4];
    for (int c = 0; c < ncols; c++) {
        act[c] = acts[c];
    }
    for (int64_t t = 0; t < ntiles; t++, code += PTQTP_CODES_SIZE, scale += PTQTP_PANEL_ROWS) {
        if (groups == 2 && ncols == 4) {
            PTQTP_LOOP("gemm 8x4");
        }
        int32x4_t sum[4][4];
        int8x16_t q[4];
#    pragma GCC unroll 4
        for (int c = 0; c < ncols; c++) {
            q[c] = vld1q_s8(act[c]->q);
#    pragma GCC unroll 4
            for (int g = 0; g < groups; g++) {
                sum[g][c] = sum_start();
            }
        }
        DOT_QUAD(0)
        DOT_QUAD(1)
        DOT_QUAD(2)
        DOT_QUAD(3)
#    pragma GCC unroll 4
        for (int c = 0; c < ncols; c++) {
            q[c] = vld1q_s8(act[c]->q + 16);
        }
        DOT_QUAD(4)
        DOT_QUAD(5)
        DOT_QUAD(6)
        DOT_QUAD(7)
#    pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            const float32x4_t s = vld1q_f32(scale + 4 * g);
#    pragma GCC unroll 4
            for (int c = 0; c < ncols; c++) {
                out[g][c] = vfmaq_f32(out[g][c], sum_float(sum[g][c]), vmulq_n_f32(s, act[c]->d));
            }
        }
#    pragma GCC unroll 4
        for (int c = 0; c < ncols; c++) {
            act[c]++;
        }
    }
    for (int g = 0; g < groups; g++) {
        for (int c = 0; c < ncols; c++) {
            vst1q_f32(y[c] + row + 4 * g, out[g][c]);
        }
    }
}

static void gemm(int64_t ntiles, const uint8_t * codes, const float * scales, int ncols, const ptqtp_act * const * acts,
                 float * const * y, bool add) {
    for (; ncols >= 4; ncols -= 4, acts += 4, y += 4) {
        gemm_block(ntiles, codes, scales, 0, 2, 4, acts, y, add);
        gemm_block(ntiles, codes, scales, 8, 2, 4, acts, y, add);
    }
    if (ncols == 3) {
        gemm_block(ntiles, codes, scales, 0, 2, 3, acts, y, add);
        gemm_block(ntiles, codes, scales, 8, 2, 3, acts, y, add);
    } else if (ncols == 2) {
        gemm_block(ntiles, codes, scales, 0, 4, 2, acts, y, add);
    } else if (ncols == 1) {
        gemm_block(ntiles, codes, scales, 0, 4, 1, acts, y, add);
    }
}

PTQTP_NEON_KERNEL(neon_dotprod);

#endif
