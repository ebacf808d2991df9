/* Our types in ggml-base: dequantize and quantize in ggml's calling conventions. */
#include "ggml.h"
#include "ggml/ggml-ptqtp.h"

#include <stdio.h>
#include <string.h>

/* A row function returns nothing, and no block means "broken": stop rather than go on with other weights. */
static void quantize_row(enum ptqtp_type type, const float * x, void * y, int64_t k) {
    const int status = ptqtp_quantize_rows(type, PTQTP_SEARCH, x, NULL, y, 1, k);
    if (status != PTQTP_OK) {
        GGML_ABORT("cannot quantize to %s: %s", ggml_type_name((enum ggml_type) type), ptqtp_status_text(status));
    }
}

/* ggml_quantize_chunk asserts on a short count, which would end the process without a reason. So say the reason and
 * write blocks that ggml_validate_row_data refuses: llama-quantize then stops with an error. */
static size_t quantize(enum ptqtp_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                       const float * imatrix) {
    const size_t size = (size_t) nrows * (size_t) (n_per_row / ptqtp_block_size(type)) * ptqtp_type_size(type);
    const int status = ptqtp_quantize_rows(type, PTQTP_SEARCH, src, imatrix, dst, nrows, n_per_row);
    if (status != PTQTP_OK) {
        fprintf(stderr, "ptqtp: cannot quantize to %s: %s\n", ggml_type_name((enum ggml_type) type),
                ptqtp_status_text(status));
        memset(dst, 0xff, size); /* 0xff is no remainder byte, and NaN as a scale */
    }
    return size;
}

#define DEFINE(name, NAME)                                                                                             \
    PTQTP_STATIC_ASSERT((int) GGML_TYPE_##NAME == PTQTP_##NAME, "type ids differ");                                    \
    void dequantize_row_##name(const void * x, float * y, int64_t k) {                                                 \
        ptqtp_dequantize_##name(x, y, k);                                                                              \
    }                                                                                                                  \
    void quantize_row_##name##_ref(const float * x, void * y, int64_t k) {                                             \
        quantize_row(PTQTP_##NAME, x, y, k);                                                                           \
    }                                                                                                                  \
    size_t quantize_##name(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {   \
        return quantize(PTQTP_##NAME, src, dst, nrows, n_per_row, imatrix);                                            \
    }
PTQTP_GGML_TYPES(DEFINE)
