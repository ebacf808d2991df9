/* The AVX-512 kernels, compiled twice: ISA(name) is name_avx512bw, or name_avx512vnni with vpdpbusd.
 * Panels: a row is a 32-bit place. Row layouts: two rows at a time, one a half of the register. */
#include "bench/bakeoff/bakeoff.h"

#include <immintrin.h>

#define SPLAT128(...) _mm512_broadcast_i32x4(__VA_ARGS__)
#define LEVELS SPLAT128(_mm_setr_epi8(0, 2, 4, 3, 5, 7, 6, 8, 10, 0, 0, 0, 0, 0, 0, 0))

static inline __m512i load(const void * p) {
    return _mm512_loadu_si512(p);
}

static inline __m512i load2(const uint8_t * lo, const uint8_t * hi) { /* 32 bytes of each */
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) lo)),
                              _mm256_loadu_si256((const __m256i *) hi), 1);
}

static inline __m512i same(const void * p) { /* 32 bytes, twice */
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) p));
}

static inline __m512i four(const void * p) { /* four bytes, 16 times */
    int32_t v;
    memcpy(&v, p, sizeof v);
    return _mm512_set1_epi32(v);
}

static inline int64_t eight(const void * p) {
    int64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline __m512i eights(const uint8_t * lo, const uint8_t * hi) { /* eight bytes of each, four times */
    return _mm512_mask_set1_epi64(_mm512_set1_epi64(eight(lo)), 0xf0, eight(hi));
}

static inline __m512i nine(void) { /* hidden from GCC, which would multiply by a shift and an addition */
    __m512i v = _mm512_set1_epi16(9);
    __asm__("" : "+v"(v));
    return v;
}

static inline __m512i digit(__m512i w) {
    return _mm512_mulhi_epu16(w, nine());
}

static inline __m512i next(__m512i w) {
    return _mm512_mullo_epi16(w, nine());
}

static inline __m512i both(__m512i lo, __m512i hi) { /* digits of lo in the low bytes, of hi in the high bytes */
    const __m512i d = _mm512_mulhi_epu16(hi, _mm512_set1_epi16(9 * 256));
    return _mm512_ternarylogic_epi32(digit(lo), d, _mm512_set1_epi16((short) 0xff00), 0xf8); /* a | (b & c) */
}

static inline __m512i times3(__m512i y) {
    return _mm512_add_epi8(y, _mm512_add_epi8(y, y));
}

/* Codes from two planes of flipped bytes: 3 t1 + 2 t2 with trits 0..2. */
static inline __m512i code(__m512i y1, __m512i y2) {
    const __m512i one = _mm512_set1_epi8(85 - 128), two = _mm512_set1_epi8(170 - 128);
    const __m512i c3 = _mm512_set1_epi8(3), c2 = _mm512_set1_epi8(2);
    __m512i u = _mm512_maskz_mov_epi8(_mm512_cmpgt_epi8_mask(y1, one), c3);
    __m512i v = _mm512_maskz_mov_epi8(_mm512_cmpgt_epi8_mask(y2, one), c2);
    u = _mm512_mask_add_epi8(u, _mm512_cmpgt_epi8_mask(y1, two), u, c3);
    v = _mm512_mask_add_epi8(v, _mm512_cmpgt_epi8_mask(y2, two), v, c2);
    return _mm512_add_epi8(u, v);
}

static inline __m512 scales16(__m128i codes) {
    const __m512i c = _mm512_slli_epi32(_mm512_cvtepu8_epi32(codes), 19);
    return _mm512_castsi512_ps(_mm512_add_epi32(c, _mm512_set1_epi32(112 << 23)));
}

#ifdef __AVX512VNNI__
static inline __m512i dot(__m512i acc, __m512i u, __m512i a) { /* sixteen 32-bit sums */
    return _mm512_dpbusd_epi32(acc, u, a);
}
static inline __m512i dot0(__m512i u, __m512i a) {
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), u, a);
}
static inline __m512i sums32(__m512i acc0, __m512i acc1) {
    return _mm512_add_epi32(acc0, acc1);
}
#else
static inline __m512i dot(__m512i acc, __m512i u, __m512i a) { /* 32 16-bit sums, each of at most 16 products */
    return _mm512_add_epi16(acc, _mm512_maddubs_epi16(u, a));
}
static inline __m512i dot0(__m512i u, __m512i a) {
    return _mm512_maddubs_epi16(u, a);
}
static inline __m512i sums32(__m512i acc0, __m512i acc1) {
    return _mm512_madd_epi16(_mm512_add_epi16(acc0, acc1), _mm512_set1_epi16(1));
}
#endif

