/* The NEON kernels, with the dot-product extension. Levels are signed here and need no bias; nibbles do. */
#include "bench/bakeoff/bakeoff.h"

#ifdef PTQTP_ARM64

#    include <arm_neon.h>

#    define INLINE __attribute__((always_inline)) static inline

/* Two ways from words to digits. SHIFTS: (9 * w) >> 4 with the digit in the top four bits, exact since both floors
 * are. MULTIPLY: floor(18 * w / 2^16) by sqdmulh, w taken as signed: -9..8, the digit's double plus 0 or 1, modulo 18;
 * after (x + 10) >> 1 the index 0..9 stands for digits 4 5 6 7 8 0 1 2 3 4.
 * In next(), GCC 12 makes a shift and an addition of the multiplication, Clang 19 the reverse; both were looked at. */
enum decoder { MULTIPLY, SHIFTS };

INLINE uint16x8_t next(uint16x8_t w, enum decoder by) {
    return by == SHIFTS ? vaddq_u16(w, vshlq_n_u16(w, 3)) : vmulq_n_u16(w, 9);
}

INLINE uint8x16_t digit(uint16x8_t w, enum decoder by) {
    if (by == SHIFTS) {
        return vreinterpretq_u8_u16(vhaddq_u16(w, vshrq_n_u16(w, 3)));
    }
    return vreinterpretq_u8_s16(vqdmulhq_n_s16(vreinterpretq_s16_u16(w), 9));
}

/* Levels: of lo in the even bytes, of hi in the odd ones. */
INLINE int8x16_t both(uint8x16_t lo, uint8x16_t hi, enum decoder by) {
    static const int8_t by_digit[16] = { -5, -3, -1, -2, 0, 2, 1, 3, 5 };
    static const int8_t by_double[16] = { 0, 2, 1, 3, 5, -5, -3, -1, -2, 0 };
    if (by == SHIFTS) {
        return vqtbl1q_s8(vld1q_s8(by_digit), vshrq_n_u8(vtrn2q_u8(lo, hi), 4));
    }
    const int8x16_t x = vreinterpretq_s8_u8(vtrn1q_u8(lo, hi));
    return vqtbl1q_s8(vld1q_s8(by_double), vreinterpretq_u8_s8(vhaddq_s8(x, vdupq_n_s8(10))));
}

INLINE uint16x8_t words(const uint8_t * p) {
    return vreinterpretq_u16_u8(vld1q_u8(p));
}

INLINE int32x4_t dot0(int8x16_t u, const int8_t * q) {
    return vdotq_s32(vdupq_n_s32(0), u, vld1q_s8(q));
}

INLINE float32x4_t scales4(uint16x4_t halves) { /* the upper halves of floats */
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}

INLINE uint16x8_t scale_half(uint8x8_t codes) {
    return vaddq_u16(vshll_n_u8(codes, 3), vdupq_n_u16(112 << 7));
}

INLINE float32x4_t add_groups(float32x4_t acc, const int32x4_t g[8], const uint8_t * codes, const float * d) {
    const uint16x8_t half = scale_half(vld1_u8(codes));
    const int32x4_t s0 = vpaddq_s32(vpaddq_s32(g[0], g[1]), vpaddq_s32(g[2], g[3]));
    const int32x4_t s1 = vpaddq_s32(vpaddq_s32(g[4], g[5]), vpaddq_s32(g[6], g[7]));
    acc = vfmaq_f32(acc, vcvtq_f32_s32(s0), vmulq_f32(scales4(vget_low_u16(half)), vld1q_f32(d)));
    return vfmaq_f32(acc, vcvtq_f32_s32(s1), vmulq_f32(scales4(vget_high_u16(half)), vld1q_f32(d + 4)));
}

void bake_unit32_rows_neon_dotprod(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    for (long r = 0; r < rows; r++) {
        out[r] = ptqtp_dot_tp2_1_neon_dotprod(cols, w + cols / 32 * 14 * r, a->q8_0);
    }
}

