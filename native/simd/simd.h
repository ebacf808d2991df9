/* Vectors of PTQTP_LANES floats, in the widest instruction set that the including file's flags allow. A file in simd/
 * for each defines the types and, as macros, the operations; each acts on all lanes, rounds once, and compares as C
 * does.
 *
 *     vf, vi, vm                floats, int32, the outcome of a comparison
 *     vf_load(p) vf_store(p, v) vf_set(f)          any alignment; f in all lanes
 *     vf_add vf_sub vf_mul vf_div(a, b)
 *     vf_min(a, b)              neither is NaN
 *     vf_nearer(best, a, v)     the smaller of best >= 0 and |a - v|
 *     vf_abs(v)
 *     vf_signed(a, sign)        a >= 0 with the sign of another
 *     vf_less(a, b)             a < b, false where one is NaN
 *     vm_any(m)                 whether m holds in any lane
 *     vf_pick(m, yes, no)       by lane; vi_pick: the same of int32
 *     vf_keep(m, v)             v where m holds, else +0
 *     vi_load(p) vi_store(p, v) vf_of_bits(v)      the floats of these bits */
#ifndef PTQTP_SIMD_H
#define PTQTP_SIMD_H

#if defined(PTQTP_NO_SIMD)
#    include "simd/none.h"
#elif defined(__AVX512DQ__)
#    include "simd/avx512.h"
#elif defined(__AVX2__)
#    include "simd/avx2.h"
#elif defined(__SSE2__)
#    include "simd/sse2.h"
#elif defined(__aarch64__)
#    include "simd/neon.h"
#else
#    include "simd/none.h"
#endif

#endif
