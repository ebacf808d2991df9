/* Native tests of the quantizers' fast ways: every instruction set against the plain C, and the sums from sorted
 * magnitudes against loops over all weights.
 *
 *     ptqtp-test-quantize              run all; exit 1 at the first failure, named
 *     ptqtp-test-quantize --kernel     print "bulk NAME", the build of the bulk loops that is chosen */
#include "quantize/quantize.h"
#include "bulk/bulk.h"
#include "codec/check.h"
#include "codec/hash.h"
#include "codec/unit.h"
#include "kernels/kernels.h"
#include "quantize/planes.h"
#include "test/test.h"

#include <float.h>

static float uniform(void) {
    return (float) ((rnd() + 0.5) / 4294967296.0);
}

static float laplace(void) {
    return (rnd() & 1 ? 1.0f : -1.0f) * logf(uniform());
}

static float as_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    bits &= 0xffff0000;
    memcpy(&f, &bits, sizeof f);
    return f;
}

enum { KINDS = 12, GROUP = 128 };

/* 128 weights of some kind, within the reach of TP2_1 */
static void fill(float * x, int kind) {
    const float scale = ldexpf(1, (int) (rnd() % 12) - 12);
    for (int i = 0; i < GROUP; i++) {
        switch (kind) {
            case 0: x[i] = 0.02f * gaussian(); break;
            case 1: x[i] = 0.02f * laplace(); break;
            case 2: x[i] = scale * (float) ptqtp_level[rnd() % 9]; break; /* exact levels */
            case 3: x[i] = 0.3f; break;
            case 4: x[i] = rnd() & 1 ? -1e-6f * gaussian() : 1e-30f; break; /* below all scales */
            case 5: x[i] = fmaxf(fminf(4 * gaussian(), 9.6875f), -9.6875f); break;
            case 6: x[i] = rnd() & 1 ? -0.0f : 0.0f; break;
            case 7: x[i] = as_bf16(0.02f * gaussian()); break;
            case 8: x[i] = (float) ((int) (rnd() % 7) - 3) * 0.25f; break; /* few values: many ties */
            case 9: x[i] = i % 32 == 7 ? 0.5f : rnd() % 3 ? 0.0f : -0.0f; break;
            case 10: x[i] = ldexpf(gaussian(), -(int) (rnd() % 130)); break; /* bits over a wide range */
            default: x[i] = as_bf16(0.02f * laplace()) * (float) (rnd() % 4 != 0); break;
        }
        x[i] = fmaxf(fminf(x[i], 9.6875f), -9.6875f);
    }
}

/* ---- the table of methods ---- */

/* Each type has a method, each method a type; what the table says of a method is so. */
static void test_methods(void) {
    enum { N = 128 };
    static float x[2 * N], h[N];
    static uint8_t whole[2 * N / 32 * 14], apart[sizeof whole];
    int nmethods, ntypes;
    const struct ptqtp_method_traits * methods = ptqtp_method_table(&nmethods);
    const struct ptqtp_type_traits * types = ptqtp_type_table(&ntypes);
    CHECK(nmethods == 2 && methods[PTQTP_PAPER].whole_matrix && !methods[PTQTP_SEARCH].whole_matrix, "methods");
    CHECK(!strcmp(methods[PTQTP_PAPER].name, "paper") && !strcmp(methods[PTQTP_SEARCH].name, "search"), "names");
    for (int i = 0; i < 2 * N; i++) { /* the rows converge in different iterations */
        x[i] = (i < N ? 0.3f : 2e-5f) * gaussian();
        h[i % N] = uniform();
    }
    for (int m = 0; m < nmethods; m++) {
        int made = 0;
        CHECK(methods[m].method == m, "row %d is method %d", m, methods[m].method);
        for (int t = 0; t < ntypes; t++) {
            const int type = types[t].type;
            const struct ptqtp_maker * maker = ptqtp_maker_of(m, type);
            const size_t row = (size_t) (N / types[t].block) * types[t].size;
            CHECK((maker != NULL) == ptqtp_method_makes(m, type), "%s, %s", methods[m].name, types[t].name);
            const int status = ptqtp_quantize_rows(type, m, x, NULL, whole, 2, N);
            if (!maker) {
                CHECK(status == PTQTP_BAD_METHOD, "%s does not make %s", methods[m].name, types[t].name);
                continue;
            }
            made++;
            CHECK(status == PTQTP_OK && maker->rows && maker->method == m && maker->type == type, "%s makes %s",
                  methods[m].name, types[t].name);
            CHECK(!maker->probe == !maker->settle && !maker->probe == !methods[m].whole_matrix, "%s: passes",
                  methods[m].name);
            for (size_t r = 0; r < 2; r++) {
                CHECK(!ptqtp_quantize_rows(type, m, x + r * N, NULL, apart + r * row, 1, N), "a row alone");
            }
            CHECK(!memcmp(whole, apart, 2 * row) == !methods[m].whole_matrix, "%s of %s: rows together and apart",
                  types[t].name, methods[m].name);
            CHECK(ptqtp_quantize_rows(type, m, x, h, whole, 2, N) ==
                      (methods[m].importance ? PTQTP_OK : PTQTP_BAD_METHOD),
                  "%s: importance", methods[m].name);
        }
        CHECK(made > 0, "%s makes nothing", methods[m].name);
    }
    for (int t = 0; t < ntypes; t++) {
        CHECK(ptqtp_method_makes(PTQTP_SEARCH, types[t].type), "search makes %s: ggml calls it", types[t].name);
    }
    CHECK(!ptqtp_method_makes(nmethods, PTQTP_TP2_0) && !ptqtp_method_makes(PTQTP_SEARCH, 8), "unknown ones");
    CHECK(ptqtp_quantize_rows(PTQTP_TP2_0, nmethods, x, NULL, whole, 1, N) == PTQTP_BAD_METHOD, "unknown method");
}

