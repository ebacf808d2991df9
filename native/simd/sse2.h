/* SSE2, the baseline of x86-64: 4 floats. */
#ifndef PTQTP_SIMD_SSE2_H
#define PTQTP_SIMD_SSE2_H

#include <emmintrin.h>

#define PTQTP_LANES 4
typedef __m128 vf;
typedef __m128i vi;
typedef __m128 vm;

#define vf_load _mm_loadu_ps
#define vf_store _mm_storeu_ps
#define vf_set _mm_set1_ps
#define vf_add _mm_add_ps
#define vf_sub _mm_sub_ps
#define vf_mul _mm_mul_ps
#define vf_div _mm_div_ps
#define vf_min(a, b) _mm_min_ps(b, a)
#define vf_nearer(best, a, v)                                                                                          \
    _mm_min_ps(best, _mm_and_ps(_mm_castsi128_ps(_mm_set1_epi32(0x7fffffff)), _mm_sub_ps(a, v)))
#define vi_load(p) _mm_loadu_si128((const __m128i *) (p))
#define vi_store(p, v) _mm_storeu_si128((__m128i *) (p), v)
#define vf_of_bits _mm_castsi128_ps
#define vf_less _mm_cmplt_ps
#define vm_any(m) (_mm_movemask_ps(m) != 0)
#define vf_pick(m, yes, no) _mm_or_ps(_mm_and_ps(m, yes), _mm_andnot_ps(m, no))
#define vf_keep _mm_and_ps
#define vf_abs(v) _mm_andnot_ps(_mm_set1_ps(-0.0f), v)
#define vf_signed(a, sign) _mm_or_ps(a, _mm_and_ps(sign, _mm_set1_ps(-0.0f)))
#define vi_pick(m, yes, no) _mm_castps_si128(vf_pick(m, _mm_castsi128_ps(yes), _mm_castsi128_ps(no)))

#endif