void bake_block256_rows_neon_dotprod(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    static const uint16_t powers[16] = { 1, 1, 1, 1, 9, 9, 9, 9, 81, 81, 81, 81, 729, 729, 729, 729 };
    const enum decoder by = MULTIPLY;
    for (long r = 0; r < rows; r++) {
        float32x4_t acc = vdupq_n_f32(0);
        for (long b = 0; b < cols / 256; b++, w += 112) {
            bake_prefetch(w, 112);
            const int8_t * q = a->q + 256 * b;
            uint64_t four;
            memcpy(&four, w + 96, sizeof four);
            const uint16x8_t tail = vreinterpretq_u16_u64(vdupq_n_u64(four));
            int32x4_t g[8];
            BAKE_UNROLL
            for (int h = 0; h < 2; h++) { /* half a group each */
                uint8x16_t last[3];
                BAKE_UNROLL
                for (int i = 0; i < 3; i++) {
                    const uint16x8_t x0 = words(w + 32 * i + 16 * h), x1 = next(x0, by), x2 = next(x1, by),
                                     x3 = next(x2, by);
                    const int8x16_t u0 = both(digit(x0, by), digit(x1, by), by);
                    const int8x16_t u1 = both(digit(x2, by), digit(x3, by), by);
                    const int8_t * at = q + 64 * i + 16 * h;
                    g[2 * i] = h ? vdotq_s32(g[2 * i], u0, vld1q_s8(at)) : dot0(u0, at);
                    g[2 * i + 1] = h ? vdotq_s32(g[2 * i + 1], u1, vld1q_s8(at + 32)) : dot0(u1, at + 32);
                    last[i] = digit(next(x3, by), by);
                }
                const uint8x16_t rest = digit(vmulq_u16(tail, vld1q_u16(powers + 8 * h)), by);
                const int8x16_t u6 = both(last[0], last[1], by), u7 = both(last[2], rest, by);
                const int8_t * at = q + 192 + 16 * h;
                g[6] = h ? vdotq_s32(g[6], u6, vld1q_s8(at)) : dot0(u6, at);
                g[7] = h ? vdotq_s32(g[7], u7, vld1q_s8(at + 32)) : dot0(u7, at + 32);
            }
            acc = add_groups(acc, g, w + 104, a->d + 8 * b);
        }
        out[r] = vaddvq_f32(acc);
    }
}

/* ---- two planes ---- */

INLINE uint8x16_t plane(const uint8_t * p) {
    return veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80));
}

INLINE uint8x16_t x3(uint8x16_t y) {
    return vaddq_u8(y, vaddq_u8(y, y));
}

/* (3 * y) >> 2 has the trit in its top two bits. Table index: 4 * first trit + second trit. */
INLINE int8x16_t code(uint8x16_t y1, uint8x16_t y2) {
    static const int8_t levels[16] = { -5, -3, -1, 0, -2, 0, 2, 0, 1, 3, 5 };
    const uint8x16_t h1 = vhaddq_u8(y1, vshrq_n_u8(y1, 1)), h2 = vhaddq_u8(y2, vshrq_n_u8(y2, 1));
    return vqtbl1q_s8(vld1q_s8(levels), vshrq_n_u8(vsriq_n_u8(h1, h2, 2), 4));
}

/* Bytes 0..3 of y, times 1, 3, 9, 27. */
INLINE uint8x16_t tail(uint32_t y) {
    static const uint8_t powers[16] = { 1, 1, 1, 1, 3, 3, 3, 3, 9, 9, 9, 9, 27, 27, 27, 27 };
    return vmulq_u8(vreinterpretq_u8_u32(vdupq_n_u32(y ^ 0x80808080u)), vld1q_u8(powers));
}

void bake_planes_rows_neon_dotprod(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    for (long r = 0; r < rows; r++) {
        float32x4_t acc = vdupq_n_f32(0);
        for (long b = 0; b < cols / 256; b++, w += 112) {
            bake_prefetch(w, 112);
            const int8_t * q = a->q + 256 * b;
            int32x4_t g[8];
            BAKE_UNROLL
            for (int h = 0; h < 2; h++) { /* half a group each */
                uint8x16_t y1 = plane(w + 16 * h), y2 = plane(w + 32 + 16 * h);
                BAKE_UNROLL
                for (int k = 0; k < 5; k++) {
                    const int8_t * at = q + 32 * k + 16 * h;
                    g[k] = h ? vdotq_s32(g[k], code(y1, y2), vld1q_s8(at)) : dot0(code(y1, y2), at);
                    y1 = x3(y1);
                    y2 = x3(y2);
                }
            }
            uint8x16_t y1 = plane(w + 64), y2 = plane(w + 80);
            BAKE_UNROLL
            for (int k = 0; k < 5; k++) {
                const int i = 5 + k / 2;
                const int8_t * at = q + 160 + 16 * k;
                g[i] = k % 2 ? vdotq_s32(g[i], code(y1, y2), vld1q_s8(at)) : dot0(code(y1, y2), at);
                y1 = x3(y1);
                y2 = x3(y2);
            }
            uint32_t rest[2];
            memcpy(rest, w + 96, sizeof rest);
            g[7] = vdotq_s32(g[7], code(tail(rest[0]), tail(rest[1])), vld1q_s8(q + 240));
            acc = add_groups(acc, g, w + 104, a->d + 8 * b);
        }
        out[r] = vaddvq_f32(acc);
    }
}

/* ---- panels: a row is a 32-bit place ---- */

