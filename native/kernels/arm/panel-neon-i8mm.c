/* Panel kernel for AArch64 with the 8-bit matrix multiplication extension: gemv as with dot products, gemm by products
 * of two rows and two columns. */
#include "kernels/kernels.h"

#ifdef PTQTP_ARM64
#    define PTQTP_DOTPROD
#    define PTQTP_I8MM
#    include "kernels/arm/panel-neon.inc"

/* Two columns' 8 activations side by side. */
PTQTP_INLINE int8x16_t pair_low(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

PTQTP_INLINE int8x16_t pair_high(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

/* 2 * rowpairs rows from row on by 2 * colpairs columns; both are constants where this is inlined. A sum or output
 * vector holds row 0 by columns 0 and 1, then row 1 by them. The columns of a pair may be the same one. */
PTQTP_INLINE void gemm_block(int64_t ntiles, const uint8_t * codes, const float * scales, const int row,
                             const int rowpairs, const int colpairs, const ptqtp_act * const * acts, float * const * y,
                             bool add) {
    float32x4_t out[8][2];
    const ptqtp_act * act[4];
    for (int p = 0; p < colpairs; p++) {
        act[2 * p] = acts[2 * p];
        act[2 * p + 1] = acts[2 * p + 1];
        for (int r = 0; r < rowpairs; r += 2) {
            const float *y0 = y[2 * p] + row + 2 * r, *y1 = y[2 * p + 1] + row + 2 * r;
            const float32x4_t a = add ? vld1q_f32(y0) : vdupq_n_f32(0), b = add ? vld1q_f32(y1) : a;
            out[r][p] = vzip1q_f32(a, b);
            out[r + 1][p] = vzip2q_f32(a, b);
        }
    }
    const int8_t * code = (const int8_t *) codes + 8 * row;
    const float * scale = scales + row;
    for (int64_t t = 0; t < ntiles; t++, code += PTQTP_CODES_SIZE, scale += PTQTP_PANEL_ROWS) {
        if (rowpairs == 4 && colpairs == 2) {
            PTQTP_LOOP("gemm 8x4");
        }
        int32x4_t sum[8][2];
#    pragma GCC unroll 2
        for (int p = 0; p < colpairs; p++) {
#    pragma GCC unroll 8
            for (int r = 0; r < rowpairs; r++) {
                sum[r][p] = sum_start();
            }
        }
#    pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            int8x16_t q[2][2];
#    pragma GCC unroll 2
            for (int p = 0; p < colpairs; p++) {
                const int8x16_t a = vld1q_s8(act[2 * p]->q + 16 * h), b = vld1q_s8(act[2 * p + 1]->q + 16 * h);
                q[p][0] = pair_low(a, b);
                q[p][1] = pair_high(a, b);
            }
#    pragma GCC unroll 2
            for (int s = 0; s < 2; s++) {
#    pragma GCC unroll 8
                for (int r = 0; r < rowpairs; r++) {
                    const int8x16_t levels = vld1q_s8(code + 128 * (2 * h + s) + 16 * r);
#    pragma GCC unroll 2
                    for (int p = 0; p < colpairs; p++) {
                        sum[r][p] = vmmlaq_s32(sum[r][p], levels, q[p][s]);
                    }
                }
            }
        }
#    pragma GCC unroll 2
        for (int p = 0; p < colpairs; p++) {
            const float32x4_t d = vtrn1q_f32(vld1q_dup_f32(&act[2 * p]->d), vld1q_dup_f32(&act[2 * p + 1]->d));
#    pragma GCC unroll 4
            for (int r = 0; r < rowpairs; r += 2) {
                const float32x4_t s = vld1q_f32(scale + 2 * r);
                out[r][p] = vfmaq_f32(out[r][p], sum_float(sum[r][p]), vmulq_f32(vzip1q_f32(s, s), d));
                out[r + 1][p] = vfmaq_f32(out[r + 1][p], sum_float(sum[r + 1][p]), vmulq_f32(vzip2q_f32(s, s), d));
            }
            act[2 * p]++;
            act[2 * p + 1]++;
        }
    }
    for (int p = 0; p < colpairs; p++) {
        for (int r = 0; r < rowpairs; r += 2) {
            vst1q_f32(y[2 * p] + row + 2 * r, vuzp1q_f32(out[r][p], out[r + 1][p]));
            vst1q_f32(y[2 * p + 1] + row + 2 * r, vuzp2q_f32(out[r][p], out[r + 1][p]));
        }
    }
}

static void gemm(int64_t ntiles, const uint8_t * codes, const float * scales, int ncols, const ptqtp_act * const * acts,
                 float * const * y, bool add) {
    for (; ncols >= 3; ncols -= 4, acts += 4, y += 4) {
        const int last = ncols > 3 ? 3 : 2;
        const ptqtp_act * const four[4] = { acts[0], acts[1], acts[2], acts[last] };
        float * const to[4] = { y[0], y[1], y[2], y[last] };
        gemm_block(ntiles, codes, scales, 0, 4, 2, four, to, add);
        gemm_block(ntiles, codes, scales, 8, 4, 2, four, to, add);
    }
    if (ncols > 0) {
        const ptqtp_act * const two[2] = { acts[0], acts[ncols - 1] };
        float * const to[2] = { y[0], y[ncols - 1] };
        gemm_block(ntiles, codes, scales, 0, 8, 1, two, to, add);
    }
}

PTQTP_NEON_KERNEL(neon_i8mm);

#endif
