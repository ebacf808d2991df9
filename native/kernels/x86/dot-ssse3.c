/* Dot products for SSSE3 (and AVX, which adds nothing for 16-bit integers). One unit fills a 128-bit register: seven
 * words and a place without one, which decodes to digit 0; every table maps digit 0 to 0, and the bias leaves it out.
 */
#include "kernels/kernels.h"

#ifdef PTQTP_X86

#    include "codec/unit.h"

#    include <tmmintrin.h>

struct digits {
    __m128i d01, d23, d4; /* bytes, bytes, 16-bit */
};

static inline struct digits unpack_unit(const ptqtp_unit * u) {
    const __m128i nine = _mm_set1_epi16(9);
    __m128i w = _mm_loadl_epi64((const __m128i *) u->q);
    int32_t words45;
    int16_t rest;
    memcpy(&words45, u->q + 8, sizeof words45);
    memcpy(&rest, &u->side, sizeof rest);
    w = _mm_insert_epi16(_mm_unpacklo_epi64(w, _mm_cvtsi32_si128(words45)), rest, 6);
    const __m128i d0 = _mm_mulhi_epu16(w, nine);
    w = _mm_mullo_epi16(w, nine);
    const __m128i d1 = _mm_mulhi_epu16(w, nine);
    w = _mm_and_si128(_mm_mullo_epi16(w, nine), _mm_setr_epi16(-1, -1, -1, -1, -1, -1, 0, 0));
    const __m128i d2 = _mm_mulhi_epu16(w, nine);
    w = _mm_mullo_epi16(w, nine);
    const __m128i d3 = _mm_mulhi_epu16(w, nine);
    w = _mm_mullo_epi16(w, nine);
    return (struct digits){
        _mm_or_si128(d0, _mm_slli_epi16(d1, 8)),
        _mm_or_si128(d2, _mm_slli_epi16(d3, 8)),
        _mm_mulhi_epu16(w, nine),
    };
}

struct acts {
    __m128i a01, a23, a4;
};

static inline struct acts load_acts(const int8_t * q) {
    const __m128i tail = _mm_srli_si128(_mm_loadl_epi64((const __m128i *) (q + 24)), 2); /* weights 26 .. 31 */
    return (struct acts){
        _mm_loadu_si128((const __m128i *) q),
        _mm_loadu_si128((const __m128i *) (q + 14)),
        _mm_srai_epi16(_mm_unpacklo_epi8(tail, tail), 8),
    };
}

/* sum over u*a - bias*a: four int32. |u| <= 10, so the 16-bit sums stay below 2^13. */
static inline __m128i dot_biased(struct digits d, struct acts a, __m128i table, int8_t bias) {
    const char b = (char) bias;
    const __m128i bias01 = _mm_setr_epi8(b, b, b, b, b, b, b, b, b, b, b, b, b, b, 0, 0);
    const __m128i bias23 = _mm_setr_epi8(b, b, b, b, b, b, b, b, b, b, b, b, 0, 0, 0, 0);
    const __m128i bias4 = _mm_setr_epi16(b, b, b, b, b, b, 0, 0);
    const __m128i plus = _mm_add_epi16(_mm_maddubs_epi16(_mm_shuffle_epi8(table, d.d01), a.a01),
                                       _mm_maddubs_epi16(_mm_shuffle_epi8(table, d.d23), a.a23));
    const __m128i minus = _mm_add_epi16(_mm_maddubs_epi16(bias01, a.a01), _mm_maddubs_epi16(bias23, a.a23));
    const __m128i u4 = _mm_sub_epi16(_mm_shuffle_epi8(table, d.d4), bias4);
    return _mm_add_epi32(_mm_madd_epi16(_mm_sub_epi16(plus, minus), _mm_set1_epi16(1)), _mm_madd_epi16(u4, a.a4));
}

static inline float sum_of(__m128 v) {
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}

float ptqtp_dot_tp2_1_ssse3(int64_t n, const void * weights, const void * q8_0) {
    const __m128i levels = _mm_setr_epi8(0, 2, 4, 3, 5, 7, 6, 8, 10, 0, 0, 0, 0, 0, 0, 0); /* 5 + 3*t1 + 2*t2 */
    const block_tp2_1 * x = weights;
    const ptqtp_block_q8_0 * y = q8_0;
    __m128 acc = _mm_setzero_ps();
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_1; i++) {
        const __m128i sum = dot_biased(unpack_unit(&x[i].u), load_acts(y[i].qs), levels, 5);
        const float scale = ptqtp_scale_value(x[i].u.side) * ptqtp_half_to_float(y[i].d);
        acc = _mm_add_ps(acc, _mm_mul_ps(_mm_cvtepi32_ps(sum), _mm_set1_ps(scale)));
    }
    return sum_of(acc);
}

float ptqtp_dot_tp2_0_ssse3(int64_t n, const void * weights, const void * q8_0) {
    const __m128i plane1 = _mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0); /* t1 + 1 by digit */
    const __m128i plane2 = _mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0); /* t2 + 1 by digit */
    const block_tp2_0 * x = weights;
    const ptqtp_block_q8_0 * y = q8_0;
    __m128 acc = _mm_setzero_ps();
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_0; i++) {
        const __m128 alpha1 = _mm_set1_ps(ptqtp_half_to_float(ptqtp_alpha_bits(&x[i], 0)));
        const __m128 alpha2 = _mm_set1_ps(ptqtp_half_to_float(ptqtp_alpha_bits(&x[i], 1)));
        for (int j = 0; j < 4; j++, y++) {
            const struct digits d = unpack_unit(&x[i].u[j]);
            const struct acts a = load_acts(y->qs);
            const __m128 sum1 = _mm_mul_ps(_mm_cvtepi32_ps(dot_biased(d, a, plane1, 1)), alpha1);
            const __m128 sum2 = _mm_mul_ps(_mm_cvtepi32_ps(dot_biased(d, a, plane2, 1)), alpha2);
            const __m128 scale = _mm_set1_ps(ptqtp_half_to_float(y->d));
            acc = _mm_add_ps(acc, _mm_mul_ps(_mm_add_ps(sum1, sum2), scale));
        }
    }
    return sum_of(acc);
}

#endif
