/* Any floats through the quantizers, the scan, the conversions and the loops of calibration. What they take they make
 * valid, alike in one thread and in three, and report truly; what they refuse they refuse alike.
 * Input: four bytes of choices, then floats. */
#include "fuzz/fuzz.h"

#include "codec/trellis.h"

#include <math.h>

static void quantize(const struct ptqtp_type_traits * t, int method, const float * x, const float * h, int64_t rows,
                     int64_t cols) {
    const int type = t->type;
    const size_t nbytes = (size_t) (rows * cols / t->block) * t->size;
    uint8_t *one = fuzz_bytes(nbytes), *many = fuzz_bytes(nbytes);
    struct ptqtp_stats stats = { 0, 0, 0 };
    const int status = ptqtp_quantize_rows(type, method, x, h, one, rows, cols);
    const int status_too = ptqtp_quantize_stats(type, method, x, h, many, rows, cols, 3, 3, &stats);
    MUST(status == status_too, "one thread %d, three %d", status, status_too);
    if (status == PTQTP_OK) {
        MUST(!memcmp(one, many, nbytes), "type %d, method %d: other bytes in three threads", type, method);
        MUST(ptqtp_validate(type, one, nbytes, NULL) == PTQTP_OK, "type %d, method %d: made what is not valid", type,
             method);
        float * r = fuzz_bytes((size_t) (rows * cols) * sizeof *r);
        t->dequantize(one, r, rows * cols);
        MUST(ptqtp_hash(r, rows * cols, 3, 1) == stats.hash, "type %d, method %d: not what was meant", type, method);
        MUST(stats.error >= 0 && stats.power >= 0 && isfinite(stats.error) && isfinite(stats.power), "statistics");
        free(r);
    }
    free(one);
    free(many);
}

static void convert(const float * x, int64_t n) {
    static const struct {
        int type;
        int64_t block;
        size_t size;
    } types[] = { { 0, 1, 4 }, { 1, 1, 2 }, { 30, 1, 2 }, { 8, 32, 34 } };
    for (int i = 0; i < 4; i++) {
        const int64_t m = n / types[i].block * types[i].block;
        uint8_t * raw = fuzz_bytes((size_t) (m / types[i].block) * types[i].size);
        float * back = fuzz_bytes((size_t) m * sizeof *back);
        if (types[i].type == 8) { /* promised for finite values only */
            struct ptqtp_scan_result s;
            ptqtp_scan(x, m, 32, 0, 1, &s);
            if (s.bad >= 0) {
                free(raw);
                free(back);
                continue;
            }
        }
        if (types[i].type) {
            MUST(ptqtp_from_float(types[i].type, x, raw, m, 1) == PTQTP_OK, "from_float %d", types[i].type);
        } else {
            memcpy(raw, x, (size_t) m * 4);
        }
        MUST(ptqtp_to_float(types[i].type, raw, back, m, 2) == PTQTP_OK, "to_float %d", types[i].type);
        free(raw);
        free(back);
    }
}

static void calibrate(int type, const float * x, int64_t n, int window) {
    const int64_t cols = n >= 3 * 64 * 64 ? 64 : 32;
    if (n < 2 * cols * cols) {
        return;
    }
    const int64_t rows = (n - cols * cols) / cols < 40 ? (n - cols * cols) / cols : 40, groups = cols / 32;
    float * out = fuzz_bytes((size_t) (rows * cols) * sizeof *out);
    int8_t * levels = fuzz_bytes((size_t) (rows * cols));
    uint8_t * codes = fuzz_bytes((size_t) (rows * groups));
    const float *h = x, *w = x + cols * cols;
    window = type == PTQTP_TP2_2 ? window / 32 : window; /* each of its codes takes long */
    for (int loop = 0; loop < 2; loop++) {               /* the second takes what the first has written */
        const int status =
            loop ? ptqtp_cd_block(type, rows, cols, w, cols, h, cols, levels, cols, codes, groups, out, cols, window, 1)
                 : ptqtp_gptq_block(type, rows, cols, w, cols, h, cols, levels, cols, codes, groups, out, cols, window,
                                    2);
        MUST(status == PTQTP_OK, "calibration loop %d: %d", loop, status);
        for (int64_t i = 0; type == PTQTP_TP2_1 && i < rows * cols; i++) {
            MUST(levels[i] >= -5 && levels[i] <= 5 && levels[i] != 4 && levels[i] != -4, "level %d", levels[i]);
        }
        for (int64_t i = 0; type == PTQTP_TP2_2 && i < rows * cols; i += PTQTP_UNIT) {
            static const uint8_t chain[PTQTP_UNIT] = { PTQTP_CHAIN_ORDER };
            int8_t unit[PTQTP_UNIT];
            uint8_t digits[PTQTP_UNIT];
            for (int c = 0; c < PTQTP_UNIT; c++) {
                unit[chain[c]] = levels[i + c];
            }
            MUST(ptqtp_trellis_digits(unit, digits), "levels without digits at %d", (int) i);
        }
    }
    free(out);
    free(levels);
    free(codes);
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 4 + sizeof(float)) {
        return 0;
    }
    const int64_t n = (int64_t) ((size - 4) / sizeof(float));
    float * x = fuzz_copy(data + 4, (size_t) n * sizeof *x);
    const struct ptqtp_type_traits * t = fuzz_type(data[0]);
    const int method = data[0] >> 1 & 1;
    const int64_t rows = 1 + data[1] % 9, cols = n / (rows + 1) / t->block * t->block;
    if (data[0] & 4) { /* into reach, so that more than the refusal is tried */
        for (int64_t i = 0; i < n; i++) {
            x[i] = isfinite(x[i]) ? fmaxf(fminf(x[i], 9.6875f), -9.6875f) : 0;
        }
    }
    float * h = NULL;
    if (data[0] & 8) {
        h = fuzz_bytes((size_t) cols * sizeof *h);
        for (int64_t i = 0; i < cols; i++) {
            h[i] = data[0] & 16 ? fabsf(x[rows * cols + i]) : x[rows * cols + i];
        }
    }
    quantize(t, method, x, h, rows, cols);
    convert(x, n);
    calibrate(data[0] & 32 ? PTQTP_TP2_2 : PTQTP_TP2_1, x, n, data[2]);
    struct ptqtp_scan_result a, b;
    MUST(ptqtp_scan(x, n, 1 + data[3], 1e-4f, 1, &a) == PTQTP_OK &&
             ptqtp_scan(x, n, 1 + data[3], 1e-4f, 3, &b) == PTQTP_OK,
         "scan");
    MUST(a.bad == b.bad && a.largest == b.largest && a.groups == b.groups && a.below == b.below, "scan in threads");
    free(x);
    free(h);
    return 0;
}
