/* The bake-off: how should the digits of TP2_1 be packed? Shared by the driver and the kernels.
 *
 * Every candidate holds the same weights (digits 0..8, 32 a group) and the same 8-bit scales. A word or a
 * byte is a fraction; a digit is what overflows when it is multiplied by the base.
 *
 * unit32_rows    the file's unit: 32 weights, 14 bytes (ptqtp.h), row by row, by the present kernels.
 * unit32_pairs   the same bytes; the kernel takes two rows at a time, with prepared activations.
 * block64_rows   64 weights, 28 bytes: 13 words of five base-9 digits, 2 scale bytes.
 *                word l: digits 0, 1 = weights 2l, 2l+1 of group 0; digits 2, 3 = the same of group 1;
 *                digit 4 = weights 26..31 of group 0 (l = 0..5), of group 1 (l = 6..11), spare (l = 12).
 * block256_rows  256 weights, 112 bytes: 52 words, 8 scale bytes, all activations in natural order.
 *                word 16i + l, i < 3: digits 0, 1 = weights 2l, 2l+1 of group 2i; digits 2, 3 = of group 2i+1;
 *                digit 4 = weight 2l of group 6 (i = 0), 2l+1 of group 6 (i = 1), 2l of group 7 (i = 2).
 *                word 48 + j, j < 4: digit k < 4 = weight 2(4k+j)+1 of group 7; digit 4 spare.
 * planes_rows    256 weights, 112 bytes: two planes of trits, five a byte. Bytes 0..31, 64..79, 96..99 are plane 1,
 *                32..63, 80..95, 100..103 plane 2, 104..111 scales. Trit k of byte j of the three parts of a plane:
 *                weight 32k+j, 160+16k+j, 240+4k+j (k < 4).
 * base9_panel    16 rows x 32 weights, 224 bytes: byte 64p + 4*row + b = byte 4p + b of that row's unit, p < 3;
 *                byte 192 + 2*row + b = byte 12 + b.
 * base9_shifts   the same bytes (NEON): decoded by shifts and additions, not by multiplication.
 * planes_panel   16 rows x 64 weights, 448 bytes: byte 64i + 4*row + b (plane 1; 192 + ... plane 2), trit k = weight
 *                4(5i+k) + b, i < 3; byte 384 + row (plane 1; 400 + row plane 2), trit k < 4 = weight 60+k;
 *                byte 416 + 16*g + row = scale of group g.
 * nibbles_panel  16 rows x 32 weights, 272 bytes: byte 64p + 4*row + b = weight 8p+b (low), 8p+4+b (high), p < 4,
 *                as level + 5; byte 256 + row = scale. 4.25 bits a weight, so for memory only, never for a file.
 *
 * The bytes of both planes layouts are stored with the top bit flipped, for signed comparisons.
 */
#ifndef PTQTP_BENCH_BAKEOFF_H
#define PTQTP_BENCH_BAKEOFF_H

#include "codec/unit.h"
#include "kernels/kernels.h"

/* One activation row, prepared before the clock starts. */
struct bake_acts {
    const int8_t * q;       /* in the kernel's own order */
    const int32_t * bias;   /* a group: -5 * the sum of its activations */
    const int16_t * bias16; /* the same modulo 2^16 */
    const float * d;        /* a group: its scale */
    const ptqtp_block_q8_0 * q8_0;
};

/* out[r] = dot of row r with the activations. rows: a multiple of 16. Reads at most 32 bytes past the weights. */
typedef void bake_fn(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols);

#define BAKE_UNROLL _Pragma("GCC unroll 8") /* before short loops that keep an array in registers */

/* All kernels but unit32_rows fetch this far ahead; hardware alone stops at every page of 4 KiB. */
enum { BAKE_AHEAD = 4096 };

static inline void bake_prefetch(const uint8_t * p, int bytes) {
    for (int i = 0; i < bytes; i += 64) {
        __builtin_prefetch(p + BAKE_AHEAD + i);
    }
}

/* X(layout, isa, order): order = which activation meets which byte, a function in bakeoff-layout.c */
#ifdef PTQTP_X86
#    define BAKE_KERNELS(X)                                                                                            \
        X(unit32_rows, scalar, natural)                                                                                \
        X(unit32_rows, avx2, natural)                                                                                  \
        X(unit32_pairs, avx2, unit32)                                                                                  \
        X(block64_rows, avx2, block64)                                                                                 \
        X(block256_rows, avx2, natural)                                                                                \
        X(planes_rows, avx2, natural)                                                                                  \
        X(base9_panel, avx2, twobytes)                                                                                 \
        X(planes_panel, avx2, natural)                                                                                 \
        X(nibbles_panel, avx2, natural)                                                                                \
        X(block256_rows, avxvnni, natural)                                                                             \
        X(planes_rows, avxvnni, natural)                                                                               \
        X(base9_panel, avxvnni, fourbytes)                                                                             \
        X(planes_panel, avxvnni, natural)                                                                              \
        X(nibbles_panel, avxvnni, natural)                                                                             \
        X(block256_rows, avx512bw, natural)                                                                            \
        X(planes_rows, avx512bw, natural)                                                                              \
        X(base9_panel, avx512bw, fourbytes)                                                                            \
        X(planes_panel, avx512bw, natural)                                                                             \
        X(nibbles_panel, avx512bw, natural)                                                                            \
        X(block256_rows, avx512vnni, natural)                                                                          \
        X(planes_rows, avx512vnni, natural)                                                                            \
        X(base9_panel, avx512vnni, fourbytes)                                                                          \
        X(planes_panel, avx512vnni, natural)                                                                           \
        X(nibbles_panel, avx512vnni, natural)
#elif defined(PTQTP_ARM64)
#    define BAKE_KERNELS(X)                                                                                            \
        X(unit32_rows, scalar, natural)                                                                                \
        X(unit32_rows, neon_dotprod, natural)                                                                          \
        X(block256_rows, neon_dotprod, natural)                                                                        \
        X(planes_rows, neon_dotprod, natural)                                                                          \
        X(base9_panel, neon_dotprod, fourbytes)                                                                        \
        X(base9_shifts, neon_dotprod, fourbytes)                                                                       \
        X(nibbles_panel, neon_dotprod, natural)
#else
#    define BAKE_KERNELS(X) X(unit32_rows, scalar, natural)
#endif

#define BAKE_DECLARE(layout, isa, order) bake_fn bake_##layout##_##isa;
BAKE_KERNELS(BAKE_DECLARE)
#undef BAKE_DECLARE

enum { BAKE_LAYOUTS = 9, BAKE_MAX_ORDER = 512 };

struct bake_layout {
    const char * name;
    int rows, cols, bytes; /* of one unit; columns are padded to a multiple of it */
    void (*pack)(const uint8_t * digits, long stride, const uint8_t * codes, long code_stride, uint8_t * dst);
};
extern const struct bake_layout bake_layouts[BAKE_LAYOUTS];
const struct bake_layout * bake_find_layout(const char * name);

/* Fills order[0..n): byte i of the prepared activations of a unit of columns is activation order[i], or 0 if that is
 * negative. Returns n; 0 = natural order. */
typedef int bake_order(int16_t * order);
bake_order bake_order_natural, bake_order_unit32, bake_order_block64, bake_order_twobytes, bake_order_fourbytes;

#endif
