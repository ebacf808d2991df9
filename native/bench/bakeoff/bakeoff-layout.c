/* Packs one unit of each candidate layout, slowly, and says in which order its kernels want the activations. */
#include "bench/bakeoff/bakeoff.h"

static int weight_of(int word, int digit) { /* the unit's digit order, see ptqtp.h */
    return digit < 2 ? 2 * word + digit : digit < 4 ? 14 + 2 * word + digit - 2 : 26 + word;
}

static uint32_t word_of(const uint8_t d[5]) {
    return ptqtp_encode_word((((d[0] * 9u + d[1]) * 9u + d[2]) * 9u + d[3]) * 9u + d[4]);
}

/* five trits, 0..2 each, top bit flipped */
static uint8_t byte_of(const uint8_t t[5]) {
    const uint32_t n = (((t[0] * 3u + t[1]) * 3u + t[2]) * 3u + t[3]) * 3u + t[4];
    return (uint8_t) (((n * 256 + 242) / 243) ^ 0x80);
}

static uint8_t trit(int digit, int plane) {
    return (uint8_t) (plane ? digit % 3 : digit / 3);
}

static void pack_unit32(const uint8_t * digits, long stride, const uint8_t * codes, long code_stride, uint8_t * dst) {
    (void) stride;
    (void) code_stride;
    ptqtp_unit_pack(digits, codes[0], (ptqtp_unit *) dst);
}

static void pack_block64(const uint8_t * x, long stride, const uint8_t * codes, long code_stride, uint8_t * dst) {
    (void) stride;
    (void) code_stride;
    for (int l = 0; l < 13; l++) {
        const uint8_t last = l < 6 ? x[26 + l] : l < 12 ? x[32 + 26 + l - 6] : 0;
        const uint8_t d[5] = { x[2 * l], x[2 * l + 1], x[32 + 2 * l], x[32 + 2 * l + 1], last };
        ptqtp_put_u16(dst + 2 * l, word_of(d));
    }
    memcpy(dst + 26, codes, 2);
}

static void pack_block256(const uint8_t * x, long stride, const uint8_t * codes, long code_stride, uint8_t * dst) {
    (void) stride;
    (void) code_stride;
    static const int last[3] = { 6 * 32, 6 * 32 + 1, 7 * 32 };
    for (int i = 0; i < 3; i++) {
        for (int l = 0; l < 16; l++) {
            const uint8_t * g = x + 64 * i + 2 * l;
            const uint8_t d[5] = { g[0], g[1], g[32], g[33], x[last[i] + 2 * l] };
            ptqtp_put_u16(dst + 2 * (16 * i + l), word_of(d));
        }
    }
    for (int j = 0; j < 4; j++) {
        uint8_t d[5] = { 0 };
        for (int k = 0; k < 4; k++) {
            d[k] = x[224 + 2 * (4 * k + j) + 1];
        }
        ptqtp_put_u16(dst + 2 * (48 + j), word_of(d));
    }
    memcpy(dst + 104, codes, 8);
}

static void pack_planes(const uint8_t * x, long stride, const uint8_t * codes, long code_stride, uint8_t * dst) {
    (void) stride;
    (void) code_stride;
    static const struct {
        int bytes, trits, weight, at[2];
    } parts[3] = { { 32, 5, 0, { 0, 32 } }, { 16, 5, 160, { 64, 80 } }, { 4, 4, 240, { 96, 100 } } };
    for (int part = 0; part < 3; part++) {
        for (int plane = 0; plane < 2; plane++) {
            for (int j = 0; j < parts[part].bytes; j++) {
                uint8_t t[5] = { 0 };
                for (int k = 0; k < parts[part].trits; k++) {
                    t[k] = trit(x[parts[part].weight + parts[part].bytes * k + j], plane);
                }
                dst[parts[part].at[plane] + j] = byte_of(t);
            }
        }
    }
    memcpy(dst + 104, codes, 8);
}

static void pack_base9_panel(const uint8_t * digits, long stride, const uint8_t * codes, long code_stride,
                             uint8_t * dst) {
    for (int row = 0; row < 16; row++) {
        uint8_t unit[sizeof(ptqtp_unit)];
        ptqtp_unit_pack(digits + row * stride, codes[row * code_stride], (ptqtp_unit *) unit);
        for (int p = 0; p < 3; p++) {
            memcpy(dst + 64 * p + 4 * row, unit + 4 * p, 4);
        }
        memcpy(dst + 192 + 2 * row, unit + 12, 2);
    }
}

