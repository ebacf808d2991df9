/* `search` for TP2_2, for the codec (and so for llama-quantize): quantize/trellis.inc with the vectors of this file's
 * own flags. */
#include "quantize/quantize.h"

#include "codec/trellis.h"

#include <float.h>
#include <math.h>

static inline float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

#include "simd/simd.h"

#include "quantize/trellis.inc"

int ptqtp_search_rows_tp2_2(const float * x, const float * importance, void * dst, float * values, int64_t nrows,
                            int64_t n_per_row, int settled) {
    (void) settled;
    block_tp2_2 * to = dst;
    const int64_t period = n_per_row / PTQTP_QK_TP2_2, ngroups = nrows * period;
    for (int64_t g = 0; g < ngroups; g += PTQTP_LANES) {
        const int n = (int) (ngroups - g < PTQTP_LANES ? ngroups - g : PTQTP_LANES);
        trellis_groups(x + g * QT, importance, g, period, n, to + g, values ? values + g * QT : NULL);
    }
    return PTQTP_OK;
}