/* ---- every instruction set against the plain C ---- */

/* A type of one unit a block; search_rows as for the codec, which is plain C. */
static void test_search(const struct ptqtp_bulk * bulk, int type,
                        int (*search_rows)(const float *, const float *, void *, float *, int64_t, int64_t, int)) {
    enum { BLOCKS = 4 * KINDS * 8 + 4, N = 32 * BLOCKS };
    static float x[N], h[N], values[N], want_values[N];
    static ptqtp_unit got[BLOCKS], want[BLOCKS];
    const ptqtp_bulk_maker_fn search = ptqtp_bulk_maker(bulk, PTQTP_SEARCH, type);
    CHECK(search, "%s: type %d", bulk->name, type);
    for (int i = 0; i < N / GROUP; i++) {
        fill(x + i * GROUP, i % KINDS);
    }
    for (int i = 0; i < N; i++) {
        h[i] = i / 32 % 5 == 3 ? 0 : -logf(uniform()) * (i / 32 % 7 == 2 ? 1e30f : 1);
    }
    const int counts[] = { BLOCKS, BLOCKS - 1, BLOCKS - 5, 1, 3, 17 };
    for (int weighted = 0; weighted < 2; weighted++) {
        const float * importance = weighted ? h : NULL;
        CHECK(search_rows(x, importance, want, want_values, 1, N, 0) == PTQTP_OK, "plain C");
        for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
            const int n = counts[c];
            memset(got, 0, sizeof got);
            memset(values, 0, sizeof values);
            search(x, importance, BLOCKS, got, values, n);
            for (int b = 0; b < n; b++) {
                CHECK(!memcmp(&got[b], &want[b], sizeof got[b]),
                      "%s, type %d: block %d of kind %d differs, weighted %d", bulk->name, type, b, b / 4 % KINDS,
                      weighted);
            }
            CHECK(!memcmp(values, want_values, (size_t) n * 32 * sizeof(float)), "%s: values", bulk->name);
            CHECK(n == BLOCKS || got[n].r == 0, "%s: wrote too far", bulk->name);
        }
        ptqtp_traits(type)->dequantize(want, values, N);
        CHECK(!memcmp(values, want_values, sizeof values), "type %d: values are not those of the blocks", type);
    }
    /* rows: the importance begins anew */
    CHECK(search_rows(x, h, want, NULL, 9, 96, 0) == PTQTP_OK, "plain C");
    search(x, h, 3, got, NULL, 27);
    CHECK(!memcmp(got, want, 27 * sizeof got[0]), "%s: importance by row", bulk->name);
}

