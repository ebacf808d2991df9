/* The quantizers for NVIDIA GPUs: source bytes -> float32 -> planes and scales -> packed rows, with what the converter
 * wants to know of the values on the way. Compiled at run time by NVRTC (cuda.py); the tests compile it for the host.
 *
 * The same arithmetic in the same order as native/quantize/quantize.c, so the bytes are equal: --fmad=false, IEEE
 * division and square root, no flush to zero (all but the first are NVRTC's defaults), and every sum over a group in
 * eight lanes joined by halves. A thread holds LANES of the eight lanes of a group: all 8 where a group of 32 fits the registers,
 * 1 where a group is 128 weights, so that 8 threads of a warp share a group and the joins are shuffles. */
#include "trellis.cuh"

#ifndef WIDE_LANES /* lanes a thread holds of a group of 128; the tests set 8 as well */
#    define WIDE_LANES 1
#endif

#define DOUBLE_MAX 1.7976931348623157e+308

enum { F32 = 0, F16 = 1, Q8_0 = 8, BF16 = 30 }; /* ggml's ids */
enum { UNIT_BYTES = 14, Q8_BYTES = 34, WIDE = 128, PAPER_ITERS = 50, SEARCH_ITERS = 24 };

/* What was seen of one group; `fold` merges them. cuda.py mirrors this as a numpy dtype. */
struct Stats {
    double error, power; /* sums of (w - r)^2 and w^2 */
    u64 hash;
    u64 bad;           /* index of the first weight that is not finite, ~0 = none */
    u64 moved;         /* paper: bit t is set where iteration t moved the scales by 1e-4 or more */
    float largest;     /* largest finite |w| */
    u32 groups, below; /* groups with a weight other than 0; those of them with all |w| < 5 * 2^-15 */
    u32 overflow;      /* groups whose scales overflow fp16 */
};

/* ---- lanes ---- */

template <int L> __device__ float join(const float * acc) {
    if constexpr (L == 8) {
        const float a = acc[0] + acc[4], b = acc[1] + acc[5], c = acc[2] + acc[6], d = acc[3] + acc[7];
        return (a + c) + (b + d);
    }
    float v = acc[0];
    v += __shfl_xor_sync(~0u, v, 4);
    v += __shfl_xor_sync(~0u, v, 2);
    return v + __shfl_xor_sync(~0u, v, 1);
}

template <int L> __device__ double join(const double * acc) {
    if constexpr (L == 8) {
        const double a = acc[0] + acc[4], b = acc[1] + acc[5], c = acc[2] + acc[6], d = acc[3] + acc[7];
        return (a + c) + (b + d);
    }
    double v = acc[0];
    v += __shfl_xor_sync(~0u, v, 4);
    v += __shfl_xor_sync(~0u, v, 2);
    return v + __shfl_xor_sync(~0u, v, 1);
}

/* A count over the group, of counts a thread. */
template <int L> __device__ int join_count(int v) {
    if constexpr (L == 8) {
        return v;
    }
    v += __shfl_xor_sync(~0u, v, 4);
    v += __shfl_xor_sync(~0u, v, 2);
    return v + __shfl_xor_sync(~0u, v, 1);
}

template <int L> __device__ float join_top(float v) {
    for (int step = 4; L < 8 && step > 0; step /= 2) {
        const float other = __shfl_xor_sync(~0u, v, step);
        v = other > v ? other : v;
    }
    return v;
}

/* Shuffles need whole warps, so the groups of a warp iterate until all of them are done: at a fixed point another
 * round changes nothing. */
template <int L> __device__ bool all_done(bool done) {
    return L == 8 ? done : __all_sync(~0u, done);
}

/* ---- values ---- */

__device__ float half_to_float(u32 h) {
    const u32 sign = (h & 0x8000) << 16, mag = h & 0x7fff;
    if (mag >= 0x7c00) {
        return __uint_as_float(sign | 0x7f800000u | (mag & 0x3ff) << 13);
    }
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(mag << 13) * 5.192296858534828e+33f)); /* * 2^112 */
}

