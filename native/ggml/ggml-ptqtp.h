/* ggml's names for our types, in ggml's calling conventions. Only the patched ggml includes this. */
#ifndef GGML_PTQTP_H
#define GGML_PTQTP_H

#include "ggml-backend.h"
#include "ptqtp.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ggml's tables hold functions by the name of a type: these are the types. */
#define PTQTP_GGML_TYPES(DO)                                                                                           \
    DO(tp2_0, TP2_0)                                                                                                   \
    DO(tp2_1, TP2_1)                                                                                                   \
    DO(tp2_2, TP2_2)

/* The first three are ggml/base.c's, in ggml-base; the last is ggml/cpu.c's, in ggml-cpu. quantize_*: method `search`;
 * returns the bytes written. Where a weight cannot be quantized (NaN, Inf, too large) it says so on stderr and writes
 * blocks that ggml_validate_row_data refuses. */
#define PTQTP_GGML_DECLARE(name, NAME)                                                                                 \
    PTQTP_API void dequantize_row_##name(const void * x, float * y, int64_t k);                                        \
    PTQTP_API void quantize_row_##name##_ref(const float * x, void * y, int64_t k);                                    \
    PTQTP_API size_t quantize_##name(const float * src, void * dst, int64_t nrows, int64_t n_per_row,                  \
                                     const float * imatrix);                                                           \
    PTQTP_API void ggml_vec_dot_##name##_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx,                 \
                                              const void * vy, size_t by, int nrc);
PTQTP_GGML_TYPES(PTQTP_GGML_DECLARE)

/* ggml/panels.cpp, in ggml-cpu: where TP2_1 and TP2_2 lie as panels; NULL if PTQTP_KERNEL names no kernel */
ggml_backend_buffer_type_t ggml_backend_cpu_ptqtp_buffer_type(void);

#ifdef __cplusplus
}
#endif
#endif
