/* The AVX2 kernels, compiled twice: ISA(name) is name_avx2, or name_avxvnni with vpdpbusd.
 *
 * Codes are level + 5, so unsigned; the bias -5 * sum of activations comes prepared. Sums of a group in 16 bits may
 * wrap before the bias is added, never after: |sum| <= 5 * 127 * 32 = 20320. */
#include "bench/bakeoff/bakeoff.h"

#include <immintrin.h>

#define SPLAT128(...) _mm256_broadcastsi128_si256(__VA_ARGS__)
#define LEVELS SPLAT128(_mm_setr_epi8(0, 2, 4, 3, 5, 7, 6, 8, 10, 0, 0, 0, 0, 0, 0, 0))

static inline __m256i load(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

static inline __m256i load2(const void * lo, const void * hi) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) lo)),
                                   _mm_loadu_si128((const __m128i *) hi), 1);
}

static inline __m256i four(const void * p) { /* four bytes, eight times */
    int32_t v;
    memcpy(&v, p, sizeof v);
    return _mm256_set1_epi32(v);
}

static inline int64_t eight(const void * p) {
    int64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline __m256i nine(void) { /* hidden from GCC, which would multiply by a shift and an addition */
    __m256i v = _mm256_set1_epi16(9);
    __asm__("" : "+x"(v));
    return v;
}

static inline __m256i digit(__m256i w) {
    return _mm256_mulhi_epu16(w, nine());
}

static inline __m256i next(__m256i w) {
    return _mm256_mullo_epi16(w, nine());
}

static inline __m256i both(__m256i lo, __m256i hi) { /* bytes from two 16-bit digits */
    return _mm256_or_si256(lo, _mm256_slli_epi16(hi, 8));
}

static inline __m256i x3(__m256i y) {
    return _mm256_add_epi8(y, _mm256_add_epi8(y, y));
}

/* Codes from two planes of flipped bytes: 3 t1 + 2 t2 with trits 0..2; comparisons give -1 for each that holds. */
static inline __m256i code(__m256i y1, __m256i y2) {
    const __m256i one = _mm256_set1_epi8(85 - 128), two = _mm256_set1_epi8(170 - 128);
    const __m256i t1 = _mm256_add_epi8(_mm256_cmpgt_epi8(y1, one), _mm256_cmpgt_epi8(y1, two));
    const __m256i t2 = _mm256_add_epi8(_mm256_cmpgt_epi8(y2, one), _mm256_cmpgt_epi8(y2, two));
    const __m256i t12 = _mm256_add_epi8(t1, t2);
    return _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_add_epi8(_mm256_add_epi8(t12, t12), t1));
}

/* 16 scales as floats from 16 codes in 16-bit places: a float's upper half is (code << 3) + (112 << 7). */
static inline __m256i scale_half(__m256i codes) {
    return _mm256_add_epi16(_mm256_slli_epi16(codes, 3), _mm256_set1_epi16(112 << 7));
}

static inline __m256 scales8(__m128i codes) { /* of 8 bytes */
    const __m256i c = _mm256_slli_epi32(_mm256_cvtepu8_epi32(codes), 19);
    return _mm256_castsi256_ps(_mm256_add_epi32(c, _mm256_set1_epi32(112 << 23)));
}

static inline float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* From 8 vectors to the 8 sums over each of their 128-bit halves, 16 bits each. */
static inline __m256i sums8(const __m256i g[8]) {
#ifdef __AVXVNNI__
    const __m256i one = _mm256_set1_epi16(1);
    __m256i s[4];
    BAKE_UNROLL
    for (int i = 0; i < 4; i++) {
        s[i] = _mm256_madd_epi16(_mm256_packs_epi32(g[2 * i], g[2 * i + 1]), one);
    }
    return _mm256_packs_epi32(_mm256_madd_epi16(_mm256_packs_epi32(s[0], s[1]), one),
                              _mm256_madd_epi16(_mm256_packs_epi32(s[2], s[3]), one));
#else
    __m256i s[4], t[2];
    BAKE_UNROLL
    for (int i = 0; i < 4; i++) {
        s[i] = _mm256_add_epi16(_mm256_unpacklo_epi16(g[2 * i], g[2 * i + 1]),
                                _mm256_unpackhi_epi16(g[2 * i], g[2 * i + 1]));
    }
    BAKE_UNROLL
    for (int i = 0; i < 2; i++) {
        t[i] = _mm256_add_epi16(_mm256_unpacklo_epi32(s[2 * i], s[2 * i + 1]),
                                _mm256_unpackhi_epi32(s[2 * i], s[2 * i + 1]));
    }
    return _mm256_add_epi16(_mm256_unpacklo_epi64(t[0], t[1]), _mm256_unpackhi_epi64(t[0], t[1]));
#endif
}