static void test_floats(const struct ptqtp_bulk * bulk, const struct ptqtp_bulk * base) {
    enum { N = 4096 + 32 };
    static float x[N], y[N], y2[N];
    static uint16_t h[N], h2[N];
    static ptqtp_block_q8_0 q[N / 32], q2[N / 32];
    for (int round = 0; round < 40; round++) {
        for (int i = 0; i < N; i++) {
            const uint32_t bits = rnd();
            memcpy(&x[i], &bits, sizeof bits);
            if (!(fabsf(x[i]) <= FLT_MAX) || round % 4 == 1) {
                x[i] = round % 8 == 1 ? gaussian() : ldexpf(gaussian(), -15);
            }
            if (round % 4 == 2) {
                x[i] = i % 32 ? (float) ((int) (rnd() % 509) - 254) / 254 : 1; /* halves for Q8_0 */
            }
        }
        const int n = round < 20 ? N : N - 32 * round;
        const int odd = n - round % 9;
        CHECK(bulk->hash(x, odd, (uint64_t) round << 30) == base->hash(x, odd, (uint64_t) round << 30), "%s: hash",
              bulk->name);
        bulk->to_f16(x, h, odd);
        base->to_f16(x, h2, odd);
        CHECK(!memcmp(h, h2, sizeof h), "%s: to_f16", bulk->name);
        for (int i = 0; i < odd; i++) {
            CHECK(h[i] == ptqtp_half_from_float(x[i]), "%s: half of %a", bulk->name, (double) x[i]);
        }
        bulk->from_f16(h, y, odd);
        base->from_f16(h, y2, odd);
        CHECK(!memcmp(y, y2, sizeof y), "%s: from_f16", bulk->name);
        bulk->to_bf16(x, h, odd);
        base->to_bf16(x, h2, odd);
        CHECK(!memcmp(h, h2, sizeof h), "%s: to_bf16", bulk->name);
        bulk->from_bf16(h, y, odd);
        base->from_bf16(h, y2, odd);
        CHECK(!memcmp(y, y2, sizeof y), "%s: from_bf16", bulk->name);
        bulk->to_q8_0(x, q, n);
        base->to_q8_0(x, q2, n);
        CHECK(!memcmp(q, q2, sizeof q), "%s: to_q8_0", bulk->name);
        bulk->from_q8_0(q, y, n);
        base->from_q8_0(q, y2, n);
        for (int i = 0; i < n; i++) {
            CHECK(!memcmp(&y[i], &y2[i], sizeof y[i]) || (isnan(y[i]) && isnan(y2[i])), "%s: from_q8_0", bulk->name);
        }
        double e[PTQTP_ERROR_LANES] = { 0 }, p[PTQTP_ERROR_LANES] = { 0 };
        double e2[PTQTP_ERROR_LANES] = { 0 }, p2[PTQTP_ERROR_LANES] = { 0 };
        bulk->compare(x, y, n, e, p);
        base->compare(x, y, n, e2, p2);
        for (int l = 0; l < PTQTP_ERROR_LANES; l++) {
            CHECK((e[l] == e2[l] || isnan(e[l])) && p[l] == p2[l], "%s: compare, lane %d", bulk->name, l);
        }
        struct ptqtp_scan_result s, s2;
        x[rnd() % N] = round % 3 ? 0 : NAN;
        bulk->scan(x, n, round % 2 ? 32 : 40, 1e-4f, &s);
        base->scan(x, n, round % 2 ? 32 : 40, 1e-4f, &s2);
        CHECK(s.bad == s2.bad && s.largest == s2.largest && s.groups == s2.groups && s.below == s2.below, "%s: scan",
              bulk->name);
    }
}

/* ---- sums from sorted magnitudes ---- */

static bool same(double a, double b) { /* the sign of 0 included */
    return !memcmp(&a, &b, sizeof a);
}

/* At scales a1, a2, in float or in double: if ptqtp_sums_at decides, it must be as the loops do. */
static int try_sums(const float * x, const struct ptqtp_sorted * sorted, double a1, double a2, bool in_double) {
    const double m1 = fabs(a1), m2 = fabs(a2);
    const double plus = in_double ? m1 + m2 : (double) (float) (m1 + m2);
    const double minus = in_double ? fabs(m1 - m2) : (double) (float) fabs(m1 - m2);
    struct ptqtp_sums sums;
    struct ptqtp_cuts cuts;
    if (!ptqtp_sums_at(sorted, a1, a2, plus, minus, in_double ? 0x1p-48 : 0x1p-22, &sums, &cuts)) {
        return 0;
    }
    uint8_t digits[GROUP];
    ptqtp_cut_digits(x, &cuts, digits);
    double want[5] = { 0 };
    for (int i = GROUP - 1; i >= 0; i--) { /* another order: exact or not at all */
        double best = DBL_MAX;
        float best_float = FLT_MAX;
        int digit = 0;
        for (int c = 0; c < 9; c++) {
            if (in_double) {
                const double e = x[i] - (a1 * ptqtp_t1(c) + a2 * ptqtp_t2(c)), e2 = e * e;
                digit = e2 < best ? c : digit;
                best = e2 < best ? e2 : best;
            } else {
                const float v = (float) a1 * (float) ptqtp_t1(c) + (float) a2 * (float) ptqtp_t2(c);
                const float e = x[i] - v, e2 = e * e;
                digit = e2 < best_float ? c : digit;
                best_float = e2 < best_float ? e2 : best_float;
            }
        }
        CHECK(digits[i] == digit, "digit %d is %d, not %d: weight %a, scales %a %a, in %s", i, digits[i], digit,
              (double) x[i], a1, a2, in_double ? "double" : "float");
        const double t1 = ptqtp_t1(digit), t2 = ptqtp_t2(digit);
        const double terms[5] = { t1 * t1, t2 * t2, t1 * t2, t1 * x[i], t2 * x[i] };
        for (int k = 0; k < 5; k++) {
            want[k] += terms[k];
        }
    }
    CHECK(same(sums.s11, want[0]) && same(sums.s22, want[1]) && same(sums.s12, want[2]) && same(sums.b1, want[3]) &&
              same(sums.b2, want[4]),
          "sums at scales %a %a", a1, a2);
    return 1;
}