/* From 8 vectors to the 8 sums over each of their 128-bit quarters, 16 bits each. */
static inline __m512i sums8(const __m512i g[8]) {
#ifdef __AVX512VNNI__
    const __m512i one = _mm512_set1_epi16(1);
    __m512i s[4];
    BAKE_UNROLL
    for (int i = 0; i < 4; i++) {
        s[i] = _mm512_madd_epi16(_mm512_packs_epi32(g[2 * i], g[2 * i + 1]), one);
    }
    return _mm512_packs_epi32(_mm512_madd_epi16(_mm512_packs_epi32(s[0], s[1]), one),
                              _mm512_madd_epi16(_mm512_packs_epi32(s[2], s[3]), one));
#else
    __m512i s[4], t[2];
    BAKE_UNROLL
    for (int i = 0; i < 4; i++) {
        s[i] = _mm512_add_epi16(_mm512_unpacklo_epi16(g[2 * i], g[2 * i + 1]),
                                _mm512_unpackhi_epi16(g[2 * i], g[2 * i + 1]));
    }
    BAKE_UNROLL
    for (int i = 0; i < 2; i++) {
        t[i] = _mm512_add_epi16(_mm512_unpacklo_epi32(s[2 * i], s[2 * i + 1]),
                                _mm512_unpackhi_epi32(s[2 * i], s[2 * i + 1]));
    }
    return _mm512_add_epi16(_mm512_unpacklo_epi64(t[0], t[1]), _mm512_unpackhi_epi64(t[0], t[1]));
#endif
}

/* acc + the sums of 8 groups of two rows; their scales lie at c0 and c1. */
static inline __m512 add_groups(__m512 acc, const __m512i g[8], const uint8_t * c0, const uint8_t * c1,
                                const struct bake_acts * a, long group) {
    const __m512i s = sums8(g), t = _mm512_shuffle_i64x2(s, s, 0xd8);
    const __m256i bias = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (a->bias16 + group)));
    const __m256i halves = _mm256_add_epi16(_mm512_castsi512_si256(t), _mm512_extracti64x4_epi64(t, 1));
    const __m512i sum = _mm512_cvtepi16_epi32(_mm256_add_epi16(halves, bias));
    const __m512 d = _mm512_broadcast_f32x8(_mm256_loadu_ps(a->d + group));
    const __m512 scale = _mm512_mul_ps(scales16(_mm_set_epi64x(eight(c1), eight(c0))), d);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
}

static inline void store2(float * out, __m512 acc) { /* the sum of each half */
    out[0] = _mm512_mask_reduce_add_ps(0x00ff, acc);
    out[1] = _mm512_mask_reduce_add_ps(0xff00, acc);
}

void ISA(bake_block256_rows)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m512i levels = LEVELS;
    const __m512i power =
        _mm512_broadcast_i64x4(_mm256_setr_epi16(1, 1, 1, 1, 9, 9, 9, 9, 81, 81, 81, 81, 729, 729, 729, 729));
    const long row = cols / 256 * 112;
    for (long r = 0; r < rows; r += 2, w += row) {
        __m512 acc = _mm512_setzero_ps();
        for (long b = 0; b < cols / 256; b++, w += 112) {
            bake_prefetch(w, 112);
            const int8_t * q = a->q + 256 * b;
            const uint8_t * v = w + row;
            bake_prefetch(v, 112);
            __m512i g[8], last[3];
            BAKE_UNROLL
            for (int i = 0; i < 3; i++) {
                const __m512i x0 = load2(w + 32 * i, v + 32 * i), x1 = next(x0), x2 = next(x1), x3 = next(x2);
                g[2 * i] = dot0(_mm512_shuffle_epi8(levels, both(x0, x1)), same(q + 64 * i));
                g[2 * i + 1] = dot0(_mm512_shuffle_epi8(levels, both(x2, x3)), same(q + 64 * i + 32));
                last[i] = next(x3);
            }
            const __m512i tail = _mm512_mullo_epi16(eights(w + 96, v + 96), power);
            g[6] = dot0(_mm512_shuffle_epi8(levels, both(last[0], last[1])), same(q + 192));
            g[7] = dot0(_mm512_shuffle_epi8(levels, both(last[2], tail)), same(q + 224));
            acc = add_groups(acc, g, w + 104, v + 104, a, 8 * b);
        }
        store2(out + r, acc);
    }
}