static inline __m256 first(const float * p, int n) { /* n <= 8 floats, then zeros */
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return n == 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}

/* acc + the sums of n <= 8 groups of one row, with bias and scales. */
static inline __m256 add_groups(__m256 acc, const __m256i g[8], __m128i codes, const struct bake_acts * a, long group,
                                int n) {
    const __m256i s = sums8(g);
    __m128i t = _mm_add_epi16(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi16(t, _mm_loadu_si128((const __m128i *) (a->bias16 + group)));
    const __m256 scale = _mm256_mul_ps(scales8(codes), first(a->d + group, n));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(t)), scale, acc);
}

#ifdef __AVXVNNI__
static inline __m256i dot(__m256i acc, __m256i u, __m256i a) { /* eight 32-bit sums */
    return _mm256_dpbusd_avx_epi32(acc, u, a);
}
static inline __m256i dot0(__m256i u, __m256i a) {
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), u, a);
}
static inline __m256i sums32(__m256i acc) {
    return acc;
}
#else
static inline __m256i dot(__m256i acc, __m256i u, __m256i a) { /* sixteen 16-bit sums */
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, a));
}
static inline __m256i dot0(__m256i u, __m256i a) {
    return _mm256_maddubs_epi16(u, a);
}
static inline __m256i sums32(__m256i acc) {
    return _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
}
#endif

void ISA(bake_block256_rows)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m256i levels = LEVELS;
    const __m256i power = _mm256_setr_epi16(1, 1, 1, 1, 9, 9, 9, 9, 81, 81, 81, 81, 729, 729, 729, 729);
    for (long r = 0; r < rows; r++) {
        __m256 acc = _mm256_setzero_ps();
        for (long b = 0; b < cols / 256; b++, w += 112) {
            bake_prefetch(w, 112);
            const int8_t * q = a->q + 256 * b;
            __m256i g[8], last[3];
            BAKE_UNROLL
            for (int i = 0; i < 3; i++) {
                __m256i x = load(w + 32 * i), d = digit(x);
                x = next(x);
                g[2 * i] = dot0(_mm256_shuffle_epi8(levels, both(d, digit(x))), load(q + 64 * i));
                x = next(x);
                d = digit(x);
                x = next(x);
                g[2 * i + 1] = dot0(_mm256_shuffle_epi8(levels, both(d, digit(x))), load(q + 64 * i + 32));
                last[i] = digit(next(x));
            }
            const __m256i tail = digit(_mm256_mullo_epi16(_mm256_set1_epi64x(eight(w + 96)), power));
            g[6] = dot0(_mm256_shuffle_epi8(levels, both(last[0], last[1])), load(q + 192));
            g[7] = dot0(_mm256_shuffle_epi8(levels, both(last[2], tail)), load(q + 224));
            acc = add_groups(acc, g, _mm_loadl_epi64((const __m128i *) (w + 104)), a, 8 * b, 8);
        }
        out[r] = sum_of(acc);
    }
}

