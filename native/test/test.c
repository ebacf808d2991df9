/* Native tests: codec, quantizers, and every kernel of kernels/kernels.inc against the scalar reference.
 *
 *     ptqtp-test              run all; exit 1 at the first failure, named
 *     ptqtp-test --kernel     print "TYPE NAME" of the kernels chosen, "none" where PTQTP_KERNEL names none
 */
#define _GNU_SOURCE
#include "test/test.h"
#include "codec/trellis.h"
#include "codec/unit.h"
#include "kernels/kernels.h"

#include <sys/mman.h>
#include <unistd.h>

/* n bytes whose end touches a page that cannot be read: an over-read is a crash, at every alignment of n. */
static uint8_t * guarded(size_t n) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), pages = (n + page - 1) / page;
    uint8_t * p = mmap(NULL, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED, "mmap");
    CHECK(mprotect(p + pages * page, page, PROT_NONE) == 0, "mprotect");
    return p + pages * page - n;
}

static void release(uint8_t * p, size_t n) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), pages = (n + page - 1) / page;
    munmap(p + n - pages * page, (pages + 1) * page);
}

/* ---- codec ---- */

static void test_words(void) {
    for (uint32_t n = 0; n < PTQTP_POW5; n++) {
        const uint32_t w = ptqtp_encode_word(n);
        CHECK(w <= 65535 && w * (uint64_t) PTQTP_POW5 >> 16 == n, "n = %u", n);
        uint32_t q = w, back = 0;
        for (int k = 0; k < 5; k++) {
            q *= 9;
            back = back * 9 + (q >> 16);
            q &= 0xffff;
        }
        CHECK(back == n, "n = %u decodes to %u", n, back);
    }
    for (uint32_t n = 0; n < PTQTP_POW2; n++) {
        for (uint32_t side = 0; side < 256; side++) {
            ptqtp_unit u = { { 0 }, (uint8_t) side, (uint8_t) ptqtp_encode_rest(n) };
            uint8_t d[PTQTP_UNIT];
            ptqtp_unit_unpack(&u, d);
            CHECK(d[12] * 9u + d[13] == n, "rest %u with side byte %u", n, side);
        }
    }
}

static void test_any_bytes_decode(void) {
    int canonical = 0;
    for (uint32_t w = 0; w < 65536; w++) {
        block_tp2_1 b = { { { 0 }, 0xf0, 0 } };
        ptqtp_put_u16(b.u.q, w);
        uint8_t d[PTQTP_UNIT], code;
        ptqtp_unpack_tp2_1(&b, d, &code, PTQTP_UNIT);
        for (int i = 0; i < PTQTP_UNIT; i++) {
            CHECK(d[i] <= 8, "word %u gives digit %u", w, d[i]);
        }
        int64_t bad = -1;
        const int status = ptqtp_validate(PTQTP_TP2_1, &b, sizeof b, &bad);
        canonical += status == PTQTP_OK;
        CHECK(status == PTQTP_OK ? bad == -1 : status == PTQTP_BAD_WORD && bad == 0, "word %u", w);
    }
    CHECK(canonical == PTQTP_POW5, "%d words pass", canonical);
    int rests = 0;
    for (uint32_t r = 0; r < 256; r++) {
        block_tp2_1 b = { { { 0 }, 0, (uint8_t) r } };
        rests += ptqtp_validate(PTQTP_TP2_1, &b, sizeof b, NULL) == PTQTP_OK;
    }
    CHECK(rests == PTQTP_POW2, "%d remainder bytes pass", rests);
}

static void test_scales(void) {
    for (int c = 0; c < 256; c++) {
        const float s = ptqtp_scale_to_float((uint8_t) c);
        CHECK(s == ldexpf(1 + (float) (c % 16) / 16, c / 16 - 15), "code %d is %g", c, s);
        CHECK(ptqtp_scale_from_float(s) == c, "code %d does not come back", c);
        if (c < 255) {
            const float mid = (s + ptqtp_scale_to_float((uint8_t) (c + 1))) / 2; /* exact; ties to the even code */
            CHECK(ptqtp_scale_from_float(mid) == c + c % 2, "tie above %d", c);
            CHECK(ptqtp_scale_from_float(nextafterf(mid, 0)) == c, "below the tie above %d", c);
            CHECK(ptqtp_scale_from_float(nextafterf(mid, 9)) == c + 1, "above the tie above %d", c);
        }
    }
    CHECK(ptqtp_scale_from_float(0) == 0 && ptqtp_scale_from_float(-1) == 0, "zero and below");
    CHECK(ptqtp_scale_from_float(1e9f) == 255 && ptqtp_scale_from_float(INFINITY) == 255, "above the range");
    for (uint32_t h = 0; h < 65536; h++) {
        const float f = ptqtp_half_to_float((uint16_t) h);
        if (isnan(f)) {
            CHECK((h & 0x7c00) == 0x7c00 && (h & 0x3ff), "half %x is NaN", h);
        } else {
            CHECK(ptqtp_half_from_float(f) == h, "half %x comes back as %x", h, ptqtp_half_from_float(f));
        }
    }
    CHECK(ptqtp_half_from_float(65519.996f) == 0x7bff && ptqtp_half_from_float(65520) == 0x7c00, "half overflow");
}

