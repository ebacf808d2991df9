/* The 14-byte unit, digit by digit: the one place in C that knows the digit order (see the picture in ptqtp.h).
 * Private to the codec, the quantizers and the scalar dot product. */
#ifndef PTQTP_CODEC_UNIT_H
#define PTQTP_CODEC_UNIT_H

#include "ptqtp.h"

#include <string.h>

enum { PTQTP_POW5 = 59049, PTQTP_POW2 = 81 }; /* 9^5, 9^2 */

/* Levels in units of the TP2_1 scale, by digit: 3*t1 + 2*t2. */
static const int8_t ptqtp_level[9] = { -5, -3, -1, -2, 0, 2, 1, 3, 5 };

static inline int ptqtp_t1(int digit) {
    return digit / 3 - 1;
}

static inline int ptqtp_t2(int digit) {
    return digit % 3 - 1;
}

static inline uint16_t ptqtp_get_u16(const uint8_t * p) {
    return (uint16_t) (p[0] | p[1] << 8);
}

static inline void ptqtp_put_u16(uint8_t * p, uint32_t v) {
    p[0] = (uint8_t) (v & 0xff);
    p[1] = (uint8_t) (v >> 8);
}

static inline uint32_t ptqtp_encode_word(uint32_t n) { /* n < 9^5 */
    return (n * 65536u + PTQTP_POW5 - 1) / PTQTP_POW5;
}

static inline uint32_t ptqtp_encode_rest(uint32_t n) { /* n < 9^2 */
    return (n * 256u + PTQTP_POW2 - 1) / PTQTP_POW2;
}

/* digits: 32 bytes 0..8 in weight order */
static inline void ptqtp_unit_pack(const uint8_t * digits, uint8_t side, ptqtp_unit * u) {
    for (int j = 0; j < PTQTP_UNIT_WORDS; j++) {
        const uint8_t * a = digits + 2 * j;
        const uint8_t * b = digits + 14 + 2 * j;
        const uint32_t n = (((a[0] * 9u + a[1]) * 9u + b[0]) * 9u + b[1]) * 9u + digits[26 + j];
        ptqtp_put_u16(u->q + 2 * j, ptqtp_encode_word(n));
    }
    u->side = side;
    u->r = (uint8_t) ptqtp_encode_rest(digits[12] * 9u + digits[13]);
}

/* Any unit gives digits 0..8. */
static inline void ptqtp_unit_unpack(const ptqtp_unit * u, uint8_t * digits) {
    for (int j = 0; j < PTQTP_UNIT_WORDS; j++) {
        uint32_t q = ptqtp_get_u16(u->q + 2 * j);
        uint8_t d[5];
        for (int k = 0; k < 5; k++) {
            q *= 9;
            d[k] = (uint8_t) (q >> 16);
            q &= 0xffff;
        }
        digits[2 * j] = d[0];
        digits[2 * j + 1] = d[1];
        digits[14 + 2 * j] = d[2];
        digits[14 + 2 * j + 1] = d[3];
        digits[26 + j] = d[4];
    }
    /* word 6 as a SIMD kernel sees it, side byte included, so that any bytes decode alike everywhere */
    const uint32_t q = (u->r * 256u + u->side) * 9;
    digits[12] = (uint8_t) (q >> 16);
    digits[13] = (uint8_t) ((q & 0xffff) * 9 >> 16);
}

static inline float ptqtp_scale_value(uint8_t code) {
    const uint32_t bits = ((uint32_t) code << 19) + (112u << 23);
    float s;
    memcpy(&s, &bits, sizeof s);
    return s;
}

/* The fp16 scales of a TP2_0 block, scattered over the side bytes of its units. */
static inline uint16_t ptqtp_alpha_bits(const block_tp2_0 * b, int plane) {
    return (uint16_t) (b->u[2 * plane].side | b->u[2 * plane + 1].side << 8);
}

#endif