void ISA(bake_planes_rows)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m256i power = _mm256_setr_epi16(1, 1, 3, 3, 9, 9, 27, 27, 1, 1, 3, 3, 9, 9, 27, 27);
    const __m256i even = _mm256_setr_epi8(0, -1, 2, -1, 0, -1, 2, -1, 0, -1, 2, -1, 0, -1, 2, -1, /* plane 1 */
                                          4, -1, 6, -1, 4, -1, 6, -1, 4, -1, 6, -1, 4, -1, 6, -1);
    const __m256i odd = _mm256_setr_epi8(-1, 1, -1, 3, -1, 1, -1, 3, -1, 1, -1, 3, -1, 1, -1, 3, /* plane 1 */
                                         -1, 5, -1, 7, -1, 5, -1, 7, -1, 5, -1, 7, -1, 5, -1, 7);
    for (long r = 0; r < rows; r++) {
        __m256 acc = _mm256_setzero_ps();
        for (long b = 0; b < cols / 256; b++, w += 112) {
            bake_prefetch(w, 112);
            const int8_t * q = a->q + 256 * b;
            __m256i g[8];
            __m256i y1 = load(w), y2 = load(w + 32);
            BAKE_UNROLL
            for (int k = 0; k < 5; k++) {
                g[k] = dot0(code(y1, y2), load(q + 32 * k));
                y1 = x3(y1);
                y2 = x3(y2);
            }
            y1 = load2(w + 64, w + 64), y2 = load2(w + 80, w + 80); /* trits 0 and 1, then 2 and 3, then 4 */
            y1 = _mm256_blend_epi32(y1, x3(y1), 0xf0);
            y2 = _mm256_blend_epi32(y2, x3(y2), 0xf0);
            g[5] = dot0(code(y1, y2), load(q + 160));
            y1 = x3(x3(y1));
            y2 = x3(x3(y2));
            g[6] = dot0(code(y1, y2), load(q + 192));
            const __m256i tail = _mm256_set1_epi64x(eight(w + 96));
            const __m256i e = _mm256_mullo_epi16(_mm256_shuffle_epi8(tail, even), power);
            const __m256i o = _mm256_mullo_epi16(_mm256_shuffle_epi8(tail, odd), power);
            const __m256i t = _mm256_or_si256(_mm256_and_si256(e, _mm256_set1_epi16(0xff)), o);
            y1 = _mm256_inserti128_si256(x3(x3(y1)), _mm256_castsi256_si128(t), 1);
            y2 = _mm256_blend_epi32(x3(x3(y2)), t, 0xf0);
            g[7] = dot0(code(y1, y2), load(q + 224));
            acc = add_groups(acc, g, _mm_loadl_epi64((const __m128i *) (w + 104)), a, 8 * b, 8);
        }
        out[r] = sum_of(acc);
    }
}

void ISA(bake_planes_panel)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m256i power = _mm256_setr_epi16(1, 9, 1, 9, 1, 9, 1, 9, 1, 9, 1, 9, 1, 9, 1, 9);
    const __m256i power3 = _mm256_setr_epi16(3, 27, 3, 27, 3, 27, 3, 27, 3, 27, 3, 27, 3, 27, 3, 27);
    const __m256i even = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1, /* rows 0..3 */
                                          4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
    const __m256i odd = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, /* rows 0..3 */
                                         -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
    for (long r = 0; r < rows; r += 16) {
        __m256 acc[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
        for (long b = 0; b < cols / 64; b++, w += 448) {
            bake_prefetch(w, 448);
            const int8_t * q = a->q + 64 * b;
            BAKE_UNROLL
            for (int h = 0; h < 2; h++) { /* eight rows each */
                __m256i s[2] = { _mm256_setzero_si256(), _mm256_setzero_si256() };
                BAKE_UNROLL
                for (int i = 0; i < 3; i++) {
                    __m256i y1 = load(w + 64 * i + 32 * h), y2 = load(w + 192 + 64 * i + 32 * h);
                    BAKE_UNROLL
                    for (int v = 5 * i; v < 5 * i + 5; v++) {
                        s[v / 8] = dot(s[v / 8], code(y1, y2), four(q + 4 * v));
                        y1 = x3(y1);
                        y2 = x3(y2);
                    }
                }
                __m256i t[2];
                BAKE_UNROLL
                for (int plane = 0; plane < 2; plane++) {
                    const __m256i y = _mm256_set1_epi64x(eight(w + 384 + 16 * plane + 8 * h));
                    const __m256i e = _mm256_mullo_epi16(_mm256_shuffle_epi8(y, even), power);
                    const __m256i o = _mm256_mullo_epi16(_mm256_shuffle_epi8(y, odd), power3);
                    t[plane] = _mm256_or_si256(_mm256_and_si256(e, _mm256_set1_epi16(0xff)), o);
                }
                s[1] = dot(s[1], code(t[0], t[1]), four(q + 60));
                BAKE_UNROLL
                for (int g = 0; g < 2; g++) {
                    const __m256i sum = _mm256_add_epi32(sums32(s[g]), _mm256_set1_epi32(a->bias[2 * b + g]));
                    const __m256 scale = scales8(_mm_loadl_epi64((const __m128i *) (w + 416 + 16 * g + 8 * h)));
                    acc[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum),
                                             _mm256_mul_ps(scale, _mm256_set1_ps(a->d[2 * b + g])), acc[h]);
                }
            }
        }
        _mm256_storeu_ps(out + r, acc[0]);
        _mm256_storeu_ps(out + r + 8, acc[1]);
    }
}

