// The inner loops of calibrated quantization over several threads. Rows do not depend on one another.
#include "bulk/calibrate.h"
#include "bulk/bulk.h"
#include "host/chunks.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

namespace {

constexpr int G = PTQTP_UNIT;

// The upper U with inv(H) = U^T U of a group's block of H, from H = V V^T, V upper, U = inv(V): from the last column to
// the first, in double, sums in the order of the columns. A column without power of its own, its pivot not > 0, is left
// out: its row of U is 0.
void factor(const float * h, int64_t ldh, float * rows) {
    double v[G][G] = {}, u[G][G] = {};
    for (int j = G - 1; j >= 0; j--) {
        for (int i = j; i >= 0; i--) {
            double x = static_cast<double>(h[i * ldh + j]);
            for (int k = j + 1; k < G; k++) {
                x -= v[i][k] * v[j][k];
            }
            v[i][j] = i < j ? (v[j][j] > 0 ? x / v[j][j] : 0) : x > 0 ? std::sqrt(x) : 0;
        }
    }
    for (int i = G - 1; i >= 0; i--) {
        for (int k = i; k < G && v[i][i] > 0; k++) {
            double x = k == i ? 1 : 0;
            for (int n = i + 1; n < G; n++) {
                x -= v[i][n] * u[n][k];
            }
            u[i][k] = x / v[i][i];
        }
        for (int k = 0; k < G; k++) {
            rows[G * i + k] = static_cast<float>(u[i][k]);
        }
    }
}

// As quantize/trellis.inc has it: the power of two that takes the largest importance of a group near 1, and the least.
constexpr float kLight = 0x1p-10F;

float unit_of(float heaviest) {
    uint32_t bits;
    std::memcpy(&bits, &heaviest, sizeof bits);
    const uint32_t exponent = bits >> 23;
    bits = (exponent < 253 ? 254 - exponent : 1) << 23;
    float unit;
    std::memcpy(&unit, &bits, sizeof unit);
    return unit;
}

} // namespace

extern "C" void ptqtp_calib_lay_out(bool descent, const float * m, int64_t ldm, int ncols, float * buffer,
                                    ptqtp_calib * block) {
    float * const diag = buffer;
    float * const inner = diag + ncols;
    float * const outer = inner + G * ncols;
    float * const pivot = outer + ncols * ncols;
    float * const weight = pivot + ncols;
    float * const importance = weight + ncols;
    float * const rows = importance + ncols;
    for (int k = 0; k < ncols; k++) {
        const int first = k / G * G, panel = k / PTQTP_CALIB_PANEL;
        diag[k] = m[k * ldm + k];
        for (int i = 0; i < G; i++) {
            inner[G * k + i] = first + i < k ? m[(first + i) * ldm + k] : 0;
            rows[G * k + i] = first + i >= k ? m[k * ldm + first + i] : 0;
        }
        for (int j = 0; j < ncols; j++) {
            outer[(panel * ncols + j) * PTQTP_CALIB_PANEL + k % PTQTP_CALIB_PANEL] = j < first ? m[j * ldm + k] : 0;
        }
    }
    for (int g = 0; g < ncols; g += G) {
        if (descent) {
            factor(m + g * ldm + g, ldm, rows + G * g);
        }
        float heaviest = 0;
        for (int k = g; k < g + G; k++) {
            const float d = rows[G * k + k - g];
            pivot[k] = d;
            weight[k] = d > 0 ? 1 / (d * d) : 0;
            importance[k] = std::fmin(weight[k], FLT_MAX);
            heaviest = std::fmax(heaviest, importance[k]);
        }
        for (int k = g; k < g + G; k++) {
            importance[k] = heaviest > 0 ? std::fmax(importance[k] * unit_of(heaviest), kLight) : 1;
        }
    }
    *block = { ncols, diag, inner, outer, { pivot, weight, importance, rows } };
}

namespace {

using Loop = void (*)(int, const ptqtp_calib *, const ptqtp_calib_rows *, int64_t, int);

int run(bool descent, int type, int64_t nrows, int64_t ncols, const float * m, int64_t ldm,
        const ptqtp_calib_rows & rows, int window, int nthreads) try {
    if (type != PTQTP_TP2_1 && type != PTQTP_TP2_2) {
        return PTQTP_BAD_TYPE;
    }
    const int64_t groups = ncols / PTQTP_UNIT;
    if (nrows < 0 || ncols < 0 || ncols > PTQTP_CALIB_COLS || ncols % PTQTP_UNIT || window < 0 || window > 255 ||
        ldm < ncols || rows.ldx < ncols || rows.ldl < ncols || rows.ldc < groups || rows.ldm < ncols) {
        return PTQTP_BAD_BLOCK;
    }
    if (nrows == 0 || ncols == 0) {
        return PTQTP_OK;
    }
    const int n = static_cast<int>(ncols);
    const std::unique_ptr<float[]> buffer(new (std::nothrow) float[static_cast<size_t>(PTQTP_CALIB_BUFFER(n))]);
    if (!buffer) {
        return PTQTP_NO_MEMORY;
    }
    ptqtp_calib block;
    ptqtp_calib_lay_out(descent, m, ldm, n, buffer.get(), &block);
    const Loop loop = descent ? ptqtp_bulk_chosen()->cd : ptqtp_bulk_chosen()->gptq;
    // an eighth of other loops' chunks, as much more is done to a weight; whole vectors of rows
    const int64_t chunk = std::max<int64_t>(16, ptqtp::kChunk / 8 / ncols / 16 * 16);
    return ptqtp::over_chunks(nrows, chunk, nthreads, [&](int64_t first, int64_t count) {
        const ptqtp_calib_rows piece = ptqtp_calib_from(&rows, first);
        loop(type, &block, &piece, count, window);
        return static_cast<int>(PTQTP_OK);
    });
} catch (const std::bad_alloc &) {
    return PTQTP_NO_MEMORY;
}

} // namespace

extern "C" int ptqtp_gptq_block(int type, int64_t nrows, int64_t ncols, const float * w, int64_t ldw, const float * u,
                                int64_t ldu, int8_t * levels, int64_t ldl, uint8_t * codes, int64_t ldc, float * err,
                                int64_t lde, int window, int nthreads) {
    return run(false, type, nrows, ncols, u, ldu, { w, ldw, levels, ldl, codes, ldc, err, lde }, window, nthreads);
}

extern "C" int ptqtp_cd_block(int type, int64_t nrows, int64_t ncols, const float * r, int64_t ldr, const float * h,
                              int64_t ldh, int8_t * levels, int64_t ldl, uint8_t * codes, int64_t ldc, float * delta,
                              int64_t ldd, int window, int nthreads) {
    return run(true, type, nrows, ncols, h, ldh, { r, ldr, levels, ldl, codes, ldc, delta, ldd }, window, nthreads);
}
