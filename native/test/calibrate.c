/* Native tests of the inner loops of calibrated quantization: every instruction set against the loops without SIMD, and
 * the outer functions' checks. What the loops compute is held against the numpy reference in tests/quantize.
 *
 *     ptqtp-test-calibrate     run all; exit 1 at the first failure, named */
#include "bulk/calibrate.h"
#include "bulk/bulk.h"
#include "codec/trellis.h"
#include "test/test.h"

#include <string.h>

enum { ROWS = 35, COLS = PTQTP_CALIB_COLS, PAD = 5, LD = COLS + PAD, LDC = COLS / PTQTP_UNIT + PAD, KINDS = 8 };

static float any_float(void) {
    const uint32_t bits = rnd();
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* kind 7: any bits, NaN and Inf among them */
static float value(int kind) {
    switch (kind) {
        case 1: return 0.25f * (float) ((int) (rnd() % 9) - 4); /* ties */
        case 2: return rnd() & 1 ? 0.0f : -0.0f;
        case 3: return 1e4f * gaussian();                                /* beyond all scales */
        case 4: return ldexpf(gaussian(), -(int) (rnd() % 150));         /* denormals too */
        case 5: return rnd() % 8 ? 1e-7f * gaussian() : 0.3f;            /* one large among small */
        case 6: return 0.0625f * (float) (((int) (rnd() % 7) - 3) * 19); /* on levels of a scale */
        case 7: return any_float();
        default: return 0.02f * gaussian();
    }
}

/* An upper triangle with its mirror image; kind 5: diagonals of 0 and below, kind 7 as above. */
static void fill_matrix(float * m, int n, int kind) {
    for (int j = 0; j < n; j++) {
        for (int k = j; k < n; k++) {
            const float off = kind == 7 ? any_float() : gaussian() * (kind == 3 ? 30.0f : 0.3f);
            const float on = kind == 7 ? any_float() : kind == 5 ? gaussian() : 0.5f + fabsf(gaussian());
            m[j * LD + k] = m[k * LD + j] = j == k ? (kind == 5 && j % 3 == 0 ? 0.0f : on) : off;
        }
    }
}

struct result {
    int8_t levels[ROWS * LD];
    uint8_t codes[ROWS * LDC];
    float moved[ROWS * LD];
};

static void same_floats(const float * got, const float * want, size_t n, const char * name, const char * what) {
    for (size_t i = 0; i < n; i++) {
        CHECK(!memcmp(&got[i], &want[i], sizeof got[i]) || (isnan(got[i]) && isnan(want[i])), "%s: %s %zu: %a, not %a",
              name, what, i, (double) got[i], (double) want[i]);
    }
}

/* Whether a chain can have the levels of a group, which stand along it. */
static bool closed(const int8_t * levels) {
    static const uint8_t chain[PTQTP_UNIT] = { PTQTP_CHAIN_ORDER };
    int8_t unit[PTQTP_UNIT];
    uint8_t digits[PTQTP_UNIT];
    for (int c = 0; c < PTQTP_UNIT; c++) {
        unit[chain[c]] = levels[c];
    }
    return ptqtp_trellis_digits(unit, digits);
}

static void test_loops(const struct ptqtp_bulk * bulk, int type) {
    static float x[ROWS * LD], m[COLS * LD], buffer[PTQTP_CALIB_BUFFER(COLS)];
    static struct result start, got, want;
    const int windows[] = { 0, 1, 2, 3, 7 }, counts[] = { 1, 3, 15, 16, 17, 33, ROWS };
    for (int round = 0; round < 60; round++) {
        const int n = 32 * (1 + round % 8), kind = round % KINDS, window = windows[round % 5], rows = counts[round % 7];
        const int64_t ld = round % 2 ? LD : n, ldc = round % 2 ? LDC : n / 32;
        fill_matrix(m, n, kind);
        for (int i = 0; i < ROWS * LD; i++) {
            x[i] = value((kind + i / LD % 2) % KINDS);
            start.levels[i] = (int8_t) (kind == 7 ? rnd() : rnd() % 11 - 5); /* TP2_2: no chain has them */
            start.codes[i % (ROWS * LDC)] = (uint8_t) (round % 3 ? rnd() : rnd() % 2 ? 254 : 1);
            start.moved[i] = 123;
        }
        for (int cd = 0; cd < 2; cd++) {
            struct ptqtp_calib block;
            ptqtp_calib_lay_out(cd, m, LD, n, buffer, &block);
            got = want = start;
            const struct ptqtp_calib_rows to_got = { x, ld, got.levels, ld, got.codes, ldc, got.moved, ld };
            const struct ptqtp_calib_rows to_want = { x, ld, want.levels, ld, want.codes, ldc, want.moved, ld };
            (cd ? bulk->cd : bulk->gptq)(type, &block, &to_got, rows, window);
            (cd ? ptqtp_bulk_plain.cd : ptqtp_bulk_plain.gptq)(type, &block, &to_want, rows, window);
            const char * what = cd ? "descent" : "gptq";
            CHECK(!memcmp(got.levels, want.levels, sizeof got.levels), "%s: %s, levels in round %d", bulk->name, what,
                  round);
            CHECK(!memcmp(got.codes, want.codes, sizeof got.codes), "%s: %s, codes in round %d", bulk->name, what,
                  round);
            same_floats(got.moved, want.moved, ROWS * LD, bulk->name, what);
            for (int64_t i = 0; type == PTQTP_TP2_2 && i < rows * n; i += PTQTP_UNIT) {
                const int8_t * group = got.levels + i / n * ld + i % n;
                const bool kept = cd && !memcmp(group, start.levels + (group - got.levels), PTQTP_UNIT);
                CHECK(kept || closed(group), "%s: %s, row %d: no chain", bulk->name, what, (int) (i / n));
            }
            for (int64_t i = 0; i < ROWS * LD; i++) { /* nothing between rows or behind them */
                const bool inside = i / ld < rows && i % ld < n;
                CHECK(inside || (got.levels[i] == start.levels[i] && got.moved[i] == start.moved[i]),
                      "%s: %s wrote at %d", bulk->name, what, (int) i);
            }
        }
    }
}

static void test_checks(void) {
    static float x[64 * 64], m[64 * 64], moved[64 * 64];
    static int8_t levels[64 * 64];
    static uint8_t codes[64 * 2];
    const struct {
        int64_t nrows, ncols, ldx, ldm, ldl, ldc, ldo;
        int window, want;
    } cases[] = {
        { 64, 64, 64, 64, 64, 2, 64, 2, PTQTP_OK },
        { 0, 64, 64, 64, 64, 2, 64, 2, PTQTP_OK },
        { 64, 0, 0, 0, 0, 0, 0, 2, PTQTP_OK },
        { 1, 32, 32, 32, 32, 1, 32, 255, PTQTP_OK },
        { -1, 64, 64, 64, 64, 2, 64, 2, PTQTP_BAD_BLOCK },
        { 1, -32, 64, 64, 64, 2, 64, 2, PTQTP_BAD_BLOCK },
        { 1, 33, 64, 64, 64, 2, 64, 2, PTQTP_BAD_BLOCK },
        { 1, 288, 288, 288, 288, 9, 288, 2, PTQTP_BAD_BLOCK },
        { 1, 64, 64, 64, 64, 2, 64, -1, PTQTP_BAD_BLOCK },
        { 1, 64, 64, 64, 64, 2, 64, 256, PTQTP_BAD_BLOCK },
        { 64, 64, 63, 64, 64, 2, 64, 2, PTQTP_BAD_BLOCK },
        { 64, 64, 64, 63, 64, 2, 64, 2, PTQTP_BAD_BLOCK },
        { 64, 64, 64, 64, 63, 2, 64, 2, PTQTP_BAD_BLOCK },
        { 64, 64, 64, 64, 64, 1, 64, 2, PTQTP_BAD_BLOCK },
        { 64, 64, 64, 64, 64, 2, -64, 2, PTQTP_BAD_BLOCK },
    };
    for (int i = 0; i < 64; i++) {
        m[65 * i] = 1;
    }
    for (int type = PTQTP_TP2_0; type <= PTQTP_TYPE_END; type++) {
        const bool known = type == PTQTP_TP2_1 || type == PTQTP_TP2_2;
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
            const int want = known ? cases[i].want : PTQTP_BAD_TYPE;
            const int status[2] = {
                ptqtp_gptq_block(type, cases[i].nrows, cases[i].ncols, x, cases[i].ldx, m, cases[i].ldm, levels,
                                 cases[i].ldl, codes, cases[i].ldc, moved, cases[i].ldo, cases[i].window, 2),
                ptqtp_cd_block(type, cases[i].nrows, cases[i].ncols, x, cases[i].ldx, m, cases[i].ldm, levels,
                               cases[i].ldl, codes, cases[i].ldc, moved, cases[i].ldo, cases[i].window, 2),
            };
            CHECK(status[0] == want && status[1] == want, "type %d, case %zu: %d, %d", type, i, status[0], status[1]);
        }
    }
}

int main(void) {
    int count;
    const struct ptqtp_bulk * const * all = ptqtp_bulk_all(&count);
    for (int i = 0; i < count; i++) {
        test_loops(all[i], PTQTP_TP2_1);
        test_loops(all[i], PTQTP_TP2_2);
        printf("ok: %s\n", all[i]->name);
    }
    test_checks();
    puts("calibration tests passed");
    return 0;
}
