/* Dot products for AArch64 with the dot-product extension. This file alone is compiled with that flag; ptqtp-dot.c
 * asks the CPU first. Two units at a time; the second is loaded two bytes early and moved down, so that nothing past
 * its end is read. Places without a digit get table index 255, which tbl turns into 0. */
#include "ptqtp-kernels.h"

#ifdef PTQTP_ARM64

#    include "ptqtp-unit.h"

#    include <arm_neon.h>

struct digits {
    uint8x16_t d01[2], d23[2]; /* of each unit */
    uint8x16_t d4;             /* of both: bytes 2..7 and 10..15 */
};

/* floor(9*w / 2^16): the two inner floors are exact, so is the outer. */
static inline uint16x8_t digit(uint16x8_t w) {
    return vshrq_n_u16(vhaddq_u16(w, vshrq_n_u16(w, 3)), 12);
}

static inline struct digits unpack_pair(const uint8_t * p) {
    static const uint8_t off01[16] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255 };
    static const uint8_t off23[16] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255 };
    static const uint8_t off4[16] = { 255, 255, 0, 0, 0, 0, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0 };
    const uint8x16_t second = vld1q_u8(p + 12);
    const uint8x16_t bytes[2] = { vld1q_u8(p), vextq_u8(second, second, 2) };
    struct digits out;
    uint8x16_t last[2];
    for (int i = 0; i < 2; i++) {
        uint16x8_t w = vreinterpretq_u16_u8(bytes[i]);
        const uint16x8_t d0 = digit(w);
        w = vmulq_n_u16(w, 9);
        const uint16x8_t d1 = digit(w);
        w = vmulq_n_u16(w, 9);
        const uint16x8_t d2 = digit(w);
        w = vmulq_n_u16(w, 9);
        const uint16x8_t d3 = digit(w);
        w = vmulq_n_u16(w, 9);
        out.d01[i] = vorrq_u8(vreinterpretq_u8_u16(vsliq_n_u16(d0, d1, 8)), vld1q_u8(off01));
        out.d23[i] = vorrq_u8(vreinterpretq_u8_u16(vsliq_n_u16(d2, d3, 8)), vld1q_u8(off23));
        last[i] = vreinterpretq_u8_u16(digit(w));
    }
    const uint64x2_t d4 = vreinterpretq_u64_u8(vuzp1q_u8(last[0], last[1]));
    out.d4 = vorrq_u8(vreinterpretq_u8_u64(vshlq_n_u64(d4, 16)), vld1q_u8(off4));
    return out;
}

struct acts {
    int8x16_t a01[2], a23[2], a4;
};

static inline struct acts load_acts(const ptqtp_block_q8_0 * y) {
    return (struct acts){
        { vld1q_s8(y[0].qs), vld1q_s8(y[1].qs) },
        { vld1q_s8(y[0].qs + 14), vld1q_s8(y[1].qs + 14) },
        vcombine_s8(vld1_s8(y[0].qs + 24), vld1_s8(y[1].qs + 24)),
    };
}

/* Two int32 a unit: lanes 0, 1 of the first, lanes 2, 3 of the second. */
static inline int32x4_t dot_table(const struct digits * d, const struct acts * a, int8x16_t table) {
    int32x4_t sum[2];
    for (int i = 0; i < 2; i++) {
        sum[i] = vdotq_s32(vdupq_n_s32(0), vqtbl1q_s8(table, d->d01[i]), a->a01[i]);
        sum[i] = vdotq_s32(sum[i], vqtbl1q_s8(table, d->d23[i]), a->a23[i]);
    }
    return vdotq_s32(vpaddq_s32(sum[0], sum[1]), vqtbl1q_s8(table, d->d4), a->a4);
}

static inline float half(uint16_t bits) {
    float16_t h;
    memcpy(&h, &bits, sizeof h);
    return (float) h;
}

static inline float32x4_t two_scales(float lo, float hi) {
    return vcombine_f32(vdup_n_f32(lo), vdup_n_f32(hi));
}

static inline float32x4_t tp2_1_pair(const block_tp2_1 * x, const ptqtp_block_q8_0 * y, float32x4_t acc) {
    static const int8_t levels[16] = { -5, -3, -1, -2, 0, 2, 1, 3, 5 }; /* 3*t1 + 2*t2 by digit */
    const struct digits d = unpack_pair(x[0].u.q);
    const struct acts a = load_acts(y);
    const float32x4_t scale =
        two_scales(ptqtp_scale_value(x[0].u.side) * half(y[0].d), ptqtp_scale_value(x[1].u.side) * half(y[1].d));
    return vfmaq_f32(acc, vcvtq_f32_s32(dot_table(&d, &a, vld1q_s8(levels))), scale);
}

float ptqtp_dot_tp2_1_neon_dotprod(int64_t n, const void * weights, const void * q8_0) {
    const block_tp2_1 * x = weights;
    const ptqtp_block_q8_0 * y = q8_0;
    int64_t nb = n / PTQTP_QK_TP2_1;
    float32x4_t acc0 = vdupq_n_f32(0), acc1 = vdupq_n_f32(0);
    for (; nb >= 4; nb -= 4, x += 4, y += 4) {
        acc0 = tp2_1_pair(x, y, acc0);
        acc1 = tp2_1_pair(x + 2, y + 2, acc1);
    }
    for (; nb >= 2; nb -= 2, x += 2, y += 2) {
        acc0 = tp2_1_pair(x, y, acc0);
    }
    if (nb) {
        block_tp2_1 last[2] = { x[0] };
        ptqtp_block_q8_0 acts[2] = { y[0] };
        acc1 = tp2_1_pair(last, acts, acc1);
    }
    return vaddvq_f32(vaddq_f32(acc0, acc1));
}

float ptqtp_dot_tp2_0_neon_dotprod(int64_t n, const void * weights, const void * q8_0) {
    static const int8_t plane1[16] = { -1, -1, -1, 0, 0, 0, 1, 1, 1 }; /* t1 by digit */
    static const int8_t plane2[16] = { -1, 0, 1, -1, 0, 1, -1, 0, 1 }; /* t2 by digit */
    const block_tp2_0 * x = weights;
    const ptqtp_block_q8_0 * y = q8_0;
    float32x4_t acc1 = vdupq_n_f32(0), acc2 = vdupq_n_f32(0);
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_0; i++) {
        const float alpha1 = half(ptqtp_alpha_bits(&x[i], 0)), alpha2 = half(ptqtp_alpha_bits(&x[i], 1));
        for (int j = 0; j < 4; j += 2, y += 2) {
            const struct digits d = unpack_pair(x[i].u[j].q);
            const struct acts a = load_acts(y);
            const float32x4_t scale = two_scales(half(y[0].d), half(y[1].d));
            const float32x4_t sum1 = vcvtq_f32_s32(dot_table(&d, &a, vld1q_s8(plane1)));
            const float32x4_t sum2 = vcvtq_f32_s32(dot_table(&d, &a, vld1q_s8(plane2)));
            acc1 = vfmaq_f32(acc1, vmulq_n_f32(scale, alpha1), sum1);
            acc2 = vfmaq_f32(acc2, vmulq_n_f32(scale, alpha2), sum2);
        }
    }
    return vaddvq_f32(vaddq_f32(acc1, acc2));
}

#endif
