/* A second decoder, for verification: what a quantizer meant and what the file holds are compared by checksum, and
 * this file shares nothing with the codec but the layout. A word q is not decoded by multiplying and shifting: its
 * number N = floor(q * 59049 / 65536) is split by division, the digits come from tables filled by counting, and q is
 * one that a packer writes if and only if it is the first with that N. */
#include "codec/check.h"

#include <math.h>
#include <string.h>

enum { THREE = 729, TWO = 81, FIVE = TWO * THREE };

/* Trits + 1 of a digit: first * 16 + second. */
struct ptqtp_check_tables {
    uint8_t two[TWO][2], three[THREE][4];
};

static struct ptqtp_check_tables tables;

static void count(uint8_t * digits, int n) { /* the next number of n base-9 digits */
    for (int i = n - 1; i >= 0; i--) {
        digits[i] = (uint8_t) (digits[i] % 16 < 2 ? digits[i] + 1 : digits[i] < 32 ? digits[i] - 2 + 16 : 0);
        if (digits[i] != 0) {
            return;
        }
    }
}

void ptqtp_check_init(void) {
    uint8_t digits[3] = { 0 };
    for (int i = 0; i < THREE; i++) {
        memcpy(tables.three[i], digits, 3);
        count(digits, 3);
    }
    for (int i = 0; i < TWO; i++) {
        memcpy(tables.two[i], digits + 1, 2);
        count(digits + 1, 2);
    }
}

/* trits: 32 bytes as in the tables; false where a word is not canonical */
static inline bool unit_trits(const uint8_t * unit, uint8_t * trits) {
    uint32_t worst = 0;
    for (int j = 0; j < 6; j++) {
        const uint32_t p = (unit[2 * j] + 256u * unit[2 * j + 1]) * FIVE;
        const uint32_t n = p / 65536, rest = p % 65536;
        worst = rest > worst ? rest : worst;
        const uint8_t *high = tables.two[n / THREE], *low = tables.three[n % THREE];
        memcpy(trits + 2 * j, high, 2);
        memcpy(trits + 14 + 2 * j, low, 2);
        trits[26 + j] = low[2];
    }
    const uint32_t p = unit[13] * (uint32_t) TWO;
    memcpy(trits + 12, tables.two[p / 256], 2);
    return worst < FIVE && p % 256 < TWO;
}

static float half_by_parts(uint32_t h) {
    const int e = (int) (h >> 10 & 31);
    const float m = (float) (h & 1023);
    const float mag = e ? ldexpf(1 + m / 1024, e - 15) : ldexpf(m, -24);
    return h & 0x8000 ? -mag : mag;
}

static float scale_by_parts(uint32_t code) {
    static const float steps[16] = { 0x1p-15f, 0x1p-14f, 0x1p-13f, 0x1p-12f, 0x1p-11f, 0x1p-10f, 0x1p-9f, 0x1p-8f,
                                     0x1p-7f,  0x1p-6f,  0x1p-5f,  0x1p-4f,  0x1p-3f,  0x1p-2f,  0x1p-1f, 0x1p0f };
    return (1 + (float) (code % 16) / 16) * steps[code / 16];
}

static bool tp2_1(const uint8_t * block, float * out) {
    uint8_t trits[32];
    const bool good = unit_trits(block, trits);
    const float s = scale_by_parts(block[12]);
    for (int i = 0; i < 32; i++) {
        const int t1 = (trits[i] >> 4) - 1, t2 = (trits[i] & 15) - 1;
        out[i] = s * (float) (3 * t1 + 2 * t2);
    }
    return good;
}

static bool tp2_0(const uint8_t * block, float * out) {
    bool good = true;
    const uint32_t h1 = block[12] + 256u * block[26], h2 = block[40] + 256u * block[54];
    const float a1 = half_by_parts(h1), a2 = half_by_parts(h2);
    good &= (h1 >> 10 & 31) != 31 && (h2 >> 10 & 31) != 31;
    for (int u = 0; u < 4; u++) {
        uint8_t trits[32];
        good &= unit_trits(block + 14 * u, trits);
        for (int i = 0; i < 32; i++) {
            const int t1 = (trits[i] >> 4) - 1, t2 = (trits[i] & 15) - 1;
            out[32 * u + i] = a1 * (float) t1 + a2 * (float) t2;
        }
    }
    return good;
}

/* The third trit of TP2_2 by its definition: -t2 of the last two before the first, then a sum mod 3. The places of the
 * chain are counted here: four laps over the eight columns that a unit's words have, a column a pair of digits. */
static bool tp2_2(const uint8_t * block, float * out) {
    uint8_t trits[32];
    int second[34], place[32], n = 0;
    const bool good = unit_trits(block, trits);
    for (int lap = 0; lap < 4; lap++) {
        for (int word = lap / 2; word < 6; word += 2) { /* digits 0 and 1 of even words, then of odd ones */
            place[n++] = 2 * word + lap % 2;
        }
        for (int word = lap / 2; word < 6; word += 2) { /* digits 2 and 3 */
            place[n++] = 14 + 2 * word + lap % 2;
        }
        const int fifth = lap / 2 + 2 * (lap % 2); /* the fifth digits of words 0, 2, 1, 3 */
        place[n++] = 26 + fifth;
        place[n++] = lap % 2 ? 12 + lap / 2 : 30 + lap / 2; /* those of words 4 and 5, and the remainder's two */
    }
    for (int i = 0; i < 32; i++) {
        second[2 + i] = trits[place[i]] & 15; /* 0, 1, 2 */
    }
    second[0] = 2 - second[32];
    second[1] = 2 - second[33];
    const float s = scale_by_parts(block[12]);
    for (int i = 0; i < 32; i++) {
        static const int third[3] = { 1, -1, 0 }; /* of a sum that is 2 too large, mod 3 */
        const int t1 = (trits[place[i]] >> 4) - 1, t2 = second[2 + i] - 1, p = third[(second[i] + second[i + 1]) % 3];
        out[place[i]] = s * (float) (3 * t1 + 2 * t2 + p);
    }
    return good;
}

/* By type: the decoder of a block, which says whether a packer writes it. A list of its own, as this file shares
 * nothing with the codec. */
static const struct decoder {
    int type, weights, size;
    bool (*decode)(const uint8_t * block, float * out);
} decoders[] = { { PTQTP_TP2_0, 128, 56, tp2_0 }, { PTQTP_TP2_1, 32, 14, tp2_1 }, { PTQTP_TP2_2, 32, 14, tp2_2 } };

static const struct decoder * decoder_of(int type) {
    for (size_t i = 0; i < sizeof decoders / sizeof decoders[0]; i++) {
        if (decoders[i].type == type) {
            return &decoders[i];
        }
    }
    return NULL;
}

int64_t ptqtp_check_piece(int type, const uint8_t * data, int64_t nblocks, uint64_t first, ptqtp_hash_fn hash,
                          uint64_t * sum) {
    enum { BUFFER = 2048 };
    float buffer[BUFFER];
    const struct decoder * d = decoder_of(type);
    if (!d) { /* what cannot be checked is not good */
        return 0;
    }
    int64_t bad = -1;
    for (int64_t i = 0; i < nblocks;) {
        int64_t n = 0;
        for (; i < nblocks && n < BUFFER; i++, n += d->weights, data += d->size) {
            const bool good = d->decode(data, buffer + n);
            bad = bad < 0 && !good ? i : bad;
        }
        *sum += hash(buffer, n, first);
        first += (uint64_t) n;
    }
    return bad;
}
