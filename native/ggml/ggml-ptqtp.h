/* ggml's names for TP2_0 and TP2_1, in ggml's calling conventions. Only the patched ggml includes this. */
#ifndef GGML_PTQTP_H
#define GGML_PTQTP_H

#include "ggml-backend.h"
#include "ptqtp.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ggml/base.c, in ggml-base */
PTQTP_API void dequantize_row_tp2_0(const void * x, float * y, int64_t k);
PTQTP_API void dequantize_row_tp2_1(const void * x, float * y, int64_t k);
PTQTP_API void quantize_row_tp2_0_ref(const float * x, void * y, int64_t k);
PTQTP_API void quantize_row_tp2_1_ref(const float * x, void * y, int64_t k);
/* Method `search`. Returns the bytes written. Where a weight cannot be quantized (NaN, Inf, too large) says so on
 * stderr and writes blocks that ggml_validate_row_data refuses. */
PTQTP_API size_t quantize_tp2_0(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
PTQTP_API size_t quantize_tp2_1(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

/* ggml/cpu.c, in ggml-cpu */
PTQTP_API void ggml_vec_dot_tp2_0_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,
                                       size_t by, int nrc);
PTQTP_API void ggml_vec_dot_tp2_1_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,
                                       size_t by, int nrc);

/* ggml/panels.cpp, in ggml-cpu: where TP2_1 lies as panels; NULL if PTQTP_KERNEL names no kernel */
ggml_backend_buffer_type_t ggml_backend_cpu_ptqtp_buffer_type(void);

#ifdef __cplusplus
}
#endif
#endif