void ISA(bake_nibbles_panel)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m256i low = _mm256_set1_epi8(15);
    for (long r = 0; r < rows; r += 16) {
        __m256 acc[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
        for (long g = 0; g < cols / 32; g++, w += 272) {
            bake_prefetch(w, 272);
            const int8_t * q = a->q + 32 * g;
            BAKE_UNROLL
            for (int h = 0; h < 2; h++) {
                __m256i s = _mm256_setzero_si256();
                BAKE_UNROLL
                for (int p = 0; p < 4; p++) {
                    const __m256i x = load(w + 64 * p + 32 * h);
                    s = dot(s, _mm256_and_si256(x, low), four(q + 8 * p));
                    s = dot(s, _mm256_and_si256(_mm256_srli_epi16(x, 4), low), four(q + 8 * p + 4));
                }
                const __m256i sum = _mm256_add_epi32(sums32(s), _mm256_set1_epi32(a->bias[g]));
                const __m256 scale = scales8(_mm_loadl_epi64((const __m128i *) (w + 256 + 8 * h)));
                acc[h] =
                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, _mm256_set1_ps(a->d[g])), acc[h]);
            }
        }
        _mm256_storeu_ps(out + r, acc[0]);
        _mm256_storeu_ps(out + r + 8, acc[1]);
    }
}

#ifdef __AVXVNNI__

/* A row in 32 bits, eight rows at a time. */
void ISA(bake_base9_panel)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m256i levels = LEVELS, zero = _mm256_setzero_si256();
    const __m256i twice = SPLAT128(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
    const __m256i power = _mm256_set1_epi32(1 | 9 << 16);
    for (long r = 0; r < rows; r += 16) {
        __m256 acc[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
        for (long g = 0; g < cols / 32; g++, w += 224) {
            bake_prefetch(w, 224);
            const int8_t * q = a->q + 32 * g;
            BAKE_UNROLL
            for (int h = 0; h < 2; h++) {
                __m256i s0 = _mm256_set1_epi32(a->bias[g]), s1 = zero, last[3];
                BAKE_UNROLL
                for (int p = 0; p < 3; p++) {
                    __m256i x = load(w + 64 * p + 32 * h), d = digit(x);
                    x = next(x);
                    s0 = dot(s0, _mm256_shuffle_epi8(levels, both(d, digit(x))), four(q + 8 * p));
                    x = next(x);
                    d = digit(x);
                    x = next(x);
                    s1 = dot(s1, _mm256_shuffle_epi8(levels, both(d, digit(x))), four(q + 8 * p + 4));
                    last[p] = digit(next(x));
                }
                const __m256i t = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) (w + 192 + 16 * h)));
                const __m256i rest = digit(_mm256_mullo_epi16(_mm256_shuffle_epi8(t, twice), power));
                s0 = dot(s0, _mm256_shuffle_epi8(levels, both(last[0], last[1])), four(q + 24));
                s1 = dot(s1, _mm256_shuffle_epi8(levels, both(last[2], rest)), four(q + 28));
                const __m256i bits = _mm256_slli_epi32(_mm256_and_si256(t, _mm256_set1_epi32(255)), 19);
                const __m256 scale = _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(112 << 23)));
                acc[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(s0, s1)),
                                         _mm256_mul_ps(scale, _mm256_set1_ps(a->d[g])), acc[h]);
            }
        }
        _mm256_storeu_ps(out + r, acc[0]);
        _mm256_storeu_ps(out + r + 8, acc[1]);
    }
}