/* Four rows of a tile: w at their words; z: for each its remainder word, and the same times 9. */
INLINE float32x4_t four_rows(float32x4_t acc, const uint8_t * w, uint16x8_t z, int8x16_t a0, int8x16_t a1, float d,
                             enum decoder by) {
    uint8x16_t last[3];
    int8x16_t u[6];
    BAKE_UNROLL
    for (int p = 0; p < 3; p++) {
        const uint16x8_t x0 = words(w + 64 * p), x1 = next(x0, by), x2 = next(x1, by), x3 = next(x2, by);
        u[2 * p] = both(digit(x0, by), digit(x1, by), by);
        u[2 * p + 1] = both(digit(x2, by), digit(x3, by), by);
        last[p] = digit(next(x3, by), by);
    }
    int32x4_t s0 = vdotq_laneq_s32(vdupq_n_s32(0), u[0], a0, 0);
    int32x4_t s1 = vdotq_laneq_s32(vdupq_n_s32(0), u[1], a0, 1);
    s0 = vdotq_laneq_s32(s0, u[2], a0, 2);
    s1 = vdotq_laneq_s32(s1, u[3], a0, 3);
    s0 = vdotq_laneq_s32(s0, u[4], a1, 0);
    s1 = vdotq_laneq_s32(s1, u[5], a1, 1);
    s0 = vdotq_laneq_s32(s0, both(last[0], last[1], by), a1, 2);
    s1 = vdotq_laneq_s32(s1, both(last[2], digit(z, by), by), a1, 3);
    const uint32x4_t bits = vshrq_n_u32(vshlq_n_u32(vreinterpretq_u32_u16(z), 24), 5);
    const float32x4_t scale = vreinterpretq_f32_u32(vaddq_u32(bits, vdupq_n_u32(112u << 23)));
    return vfmaq_f32(acc, vcvtq_f32_s32(vaddq_s32(s0, s1)), vmulq_n_f32(scale, d));
}

INLINE void base9_panel(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols,
                        enum decoder by) {
    for (long r = 0; r < rows; r += 16) {
        float32x4_t acc0 = vdupq_n_f32(0), acc1 = acc0, acc2 = acc0, acc3 = acc0;
        for (long g = 0; g < cols / 32; g++, w += 224) {
            bake_prefetch(w, 224);
            const int8x16_t a0 = vld1q_s8(a->q + 32 * g), a1 = vld1q_s8(a->q + 32 * g + 16);
            const float d = a->d[g];
            const uint16x8_t t0 = words(w + 192), n0 = next(t0, by), t1 = words(w + 208), n1 = next(t1, by);
            acc0 = four_rows(acc0, w, vzip1q_u16(t0, n0), a0, a1, d, by);
            acc1 = four_rows(acc1, w + 16, vzip2q_u16(t0, n0), a0, a1, d, by);
            acc2 = four_rows(acc2, w + 32, vzip1q_u16(t1, n1), a0, a1, d, by);
            acc3 = four_rows(acc3, w + 48, vzip2q_u16(t1, n1), a0, a1, d, by);
        }
        vst1q_f32(out + r, acc0);
        vst1q_f32(out + r + 4, acc1);
        vst1q_f32(out + r + 8, acc2);
        vst1q_f32(out + r + 12, acc3);
    }
}

void bake_base9_panel_neon_dotprod(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    base9_panel(w, a, out, rows, cols, MULTIPLY);
}

void bake_base9_shifts_neon_dotprod(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    base9_panel(w, a, out, rows, cols, SHIFTS);
}

void bake_nibbles_panel_neon_dotprod(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    for (long r = 0; r < rows; r += 16) {
        float32x4_t acc[4] = { vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0) };
        for (long g = 0; g < cols / 32; g++, w += 272) {
            bake_prefetch(w, 272);
            const int8x16_t a0 = vld1q_s8(a->q + 32 * g), a1 = vld1q_s8(a->q + 32 * g + 16);
            const float d = a->d[g];
            const uint16x8_t half[2] = { scale_half(vld1_u8(w + 256)), scale_half(vld1_u8(w + 264)) };
            BAKE_UNROLL
            for (int i = 0; i < 4; i++) { /* four rows each */
                int8x16_t lo[4], hi[4];
                BAKE_UNROLL
                for (int p = 0; p < 4; p++) {
                    const uint8x16_t x = vld1q_u8(w + 64 * p + 16 * i);
                    lo[p] = vreinterpretq_s8_u8(vandq_u8(x, vdupq_n_u8(15)));
                    hi[p] = vreinterpretq_s8_u8(vshrq_n_u8(x, 4));
                }
                int32x4_t s0 = vdotq_laneq_s32(vdupq_n_s32(a->bias[g]), lo[0], a0, 0);
                int32x4_t s1 = vdotq_laneq_s32(vdupq_n_s32(0), hi[0], a0, 1);
                s0 = vdotq_laneq_s32(s0, lo[1], a0, 2);
                s1 = vdotq_laneq_s32(s1, hi[1], a0, 3);
                s0 = vdotq_laneq_s32(s0, lo[2], a1, 0);
                s1 = vdotq_laneq_s32(s1, hi[2], a1, 1);
                s0 = vdotq_laneq_s32(s0, lo[3], a1, 2);
                s1 = vdotq_laneq_s32(s1, hi[3], a1, 3);
                const float32x4_t scale = scales4(i % 2 ? vget_high_u16(half[i / 2]) : vget_low_u16(half[i / 2]));
                acc[i] = vfmaq_f32(acc[i], vcvtq_f32_s32(vaddq_s32(s0, s1)), vmulq_n_f32(scale, d));
            }
        }
        BAKE_UNROLL
        for (int i = 0; i < 4; i++) {
            vst1q_f32(out + r + 4 * i, acc[i]);
        }
    }
}

#endif