/* The table says of each type what its bytes say; and what is packed unpacks, validates and reads back alike. */
static void test_types(void) {
    enum { BLOCKS = 9 };
    int count;
    const struct ptqtp_type_traits * types = ptqtp_type_table(&count);
    CHECK(count == PTQTP_TYPE_COUNT, "%d types", count);
    for (int i = 0; i < count; i++) {
        const struct ptqtp_type_traits * t = &types[i];
        CHECK(t->type == PTQTP_TP2_0 + i && ptqtp_traits(t->type) == t, "row %d is type %d", i, t->type);
        CHECK(t->name && t->planes > 0 && t->reach > 0, "row %d", i);
        CHECK(t->pack && t->unpack && t->dequantize && t->validate, "functions of %s", t->name);
        CHECK(t->block > 0 && t->group > 0 && t->block % t->group == 0 && t->block % 32 == 0, "block of %s", t->name);
        CHECK(ptqtp_type_size(t->type) == t->size && ptqtp_block_size(t->type) == t->block, "sizes of %s", t->name);
        const int64_t n = BLOCKS * t->block;
        const size_t nscales = (size_t) (n / t->group) * t->scale_size, nbytes = BLOCKS * t->size;
        uint8_t *digits = guarded((size_t) n), *back = guarded((size_t) n), *packed = guarded(nbytes);
        uint8_t *scales = guarded(nscales), *scales_back = guarded(nscales);
        float * values = (float *) guarded((size_t) n * sizeof(float));
        for (int64_t k = 0; k < n; k++) {
            digits[k] = rnd() % 9;
        }
        for (size_t k = 0; k < nscales; k++) {
            scales[k] = (uint8_t) (rnd() & 0x3f); /* finite, if two bytes are an fp16 */
        }
        CHECK(t->pack(digits, scales, packed, n) == PTQTP_OK, "%s packs", t->name);
        CHECK(t->unpack(packed, back, scales_back, n) == PTQTP_OK, "%s unpacks", t->name);
        CHECK(!memcmp(digits, back, (size_t) n) && !memcmp(scales, scales_back, nscales), "%s round trip", t->name);
        CHECK(ptqtp_validate(t->type, packed, nbytes, NULL) == PTQTP_OK, "%s validates", t->name);
        t->dequantize(packed, values, n);
        uint64_t sum = 0;
        int64_t bad = -2;
        CHECK(ptqtp_check(t->type, packed, BLOCKS, 5, 1, &sum, &bad) == PTQTP_OK && bad == -1,
              "%s has no second decoder", t->name);
        CHECK(sum == ptqtp_hash(values, n, 5, 1), "the two decoders of %s differ", t->name);
        memset(packed + 3 * t->size, 0xff, t->size);
        CHECK(ptqtp_validate(t->type, packed, nbytes, &bad) != PTQTP_OK && bad == 3, "%s: 0xff is no block", t->name);
        CHECK(t->validate(packed + 3 * t->size) != PTQTP_OK && t->validate(packed) == PTQTP_OK, "one block");
        digits[n - 1] = 9;
        CHECK(t->pack(digits, scales, packed, n) == PTQTP_BAD_DIGIT, "%s: digit 9", t->name);
        CHECK(t->pack(digits, scales, packed, t->block + 1) == PTQTP_BAD_SIZE, "%s: not whole", t->name);
        CHECK(t->unpack(packed, back, scales_back, t->block - 1) == PTQTP_BAD_SIZE, "%s: not whole", t->name);
        CHECK(ptqtp_panels_size(PTQTP_PACKED, 16, t->block) > 0 || !t->panels, "panels of %s", t->name);
        release(digits, (size_t) n);
        release(back, (size_t) n);
        release(packed, nbytes);
        release(scales, nscales);
        release(scales_back, nscales);
        release((uint8_t *) values, (size_t) n * sizeof(float));
    }
    const int others[] = { PTQTP_TP2_0 - 1, PTQTP_TYPE_END, 0, -1 };
    for (int i = 0; i < 4; i++) {
        CHECK(!ptqtp_traits(others[i]) && !ptqtp_type_size(others[i]) && !ptqtp_block_size(others[i]), "type %d",
              others[i]);
    }
}

static void test_round_trip(void) {
    enum { N = 128 * 9 };
    static uint8_t digits[N], back[N], packed[N / 32 * 14];
    uint8_t codes[N / 32], codes2[N / 32];
    uint16_t alphas[N / 64], alphas2[N / 64];
    float values[N];
    for (int i = 0; i < N; i++) {
        digits[i] = rnd() % 9;
    }
    for (int i = 0; i < N / 32; i++) {
        codes[i] = (uint8_t) rnd();
    }
    for (int i = 0; i < N / 64; i++) {
        alphas[i] = (uint16_t) (rnd() & 0xbfff); /* finite */
    }
    CHECK(ptqtp_pack_tp2_1(digits, codes, packed, N) == PTQTP_OK, "pack");
    CHECK(ptqtp_validate(PTQTP_TP2_1, packed, sizeof packed, NULL) == PTQTP_OK, "validate");
    CHECK(ptqtp_unpack_tp2_1(packed, back, codes2, N) == PTQTP_OK, "unpack");
    CHECK(!memcmp(digits, back, N) && !memcmp(codes, codes2, sizeof codes), "TP2_1 round trip");
    ptqtp_dequantize_tp2_1(packed, values, N);
    for (int i = 0; i < N; i++) {
        const float s = ptqtp_scale_to_float(codes[i / 32]);
        CHECK(values[i] == s * (float) (3 * (digits[i] / 3 - 1) + 2 * (digits[i] % 3 - 1)), "value %d", i);
    }
    CHECK(ptqtp_pack_tp2_0(digits, alphas, packed, N) == PTQTP_OK, "pack");
    CHECK(ptqtp_validate(PTQTP_TP2_0, packed, sizeof packed, NULL) == PTQTP_OK, "validate");
    CHECK(ptqtp_unpack_tp2_0(packed, back, alphas2, N) == PTQTP_OK, "unpack");
    CHECK(!memcmp(digits, back, N) && !memcmp(alphas, alphas2, sizeof alphas), "TP2_0 round trip");
    alphas[5] = 0x7c00;
    ptqtp_pack_tp2_0(digits, alphas, packed, N);
    int64_t bad = -1;
    CHECK(ptqtp_validate(PTQTP_TP2_0, packed, sizeof packed, &bad) == PTQTP_BAD_SCALE && bad == 2, "Inf scale");
    digits[7] = 9;
    CHECK(ptqtp_pack_tp2_1(digits, codes, packed, N) == PTQTP_BAD_DIGIT, "digit 9");
    CHECK(ptqtp_pack_tp2_1(digits, codes, packed, 33) == PTQTP_BAD_SIZE, "n = 33");
    CHECK(ptqtp_validate(PTQTP_TP2_1, packed, 15, NULL) == PTQTP_BAD_SIZE, "15 bytes");
    CHECK(ptqtp_validate(2, packed, 14, NULL) == PTQTP_BAD_TYPE, "type 2");
}

