/* Dot products for AVX2 + FMA + F16C. This file alone is compiled with those flags; kernels/dot.c asks the CPU first.
 *
 * Two units fill a 256-bit register, one a lane. The second is loaded two bytes early, so that nothing past its end
 * is read; its words sit one place higher, and its activations are loaded two bytes early too (from Q8_0's own d),
 * so that they meet. Places without a word hold 0, which decodes to digit 0; every table maps digit 0 to 0, and the
 * bias vectors leave those places out.
 */
#include "kernels/kernels.h"

#ifdef PTQTP_X86

#    include "codec/unit.h"

#    include <immintrin.h>

/* Five digits of each word, one a 16-bit place, joined in pairs to bytes. */
struct digits {
    __m256i d01, d23, d4; /* bytes, bytes, 16-bit */
};

static inline struct digits unpack_pair(const uint8_t * p) {
    const __m256i seven = _mm256_setr_epi16(-1, -1, -1, -1, -1, -1, -1, 0, 0, -1, -1, -1, -1, -1, -1, -1);
    const __m256i six = _mm256_setr_epi16(-1, -1, -1, -1, -1, -1, 0, 0, 0, -1, -1, -1, -1, -1, -1, 0);
    const __m256i nine = _mm256_set1_epi16(9);
    const __m128i lo = _mm_loadu_si128((const __m128i *) p);
    const __m128i hi = _mm_loadu_si128((const __m128i *) (p + 12));
    __m256i w = _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(lo), hi, 1), seven);
    const __m256i d0 = _mm256_mulhi_epu16(w, nine);
    w = _mm256_mullo_epi16(w, nine);
    const __m256i d1 = _mm256_mulhi_epu16(w, nine);
    w = _mm256_and_si256(_mm256_mullo_epi16(w, nine), six);
    const __m256i d2 = _mm256_mulhi_epu16(w, nine);
    w = _mm256_mullo_epi16(w, nine);
    const __m256i d3 = _mm256_mulhi_epu16(w, nine);
    w = _mm256_mullo_epi16(w, nine);
    return (struct digits){
        _mm256_or_si256(d0, _mm256_slli_epi16(d1, 8)),
        _mm256_or_si256(d2, _mm256_slli_epi16(d3, 8)),
        _mm256_mulhi_epu16(w, nine),
    };
}

static inline __m256i join(const void * lo, const void * hi) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) lo)),
                                   _mm_loadu_si128((const __m128i *) hi), 1);
}

/* The activations that meet d01, d23 (bytes) and d4 (16-bit) of two units. */
struct acts {
    __m256i a01, a23, a4;
};

static inline struct acts load_acts(const ptqtp_block_q8_0 * y) {
    __m128i tail = _mm_loadl_epi64((const __m128i *) (y[0].qs + 24));
    tail = _mm_unpacklo_epi64(tail, _mm_loadl_epi64((const __m128i *) (y[1].qs + 24)));
    tail = _mm_srlv_epi64(tail, _mm_set_epi64x(8, 16)); /* weight 26 to place 0, and to place 1 */
    return (struct acts){
        join(y[0].qs, (const uint8_t *) &y[1].d), /* d lies two bytes before qs */
        join(y[0].qs + 14, y[1].qs + 12),
        _mm256_cvtepi8_epi16(tail),
    };
}

/* sum over u*a - bias*a: four int32 a unit. |u| <= 10, so the 16-bit sums stay below 2^13. */
static inline __m256i dot_biased(struct digits d, struct acts a, __m256i table, int8_t bias) {
    const char b = (char) bias;
    const __m256i bias01 = _mm256_setr_epi8(b, b, b, b, b, b, b, b, b, b, b, b, b, b, 0, 0, 0, 0, b, b, b, b, b, b, b,
                                            b, b, b, b, b, b, b);
    const __m256i bias23 = _mm256_setr_epi8(b, b, b, b, b, b, b, b, b, b, b, b, 0, 0, 0, 0, 0, 0, b, b, b, b, b, b, b,
                                            b, b, b, b, b, 0, 0);
    const __m256i bias4 = _mm256_setr_epi16(b, b, b, b, b, b, 0, 0, 0, b, b, b, b, b, b, 0);
    const __m256i u01 = _mm256_shuffle_epi8(table, d.d01), u23 = _mm256_shuffle_epi8(table, d.d23);
    const __m256i u4 = _mm256_sub_epi16(_mm256_shuffle_epi8(table, d.d4), bias4);
    const __m256i plus = _mm256_add_epi16(_mm256_maddubs_epi16(u01, a.a01), _mm256_maddubs_epi16(u23, a.a23));
    const __m256i minus = _mm256_add_epi16(_mm256_maddubs_epi16(bias01, a.a01), _mm256_maddubs_epi16(bias23, a.a23));
    return _mm256_add_epi32(_mm256_madd_epi16(_mm256_sub_epi16(plus, minus), _mm256_set1_epi16(1)),
                            _mm256_madd_epi16(u4, a.a4));
}