void ISA(bake_planes_rows)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m512i power = SPLAT128(_mm_setr_epi16(1, 1, 3, 3, 9, 9, 27, 27));
    const __m512i even = _mm512_broadcast_i64x4(
        _mm256_setr_epi8(0, -1, 2, -1, 0, -1, 2, -1, 0, -1, 2, -1, 0, -1, 2, -1, /* plane 1, then plane 2 */
                         4, -1, 6, -1, 4, -1, 6, -1, 4, -1, 6, -1, 4, -1, 6, -1));
    const __m512i odd = _mm512_broadcast_i64x4(
        _mm256_setr_epi8(-1, 1, -1, 3, -1, 1, -1, 3, -1, 1, -1, 3, -1, 1, -1, 3, /* plane 1, then plane 2 */
                         -1, 5, -1, 7, -1, 5, -1, 7, -1, 5, -1, 7, -1, 5, -1, 7));
    const long row = cols / 256 * 112;
    for (long r = 0; r < rows; r += 2, w += row) {
        __m512 acc = _mm512_setzero_ps();
        for (long b = 0; b < cols / 256; b++, w += 112) {
            bake_prefetch(w, 112);
            const int8_t * q = a->q + 256 * b;
            const uint8_t * v = w + row;
            bake_prefetch(v, 112);
            __m512i g[8];
            __m512i y1 = load2(w, v), y2 = load2(w + 32, v + 32);
            BAKE_UNROLL
            for (int k = 0; k < 5; k++) {
                g[k] = dot0(code(y1, y2), same(q + 32 * k));
                y1 = times3(y1);
                y2 = times3(y2);
            }
            const __m512i z = load2(w + 64, v + 64); /* 16 bytes of plane 1, 16 of plane 2; of both rows */
            y1 = _mm512_shuffle_i64x2(z, z, 0xa0);   /* trits 0 and 1, then 2 and 3, then 4 */
            y2 = _mm512_shuffle_i64x2(z, z, 0xf5);
            y1 = _mm512_mask_mov_epi64(y1, 0xcc, times3(y1));
            y2 = _mm512_mask_mov_epi64(y2, 0xcc, times3(y2));
            g[5] = dot0(code(y1, y2), same(q + 160));
            y1 = times3(times3(y1));
            y2 = times3(times3(y2));
            g[6] = dot0(code(y1, y2), same(q + 192));
            const __m512i tail = eights(w + 96, v + 96);
            const __m512i e = _mm512_mullo_epi16(_mm512_shuffle_epi8(tail, even), power);
            const __m512i o = _mm512_mullo_epi16(_mm512_shuffle_epi8(tail, odd), power);
            const __m512i t = _mm512_ternarylogic_epi32(o, e, _mm512_set1_epi16(0xff), 0xf8);
            y1 = _mm512_mask_shuffle_i64x2(times3(times3(y1)), 0xcc, t, t, 0xa0);
            y2 = _mm512_mask_mov_epi64(times3(times3(y2)), 0xcc, t);
            g[7] = dot0(code(y1, y2), same(q + 224));
            acc = add_groups(acc, g, w + 104, v + 104, a, 8 * b);
        }
        store2(out + r, acc);
    }
}

void ISA(bake_base9_panel)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m512i levels = LEVELS, zero = _mm512_setzero_si512();
    const __m512i twice = SPLAT128(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
    const __m512i power = _mm512_set1_epi32(1 | 9 << 16);
    for (long r = 0; r < rows; r += 16) {
        __m512 acc = _mm512_setzero_ps();
        for (long g = 0; g < cols / 32; g++, w += 224) {
            bake_prefetch(w, 224);
            const int8_t * q = a->q + 32 * g;
            __m512i s0 = zero, s1 = zero, last[3];
            BAKE_UNROLL
            for (int p = 0; p < 3; p++) {
                const __m512i x0 = load(w + 64 * p), x1 = next(x0), x2 = next(x1), x3 = next(x2);
                s0 = dot(s0, _mm512_shuffle_epi8(levels, both(x0, x1)), four(q + 8 * p));
                s1 = dot(s1, _mm512_shuffle_epi8(levels, both(x2, x3)), four(q + 8 * p + 4));
                last[p] = next(x3);
            }
            const __m512i t = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) (w + 192)));
            const __m512i rest = _mm512_mullo_epi16(_mm512_shuffle_epi8(t, twice), power);
            s0 = dot(s0, _mm512_shuffle_epi8(levels, both(last[0], last[1])), four(q + 24));
            s1 = dot(s1, _mm512_shuffle_epi8(levels, both(last[2], rest)), four(q + 28));
            const __m512i bits = _mm512_slli_epi32(_mm512_and_si512(t, _mm512_set1_epi32(255)), 19);
            const __m512 scale = _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(112 << 23)));
            const __m512i sum = _mm512_add_epi32(sums32(s0, s1), _mm512_set1_epi32(a->bias[g]));
            acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(a->d[g])), acc);
        }
        _mm512_storeu_ps(out + r, acc);
    }
}

