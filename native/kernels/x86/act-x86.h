/* Quantizing activations on x86 from SSSE3 up, in 128-bit vectors: every panel kernel there includes this. The bits are
 * those of ptqtp_quantize_act. */
#ifndef PTQTP_KERNELS_X86_ACT_X86_H
#define PTQTP_KERNELS_X86_ACT_X86_H

#include "kernels/panel.h"

#include <tmmintrin.h>

/* The hardware does not look past a page and starts anew on the next: ask for what comes a page later. */
static inline __attribute__((always_inline)) void prefetch_tile(const uint8_t * tile, bool wide) {
    for (int i = 0; i < (wide ? PTQTP_WIDE_TILE_SIZE : PTQTP_TILE_SIZE); i += 64) {
        _mm_prefetch((const char *) tile + 4096 + i, _MM_HINT_T0);
    }
}

/* 32 activations in weight order; returns d. */
static inline float quantize_act(const float * x, __m128i q[2], int32_t * sum) {
    const __m128i magnitude = _mm_set1_epi32(0x7fffffff);
    __m128 v[8], max = _mm_setzero_ps();
    for (int i = 0; i < 8; i++) {
        v[i] = _mm_loadu_ps(x + 4 * i);
    }
    __m128i top = _mm_setzero_si128(); /* which are Inf or NaN */
    for (int i = 0; i < 8; i++) {
        const __m128 abs = _mm_and_ps(v[i], _mm_castsi128_ps(magnitude));
        max = _mm_max_ps(max, abs);
        top = _mm_or_si128(top, _mm_cmpgt_epi32(_mm_castps_si128(abs), _mm_set1_epi32(0x7f7fffff)));
    }
    max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    max = _mm_max_ss(max, _mm_shuffle_ps(max, max, 1));
    const float m = _mm_cvtss_f32(max);
    const bool finite = !_mm_movemask_epi8(top);
    if (!finite || m < 0x1p-126f) {
        q[0] = q[1] = _mm_setzero_si128();
        *sum = 0;
        return finite ? 0.0f : __builtin_nanf("");
    }
    const __m128 inverse = _mm_set1_ps(127.0f / m);
    __m128i r[8];
    for (int i = 0; i < 8; i++) {
        r[i] = _mm_cvtps_epi32(_mm_mul_ps(v[i], inverse));
    }
    __m128i s = _mm_setzero_si128();
    for (int i = 0; i < 2; i++) {
        const __m128i low = _mm_packs_epi32(r[4 * i], r[4 * i + 1]);
        const __m128i high = _mm_packs_epi32(r[4 * i + 2], r[4 * i + 3]);
        s = _mm_add_epi16(s, _mm_add_epi16(low, high)); /* at most 4 * 127 */
        q[i] = _mm_packs_epi16(low, high);
    }
    s = _mm_madd_epi16(s, _mm_set1_epi16(1));
    s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
    *sum = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
    return m / 127.0f;
}

static inline void quantize_quads(const float * x, ptqtp_act * acts, int64_t n) {
    for (int64_t i = 0; i < n / PTQTP_UNIT; i++) {
        __m128i q[2];
        int32_t sum;
        acts[i].d = quantize_act(x + i * PTQTP_UNIT, q, &sum);
        acts[i].bias = -PTQTP_LEVEL_BIAS * sum;
        /* the quad order, gathered from both halves */
        const __m128i first = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, -1, -1);
        const __m128i first2 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1);
        const __m128i second = _mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 11, 13, 14, -1, 15, -1);
        const __m128i second2 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 12, -1, 13);
        const __m128i a = _mm_or_si128(_mm_shuffle_epi8(q[0], first), _mm_shuffle_epi8(q[1], first2));
        const __m128i b = _mm_or_si128(_mm_shuffle_epi8(q[1], second), _mm_shuffle_epi8(q[0], second2));
        _mm_storeu_si128((__m128i *) acts[i].q, a);
        _mm_storeu_si128((__m128i *) (acts[i].q + 16), b);
    }
}

#endif