static inline __m256 two_scales(float lo, float hi) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_set1_ps(lo)), _mm_set1_ps(hi), 1);
}

static inline float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline __m256 tp2_1_pair(const block_tp2_1 * x, const ptqtp_block_q8_0 * y, __m256 acc) {
    const __m256i levels = _mm256_broadcastsi128_si256(/* 5 + 3*t1 + 2*t2 by digit */
                                                       _mm_setr_epi8(0, 2, 4, 3, 5, 7, 6, 8, 10, 0, 0, 0, 0, 0, 0, 0));
    const __m256i sum = dot_biased(unpack_pair(x[0].u.q), load_acts(y), levels, 5);
    const __m256 scale = two_scales(ptqtp_scale_value(x[0].u.side) * _cvtsh_ss(y[0].d),
                                    ptqtp_scale_value(x[1].u.side) * _cvtsh_ss(y[1].d));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc);
}

float ptqtp_dot_tp2_1_avx2(int64_t n, const void * weights, const void * q8_0) {
    const block_tp2_1 * x = weights;
    const ptqtp_block_q8_0 * y = q8_0;
    int64_t nb = n / PTQTP_QK_TP2_1;
    __m256 acc0 = _mm256_setzero_ps(), acc1 = _mm256_setzero_ps();
    for (; nb >= 4; nb -= 4, x += 4, y += 4) {
        acc0 = tp2_1_pair(x, y, acc0);
        acc1 = tp2_1_pair(x + 2, y + 2, acc1);
    }
    for (; nb >= 2; nb -= 2, x += 2, y += 2) {
        acc0 = tp2_1_pair(x, y, acc0);
    }
    if (nb) {
        block_tp2_1 last[2] = { x[0] };
        ptqtp_block_q8_0 acts[2] = { y[0] };
        acc1 = tp2_1_pair(last, acts, acc1);
    }
    return sum_of(_mm256_add_ps(acc0, acc1));
}

float ptqtp_dot_tp2_0_avx2(int64_t n, const void * weights, const void * q8_0) {
    const __m256i plane1 = _mm256_broadcastsi128_si256(/* t1 + 1 by digit */
                                                       _mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0));
    const __m256i plane2 = _mm256_broadcastsi128_si256(/* t2 + 1 by digit */
                                                       _mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0));
    const block_tp2_0 * x = weights;
    const ptqtp_block_q8_0 * y = q8_0;
    __m256 acc1 = _mm256_setzero_ps(), acc2 = _mm256_setzero_ps();
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_0; i++) {
        const __m256 alpha1 = _mm256_set1_ps(_cvtsh_ss(ptqtp_alpha_bits(&x[i], 0)));
        const __m256 alpha2 = _mm256_set1_ps(_cvtsh_ss(ptqtp_alpha_bits(&x[i], 1)));
        for (int j = 0; j < 4; j += 2, y += 2) {
            const struct digits d = unpack_pair(x[i].u[j].q);
            const struct acts a = load_acts(y);
            const __m256 scale = two_scales(_cvtsh_ss(y[0].d), _cvtsh_ss(y[1].d));
            const __m256 sum1 = _mm256_cvtepi32_ps(dot_biased(d, a, plane1, 1));
            const __m256 sum2 = _mm256_cvtepi32_ps(dot_biased(d, a, plane2, 1));
            acc1 = _mm256_fmadd_ps(_mm256_mul_ps(scale, alpha1), sum1, acc1);
            acc2 = _mm256_fmadd_ps(_mm256_mul_ps(scale, alpha2), sum2, acc2);
        }
    }
    return sum_of(_mm256_add_ps(acc1, acc2));
}

#endif