/* Rounds to nearest even. */
__device__ u32 half_from_float(float f) {
    u32 bits = __float_as_uint(f);
    const u32 sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        return sign | 0x7e00;
    }
    if (bits >= 0x477ff000) { /* rounds to 65536 or more */
        return sign | 0x7c00;
    }
    if (bits < 0x38800000) { /* below 2^-14: the float adder rounds to steps of 2^-24 */
        return sign | (__float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000);
    }
    bits -= (127u - 15) << 23;
    bits += 0xfff + (bits >> 13 & 1);
    return sign | bits >> 13;
}

__device__ float load(const u8 * src, int type, u64 i) {
    switch (type) {
        case F32: return ((const float *) src)[i];
        case F16: return half_to_float(((const u16 *) src)[i]);
        case BF16: return __uint_as_float((u32) ((const u16 *) src)[i] << 16);
        default: /* Q8_0 */
            src += i / UNIT * Q8_BYTES;
            return half_to_float(src[0] | src[1] << 8) * (float) (signed char) src[2 + i % UNIT];
    }
}

struct alignas(16) Quad {
    u32 v[4];
};

/* The 32 weights from i on, i a multiple of 32, by 16 bytes at a time. */
__device__ void load_unit(const u8 * src, int type, u64 i, float * x) {
    if (type == F32) {
#pragma unroll
        for (int k = 0; k < UNIT / 4; k++) {
            const Quad q = ((const Quad *) src)[i / 4 + k];
            for (int j = 0; j < 4; j++) {
                x[4 * k + j] = __uint_as_float(q.v[j]);
            }
        }
    } else if (type == F16 || type == BF16) {
#pragma unroll
        for (int k = 0; k < UNIT / 8; k++) {
            const Quad q = ((const Quad *) src)[i / 8 + k];
            for (int j = 0; j < 8; j++) {
                const u32 h = q.v[j / 2] >> 16 * (j % 2) & 0xffff;
                x[8 * k + j] = type == F16 ? half_to_float(h) : __uint_as_float(h << 16);
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < UNIT; k++) {
            x[k] = load(src, type, i + k);
        }
    }
}

/* ---- what the converter wants to know ---- */

/* The checksum of native/codec/hash.h: a sum of this over all weights, whatever the order and the pieces. */
__device__ u64 mix(u64 index, float r) {
    const u64 key = (index + 1) * 0x9e3779b97f4a7c15ull;
    u64 z = (u64) (__float_as_uint(r) ^ (u32) (key >> 32)) * 0xd6e8feb9u + key;
    z ^= z >> 32;
    z *= 0x9fb21c65u;
    return z ^ z >> 29;
}

/* x: weights of this thread, K eights of L lanes each, from `lane` on. base: index of the group's first weight in
 * the piece, first: of the piece in the tensor. Returns the largest finite |w| of the group. */
template <int L, int K> __device__ float examine(const float * x, u64 base, int lane, Stats & st) {
    st.bad = ~0ull;
    st.hash = st.moved = 0;
    st.overflow = 0;
    float top = 0;
#pragma unroll
    for (int k = K * L - 1; k >= 0; k--) {
        const float a = fabsf(x[k]);
        if (a <= FLOAT_MAX) {
            top = a > top ? a : top;
        } else {
            st.bad = base + 8 * (k / L) + lane + k % L;
        }
    }
    st.largest = top = join_top<L>(top);
    st.groups = top > 0;
    st.below = top > 0 && top < 5 * 0x1p-15f;
    return top;
}

__device__ void account(Stats & st, float x, float r, u64 index) {
    const double w = x, e = w - r;
    st.error += e * e;
    st.power += w * w;
    st.hash += mix(index, r);
}

/* Joins what is a lane's own; the rest is the group's already. */
template <int L> __device__ void gather(Stats & st) {
    for (int step = 4; L < 8 && step > 0; step /= 2) {
        st.error += __shfl_xor_sync(~0u, st.error, step);
        st.power += __shfl_xor_sync(~0u, st.power, step);
        st.hash += __shfl_xor_sync(~0u, st.hash, step);
        const u64 bad = __shfl_xor_sync(~0u, st.bad, step);
        st.bad = bad < st.bad ? bad : st.bad;
    }
}

/* ---- packing ---- */

/* Word of weight i of a unit (6 = the remainder byte), and the power of 9 that its digit has there. */
__device__ int word_of(int i) {
    return i < 14 ? i / 2 : i < 26 ? (i - 14) / 2 : i - 26;
}

__device__ u32 power_of(int i) {
    return i < 12 ? (i % 2 ? 729 : 6561) : i < 14 ? (i % 2 ? 1 : 9) : i < 26 ? (i % 2 ? 9 : 81) : 1;
}

/* digits: 4 eights of L lanes from `lane` on. */
template <int L> __device__ void pack_unit(const int * digits, int lane, u32 side, u8 * dst) {
    u16 * q = (u16 *) dst;
#pragma unroll
    for (int j = 0; j < 7; j++) {
        int n = 0;
#pragma unroll
        for (int k = 0; k < 4 * L; k++) {
            const int i = 8 * (k / L) + lane + k % L;
            n += word_of(i) == j ? digits[k] * (int) power_of(i) : 0;
        }
        const u32 sum = (u32) join_count<L>(n);
        const u32 word = j < 6 ? (sum * 65536u + 59048) / 59049 : side | (sum * 256u + 80) / 81 << 8;
        if (lane == 0 && dst) {
            q[j] = (u16) word;
        }
    }
}

/* ---- search, TP2_1 ---- */

/* Each squared error times 2 mean|w| + |w|; twice: 2 mean|w|. */
__device__ float error_tp2_1(const float * x, float twice, float s) {
    const float s2 = 2 * s, s3 = 3 * s, s5 = 5 * s;
    float acc[8] = {};
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
        const float a = fabsf(x[i]);
        const float e = nearer(nearer(nearer(nearer(a, a - s), a - s2), a - s3), a - s5);
        const float e2 = e * e * (twice + a);
        acc[i % 8] = i < 8 ? e2 : acc[i % 8] + e2;
    }
    return join<8>(acc);
}