static void pack_planes_panel(const uint8_t * digits, long stride, const uint8_t * codes, long code_stride,
                              uint8_t * dst) {
    for (int row = 0; row < 16; row++) {
        const uint8_t * x = digits + row * stride;
        for (int plane = 0; plane < 2; plane++) {
            for (int i = 0; i < 3; i++) {
                for (int b = 0; b < 4; b++) {
                    uint8_t t[5];
                    for (int k = 0; k < 5; k++) {
                        t[k] = trit(x[4 * (5 * i + k) + b], plane);
                    }
                    dst[192 * plane + 64 * i + 4 * row + b] = byte_of(t);
                }
            }
            uint8_t t[5] = { 0 };
            for (int k = 0; k < 4; k++) {
                t[k] = trit(x[60 + k], plane);
            }
            dst[384 + 16 * plane + row] = byte_of(t);
        }
        dst[416 + row] = codes[row * code_stride];
        dst[432 + row] = codes[row * code_stride + 1];
    }
}

static void pack_nibbles_panel(const uint8_t * digits, long stride, const uint8_t * codes, long code_stride,
                               uint8_t * dst) {
    for (int row = 0; row < 16; row++) {
        for (int p = 0; p < 4; p++) {
            for (int b = 0; b < 4; b++) {
                const uint8_t * x = digits + row * stride + 8 * p + b;
                dst[64 * p + 4 * row + b] = (uint8_t) ((ptqtp_level[x[0]] + 5) | (ptqtp_level[x[4]] + 5) << 4);
            }
        }
        dst[256 + row] = codes[row * code_stride];
    }
}

const struct bake_layout bake_layouts[BAKE_LAYOUTS] = {
    { "unit32_rows", 1, 32, 14, pack_unit32 },
    { "unit32_pairs", 1, 32, 14, pack_unit32 }, /* the same bytes; the kernel takes two rows at a time */
    { "block64_rows", 1, 64, 28, pack_block64 },
    { "block256_rows", 1, 256, 112, pack_block256 },
    { "planes_rows", 1, 256, 112, pack_planes },
    { "base9_panel", 16, 32, 224, pack_base9_panel },
    { "base9_shifts", 16, 32, 224, pack_base9_panel },
    { "planes_panel", 16, 64, 448, pack_planes_panel },
    { "nibbles_panel", 16, 32, 272, pack_nibbles_panel },
};

const struct bake_layout * bake_find_layout(const char * name) {
    for (int i = 0; i < BAKE_LAYOUTS; i++) {
        if (strcmp(bake_layouts[i].name, name) == 0) {
            return &bake_layouts[i];
        }
    }
    return NULL;
}

int bake_order_natural(int16_t * order) {
    (void) order;
    return 0;
}

/* 16 bytes each for digits 0 1 (word 6 included), digits 2 3, digit 4 (low bytes of 16-bit places). */
int bake_order_unit32(int16_t * order) {
    for (int i = 0; i < 48; i++) {
        order[i] = -1;
    }
    for (int j = 0; j < 7; j++) {
        for (int k = 0; k < (j < 6 ? 5 : 2); k++) {
            order[16 * (k / 2) + 2 * j + k % 2] = (int16_t) weight_of(j, k);
        }
    }
    return 48;
}

/* 32 bytes each for digits 0 1, digits 2 3, digit 4 of group 0, digit 4 of group 1. */
int bake_order_block64(int16_t * order) {
    for (int i = 0; i < 128; i++) {
        order[i] = -1;
    }
    for (int i = 0; i < 26; i++) {
        order[i] = (int16_t) i;
        order[32 + i] = (int16_t) (32 + i);
    }
    for (int l = 0; l < 6; l++) {
        order[64 + 2 * l] = (int16_t) (26 + l);
        order[96 + 2 * (6 + l)] = (int16_t) (32 + 26 + l);
    }
    return 128;
}

/* base9_panel, a row in 16 bits: for each pair of words p and digit k, then for the remainder, two bytes twice. */
int bake_order_twobytes(int16_t * order) {
    for (int i = 0; i < 16; i++) {
        const int p = i / 5, k = i % 5;
        const int16_t lo = (int16_t) (p < 3 ? weight_of(2 * p, k) : weight_of(6, 0));
        const int16_t hi = (int16_t) (p < 3 ? weight_of(2 * p + 1, k) : weight_of(6, 1));
        order[4 * i] = order[4 * i + 2] = lo;
        order[4 * i + 1] = order[4 * i + 3] = hi;
    }
    return 64;
}

/* base9_panel, a row in 32 bits: for each pair of words digits 0 1, digits 2 3; then the last digits of pairs 0 and 1;
 * then those of pair 2 with the remainder. */
int bake_order_fourbytes(int16_t * order) {
    for (int v = 0; v < 6; v++) {
        for (int b = 0; b < 4; b++) {
            order[4 * v + b] = (int16_t) weight_of(2 * (v / 2) + b / 2, 2 * (v % 2) + b % 2);
        }
    }
    const int16_t last[8] = { 26, 28, 27, 29, 30, 12, 31, 13 };
    memcpy(order + 24, last, sizeof last);
    return 32;
}
