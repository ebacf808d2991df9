/* The codec of all types: pack, unpack, dequantize, validate. Scalar, portable, without allocation. */
#include "codec/trellis.h"
#include "codec/types.h"
#include "codec/unit.h"

const char * ptqtp_status_text(int status) {
    switch (status) {
        case PTQTP_OK: return "ok";
        case PTQTP_BAD_TYPE: return "not a trit-plane type";
        case PTQTP_BAD_METHOD: return "the method does not make this type, or takes no importance";
        case PTQTP_BAD_SIZE: return "length is no multiple of the block";
        case PTQTP_BAD_DIGIT: return "digit above 8";
        case PTQTP_BAD_WORD: return "a word that no packer writes";
        case PTQTP_BAD_SCALE: return "scale is not finite";
        case PTQTP_NOT_FINITE: return "value is not finite, or importance is negative";
        case PTQTP_TOO_LARGE: return "weight beyond the reach of the type's scales";
        case PTQTP_BAD_BLOCK:
            return "columns no multiple of 32 or above 256, window outside 0..255, or rows that overlap";
        case PTQTP_NO_MEMORY: return "out of memory";
        default: return "unknown status";
    }
}

/* ---- scales ---- */

float ptqtp_scale_to_float(uint8_t code) {
    return ptqtp_scale_value(code);
}

uint8_t ptqtp_scale_from_float(float s) {
    uint32_t bits;
    memcpy(&bits, &s, sizeof bits);
    const uint32_t smallest = 112u << 23;
    if (!(s > 0) || bits <= smallest) { /* zero, negative, NaN with a sign or below the range */
        return 0;
    }
    if (bits >= smallest + (255u << 19)) {
        return 255;
    }
    bits -= smallest;
    const uint32_t low = bits & ((1u << 19) - 1), half = 1u << 18;
    uint32_t code = bits >> 19;
    code += low > half || (low == half && (code & 1));
    return (uint8_t) code;
}

float ptqtp_half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    const uint32_t mag = h & 0x7fff;
    uint32_t bits;
    if (mag >= 0x7c00) { /* Inf, NaN */
        bits = 0x7f800000u | (mag & 0x3ff) << 13;
    } else if (mag >= 0x0400) {
        bits = (mag << 13) + ((127u - 15) << 23);
    } else { /* subnormal: mag * 2^-24, exact in a float */
        const float f = (float) mag * 0x1p-24f;
        memcpy(&bits, &f, sizeof bits);
    }
    bits |= sign;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

uint16_t ptqtp_half_from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    const uint16_t sign = (uint16_t) (bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        return sign | 0x7e00;
    }
    if (bits >= 0x477ff000) { /* rounds to 65536 or more */
        return sign | 0x7c00;
    }
    if (bits < 0x38800000) { /* below 2^-14: count steps of 2^-24; the float adder rounds to nearest even */
        float mag;
        memcpy(&mag, &bits, sizeof mag);
        mag += 0.5f; /* ulp of [0.5, 1) is 2^-24 */
        memcpy(&bits, &mag, sizeof bits);
        return sign | (uint16_t) (bits - 0x3f000000);
    }
    bits -= (127u - 15) << 23;
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t) (bits >> 13);
}

/* ---- pack and unpack ---- */

static bool digits_ok(const uint8_t * digits, int64_t n) {
    uint8_t high = 0;
    for (int64_t i = 0; i < n; i++) {
        high |= digits[i] > 8;
    }
    return !high;
}

int ptqtp_pack_tp2_1(const uint8_t * digits, const void * scales, void * dst, int64_t n) {
    if (n < 0 || n % PTQTP_QK_TP2_1) {
        return PTQTP_BAD_SIZE;
    }
    if (!digits_ok(digits, n)) {
        return PTQTP_BAD_DIGIT;
    }
    const uint8_t * codes = scales;
    block_tp2_1 * b = dst;
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_1; i++) {
        ptqtp_unit_pack(digits + i * PTQTP_QK_TP2_1, codes[i], &b[i].u);
    }
    return PTQTP_OK;
}

int ptqtp_pack_tp2_0(const uint8_t * digits, const void * scales, void * dst, int64_t n) {
    if (n < 0 || n % PTQTP_QK_TP2_0) {
        return PTQTP_BAD_SIZE;
    }
    if (!digits_ok(digits, n)) {
        return PTQTP_BAD_DIGIT;
    }
    const uint16_t * alphas = scales;
    block_tp2_0 * b = dst;
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_0; i++) {
        for (int j = 0; j < 4; j++) {
            const uint8_t side = (uint8_t) (alphas[2 * i + j / 2] >> (j % 2 * 8));
            ptqtp_unit_pack(digits + i * PTQTP_QK_TP2_0 + j * PTQTP_UNIT, side, &b[i].u[j]);
        }
    }
    return PTQTP_OK;
}

int ptqtp_pack_tp2_2(const uint8_t * digits, const void * scales, void * dst, int64_t n) {
    return ptqtp_pack_tp2_1(digits, scales, dst, n); /* the same unit: only what digits mean differs */
}

