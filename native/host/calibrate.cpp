// The inner loops of calibrated quantization over several threads. Rows do not depend on one another.
#include "bulk/calibrate.h"
#include "bulk/bulk.h"
#include "host/chunks.h"

#include <memory>
#include <new>

extern "C" void ptqtp_calib_lay_out(const float * m, int64_t ldm, int ncols, float * buffer, ptqtp_calib * block) {
    float * const diag = buffer;
    float * const weight = diag + ncols;
    float * const inner = weight + ncols;
    float * const outer = inner + PTQTP_UNIT * ncols;
    for (int k = 0; k < ncols; k++) {
        const int first = k / PTQTP_UNIT * PTQTP_UNIT, panel = k / PTQTP_CALIB_PANEL;
        const float d = m[k * ldm + k];
        diag[k] = d;
        weight[k] = d > 0 ? 1 / (d * d) : 0;
        for (int i = 0; i < PTQTP_UNIT; i++) {
            inner[PTQTP_UNIT * k + i] = first + i < k ? m[(first + i) * ldm + k] : 0;
        }
        for (int j = 0; j < ncols; j++) {
            outer[(panel * ncols + j) * PTQTP_CALIB_PANEL + k % PTQTP_CALIB_PANEL] = j < first ? m[j * ldm + k] : 0;
        }
    }
    *block = { ncols, diag, weight, inner, outer };
}

namespace {

using Loop = void (*)(const ptqtp_calib *, const ptqtp_calib_rows *, int64_t, int);

int run(Loop loop, int64_t nrows, int64_t ncols, const float * m, int64_t ldm, const ptqtp_calib_rows & rows,
        int window, int nthreads) try {
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
    ptqtp_calib_lay_out(m, ldm, n, buffer.get(), &block);
    // an eighth of other loops' chunks, as much more is done to a weight; whole vectors of rows
    const int64_t chunk = std::max<int64_t>(16, ptqtp::kChunk / 8 / ncols / 16 * 16);
    return ptqtp::over_chunks(nrows, chunk, nthreads, [&](int64_t first, int64_t count) {
        const ptqtp_calib_rows piece = ptqtp_calib_from(&rows, first);
        loop(&block, &piece, count, window);
        return static_cast<int>(PTQTP_OK);
    });
} catch (const std::bad_alloc &) {
    return PTQTP_NO_MEMORY;
}

} // namespace

extern "C" int ptqtp_gptq_block(int64_t nrows, int64_t ncols, const float * w, int64_t ldw, const float * u,
                                int64_t ldu, int8_t * levels, int64_t ldl, uint8_t * codes, int64_t ldc, float * err,
                                int64_t lde, int window, int nthreads) {
    return run(ptqtp_bulk_chosen()->gptq, nrows, ncols, u, ldu, { w, ldw, levels, ldl, codes, ldc, err, lde }, window,
               nthreads);
}

extern "C" int ptqtp_cd_block(int64_t nrows, int64_t ncols, const float * r, int64_t ldr, const float * h, int64_t ldh,
                              int8_t * levels, int64_t ldl, uint8_t * codes, int64_t ldc, float * delta, int64_t ldd,
                              int window, int nthreads) {
    return run(ptqtp_bulk_chosen()->cd, nrows, ncols, h, ldh, { r, ldr, levels, ldl, codes, ldc, delta, ldd }, window,
               nthreads);
}