/* Levels and digits of TP2_2 are inverse; levels without digits are refused. */
static void test_trellis(void) {
    uint8_t digits[PTQTP_UNIT], back[PTQTP_UNIT];
    int8_t levels[PTQTP_UNIT], again[PTQTP_UNIT];
    int with = 0;
    for (int round = 0; round < 20000; round++) {
        for (int i = 0; i < PTQTP_UNIT; i++) {
            digits[i] = (uint8_t) (round < 9 ? (uint32_t) round : rnd() % 9);
        }
        ptqtp_trellis_levels(digits, levels);
        CHECK(ptqtp_trellis_digits(levels, back) && !memcmp(digits, back, sizeof back), "levels to digits");
        for (int i = 0; i < PTQTP_UNIT; i++) { /* -2 .. 2 have digits always; one of 5 has in a third of all cases */
            CHECK(levels[i] >= -6 && levels[i] <= 6, "level %d", levels[i]);
            levels[i] = (int8_t) (rnd() % 5 - 2);
        }
        CHECK(ptqtp_trellis_digits(levels, back), "levels up to 2");
        ptqtp_trellis_levels(back, again);
        CHECK(!memcmp(levels, again, sizeof again), "levels up to 2 and back");
        levels[rnd() % PTQTP_UNIT] = rnd() & 1 ? 5 : -5;
        if (ptqtp_trellis_digits(levels, back)) {
            ptqtp_trellis_levels(back, again);
            CHECK(!memcmp(levels, again, sizeof again), "a large level and back");
            with++;
        }
    }
    CHECK(with > 6400 && with < 6933, "%d of 20000 units with a 5 have digits", with);
}

/* Many units at once as one by one: levels that digits give, any of -6 .. 6 and any bytes, on several threads. */
static void test_levels(int type) {
    enum { UNITS = 5000, N = UNITS * PTQTP_UNIT };
    static uint8_t digits[N], got[N], want[N];
    static int8_t levels[N], again[N];
    int with = 0;
    for (int u = 0; u < UNITS; u++) {
        uint8_t * d = digits + u * PTQTP_UNIT;
        int8_t * l = levels + u * PTQTP_UNIT;
        uint8_t unit[PTQTP_UNIT];
        for (int i = 0; i < PTQTP_UNIT; i++) {
            d[i] = (uint8_t) (rnd() % 9);
            l[i] = (int8_t) (u % 4 == 1 ? rnd() % 256 : u % 4 == 2 ? rnd() % 13 - 6 : rnd() % 5 - 2);
        }
        if (u % 4 == 0) {
            ptqtp_unit whole;
            ptqtp_unit_pack(d, 0, &whole);
            ptqtp_unit_levels(type, &whole, l);
        } else if (u % 4 == 3) {
            l[rnd() % PTQTP_UNIT] = (int8_t) (rnd() % 13 - 6);
        }
        const bool good = type == PTQTP_TP2_2 && ptqtp_trellis_digits(l, unit);
        for (int i = 0; i < PTQTP_UNIT; i++) {
            want[u * PTQTP_UNIT + i] = good ? unit[i] : 255;
            for (uint8_t digit = 0; type == PTQTP_TP2_1 && digit < 9; digit++) {
                if (ptqtp_level[digit] == l[i]) {
                    want[u * PTQTP_UNIT + i] = digit;
                }
            }
        }
        with += u % 4 && want[u * PTQTP_UNIT] != 255;
    }
    CHECK(with > UNITS / 8 && with < UNITS / 4 * 3, "%d of %d units begin with a digit", with, UNITS);
    for (int threads = 1; threads <= 3; threads += 2) {
        memset(got, 7, sizeof got);
        CHECK(ptqtp_digits_of_levels(type, levels, got, N, threads) == PTQTP_OK, "digits");
        CHECK(!memcmp(got, want, sizeof got), "digits of levels, type %d", type);
        CHECK(ptqtp_levels_of_digits(type, digits, again, N, threads) == PTQTP_OK, "levels");
        for (int i = 0; i < N; i += 4 * PTQTP_UNIT) {
            CHECK(!memcmp(again + i, levels + i, PTQTP_UNIT), "levels of digits, type %d", type);
        }
        CHECK(ptqtp_digits_of_levels(type, again, got, N, threads) == PTQTP_OK, "digits again");
        CHECK(!memcmp(got, digits, sizeof got), "levels and back, type %d", type);
    }
    digits[N - 1] = 9;
    CHECK(ptqtp_levels_of_digits(type, digits, again, N, 2) == PTQTP_BAD_DIGIT, "digit 9");
    CHECK(ptqtp_levels_of_digits(type, digits, again, 33, 1) == PTQTP_BAD_SIZE, "n = 33");
    CHECK(ptqtp_digits_of_levels(type, levels, got, -32, 1) == PTQTP_BAD_SIZE, "n = -32");
    CHECK(ptqtp_digits_of_levels(type, levels, got, 0, 1) == PTQTP_OK, "n = 0");
    CHECK(ptqtp_digits_of_levels(PTQTP_TP2_0, levels, got, 32, 1) == PTQTP_BAD_TYPE, "a type without levels");
}