static void test_sums(void) {
    enum { ROUNDS = 400 };
    static float x[PTQTP_SORT_LANES * GROUP];
    struct ptqtp_sorted sorted[PTQTP_SORT_LANES];
    int decided[KINDS] = { 0 }, tried = 0;
    for (int round = 0; round < ROUNDS; round++) {
        const int n = 1 + round % PTQTP_SORT_LANES;
        for (int g = 0; g < n; g++) {
            fill(x + g * GROUP, (round + g) % KINDS);
        }
        ptqtp_sort_groups(x, n, sorted);
        for (int g = 0; g < n; g++) {
            const float * w = x + g * GROUP;
            double all = 0;
            float top = 0;
            for (int i = 0; i < GROUP; i++) {
                all += fabs((double) w[i]);
                top = fmaxf(top, fabsf(w[i]));
                CHECK(i == 0 || sorted[g].a[i] <= sorted[g].a[i + 1], "not sorted");
            }
            CHECK(sorted[g].a[GROUP] == top && (!sorted[g].usable || sorted[g].sum[GROUP] == all), "sorted, summed");
            for (int k = 0; k < 12; k++, tried++) {
                float a1 = top * uniform() * (rnd() & 1 ? -1.0f : 1.0f), a2 = top * uniform();
                if (k == 0) {
                    a2 = a1;
                } else if (k == 1) {
                    a2 = 0;
                } else if (k == 2) {
                    a2 = 0.5f * a1;
                } else if (k == 3) { /* a weight right in the middle of two levels, or next to it */
                    a1 = 2 * nextafterf(w[5], rnd() & 1 ? 9.0f : -9.0f) - a2;
                } else if (k == 4) {
                    a2 = -ptqtp_half_to_float(ptqtp_half_from_float(a2));
                    a1 = ptqtp_half_to_float(ptqtp_half_from_float(a1));
                } else if (k == 5) {
                    a1 = 2 * w[9], a2 = ldexpf(w[17], -(int) (rnd() % 20));
                }
                decided[(round + g) % KINDS] += try_sums(w, &sorted[g], a1, a2, false);
                decided[(round + g) % KINDS] += try_sums(w, &sorted[g], a1 * (1 + 0x1p-30 * rnd()), a2, true);
            }
        }
    }
    CHECK(decided[0] > tried / KINDS && decided[7] > tried / KINDS, "Gaussian weights are decided: %d, %d of %d",
          decided[0], decided[7], 2 * tried / KINDS);
    CHECK(decided[6] == 0, "zeros cannot be");
}

/* Words of all kinds, counted on any number of threads, and added to what is there. */
static void test_count_words(void) {
    enum { UNITS = 40000, WORDS = 65536 };
    static uint8_t units[UNITS * sizeof(ptqtp_unit)];
    static uint64_t five[WORDS], last[WORDS], want_five[WORDS], want_last[WORDS];
    for (size_t i = 0; i < sizeof units; i++) {
        units[i] = (uint8_t) (rnd() % 256);
    }
    for (size_t i = 0; i < sizeof units; i += 2) {
        (i % sizeof(ptqtp_unit) == 12 ? want_last : want_five)[units[i] + 256 * units[i + 1]] += 3;
    }
    for (int threads = 1; threads <= 4; threads += threads == 1 ? 1 : 2) {
        CHECK(ptqtp_count_words(units, UNITS, threads, five, last) == PTQTP_OK, "counting");
    }
    CHECK(!memcmp(five, want_five, sizeof five) && !memcmp(last, want_last, sizeof last), "counts of words");
    CHECK(ptqtp_count_words(units, 0, 0, five, last) == PTQTP_OK && five[7] == want_five[7], "no units");
    CHECK(ptqtp_count_words(units, -1, 0, five, last) == PTQTP_BAD_SIZE, "a negative count");
}