extern "C" __global__ void search_tp2_1(const u8 * src, int type, u32 groups, u64 first, u8 * dst, Stats * stats) {
    const u32 g = blockIdx.x * blockDim.x + threadIdx.x;
    if (g >= groups) {
        return;
    }
    const u64 base = (u64) g * UNIT;
    float x[UNIT];
    load_unit(src, type, base, x);
    Stats st;
    const float top = examine<8, 4>(x, base, 0, st);

    float acc[8];
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
        acc[i % 8] = i < 8 ? fabsf(x[i]) : acc[i % 8] + fabsf(x[i]);
    }
    const float twice = join<8>(acc) * (2.0f / UNIT);

    const int c5 = scale_code(top / 5), c2 = scale_code(top / 2), c1 = scale_code(top);
    float best = FLOAT_MAX;
    int code = 0;
    for (int c = 0; c < 32; c++) { /* -12 .. +13 around max/5, the three next to max/2 and to max */
        int candidate = c < 26 ? c5 - 12 + c : c < 29 ? c2 - 27 + c : c1 - 30 + c;
        candidate = candidate < 0 ? 0 : candidate > 255 ? 255 : candidate;
        const float err = error_tp2_1(x, twice, scale_value(candidate));
        code = err < best ? candidate : code;
        best = err < best ? err : best;
    }
    const float s = scale_value(code);
    int digits[UNIT];
    st.error = st.power = 0;
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
        const float a = fabsf(x[i]);
        const int step = (a > 0.5f * s) + (a > 1.5f * s) + (a > 2.5f * s) + (a > 4 * s);
        const int digit = 0x87564 >> 4 * step & 15; /* of levels 0 1 2 3 5 */
        const int level = step < 4 ? step : 5;
        digits[i] = x[i] < 0 ? 8 - digit : digit;
        account(st, x[i], s * (float) (x[i] < 0 ? -level : level), first + base + i);
    }
    pack_unit<8>(digits, 0, (u32) code, dst + (u64) g * UNIT_BYTES);
    stats[g] = st;
}