/* ---- quantizers ---- */

static double rel_mse(int type, const float * x, const uint8_t * q, int64_t n) {
    float * y = malloc((size_t) n * sizeof *y);
    CHECK(y, "malloc");
    ptqtp_traits(type)->dequantize(q, y, n);
    double num = 0, den = 0;
    for (int64_t i = 0; i < n; i++) {
        num += (double) (x[i] - y[i]) * (x[i] - y[i]);
        den += (double) x[i] * x[i];
    }
    free(y);
    return num / den;
}

static void test_quantizers(void) {
    enum { ROWS = 96, COLS = 640, N = ROWS * COLS, BYTES = N / 32 * 14 };
    static float x[N];
    static uint8_t one[BYTES], many[BYTES];
    for (int i = 0; i < N; i++) {
        x[i] = 0.02f * gaussian();
    }
    const struct {
        int type, method;
        double low, high;
    } cases[] = { /* relative MSE on Gaussian weights, two-sided; only of TP2_0 it is what search makes small */
                  { PTQTP_TP2_2, PTQTP_SEARCH, 0.0152, 0.0162 },
                  { PTQTP_TP2_1, PTQTP_SEARCH, 0.0203, 0.0217 },
                  { PTQTP_TP2_0, PTQTP_SEARCH, 0.0245, 0.0261 },
                  { PTQTP_TP2_0, PTQTP_PAPER, 0.0260, 0.0290 }
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        const int type = cases[c].type, method = cases[c].method;
        memset(one, 0, sizeof one);
        CHECK(ptqtp_quantize_rows(type, method, x, NULL, one, ROWS, COLS) == PTQTP_OK, "case %zu", c);
        CHECK(ptqtp_validate(type, one, sizeof one, NULL) == PTQTP_OK, "case %zu", c);
        for (int threads = 1; threads <= 5; threads += 2) {
            memset(many, 0, sizeof many);
            CHECK(ptqtp_quantize_parallel(type, method, x, NULL, many, ROWS, COLS, threads) == PTQTP_OK, "parallel");
            CHECK(!memcmp(one, many, sizeof one), "case %zu differs with %d threads", c, threads);
        }
        const double mse = rel_mse(type, x, one, N);
        CHECK(mse > cases[c].low && mse < cases[c].high, "case %zu: relative MSE %.5f", c, mse);
    }
    /* weights that lie on the levels come back exactly, whichever level is the largest in the group */
    for (int top = 1; top <= 5; top += top == 3 ? 2 : 1) {
        float levels[PTQTP_UNIT], back[PTQTP_UNIT];
        for (int code = 0; code < 256; code++) {
            const float s = ptqtp_scale_to_float((uint8_t) code);
            for (int i = 0; i < PTQTP_UNIT; i++) {
                const int l = i == 0 ? top : ptqtp_level[rnd() % 9];
                levels[i] = s * (float) (abs(l) > top ? 0 : l);
            }
            CHECK(ptqtp_quantize_rows(PTQTP_TP2_1, PTQTP_SEARCH, levels, NULL, one, 1, PTQTP_UNIT) == PTQTP_OK, "q");
            ptqtp_dequantize_tp2_1(one, back, PTQTP_UNIT);
            CHECK(!memcmp(levels, back, sizeof back), "code %d, largest level %d", code, top);
        }
    }
    /* so do ternary weights as TP2_2: level 2 is free of the chain */
    for (int code = 0; code < 256; code++) {
        float levels[PTQTP_UNIT], back[PTQTP_UNIT];
        for (int i = 0; i < PTQTP_UNIT; i++) {
            levels[i] = 2 * ptqtp_scale_to_float((uint8_t) code) * (float) (i == 0 ? 1 : ptqtp_t2((int) (rnd() % 9)));
        }
        CHECK(ptqtp_quantize_rows(PTQTP_TP2_2, PTQTP_SEARCH, levels, NULL, one, 1, PTQTP_UNIT) == PTQTP_OK, "q");
        ptqtp_dequantize_tp2_2(one, back, PTQTP_UNIT);
        for (int i = 0; i < PTQTP_UNIT; i++) {
            CHECK(levels[i] == back[i], "ternary, code %d: %g, not %g", code, back[i], levels[i]);
        }
    }
    memset(x, 0, sizeof x);
    for (int type = PTQTP_TP2_1; type <= PTQTP_TP2_2; type++) {
        CHECK(ptqtp_quantize_rows(type, PTQTP_SEARCH, x, NULL, one, 1, 32) == PTQTP_OK, "zeros");
        uint8_t digits[32], code;
        ptqtp_unpack_tp2_1(one, digits, &code, 32);
        for (int i = 0; i < 32; i++) {
            CHECK(digits[i] == 4 && code == 0, "zeros are digit 4, code 0");
        }
    }
    for (int method = PTQTP_PAPER; method <= PTQTP_SEARCH; method++) {
        CHECK(ptqtp_quantize_rows(PTQTP_TP2_0, method, x, NULL, one, 1, 128) == PTQTP_OK, "zeros");
        CHECK(ptqtp_validate(PTQTP_TP2_0, one, 56, NULL) == PTQTP_OK, "zeros");
    }
    const struct {
        float value;
        int status;
    } bad[] = { { NAN, PTQTP_NOT_FINITE }, { -INFINITY, PTQTP_NOT_FINITE }, { 9.7f, PTQTP_TOO_LARGE } };
    for (int i = 0; i < 3; i++) {
        x[N - 3] = bad[i].value;
        CHECK(ptqtp_quantize_rows(PTQTP_TP2_1, PTQTP_SEARCH, x, NULL, one, ROWS, COLS) == bad[i].status, "bad %d", i);
        CHECK(ptqtp_quantize_parallel(PTQTP_TP2_1, PTQTP_SEARCH, x, NULL, one, ROWS, COLS, 2) == bad[i].status,
              "bad %d", i);
    }
    x[N - 3] = 11.625f;
    CHECK(ptqtp_quantize_rows(PTQTP_TP2_2, PTQTP_SEARCH, x, NULL, one, ROWS, COLS) == PTQTP_OK, "6 * 1.9375");
    x[N - 3] = 11.63f;
    CHECK(ptqtp_quantize_rows(PTQTP_TP2_2, PTQTP_SEARCH, x, NULL, one, ROWS, COLS) == PTQTP_TOO_LARGE, "above it");
    x[N - 3] = 0;
    float h[COLS] = { 0 };
    CHECK(ptqtp_quantize_rows(PTQTP_TP2_1, PTQTP_SEARCH, x, h, one, 1, COLS) == PTQTP_OK, "no importance anywhere");
    h[3] = -1;
    CHECK(ptqtp_quantize_rows(PTQTP_TP2_1, PTQTP_SEARCH, x, h, one, 1, COLS) == PTQTP_NOT_FINITE, "importance < 0");
    CHECK(ptqtp_quantize_rows(PTQTP_TP2_1, PTQTP_PAPER, x, NULL, one, 1, 32) == PTQTP_BAD_METHOD, "paper TP2_1");
    CHECK(ptqtp_quantize_rows(PTQTP_TP2_1, PTQTP_SEARCH, x, NULL, one, 1, 40) == PTQTP_BAD_SIZE, "row of 40");
    CHECK(ptqtp_quantize_rows(8, PTQTP_SEARCH, x, NULL, one, 1, 32) == PTQTP_BAD_TYPE, "type 8");
    const int64_t many_rows = (int64_t) 1 << 58; /* times 64: no product of sizes may overflow unseen */
    CHECK(ptqtp_quantize_rows(PTQTP_TP2_1, PTQTP_SEARCH, x, NULL, one, many_rows, 64) == PTQTP_BAD_SIZE,
          "2^64 weights");
    CHECK(ptqtp_quantize_parallel(PTQTP_TP2_1, PTQTP_SEARCH, x, NULL, one, many_rows, 64, 2) == PTQTP_BAD_SIZE, "2^64");
    CHECK(ptqtp_panels_size(PTQTP_PACKED, 1, (int64_t) 1 << 62) == SIZE_MAX, "panels of 2^64 bytes");
    CHECK(ptqtp_panels_size(PTQTP_WIDE, -1, 32) == SIZE_MAX, "-1 rows");
}