/* The third trits of TP2_2, from the weights that dequantizing gives, counted on any number of threads. */
static void test_count_third(void) {
    enum { UNITS = 40000 };
    static ptqtp_unit units[UNITS];
    static float values[UNITS * PTQTP_UNIT];
    uint64_t counts[3] = { 5, 6, 7 }, want[3] = { 5, 6, 7 };
    for (size_t i = 0; i < sizeof units; i++) {
        ((uint8_t *) units)[i] = (uint8_t) rnd();
    }
    ptqtp_dequantize_tp2_2(units, values, UNITS * PTQTP_UNIT);
    for (int u = 0; u < UNITS; u++) {
        uint8_t digits[PTQTP_UNIT];
        ptqtp_unit_unpack(&units[u], digits);
        for (int i = 0; i < PTQTP_UNIT; i++) {
            const float level = values[u * PTQTP_UNIT + i] / ptqtp_scale_value(units[u].side);
            want[1 + (int) level - ptqtp_level[digits[i]]] += 3;
        }
    }
    for (int threads = 1; threads <= 4; threads += threads == 1 ? 1 : 2) {
        CHECK(ptqtp_count_third(units, UNITS, threads, counts) == PTQTP_OK, "counting");
    }
    CHECK(!memcmp(counts, want, sizeof counts), "counts of third trits");
    CHECK(ptqtp_count_third(units, 0, 0, counts) == PTQTP_OK && counts[1] == want[1], "no units");
    CHECK(ptqtp_count_third(units, -1, 0, counts) == PTQTP_BAD_SIZE, "a negative count");
}

/* Each kernel that runs here means one of the builds that do: a better instruction set no worse one. */
static void test_forcing(void) {
    int nbuilds, nkernels;
    const struct ptqtp_bulk * const * builds = ptqtp_bulk_all(&nbuilds);
    const struct ptqtp_panel_kernel * const * kernels = ptqtp_panel_kernels(&nkernels);
    int last = 0;
    for (int k = 0; k < nkernels; k++) {
        const char * name = ptqtp_panel_kernel_name(kernels[k]);
        const struct ptqtp_bulk * bulk = ptqtp_bulk_of(name);
        CHECK((bulk != NULL) == ptqtp_panel_kernel_supported(kernels[k]), "%s", name);
        if (!bulk) {
            continue;
        }
        int at = 0;
        while (at < nbuilds && builds[at] != bulk) {
            at++;
        }
        CHECK(at < nbuilds && at >= last, "%s means %s", name, bulk->name);
        last = at;
    }
    CHECK(builds[nbuilds - 1] == &ptqtp_bulk_plain && ptqtp_bulk_of("scalar") == &ptqtp_bulk_plain, "scalar is plain");
    CHECK(!ptqtp_bulk_of("doesnotexist") && !ptqtp_bulk_of(""), "unknown names");
    const char * forced = getenv("PTQTP_KERNEL");
    const struct ptqtp_bulk * wanted = forced ? ptqtp_bulk_of(forced) : NULL;
    CHECK(ptqtp_bulk_chosen() == (wanted ? wanted : builds[0]), "%s is chosen", ptqtp_bulk_chosen()->name);
}

int main(int argc, char ** argv) {
    if (argc == 2 && !strcmp(argv[1], "--kernel")) {
        printf("bulk %s\n", ptqtp_bulk_chosen()->name);
        return 0;
    }
    int count;
    const struct ptqtp_bulk * const * all = ptqtp_bulk_all(&count);
    ptqtp_check_init();
    test_forcing();
    test_methods();
    for (int i = 0; i < count; i++) {
        test_search(all[i], PTQTP_TP2_1, ptqtp_search_rows_tp2_1);
        test_search(all[i], PTQTP_TP2_2, ptqtp_search_rows_tp2_2);
        test_floats(all[i], &ptqtp_bulk_plain);
        printf("ok: %s\n", all[i]->name);
    }
    test_sums();
    test_count_words();
    test_count_third();
    puts("quantizer tests passed");
    return 0;
}