/* ---- search, TP2_2: native/quantize/trellis.inc, a thread a group ---- */

extern "C" __global__ void search_tp2_2(const u8 * src, int type, u32 groups, u64 first, u8 * dst, Stats * stats) {
    __shared__ float chains[UNIT * TRELLIS_THREADS];
    const u32 g = blockIdx.x * blockDim.x + threadIdx.x;
    if (g >= groups) {
        return;
    }
    const u64 base = (u64) g * UNIT;
    float top;
    Stats st;
    OwnWeights chain = { chains + threadIdx.x, 0, 0 };
    {
        float x[UNIT];
        load_unit(src, type, base, x);
        top = examine<8, 4>(x, base, 0, st);
        float acc[8];
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
            acc[i % 8] = i < 8 ? fabsf(x[i]) : acc[i % 8] + fabsf(x[i]);
        }
        chain.twice = join<8>(acc) * (2.0f / UNIT);
        const u32 exponent = __float_as_uint(chain.twice + top) >> 23; /* of the heaviest */
        chain.unit = top > 0 ? __uint_as_float((exponent < 253 ? 254 - exponent : 1) << 23) : 0;
#pragma unroll
        for (int c = 0; c < UNIT; c++) {
            chains[c * TRELLIS_THREADS + threadIdx.x] = x[chain_weight(c)];
        }
    }
    float best = FLOAT_MAX;
    int code = trellis_code(0, top);
    for (int i = 0; i < TRELLIS_CODES; i++) {
        const int candidate = trellis_code(i, top);
        const float rank = trellis_rank(chain, scale_value(candidate), best);
        code = rank < best ? candidate : code;
        best = rank < best ? rank : best;
    }
    const float s = scale_value(code);
    const int start = trellis_start(chain, s);
    u32 from[UNIT];
    trellis_trace(chain, s, start, from);
    int state = STATES - 1 - start;
    u32 n[7] = {};
    st.error = st.power = 0;
    for (int c = UNIT - 1; c >= 0; c--) {
        const int before = state / 3, t = state % 3, before2 = trellis_from(from[c], state);
        const int o = trellis_offset(before2, before, t) - 3, weight = chain_weight(c);
        const float x = chain.at(c), v = x - (float) o * s, e = fabsf(v);
        const int t1 = fabsf(e - 3 * s) < e ? v < 0 ? -1 : 1 : 0;
        const u32 add = (u32) (3 * (t1 + 1) + t) * power_of(weight);
#pragma unroll
        for (int j = 0; j < 7; j++) {
            n[j] += word_of(weight) == j ? add : 0;
        }
        account(st, x, s * (float) (3 * t1 + o), first + base + weight);
        state = 3 * before2 + before;
    }
    u16 * q = (u16 *) (dst + (u64) g * UNIT_BYTES);
#pragma unroll
    for (int j = 0; j < 7; j++) {
        q[j] = (u16) (j < 6 ? (n[j] * 65536u + 59048) / 59049 : (u32) code | (n[j] * 256u + 80) / 81 << 8);
    }
    stats[g] = st;
}

/* ---- Q8_0 ---- */

extern "C" __global__ void q8_0(const u8 * src, int type, u32 groups, u64 first, u8 * dst, Stats * stats) {
    const u32 g = blockIdx.x * blockDim.x + threadIdx.x;
    if (g >= groups) {
        return;
    }
    const u64 base = (u64) g * UNIT;
    float x[UNIT];
    load_unit(src, type, base, x);
    Stats st;
    const float top = examine<8, 4>(x, base, 0, st);
    const float d = top / 127, id = d == 0 ? 0 : 1 / d;
    const u32 half = half_from_float(d);
    const float scale = half_to_float(half);
    u16 * out = (u16 *) (dst + (u64) g * Q8_BYTES);
    out[0] = (u16) half;
    st.error = st.power = 0;
#pragma unroll
    for (int i = 0; i < UNIT; i += 2) {
        u32 pair = 0;
        for (int j = 0; j < 2; j++) {
            const float v = x[i + j] * id, a = fabsf(v), whole = floorf(a);
            const float rounded = whole + floorf(2 * (a - whole)); /* half away from zero, as gguf-py */
            const int q = rounded <= 127 ? (int) rounded : 0;      /* not a number where 1/d overflows */
            const int level = v < 0 ? -q : q;
            pair |= (u32) (level & 255) << 8 * j;
            account(st, x[i + j], scale * (float) level, first + base + i + j);
        }
        out[1 + i / 2] = (u16) pair;
    }
    stats[g] = st;
}