/* ---- kernels ---- */

static const struct ptqtp_kernel * kernel;

/* The scales of n weights with which a digit's value is ptqtp_level of it. A new type needs a case. */
static uint8_t * unit_scales(const struct ptqtp_type_traits * t, int64_t n) {
    const uint16_t three_two[2] = { 0x4200, 0x4000 };
    const uint8_t one = 0xf0;
    const void * of_group = t->type == PTQTP_TP2_0                             ? (const void *) three_two
                            : t->type == PTQTP_TP2_1 || t->type == PTQTP_TP2_2 ? &one
                                                                               : NULL;
    CHECK(of_group, "no unit scale for %s", t->name);
    uint8_t * scales = malloc((size_t) (n / t->group) * t->scale_size);
    CHECK(scales, "malloc");
    for (int64_t i = 0; i < n / t->group; i++) {
        memcpy(scales + (size_t) i * t->scale_size, of_group, t->scale_size);
    }
    return scales;
}

/* Unit scales, so that the float result is the integer sum itself: it must be equal, not close. */
static void check_integer_sums(int64_t n, int fill) {
    const struct ptqtp_type_traits * t = ptqtp_traits(kernel->type);
    const int64_t ny = n / 32;
    const size_t wbytes = (size_t) (n / t->block) * t->size, ybytes = (size_t) ny * 34;
    uint8_t * digits = malloc((size_t) n);
    uint8_t * scales = unit_scales(t, n);
    CHECK(digits, "malloc");
    float * levels = malloc((size_t) n * sizeof(float));
    CHECK(levels, "malloc");
    uint8_t * w = guarded(wbytes);
    ptqtp_block_q8_0 * y = (ptqtp_block_q8_0 *) guarded(ybytes);
    for (int64_t i = 0; i < n; i++) {
        digits[i] = (uint8_t) (fill == 0   ? rnd() % 9
                               : fill == 1 ? 8
                                           : 0); /* random; all of the largest digit, of the smallest */
    }
    CHECK(t->pack(digits, scales, w, n) == PTQTP_OK, "pack");
    t->dequantize(w, levels, n);
    /* all groups at once, then one group alone: a lane that leaks into its neighbour's group shows */
    for (int64_t only = -1; only < ny; only += 1 + ny / 7) {
        int64_t expect = 0;
        for (int64_t i = 0; i < ny; i++) {
            y[i].d = only < 0 || only == i ? 0x3c00 : 0;
            for (int k = 0; k < 32; k++) {
                const int a = fill == 0 ? (int) (rnd() % 256) - 128 : fill == 1 ? 127 : -128;
                y[i].qs[k] = (int8_t) a;
                expect += y[i].d ? (int) levels[i * 32 + k] * a : 0;
            }
        }
        const float got = kernel->dot(n, w, y);
        CHECK(got == (float) expect, "%s, type %d, n %d, fill %d, only %d: %.1f, expected %d", kernel->name,
              kernel->type, (int) n, fill, (int) only, got, (int) expect);
        CHECK(ptqtp_dot_scalar(kernel->type)(n, w, y) == (float) expect, "scalar reference, n %d", (int) n);
    }
    release(w, wbytes);
    release((uint8_t *) y, ybytes);
    free(digits);
    free(levels);
    free(scales);
}

