/* What a panel kernel is. Private to ptqtp-panel*.c.
 *
 * The order of a tile's 32 weights in ptqtp_act.q and in unpacked codes: eight quads of four weights. A quad is
 * what one 32-bit lane (a row) holds when two digits of a word pair are joined to bytes:
 *
 *     quads 0, 1, 2   digits 0 and 1 of word pair p      weights 4p .. 4p+3
 *     quads 3, 4, 5   digits 2 and 3 of word pair p      weights 14+4p .. 14+4p+3
 *     quad  6         digit 4 of pairs 0 and 1           weights 26, 28, 27, 29
 *     quad  7         digit 4 of pair 2, the remainder   weights 30, 12, 31, 13
 *
 * TP2_2's chain (codec/trellis.h) takes byte 0 of quads 0 to 7, then byte 1, and so on: the two weights before those of
 * a quad are the two quads before it; before quad 0 stand quads 7 and 6 a byte further, and in byte 0, where the chain
 * closes, with the sign changed.
 */
#ifndef PTQTP_KERNELS_PANEL_H
#define PTQTP_KERNELS_PANEL_H

#include "kernels/kernels.h"

#define PTQTP_QUADS 8
#define PTQTP_LEVEL_BIAS 6   /* what decoded levels, -6 .. 6, have added */
#define PTQTP_CODES_SIZE 512 /* bytes of a tile's unpacked codes: 8 quads x 16 rows x 4 weights */

/* What ptqtp_gemm unpacks at a time: so many panels, */
#define PTQTP_BLOCK_PANELS 8
#define PTQTP_BLOCK_TILES 16 /* so many tiles each: 72 KB, in L2, while the columns' activations pass through L1 */

/* How a tile is decoded: wide ones hold levels, so they are alike. */
enum ptqtp_layout { PTQTP_LAYOUT_TP2_1 = 0, PTQTP_LAYOUT_WIDE = 1, PTQTP_LAYOUT_TP2_2 = 2 };

static inline int ptqtp_layout(int type, int form) {
    return form == PTQTP_WIDE ? PTQTP_LAYOUT_WIDE : type == PTQTP_TP2_2 ? PTQTP_LAYOUT_TP2_2 : PTQTP_LAYOUT_TP2_1;
}

struct ptqtp_panel_kernel {
    const char * name;
    bool (*supported)(void);
    void (*gemm_quantize)(const float * x, ptqtp_act * acts, int64_t n);
    struct {                  /* by enum ptqtp_layout */
        size_t gemv_act_size; /* bytes of a block of 32 activations as gemv wants it */
        void (*gemv_quantize)(const float * x, void * acts, int64_t n);
        /* y: 16 floats for each of npanels panels */
        void (*gemv)(int64_t n, int64_t npanels, const void * panels, const void * acts, float * y);
        /* ntiles tiles of one panel -> PTQTP_CODES_SIZE bytes and 16 scales each. The codes are the kernel's own. */
        void (*unpack)(int64_t ntiles, const void * tiles, uint8_t * codes, float * scales);
    } layout[3];
    /* y[c][0..15] (+)= sum over ntiles tiles, for c < ncols <= max_cols */
    void (*gemm)(int64_t ntiles, const uint8_t * codes, const float * scales, int ncols, const ptqtp_act * const * acts,
                 float * const * y, bool add);
    int max_cols;
    /* Instead of gemm, where it is there: a block of panels at once, of which nrows rows are there. The codes and the
     * scales of a panel lie PTQTP_BLOCK_TILES tiles behind those of the one before. */
    void (*gemm_block)(int64_t ntiles, int64_t nrows, const uint8_t * codes, const float * scales, int ncols,
                       const ptqtp_act * const * acts, float * const * y, bool add);
    /* The faster kernel, with the same activations, where at most PTQTP_FEW_COLS columns are left over from 16s. */
    const struct ptqtp_panel_kernel * few;
};

#define PTQTP_FEW_COLS 8

static inline int64_t ptqtp_tile_size(int form) {
    return form == PTQTP_WIDE ? PTQTP_WIDE_TILE_SIZE : PTQTP_TILE_SIZE;
}

/* ptqtp_act.q[i] belongs to weight order[i] */
#define PTQTP_QUAD_ORDER                                                                                               \
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 28, 27, 29, 30, 12, 31, 13

/* A block of 32 activations in weight order: returns d, writes q and their sum. Plain C that the compiler vectorises
 * for the flags of the including file; the same bits everywhere. */
static inline float ptqtp_quantize_act(const float * x, int8_t q[PTQTP_UNIT], int32_t * sum) {
    int32_t bits[PTQTP_UNIT], top = 0;
    __builtin_memcpy(bits, x, sizeof bits);
    for (int i = 0; i < PTQTP_UNIT; i++) {
        const int32_t magnitude = bits[i] & 0x7fffffff; /* orders like the float itself */
        top = magnitude > top ? magnitude : top;
    }
    if (top < 0x00800000 || top >= 0x7f800000) { /* all zero (or denormal), or Inf or NaN */
        __builtin_memset(q, 0, PTQTP_UNIT);
        *sum = 0;
        return top < 0x00800000 ? 0.0f : __builtin_nanf("");
    }
    float max;
    __builtin_memcpy(&max, &top, sizeof max);
    const float inverse = 127.0f / max;
    int32_t s = 0;
    for (int i = 0; i < PTQTP_UNIT; i++) {
        const float shifted = x[i] * inverse + 12582912.0f; /* 1.5 * 2^23: rounds to nearest even */
        __builtin_memcpy(&bits[i], &shifted, sizeof bits[i]);
        bits[i] -= 0x4b400000;
        s += bits[i];
    }
    for (int i = 0; i < PTQTP_UNIT; i++) {
        q[i] = (int8_t) bits[i];
    }
    *sum = s;
    return max / 127.0f;
}

/* The body of gemm_quantize, for each file's own flags. */
static inline void ptqtp_quantize_quads(const float * x, ptqtp_act * acts, int64_t n) {
    static const uint8_t order[PTQTP_UNIT] = { PTQTP_QUAD_ORDER };
    for (int64_t i = 0; i < n / PTQTP_UNIT; i++) {
        int8_t q[PTQTP_UNIT];
        int32_t sum;
        acts[i].d = ptqtp_quantize_act(x + i * PTQTP_UNIT, q, &sum);
        acts[i].bias = -PTQTP_LEVEL_BIAS * sum;
        __builtin_memcpy(acts[i].q, q, 12); /* the quad order: two runs, and eight odd ones */
        __builtin_memcpy(acts[i].q + 12, q + 14, 12);
        for (int k = 24; k < PTQTP_UNIT; k++) {
            acts[i].q[k] = q[order[k]];
        }
    }
}

#define PTQTP_PANEL_KERNEL(isa) extern const struct ptqtp_panel_kernel ptqtp_panel_##isa;
#define PTQTP_KERNEL(isa, type, symbol)
#include "kernels/kernels.inc"
#undef PTQTP_PANEL_KERNEL
#undef PTQTP_KERNEL

#endif