/* ---- paper ----
 * A digit is 3*(t1+1) + (t2+1): digits in order are the pairs in lexicographic order. */

__device__ int t1_of(int digit) {
    return digit / 3 - 1;
}

__device__ int t2_of(int digit) {
    return digit % 3 - 1;
}

/* t * w, t a trit */
__device__ double times(int t, double w) {
    return t > 0 ? w : t < 0 ? -w : 0;
}

/* Sums of least squares over a group: of t1^2, t2^2, t1*t2, t1*w, t2*w. */
template <int L>
__device__ void normal_equations(const int * digits, const float * x, double & s11, double & s22, double & s12,
                                 double & b1, double & b2) {
    int n11 = 0, n22 = 0, n12 = 0;
    double v1[L] = {}, v2[L] = {};
#pragma unroll
    for (int i = 0; i < WIDE / 8 * L; i++) {
        const int t1 = t1_of(digits[i]), t2 = t2_of(digits[i]);
        n11 += t1 * t1;
        n22 += t2 * t2;
        n12 += t1 * t2;
        v1[i % L] += times(t1, x[i]);
        v2[i % L] += times(t2, x[i]);
    }
    s11 = join_count<L>(n11);
    s22 = join_count<L>(n22);
    s12 = join_count<L>(n12);
    b1 = join<L>(v1);
    b2 = join<L>(v2);
}

template <int L> struct Paper {
    enum { N = WIDE / 8 * L };

    double a1, a2, ridge;
    int digits[N];

    __device__ void init(const float * x) {
        a1 = a2 = 1;
        ridge = 1e-8;
#pragma unroll
        for (int i = 0; i < N; i++) {
            digits[i] = x[i] < 0 ? 0 : 8;
        }
    }

    /* One iteration. Returns the length of the change of the scale pair. */
    __device__ double step(const float * x) {
        double s11, s22, s12, b1, b2;
        normal_equations<L>(digits, x, s11, s22, s12, b1, b2);
        double a11, a22, det;
        for (;;) {
            a11 = s11 + ridge;
            a22 = s22 + ridge;
            det = a11 * a22 - s12 * s12;
            const double kappa = (a11 * a11 + a22 * a22 + 2 * (s12 * s12)) / det;
            if (kappa < 1e12 || ridge >= 1) {
                break;
            }
            const double grown = ridge * sqrt(kappa / 1e12);
            ridge = grown < 1 ? grown : 1;
        }
        const double n1 = (b1 * a22 - b2 * s12) / det, n2 = (b2 * a11 - b1 * s12) / det;
        const double d1 = n1 - a1, d2 = n2 - a2;
        a1 = n1;
        a2 = n2;
        double v[9];
#pragma unroll
        for (int d = 0; d < 9; d++) {
            v[d] = a1 * t1_of(d) + a2 * t2_of(d);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            double best = DOUBLE_MAX;
            int digit = 4;
#pragma unroll
            for (int d = 0; d < 9; d++) {
                const double e = x[i] - v[d], e2 = e * e;
                digit = e2 < best ? d : digit;
                best = e2 < best ? e2 : best;
            }
            digits[i] = digit;
        }
        return sqrt(d1 * d1 + d2 * d2);
    }

    /* Returns the bits of the iterations that moved the scales by 1e-4 or more. */
    __device__ u64 run(const float * x, int iters) {
        u64 moved = 0;
        init(x);
        for (int t = 0; t < iters; t++) {
            const double change = step(x);
            moved |= (u64) (change >= 1e-4) << t;
            if (all_done<L>(change == 0 && t > 0)) {
                break;
            }
        }
        return moved;
    }
};