#else

/* A row in 16 bits: packus joins the digits of rows 0..7 and 8..15, as rows 0..3 8..11 4..7 12..15. */
void ISA(bake_base9_panel)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m256i levels = LEVELS, zero = _mm256_setzero_si256();
    for (long r = 0; r < rows; r += 16) {
        __m256 acc0 = _mm256_setzero_ps(), acc1 = _mm256_setzero_ps();
        for (long g = 0; g < cols / 32; g++, w += 224) {
            bake_prefetch(w, 224);
            const int8_t * q = a->q + 64 * g;
            __m256i s = _mm256_set1_epi16(a->bias16[g]);
            BAKE_UNROLL
            for (int p = 0; p < 3; p++) {
                __m256i x = load(w + 64 * p), y = load(w + 64 * p + 32);
                BAKE_UNROLL
                for (int k = 0; k < 5; k++) {
                    const __m256i d = _mm256_packus_epi16(digit(x), digit(y));
                    s = dot(s, _mm256_shuffle_epi8(levels, d), four(q + 4 * (5 * p + k)));
                    x = next(x);
                    y = next(y);
                }
            }
            const __m256i t = _mm256_permute4x64_epi64(load(w + 192), 0xd8);
            s = dot(s, _mm256_shuffle_epi8(levels, both(digit(t), digit(next(t)))), four(q + 60));
            const __m256i half = scale_half(_mm256_and_si256(t, _mm256_set1_epi16(255)));
            const __m256 d = _mm256_set1_ps(a->d[g]);
            const __m256 scale0 = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, half)), d);
            const __m256 scale1 = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, half)), d);
            const __m256i s0 = _mm256_srai_epi32(_mm256_unpacklo_epi16(zero, s), 16);
            const __m256i s1 = _mm256_srai_epi32(_mm256_unpackhi_epi16(zero, s), 16);
            acc0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s0), scale0, acc0);
            acc1 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s1), scale1, acc1);
        }
        _mm256_storeu_ps(out + r, acc0);
        _mm256_storeu_ps(out + r + 8, acc1);
    }
}

/* n <= 8 groups of two rows; one row a 128-bit half. */
__attribute__((always_inline)) static inline __m256
unit_pairs(const uint8_t * w0, const uint8_t * w1, const struct bake_acts * a, long group, __m256 acc, const int n) {
    const __m256i levels = LEVELS, zero = _mm256_setzero_si256();
    __m256i g[8], word[8];
    bake_prefetch(w0, 14 * n);
    bake_prefetch(w1, 14 * n);
    BAKE_UNROLL
    for (int i = 0; i < 8; i++) {
        if (i >= n) {
            g[i] = word[i] = zero;
            continue;
        }
        const __m128i * q = (const __m128i *) (a->q + 48 * (group + i));
        __m256i x = word[i] = load2(w0 + 14 * i, w1 + 14 * i), d = digit(x);
        x = next(x);
        g[i] = dot0(_mm256_shuffle_epi8(levels, both(d, digit(x))), SPLAT128(_mm_loadu_si128(q)));
        x = next(x);
        d = digit(x);
        x = next(x);
        g[i] = dot(g[i], _mm256_shuffle_epi8(levels, both(d, digit(x))), SPLAT128(_mm_loadu_si128(q + 1)));
        g[i] = dot(g[i], _mm256_shuffle_epi8(levels, digit(next(x))), SPLAT128(_mm_loadu_si128(q + 2)));
    }
    const __m256i s = _mm256_add_epi16(sums8(g), SPLAT128(_mm_loadu_si128((const __m128i *) (a->bias16 + group))));
    __m256i t[4]; /* word 6 of each unit, with the scale in its low byte */
    BAKE_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_unpackhi_epi16(word[2 * i], word[2 * i + 1]);
    }
    const __m256i side = _mm256_unpacklo_epi64(_mm256_unpackhi_epi32(t[0], t[1]), _mm256_unpackhi_epi32(t[2], t[3]));
    const __m256i half = scale_half(_mm256_and_si256(side, _mm256_set1_epi16(255)));
    const __m256 lo = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, half));
    const __m256 hi = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, half));
    const __m256 s0 = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_unpacklo_epi16(zero, s), 16));
    const __m256 s1 = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_unpackhi_epi16(zero, s), 16));
    const __m256 d = first(a->d + group, n);
    const __m256 d0 = _mm256_permute2f128_ps(d, d, 0x00), d1 = _mm256_permute2f128_ps(d, d, 0x11);
    acc = _mm256_fmadd_ps(s0, _mm256_mul_ps(lo, d0), acc);
    return _mm256_fmadd_ps(s1, _mm256_mul_ps(hi, d1), acc);
}

