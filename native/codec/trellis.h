/* TP2_2's third trit. The 32 weights of a unit form a chain; the trit p of each follows from the stored second trits of
 * the two before it, by a ternary convolutional code:
 *
 *     w = s * (3*t1 + 2*t2 + p),    p = bal(t2[-1] + t2[-2])        bal: mod 3, to -1, 0, 1
 *
 * The chain closes with the sign changed: before its first weight stand -t2 of the last two. So no two units with the
 * same scale hold the same levels: where the chain without that change would have nine starts for the same levels, this
 * one has one. Private to the codec, the quantizers and the scalar kernels. */
#ifndef PTQTP_CODEC_TRELLIS_H
#define PTQTP_CODEC_TRELLIS_H

#include "codec/unit.h"

#include <stdbool.h>

/* The weight at each place of the chain: byte k of all eight quads (kernels/panel.h) in turn, then byte k + 1. So the
 * weights before those of a SIMD vector are the two vectors decoded before it. */
#define PTQTP_CHAIN_ORDER                                                                                              \
    0, 4, 8, 14, 18, 22, 26, 30, 1, 5, 9, 15, 19, 23, 28, 12, 2, 6, 10, 16, 20, 24, 27, 31, 3, 7, 11, 17, 21, 25, 29, 13

/* A state is the pair of trits before a weight: 3 * (t2[-2] + 1) + t2[-1] + 1. That of a chain's end with the sign
 * changed, which is its start, is 8 less it. */
enum { PTQTP_STATES = 9, PTQTP_NO_STATE = -1 };

static inline int ptqtp_bal(int v) { /* v = -4 .. 4 */
    return v > 1 ? v - 3 : v < -1 ? v + 3 : v;
}

/* digits 0..8 -> levels -6..6, 32 of each in weight order */
static inline void ptqtp_trellis_levels(const uint8_t * digits, int8_t * levels) {
    static const uint8_t chain[PTQTP_UNIT] = { PTQTP_CHAIN_ORDER };
    int before2 = -ptqtp_t2(digits[chain[30]]), before = -ptqtp_t2(digits[chain[31]]);
    for (int c = 0; c < PTQTP_UNIT; c++) {
        const uint8_t digit = digits[chain[c]];
        levels[chain[c]] = (int8_t) (ptqtp_level[digit] + ptqtp_bal(before + before2));
        before2 = before;
        before = ptqtp_t2(digit);
    }
}

/* The levels of a unit of a type with one scale, in weight order. */
static inline void ptqtp_unit_levels(int type, const ptqtp_unit * u, int8_t * levels) {
    uint8_t digits[PTQTP_UNIT];
    ptqtp_unit_unpack(u, digits);
    if (type == PTQTP_TP2_2) {
        ptqtp_trellis_levels(digits, levels);
        return;
    }
    for (int i = 0; i < PTQTP_UNIT; i++) {
        levels[i] = ptqtp_level[digits[i]];
    }
}

/* One lap from a state: the state that it ends in. digits may be NULL; PTQTP_NO_STATE where a level has no digit. */
static inline int ptqtp_trellis_lap(const int8_t * levels, int state, uint8_t * digits) {
    static const uint8_t chain[PTQTP_UNIT] = { PTQTP_CHAIN_ORDER };
    int before2 = state / 3 - 1, before = state % 3 - 1;
    for (int c = 0; c < PTQTP_UNIT; c++) {
        const int level = levels[chain[c]], p = ptqtp_bal(before + before2);
        const int t2 = ptqtp_bal(p - (level % 3)), rest = level - p - 2 * t2; /* level = 2*t2 + p = p - t2 mod 3 */
        if (digits) {
            if (rest < -3 || rest > 3) {
                return PTQTP_NO_STATE;
            }
            digits[chain[c]] = (uint8_t) (3 * (rest / 3 + 1) + t2 + 1);
        }
        before2 = before;
        before = t2;
    }
    return 3 * (before2 + 1) + before + 1;
}

/* The inverse of ptqtp_trellis_levels; false where no digits give these levels, each -6..6. The trits of a lap are
 * linear in its start, 32 steps are a multiple of the code's period of 8, and so a lap from start S ends in S + E, E
 * being the end of one from zero. It must end in -S: S = -(S + E), so S = E. */
static inline bool ptqtp_trellis_digits(const int8_t * levels, uint8_t * digits) {
    const int start = ptqtp_trellis_lap(levels, 4, NULL);
    return ptqtp_trellis_lap(levels, start, digits) == 8 - start;
}

#endif