/* Any bytes as weights: same digits as the reference, so only the order of the float sum may differ. */
static void check_any_bytes(int64_t n) {
    const struct ptqtp_type_traits * t = ptqtp_traits(kernel->type);
    const int64_t ny = n / 32;
    const size_t wbytes = (size_t) (n / t->block) * t->size, ybytes = (size_t) ny * 34;
    uint8_t * w = guarded(wbytes);
    ptqtp_block_q8_0 * y = (ptqtp_block_q8_0 *) guarded(ybytes);
    for (size_t i = 0; i < wbytes; i++) {
        w[i] = (uint8_t) rnd();
        if (kernel->type == PTQTP_TP2_0 && i % 28 == 26) {
            w[i] &= 0x3f; /* high byte of an fp16: below 2 */
        }
    }
    for (int64_t i = 0; i < ny; i++) {
        y[i].d = ptqtp_half_from_float(0.001f * (float) (rnd() % 1000));
        for (int k = 0; k < 32; k++) {
            y[i].qs[k] = (int8_t) rnd();
        }
    }
    /* |error| <= (terms + a few roundings each) * eps * sum of |term| */
    double bound = 0;
    for (int64_t i = 0; i < ny; i++) {
        bound += 6 * 2.0 * 32 * 128 * (double) ptqtp_half_to_float(y[i].d);
    }
    bound *= (double) (ny + 8) * 6e-8;
    const float got = kernel->dot(n, w, y), want = ptqtp_dot_scalar(kernel->type)(n, w, y);
    CHECK(fabs((double) got - want) <= bound, "%s, type %d, n %d: %g, reference %g", kernel->name, kernel->type,
          (int) n, got, want);
    release(w, wbytes);
    release((uint8_t *) y, ybytes);
}

static void test_kernels(void) {
    int count;
    const struct ptqtp_kernel * all = ptqtp_kernels(&count);
    int ran = 0;
    for (int i = 0; i < count; i++) {
        kernel = &all[i];
        if (!kernel->supported()) {
            printf("not on this CPU: %s, type %d\n", kernel->name, kernel->type);
            continue;
        }
        const int64_t qk = ptqtp_block_size(kernel->type);
        for (int64_t blocks = 1; blocks <= 12; blocks++) {
            for (int fill = 0; fill < 3; fill++) {
                check_integer_sums(blocks * qk, fill);
            }
            check_any_bytes(blocks * qk);
        }
        const int64_t rows[] = { 576, 640, 896, 1536, 4864, 8960 };
        for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
            const int64_t n = rows[r] / qk * qk;
            check_integer_sums(n, 0);
            for (int k = 0; k < 20; k++) {
                check_any_bytes(n);
            }
        }
        printf("kernel ok: %s, type %d\n", kernel->name, kernel->type);
        ran++;
    }
    const struct ptqtp_type_traits * types = ptqtp_type_table(&count);
    CHECK(ran >= count, "at least the scalar kernels run");
    for (int i = 0; i < count; i++) {
        CHECK(ptqtp_dot_scalar(types[i].type), "%s has no scalar kernel", types[i].name);
    }
    CHECK(!ptqtp_dot_scalar(2) && !ptqtp_kernel_for(2), "another's type has no kernel");
}

/* ---- panels ---- */

static const struct ptqtp_panel_kernel * panel_kernel;
static int form, panel_type;

/* Integer activations with a 127 in each block quantize to themselves, d = 1; with unit scales every result is an
 * integer and must be equal. block >= 0: all other blocks are 0, so that a lane that leaks shows. */
