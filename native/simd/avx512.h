/* AVX-512 F and DQ: 16 floats. */
#ifndef PTQTP_SIMD_AVX512_H
#define PTQTP_SIMD_AVX512_H

#include <immintrin.h>

#define PTQTP_LANES 16
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

#define vf_load _mm512_loadu_ps
#define vf_store _mm512_storeu_ps
#define vf_set _mm512_set1_ps
#define vf_add _mm512_add_ps
#define vf_sub _mm512_sub_ps
#define vf_mul _mm512_mul_ps
#define vf_div _mm512_div_ps
#define vf_min(a, b) _mm512_min_ps(b, a)
/* min(|best|, |a - v|) in one instruction */
#define vf_nearer(best, a, v) _mm512_range_ps(best, _mm512_sub_ps(a, v), 10)
#define vi_load(p) _mm512_loadu_si512(p)
#define vi_store(p, v) _mm512_storeu_si512(p, v)
#define vf_of_bits _mm512_castsi512_ps
#define vf_less(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define vm_any(m) ((m) != 0)
#define vf_pick(m, yes, no) _mm512_mask_mov_ps(no, m, yes)
#define vf_keep(m, v) _mm512_maskz_mov_ps(m, v)
#define vf_abs _mm512_abs_ps
#define vf_signed(a, sign) _mm512_or_ps(a, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)))
#define vi_pick(m, yes, no) _mm512_mask_mov_epi32(no, m, yes)

#endif