void ISA(bake_planes_panel)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m512i power = _mm512_set1_epi32(1 | 9 << 16), power3 = _mm512_set1_epi32(3 | 27 << 16);
    const __m512i row = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(0x00010001)); /* byte `row`, twice */
    const __m512i even = _mm512_or_si512(row, _mm512_set1_epi32((int) 0x80008000u));
    const __m512i odd = _mm512_or_si512(_mm512_slli_epi32(row, 8), _mm512_set1_epi32(0x00800080));
    for (long r = 0; r < rows; r += 16) {
        __m512 acc = _mm512_setzero_ps();
        for (long b = 0; b < cols / 64; b++, w += 448) {
            bake_prefetch(w, 448);
            const int8_t * q = a->q + 64 * b;
            __m512i s[2][2] = { { _mm512_setzero_si512(), _mm512_setzero_si512() },
                                { _mm512_setzero_si512(), _mm512_setzero_si512() } };
            BAKE_UNROLL
            for (int i = 0; i < 3; i++) {
                __m512i y1 = load(w + 64 * i), y2 = load(w + 192 + 64 * i);
                BAKE_UNROLL
                for (int v = 5 * i; v < 5 * i + 5; v++) {
                    s[v / 8][v % 2] = dot(s[v / 8][v % 2], code(y1, y2), four(q + 4 * v));
                    y1 = times3(y1);
                    y2 = times3(y2);
                }
            }
            __m512i t[2];
            BAKE_UNROLL
            for (int plane = 0; plane < 2; plane++) {
                const __m512i y = SPLAT128(_mm_loadu_si128((const __m128i *) (w + 384 + 16 * plane)));
                const __m512i e = _mm512_mullo_epi16(_mm512_shuffle_epi8(y, even), power);
                const __m512i o = _mm512_mullo_epi16(_mm512_shuffle_epi8(y, odd), power3);
                t[plane] = _mm512_ternarylogic_epi32(o, e, _mm512_set1_epi16(0xff), 0xf8);
            }
            s[1][1] = dot(s[1][1], code(t[0], t[1]), four(q + 60));
            BAKE_UNROLL
            for (int g = 0; g < 2; g++) {
                const __m512i sum = _mm512_add_epi32(sums32(s[g][0], s[g][1]), _mm512_set1_epi32(a->bias[2 * b + g]));
                const __m512 scale = scales16(_mm_loadu_si128((const __m128i *) (w + 416 + 16 * g)));
                acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(a->d[2 * b + g])),
                                      acc);
            }
        }
        _mm512_storeu_ps(out + r, acc);
    }
}

void ISA(bake_nibbles_panel)(const uint8_t * w, const struct bake_acts * a, float * out, long rows, long cols) {
    const __m512i low = _mm512_set1_epi8(15);
    for (long r = 0; r < rows; r += 16) {
        __m512 acc = _mm512_setzero_ps();
        for (long g = 0; g < cols / 32; g++, w += 272) {
            bake_prefetch(w, 272);
            const int8_t * q = a->q + 32 * g;
            __m512i s0 = _mm512_setzero_si512(), s1 = s0;
            BAKE_UNROLL
            for (int p = 0; p < 4; p++) {
                const __m512i x = load(w + 64 * p);
                s0 = dot(s0, _mm512_and_si512(x, low), four(q + 8 * p));
                s1 = dot(s1, _mm512_and_si512(_mm512_srli_epi16(x, 4), low), four(q + 8 * p + 4));
            }
            const __m512i sum = _mm512_add_epi32(sums32(s0, s1), _mm512_set1_epi32(a->bias[g]));
            const __m512 scale = scales16(_mm_loadu_si128((const __m128i *) (w + 256)));
            acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(a->d[g])), acc);
        }
        _mm512_storeu_ps(out + r, acc);
    }
}