void ISA(bake_unit32_pairs)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const long groups = cols / 32;
    for (long r = 0; r < rows; r += 2) {
        const uint8_t *w0 = w + 14 * groups * r, *w1 = w0 + 14 * groups;
        __m256 acc = _mm256_setzero_ps();
        long g = 0;
        for (; g + 8 <= groups; g += 8) {
            acc = unit_pairs(w0 + 14 * g, w1 + 14 * g, a, g, acc, 8);
        }
        for (; g + 4 <= groups; g += 4) {
            acc = unit_pairs(w0 + 14 * g, w1 + 14 * g, a, g, acc, 4);
        }
        for (; g < groups; g++) {
            acc = unit_pairs(w0 + 14 * g, w1 + 14 * g, a, g, acc, 1);
        }
        const __m128 lo = _mm256_castps256_ps128(acc), hi = _mm256_extractf128_ps(acc, 1);
        __m128 s = _mm_hadd_ps(lo, hi);
        s = _mm_hadd_ps(s, s);
        _mm_storel_pi((__m64 *) (out + r), s);
    }
}

/* n <= 4 blocks of one row. */
__attribute__((always_inline)) static inline __m256 block64(const uint8_t * w, const struct bake_acts * a, long b,
                                                            __m256 acc, const int n) {
    const __m256i levels = LEVELS;
    __m256i g[8];
    int codes[4] = { 0 };
    bake_prefetch(w, 28 * n);
    BAKE_UNROLL
    for (int i = 0; i < 4; i++) {
        if (i >= n) {
            g[2 * i] = g[2 * i + 1] = _mm256_setzero_si256();
            continue;
        }
        const int8_t * q = a->q + 128 * (b + i);
        __m256i x = load(w + 28 * i), d = digit(x);
        x = next(x);
        g[2 * i] = dot0(_mm256_shuffle_epi8(levels, both(d, digit(x))), load(q));
        x = next(x);
        d = digit(x);
        x = next(x);
        g[2 * i + 1] = dot0(_mm256_shuffle_epi8(levels, both(d, digit(x))), load(q + 32));
        const __m256i last = _mm256_shuffle_epi8(levels, digit(next(x)));
        g[2 * i] = dot(g[2 * i], last, load(q + 64));
        g[2 * i + 1] = dot(g[2 * i + 1], last, load(q + 96));
        codes[i] = ptqtp_get_u16(w + 28 * i + 26);
    }
    __m128i c = _mm_cvtsi32_si128(codes[0]);
    c = _mm_insert_epi16(_mm_insert_epi16(_mm_insert_epi16(c, codes[1], 1), codes[2], 2), codes[3], 3);
    return add_groups(acc, g, c, a, 2 * b, 2 * n);
}

void ISA(bake_block64_rows)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const long blocks = cols / 64;
    for (long r = 0; r < rows; r++, w += 28 * blocks) {
        __m256 acc = _mm256_setzero_ps();
        long b = 0;
        for (; b + 4 <= blocks; b += 4) {
            acc = block64(w + 28 * b, a, b, acc, 4);
        }
        for (; b + 2 <= blocks; b += 2) {
            acc = block64(w + 28 * b, a, b, acc, 2);
        }
        for (; b < blocks; b++) {
            acc = block64(w + 28 * b, a, b, acc, 1);
        }
        out[r] = sum_of(acc);
    }
}

void ISA(bake_unit32_rows)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    for (long r = 0; r < rows; r++) {
        out[r] = ptqtp_dot_tp2_1_avx2(cols, w + cols / 32 * 14 * r, a->q8_0);
    }
}

#endif