/* ---- search, TP2_0 ---- */

template <int L> struct Search {
    enum { N = WIDE / 8 * L };

    int digits[N];

    /* Nearest pair of each weight, the first of equals. Returns the error of the group. */
    __device__ float assign(const float * x, float a1, float a2) {
        float v[9], acc[L] = {};
#pragma unroll
        for (int d = 0; d < 9; d++) {
            v[d] = a1 * (float) t1_of(d) + a2 * (float) t2_of(d);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            float best = FLOAT_MAX;
            int digit = 0;
#pragma unroll
            for (int d = 0; d < 9; d++) {
                const float e = x[i] - v[d], e2 = e * e;
                digit = e2 < best ? d : digit;
                best = e2 < best ? e2 : best;
            }
            digits[i] = digit;
            acc[i % L] += best;
        }
        return join<L>(acc);
    }

    /* Least squares of both scales. */
    __device__ void solve(const float * x, float & a1, float & a2) {
        double s11, s22, s12, b1, b2;
        normal_equations<L>(digits, x, s11, s22, s12, b1, b2);
        const double det = s11 * s22 - s12 * s12;
        if (det > 1e-9 * (s11 * s22)) {
            a1 = (float) ((s22 * b1 - s12 * b2) / det);
            a2 = (float) ((s11 * b2 - s12 * b1) / det);
        } else {
            a1 = s11 > 0 ? (float) (b1 / s11) : 0;
            a2 = 0;
        }
    }

    /* Digits and fp16 scales of the best of five starts. */
    __device__ void run(const float * x, float top, u32 & h1, u32 & h2) {
        float best = FLOAT_MAX;
        h1 = h2 = 0;
#pragma unroll 1
        for (int start = 0; start < 5; start++) {
            float a1, a2;
            if (start < 4) {
                const float ratio = start == 0 ? 0.35f : start == 1 ? 0.6f : start == 2 ? 0.75f : 0.9f;
                a1 = 0.9f * top / (1 + ratio);
                a2 = a1 * ratio;
            } else {
                Paper<L> paper;
                paper.run(x, PAPER_ITERS);
                a1 = (float) paper.a1;
                a2 = (float) paper.a2;
            }
            /* Scales that come back the same give the same planes again. Comparing with the planes of the round before
             * says the same, but ptxas 13.0 makes wrong code of that (from -O1 on, not with -O0). */
            for (int t = 0; t < SEARCH_ITERS; t++) {
                assign(x, a1, a2);
                float n1, n2;
                solve(x, n1, n2);
                const bool same = n1 == a1 && n2 == a2;
                a1 = n1;
                a2 = n2;
                if (all_done<L>(same)) {
                    break;
                }
            }
            const u32 r1 = half_from_float(a1), r2 = half_from_float(a2);
            const float err = assign(x, half_to_float(r1), half_to_float(r2));
            h1 = err < best ? r1 : h1;
            h2 = err < best ? r2 : h2;
            best = err < best ? err : best;
        }
        assign(x, half_to_float(h1), half_to_float(h2));
    }
};

/* ---- TP2_0 ---- */

enum { WIDE_SHARE = 8 / WIDE_LANES, WIDE_N = WIDE / 8 * WIDE_LANES };

/* The weights of this thread. Threads past the end take the last group again, for whole warps; they write nothing. */
struct Wide {
    u32 group;
    int lane;
    bool live;
    float x[WIDE_N];

    __device__ Wide(const u8 * src, int type, u32 groups) {
        const u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
        group = thread / WIDE_SHARE;
        lane = (int) (thread % WIDE_SHARE) * WIDE_LANES;
        live = group < groups;
        group = live ? group : groups - 1;
#pragma unroll
        for (int k = 0; k < WIDE_N; k++) {
            x[k] = load(src, type, (u64) group * WIDE + 8 * (k / WIDE_LANES) + lane + k % WIDE_LANES);
        }
    }
};

