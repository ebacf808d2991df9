/* AVX2: 8 floats. */
#ifndef PTQTP_SIMD_AVX2_H
#define PTQTP_SIMD_AVX2_H

#include <immintrin.h>

#define PTQTP_LANES 8
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;

#define vf_load _mm256_loadu_ps
#define vf_store _mm256_storeu_ps
#define vf_set _mm256_set1_ps
#define vf_add _mm256_add_ps
#define vf_sub _mm256_sub_ps
#define vf_mul _mm256_mul_ps
#define vf_div _mm256_div_ps
#define vf_min(a, b) _mm256_min_ps(b, a)
#define vf_nearer(best, a, v)                                                                                          \
    _mm256_min_ps(best, _mm256_and_ps(_mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)), _mm256_sub_ps(a, v)))
#define vi_load(p) _mm256_loadu_si256((const __m256i *) (p))
#define vi_store(p, v) _mm256_storeu_si256((__m256i *) (p), v)
#define vf_of_bits _mm256_castsi256_ps
#define vf_less(a, b) _mm256_cmp_ps(a, b, _CMP_LT_OQ)
#define vm_any(m) (_mm256_movemask_ps(m) != 0)
#define vf_pick(m, yes, no) _mm256_blendv_ps(no, yes, m)
#define vf_keep _mm256_and_ps
#define vf_abs(v) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)
#define vf_signed(a, sign) _mm256_or_ps(a, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)))
#define vi_pick(m, yes, no) _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m))

#endif