static void check_panels(int64_t n, int64_t nrows, int fill, int64_t block) {
    enum { NCOLS = 39 };
    const struct ptqtp_panel_kernel * k = panel_kernel;
    const int64_t nb = n / 32, npanels = (nrows + 15) / 16;
    const size_t row_bytes = (size_t) nb * 14, size = ptqtp_panels_size(form, nrows, n);
    CHECK(size == (size_t) (npanels * nb * (form == PTQTP_WIDE ? 272 : 224)), "panels_size");
    uint8_t *digits = malloc((size_t) (nrows * n)), *codes = malloc((size_t) (nrows * nb));
    uint8_t *rows = malloc((size_t) nrows * row_bytes), *back = malloc((size_t) nrows * row_bytes);
    float * levels = malloc((size_t) (nrows * n) * sizeof(float));
    float *x = malloc((size_t) n * sizeof(float)), *want = calloc((size_t) (nrows * NCOLS), sizeof(float));
    CHECK(digits && codes && rows && back && levels && x && want, "malloc");
    uint8_t * panels = guarded(size);
    uint8_t * gemv_acts = guarded((size_t) nb * ptqtp_gemv_act_size(k, panel_type, form));
    ptqtp_act * acts = (ptqtp_act *) guarded(NCOLS * (size_t) nb * sizeof(ptqtp_act));
    float * y = (float *) guarded((size_t) (nrows * NCOLS) * sizeof(float));
    uint8_t * scratch = guarded(PTQTP_GEMM_SCRATCH);

    for (int64_t i = 0; i < nrows * n; i++) {
        digits[i] = (uint8_t) (fill == 0 ? rnd() % 9 : fill == 1 ? 8 : 0);
    }
    memset(codes, 0xf0, (size_t) (nrows * nb)); /* 1.0 */
    ptqtp_traits(panel_type)->pack(digits, codes, rows, nrows * n);
    ptqtp_traits(panel_type)->dequantize(rows, levels, nrows * n); /* the scale is 1 */
    ptqtp_panels_from_rows(panel_type, form, rows, panels, 0, nrows, n);
    ptqtp_rows_from_panels(panel_type, form, panels, back, 0, nrows, n);
    CHECK(!memcmp(rows, back, (size_t) nrows * row_bytes), "panels and back");
    if (nrows > 20) {
        ptqtp_rows_from_panels(panel_type, form, panels, back, 17, 3, n);
        CHECK(!memcmp(rows + 17 * row_bytes, back, 3 * row_bytes), "rows 17..19 from panels");
        memset(panels, 0, size); /* in two parts, as a thread or an expert at a time */
        ptqtp_panels_from_rows(panel_type, form, rows, panels, 0, 16, n);
        ptqtp_panels_from_rows(panel_type, form, rows + 16 * row_bytes, panels, 16, nrows - 16, n);
    }
    const ptqtp_act * act_of[NCOLS];
    float * y_of[NCOLS];
    for (int c = 0; c < NCOLS; c++) {
        for (int64_t i = 0; i < n; i++) {
            const int a = fill == 0 ? (int) (rnd() % 255) - 127 : fill == 1 ? 127 : -127;
            x[i] = (float) (block >= 0 && i / 32 != block ? 0 : i % 32 == (c + 3 * (i / 32)) % 32 ? 127 : a);
        }
        act_of[c] = acts + c * nb;
        y_of[c] = y + c * nrows;
        ptqtp_gemm_quantize(k, x, acts + c * nb, n);
        if (c == 0) {
            ptqtp_gemv_quantize(k, panel_type, form, x, gemv_acts, n);
        }
        if (fill == 2 && c == 1) { /* the most negative code, which no quantizer makes */
            for (int64_t i = 0; i < nb; i++) {
                acts[c * nb + i].d = 1;
                acts[c * nb + i].bias = 6 * 32 * 128;
                memset(acts[c * nb + i].q, -128, 32);
            }
            for (int64_t i = 0; i < n; i++) {
                x[i] = -128;
            }
        }
        for (int64_t r = 0; r < nrows; r++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < n; i++) {
                sum += (int64_t) levels[r * n + i] * (int64_t) x[i];
            }
            want[c * nrows + r] = (float) sum;
        }
    }
    for (int64_t p0 = 0; p0 < npanels; p0 += 1 + npanels / 3) {
        for (int64_t p1 = p0; p1 <= npanels; p1 += 1 + npanels / 2) {
            memset(y, 0x5a, (size_t) nrows * sizeof(float));
            const int64_t r0 = p0 * 16, r1 = p1 * 16 < nrows ? p1 * 16 : nrows;
            ptqtp_gemv(k, panel_type, form, n, nrows, panels, p0, p1, gemv_acts, y);
            for (int64_t r = 0; r < nrows; r++) {
                float untouched;
                memset(&untouched, 0x5a, sizeof untouched);
                const float expect = r >= r0 && r < r1 ? want[r] : untouched;
                CHECK(y[r] == expect, "%s gemv, n %d, row %d of %d, fill %d: %.1f, expected %.1f",
                      ptqtp_panel_kernel_name(k), (int) n, (int) r, (int) nrows, fill, y[r], expect);
            }
        }
    }
    for (int ncols = 1; ncols <= NCOLS; ncols += n > 1000 ? 6 : ncols >= 19 ? 5 : 1) {
        memset(y, 0, (size_t) (nrows * NCOLS) * sizeof(float));
        ptqtp_gemm(k, panel_type, form, n, nrows, panels, 0, npanels, ncols, act_of, y_of, scratch);
        for (int64_t i = 0; i < nrows * ncols; i++) {
            CHECK(y[i] == want[i], "%s gemm, n %d, %d columns, column %d, row %d, fill %d: %.1f, expected %.1f",
                  ptqtp_panel_kernel_name(k), (int) n, ncols, (int) (i / nrows), (int) (i % nrows), fill, y[i],
                  want[i]);
        }
    }
    release(panels, size);
    release(gemv_acts, (size_t) nb * ptqtp_gemv_act_size(k, panel_type, form));
    release((uint8_t *) acts, NCOLS * (size_t) nb * sizeof(ptqtp_act));
    release((uint8_t *) y, (size_t) (nrows * NCOLS) * sizeof(float));
    release(scratch, PTQTP_GEMM_SCRATCH);
    free(digits);
    free(codes);
    free(rows);
    free(back);
    free(levels);
    free(x);
    free(want);
}

/* Any bytes as weights and real activations: as the scalar reference up to the order of the float sum; activations are
 * quantized to the same bits. */