__device__ void finish_tp2_0(const Wide & w, const int * digits, u32 h1, u32 h2, u64 first, u8 * dst, Stats & st,
                             Stats * stats) {
    st.overflow = (h1 & 0x7c00) == 0x7c00 || (h2 & 0x7c00) == 0x7c00;
    const float a1 = half_to_float(h1), a2 = half_to_float(h2);
    st.error = st.power = 0;
#pragma unroll
    for (int k = 0; k < WIDE_N; k++) {
        const u64 index = first + (u64) w.group * WIDE + 8 * (k / WIDE_LANES) + w.lane + k % WIDE_LANES;
        account(st, w.x[k], a1 * (float) t1_of(digits[k]) + a2 * (float) t2_of(digits[k]), index);
    }
#pragma unroll
    for (int u = 0; u < 4; u++) {
        const u32 side = (u < 2 ? h1 : h2) >> 8 * (u % 2) & 255;
        u8 * unit = dst + ((u64) w.group * 4 + u) * UNIT_BYTES;
        pack_unit<WIDE_LANES>(digits + u * 4 * WIDE_LANES, w.lane, side, w.live ? unit : 0);
    }
    gather<WIDE_LANES>(st);
    if (w.live && w.lane == 0) {
        stats[w.group] = st;
    }
}

extern "C" __global__ void search_tp2_0(const u8 * src, int type, u32 groups, u64 first, u8 * dst, Stats * stats) {
    const Wide w(src, type, groups);
    Stats st;
    const float top = examine<WIDE_LANES, 16>(w.x, (u64) w.group * WIDE, w.lane, st);
    Search<WIDE_LANES> search;
    u32 h1, h2;
    search.run(w.x, top, h1, h2);
    finish_tp2_0(w, search.digits, h1, h2, first, dst, st, stats);
}

/* The published rule stops all groups of a matrix together: first see which iterations moved any group (`probe_paper`,
 * folded by `fold`), then run as many as that says. */
extern "C" __global__ void probe_paper(const u8 * src, int type, u32 groups, Stats * stats) {
    const Wide w(src, type, groups);
    Stats st;
    examine<WIDE_LANES, 16>(w.x, (u64) w.group * WIDE, w.lane, st);
    Paper<WIDE_LANES> paper;
    st.moved = paper.run(w.x, PAPER_ITERS);
    st.error = st.power = 0;
    gather<WIDE_LANES>(st);
    if (w.live && w.lane == 0) {
        stats[w.group] = st;
    }
}

/* moved: a bit for each iteration that moved some group. */
extern "C" __global__ void paper_tp2_0(const u8 * src, int type, u32 groups, u64 first, u8 * dst, Stats * stats,
                                       const u64 * moved) {
    const Wide w(src, type, groups);
    Stats st;
    examine<WIDE_LANES, 16>(w.x, (u64) w.group * WIDE, w.lane, st);
    int iters = 1;
    while (iters < PAPER_ITERS && (*moved >> (iters - 1) & 1)) {
        iters++;
    }
    Paper<WIDE_LANES> paper;
    paper.run(w.x, iters);
    const u32 h1 = half_from_float((float) paper.a1), h2 = half_from_float((float) paper.a2);
    finish_tp2_0(w, paper.digits, h1, h2, first, dst, st, stats);
}

/* ---- folding ---- */

/* n stats to m: thread i merges i, i + m, i + 2m, ..., in this order, so the sums do not depend on anything else. */
extern "C" __global__ void fold(const Stats * in, u32 n, Stats * out, u32 m) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= m) {
        return;
    }
    Stats a = in[i];
    for (u32 k = i + m; k < n; k += m) {
        const Stats b = in[k];
        a.error += b.error;
        a.power += b.power;
        a.hash += b.hash;
        a.moved |= b.moved;
        a.bad = b.bad < a.bad ? b.bad : a.bad;
        a.largest = b.largest > a.largest ? b.largest : a.largest;
        a.groups += b.groups;
        a.below += b.below;
        a.overflow += b.overflow;
    }
    out[i] = a;
}

/* One value out of one folded Stats, where the next kernel reads it. */
extern "C" __global__ void take_moved(const Stats * in, u64 * moved) {
    *moved = in->moved;
}