int ptqtp_unpack_tp2_1(const void * src, uint8_t * digits, void * scales, int64_t n) {
    if (n < 0 || n % PTQTP_QK_TP2_1) {
        return PTQTP_BAD_SIZE;
    }
    uint8_t * codes = scales;
    const block_tp2_1 * b = src;
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_1; i++) {
        ptqtp_unit_unpack(&b[i].u, digits + i * PTQTP_QK_TP2_1);
        codes[i] = b[i].u.side;
    }
    return PTQTP_OK;
}

int ptqtp_unpack_tp2_0(const void * src, uint8_t * digits, void * scales, int64_t n) {
    if (n < 0 || n % PTQTP_QK_TP2_0) {
        return PTQTP_BAD_SIZE;
    }
    uint16_t * alphas = scales;
    const block_tp2_0 * b = src;
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_0; i++) {
        for (int j = 0; j < 4; j++) {
            ptqtp_unit_unpack(&b[i].u[j], digits + i * PTQTP_QK_TP2_0 + j * PTQTP_UNIT);
        }
        alphas[2 * i] = ptqtp_alpha_bits(&b[i], 0);
        alphas[2 * i + 1] = ptqtp_alpha_bits(&b[i], 1);
    }
    return PTQTP_OK;
}

int ptqtp_unpack_tp2_2(const void * src, uint8_t * digits, void * scales, int64_t n) {
    return ptqtp_unpack_tp2_1(src, digits, scales, n);
}

/* ---- dequantize ---- */

void ptqtp_dequantize_tp2_1(const void * src, float * dst, int64_t n) {
    const block_tp2_1 * b = src;
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_1; i++, dst += PTQTP_QK_TP2_1) {
        uint8_t digits[PTQTP_UNIT];
        ptqtp_unit_unpack(&b[i].u, digits);
        const float s = ptqtp_scale_value(b[i].u.side);
        for (int k = 0; k < PTQTP_UNIT; k++) {
            dst[k] = s * (float) ptqtp_level[digits[k]];
        }
    }
}

void ptqtp_dequantize_tp2_0(const void * src, float * dst, int64_t n) {
    const block_tp2_0 * b = src;
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_0; i++) {
        const float a1 = ptqtp_half_to_float(ptqtp_alpha_bits(&b[i], 0));
        const float a2 = ptqtp_half_to_float(ptqtp_alpha_bits(&b[i], 1));
        for (int j = 0; j < 4; j++, dst += PTQTP_UNIT) {
            uint8_t digits[PTQTP_UNIT];
            ptqtp_unit_unpack(&b[i].u[j], digits);
            for (int k = 0; k < PTQTP_UNIT; k++) {
                dst[k] = a1 * (float) ptqtp_t1(digits[k]) + a2 * (float) ptqtp_t2(digits[k]);
            }
        }
    }
}

void ptqtp_dequantize_tp2_2(const void * src, float * dst, int64_t n) {
    const block_tp2_2 * b = src;
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_2; i++, dst += PTQTP_QK_TP2_2) {
        uint8_t digits[PTQTP_UNIT];
        int8_t levels[PTQTP_UNIT];
        ptqtp_unit_unpack(&b[i].u, digits);
        ptqtp_trellis_levels(digits, levels);
        const float s = ptqtp_scale_value(b[i].u.side);
        for (int k = 0; k < PTQTP_UNIT; k++) {
            dst[k] = s * (float) levels[k];
        }
    }
}

/* ---- validate ---- */

static bool unit_ok(const ptqtp_unit * u) {
    for (int j = 0; j < PTQTP_UNIT_WORDS; j++) {
        const uint32_t q = ptqtp_get_u16(u->q + 2 * j);
        if (ptqtp_encode_word(q * (uint64_t) PTQTP_POW5 >> 16) != q) {
            return false;
        }
    }
    return ptqtp_encode_rest(u->r * (uint32_t) PTQTP_POW2 >> 8) == u->r;
}

int ptqtp_validate_block_tp2_1(const void * block) {
    const block_tp2_1 * b = block;
    return unit_ok(&b->u) ? PTQTP_OK : PTQTP_BAD_WORD;
}

int ptqtp_validate_block_tp2_2(const void * block) {
    return ptqtp_validate_block_tp2_1(block);
}

int ptqtp_validate_block_tp2_0(const void * block) {
    const block_tp2_0 * b = block;
    for (int plane = 0; plane < 2; plane++) {
        if ((ptqtp_alpha_bits(b, plane) & 0x7c00) == 0x7c00) {
            return PTQTP_BAD_SCALE;
        }
    }
    for (int j = 0; j < 4; j++) {
        if (!unit_ok(&b->u[j])) {
            return PTQTP_BAD_WORD;
        }
    }
    return PTQTP_OK;
}

int ptqtp_validate(int type, const void * data, size_t nbytes, int64_t * bad_block) {
    const struct ptqtp_type_traits * t = ptqtp_traits(type);
    if (!t) {
        return PTQTP_BAD_TYPE;
    }
    if (nbytes % t->size) {
        return PTQTP_BAD_SIZE;
    }
    const uint8_t * block = data;
    for (int64_t i = 0; i < (int64_t) (nbytes / t->size); i++, block += t->size) {
        const int status = t->validate(block);
        if (status != PTQTP_OK) {
            if (bad_block) {
                *bad_block = i;
            }
            return status;
        }
    }
    return PTQTP_OK;
}