static void check_panels_any_bytes(int64_t n, int64_t nrows) {
    enum { NCOLS = 29 }; /* more than a kernel leaves to another */
    const struct ptqtp_panel_kernel * k = panel_kernel;
    int count;
    const struct ptqtp_panel_kernel * const * all = ptqtp_panel_kernels(&count);
    const struct ptqtp_panel_kernel * scalar = all[count - 1];
    const int64_t nb = n / 32, npanels = (nrows + 15) / 16;
    const size_t size = ptqtp_panels_size(form, nrows, n), scalar_act = ptqtp_gemv_act_size(scalar, panel_type, form);
    uint8_t *panels = guarded(size), *scratch = guarded(PTQTP_GEMM_SCRATCH);
    uint8_t * one = guarded((size_t) nb * ptqtp_gemv_act_size(k, panel_type, form));
    uint8_t * one_ref = guarded((size_t) nb * scalar_act);
    ptqtp_act acts[NCOLS][32], ref[NCOLS][32];
    float x[NCOLS][32 * 32], y[NCOLS + 1][64], want[NCOLS + 1][64];
    CHECK(nb <= 32 && nrows <= 64, "test sizes");
    for (size_t i = 0; i < size; i++) {
        panels[i] = (uint8_t) rnd();
        if (form == PTQTP_WIDE && i % 272 < 256) { /* a code is 0 to 12 */
            panels[i] = (uint8_t) (rnd() % 13 | rnd() % 13 << 4);
        }
    }
    const ptqtp_act *act_of[NCOLS], *ref_of[NCOLS];
    float *y_of[NCOLS], *want_of[NCOLS];
    double bound = 0;
    for (int c = 0; c < NCOLS; c++) {
        double sum = 0;
        for (int64_t b = 0; b < nb; b++) {
            const float size_of_block = ldexpf(1.0f, (int) (rnd() % 20) - 10);
            for (int i = 0; i < 32; i++) {
                const float value = size_of_block * ((float) rnd() / 4294967296.0f - 0.5f);
                x[c][b * 32 + i] = rnd() % 50 == 0 ? 0.0f : value;
            }
            sum += 6 * 2.0 * 32 * (double) size_of_block;
        }
        bound = fmax(bound, sum * (double) (nb + 8) * 1.2e-7);
        ptqtp_gemm_quantize(k, x[c], acts[c], n);
        ptqtp_gemm_quantize(scalar, x[c], ref[c], n);
        CHECK(!memcmp(acts[c], ref[c], (size_t) nb * sizeof(ptqtp_act)), "%s quantizes activations differently",
              ptqtp_panel_kernel_name(k));
        act_of[c] = acts[c], ref_of[c] = ref[c], y_of[c] = y[c], want_of[c] = want[c];
    }
    ptqtp_gemm(k, panel_type, form, n, nrows, panels, 0, npanels, NCOLS, act_of, y_of, scratch);
    ptqtp_gemm(scalar, panel_type, form, n, nrows, panels, 0, npanels, NCOLS, ref_of, want_of, scratch);
    ptqtp_gemv_quantize(k, panel_type, form, x[0], one, n);
    ptqtp_gemv_quantize(scalar, panel_type, form, x[0], one_ref, n);
    ptqtp_gemv(k, panel_type, form, n, nrows, panels, 0, npanels, one, y[NCOLS]);
    ptqtp_gemv(scalar, panel_type, form, n, nrows, panels, 0, npanels, one_ref, want[NCOLS]);
    for (int c = 0; c <= NCOLS; c++) {
        for (int64_t r = 0; r < nrows; r++) {
            CHECK(fabs((double) y[c][r] - want[c][r]) <= bound, "%s, n %d, column %d, row %d: %g, reference %g",
                  ptqtp_panel_kernel_name(k), (int) n, c, (int) r, y[c][r], want[c][r]);
        }
    }
    const float bad[] = { INFINITY, -INFINITY, NAN };
    for (int i = 0; i < 3; i++) {
        x[0][5] = bad[i];
        ptqtp_gemm_quantize(k, x[0], acts[0], n);
        CHECK(isnan(acts[0][0].d), "a block with Inf or NaN is marked");
        ptqtp_gemv_quantize(k, panel_type, form, x[0], one, n);
        ptqtp_gemv(k, panel_type, form, n, nrows, panels, 0, npanels, one, y[0]);
        CHECK(isnan(y[0][0]) && isnan(y[0][nrows - 1]), "Inf and NaN reach the result");
    }
    release(panels, size);
    release(scratch, PTQTP_GEMM_SCRATCH);
    release(one, (size_t) nb * ptqtp_gemv_act_size(k, panel_type, form));
    release(one_ref, (size_t) nb * scalar_act);
}

static void test_panels(void) {
    int count, ran = 0;
    const struct ptqtp_panel_kernel * const * all = ptqtp_panel_kernels(&count);
    for (int i = 0; i < count; i++) {
        panel_kernel = all[i];
        if (!ptqtp_panel_kernel_supported(panel_kernel)) {
            printf("not on this CPU: panels, %s\n", ptqtp_panel_kernel_name(panel_kernel));
            continue;
        }
        int ntypes;
        const struct ptqtp_type_traits * types = ptqtp_type_table(&ntypes);
        for (int of = 0; of < 2 * ntypes; of++) {
            panel_type = types[of / 2].type;
            form = of % 2;
            if (!types[of / 2].panels) {
                continue;
            }
            for (int64_t blocks = 1; blocks <= 19; blocks += 1 + blocks / 4) {
                for (int64_t nrows = 1; nrows <= 64; nrows += 21) {
                    for (int fill = 0; fill < 3; fill++) {
                        check_panels(blocks * 32, nrows, fill, -1);
                    }
                    check_panels(blocks * 32, nrows, 0, (int64_t) rnd() % blocks);
                }
                for (int k = 0; k < 5; k++) {
                    check_panels_any_bytes(blocks * 32, 1 + rnd() % 64);
                }
            }
            const int64_t rows[] = { 576, 640, 896, 1536, 4864 };
            for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
                check_panels(rows[r], 176, 0, -1); /* more than the panels of a block, and whole ones */
            }
        }
        printf("panel kernel ok: %s\n", ptqtp_panel_kernel_name(panel_kernel));
        ran++;
    }
    CHECK(ran >= 1, "at least the scalar kernel runs");
}

int main(int argc, char ** argv) {
    if (argc == 2 && !strcmp(argv[1], "--kernel")) {
        int count;
        const struct ptqtp_type_traits * types = ptqtp_type_table(&count);
        for (int i = 0; i < count; i++) {
            const struct ptqtp_kernel * k = ptqtp_kernel_for(types[i].type);
            printf("%d %s\n", types[i].type, k ? k->name : "none");
        }
        const struct ptqtp_panel_kernel * panel = ptqtp_panel_kernel_chosen();
        printf("panels %s\n", panel ? ptqtp_panel_kernel_name(panel) : "none");
        return 0;
    }
    test_types();
    test_words();
    test_any_bytes_decode();
    test_scales();
    test_round_trip();
    test_trellis();
    test_levels(PTQTP_TP2_1);
    test_levels(PTQTP_TP2_2);
    test_quantizers();
    test_kernels();
    test_panels();
    puts("native tests passed");
    return 0;
}
