/* TP2_2's trellis for kernels of a thread a group: the arithmetic of native/quantize/trellis.inc, in its order. */
#include "scales.cuh"

enum { UNIT = 32, STATES = 9, OFFSETS = 7, TRELLIS_THREADS = 128 };

#define TRELLIS_LARGE 1e38f
#define TRELLIS_LIGHT 0x1p-10f

__device__ constexpr int third_trit(int sum) { /* of two trits, each + 1 */
    return sum == 0 || sum == 3 ? 1 : sum == 2 ? 0 : -1;
}

/* The offset of a step from state (before2, before) with trit t, all 0..2: 2 * t + p, counted from -3. */
__device__ constexpr int trellis_offset(int before2, int before, int t) {
    return 2 * t + third_trit(before2 + before) + 1;
}

/* The weight at place c of the chain. */
__device__ int chain_weight(int c) {
    const int quad = c % 8, byte = c / 8;
    if (quad < 6) {
        return quad < 3 ? 4 * quad + byte : 14 + 4 * (quad - 3) + byte;
    }
    return quad == 6 ? 26 + (byte == 1 || byte == 2 ? 3 - byte : byte) : byte % 2 ? 12 + byte / 2 : 30 + byte / 2;
}

/* A group's weights along the chain and what their squared errors count, as the functions below read them. */
struct OwnWeights { /* of a data-free search: h = (twice + |x|) * unit, at least TRELLIS_LIGHT, or 1; x: TRELLIS_THREADS apart */
    const float * x;
    float twice, unit;

    __device__ float at(int c) const { return x[c * TRELLIS_THREADS]; }
    __device__ float weight(int, float v) const {
        const float h = (twice + fabsf(v)) * unit; /* 0 where twice is too small for a float */
        return unit > 0 ? h > TRELLIS_LIGHT ? h : TRELLIS_LIGHT : 1;
    }
};

struct GivenWeights {
    const float *x, *h;

    __device__ float at(int c) const { return x[c]; }
    __device__ float weight(int c, float) const { return h[c]; }
};

__device__ void trellis_costs(float x, float h, float s, float * cost) {
    const float s3 = 3 * s;
#pragma unroll
    for (int o = 0; o < OFFSETS; o++) {
        float e = fabsf(x - (float) (o - 3) * s);
        e = nearer(e, e - s3);
        cost[o] = e * e * h;
    }
}

__device__ float smaller(float a, float b) {
    return b < a ? b : a;
}

template <typename Chain> __device__ void trellis_lap(const Chain & chain, float s, float * path) {
#pragma unroll 2
    for (int c = 0; c < UNIT; c++) {
        float cost[OFFSETS], next[STATES];
        const float x = chain.at(c);
        trellis_costs(x, chain.weight(c, x), s, cost);
#pragma unroll
        for (int i = 0; i < STATES; i++) {
            const int before = i / 3, t = i % 3;
            const float way0 = path[before] + cost[trellis_offset(0, before, t)];
            const float way1 = path[3 + before] + cost[trellis_offset(1, before, t)];
            next[i] = smaller(smaller(way0, way1), path[6 + before] + cost[trellis_offset(2, before, t)]);
        }
#pragma unroll
        for (int i = 0; i < STATES; i++) {
            path[i] = next[i];
        }
    }
}

__device__ float least_of(const float * path) {
    float least = path[0];
#pragma unroll
    for (int i = 1; i < STATES; i++) {
        least = smaller(least, path[i]);
    }
    return least;
}

/* The cost of the cheapest path from a start to the end that closes it. */
template <typename Chain> __device__ float trellis_closed(const Chain & chain, float s, int start) {
    float path[STATES], end = 0;
#pragma unroll
    for (int i = 0; i < STATES; i++) {
        path[i] = i == start ? 0 : TRELLIS_LARGE;
    }
    trellis_lap(chain, s, path);
#pragma unroll
    for (int i = 0; i < STATES; i++) {
        end = i == STATES - 1 - start ? path[i] : end;
    }
    return end;
}

/* The start of the cheapest closed path; the first of equals. */
template <typename Chain> __device__ int trellis_start(const Chain & chain, float s) {
    float best = FLOAT_MAX;
    int start = 0;
    for (int k = 0; k < STATES; k++) {
        const float end = trellis_closed(chain, s, k);
        start = end < best ? k : start;
        best = end < best ? end : best;
    }
    return start;
}

/* The rank of a scale, or a part of it that is no less than best. */
template <typename Chain> __device__ float trellis_rank(const Chain & chain, float s, float best) {
    float path[STATES], start[STATES];
#pragma unroll
    for (int k = 0; k < STATES; k++) {
        path[k] = 0;
    }
    trellis_lap(chain, s, path);
    const float least = least_of(path);
    if (!(least < best)) {
        return least;
    }
#pragma unroll
    for (int k = 0; k < STATES; k++) {
        start[k] = path[STATES - 1 - k] - least;
    }
    trellis_lap(chain, s, start);
    return least_of(start);
}

/* The i-th scale code to try for a group whose largest weight is top: quantize/trellis.inc's order. */
enum { TRELLIS_STEPS = 12, TRELLIS_CODES = TRELLIS_STEPS + 1 };

__device__ int trellis_code(int i, float top) {
    const int steps[TRELLIS_STEPS] = { 1, 0, 2, 3, -1, 4, -2, 5, -3, 6, -4, 7 };
    const int code = i < TRELLIS_STEPS ? scale_code(top / 6) + steps[i] : scale_code(top / 2);
    return code < 0 || !(top > 0) ? 0 : code > 255 ? 255 : code;
}

/* A lap from the start: from[c] has two bits a state, the trit two before on the best way to it. */
template <typename Chain> __device__ void trellis_trace(const Chain & chain, float s, int start, u32 * from) {
    float path[STATES];
#pragma unroll
    for (int i = 0; i < STATES; i++) {
        path[i] = i == start ? 0 : TRELLIS_LARGE;
    }
    for (int c = 0; c < UNIT; c++) {
        float cost[OFFSETS], next[STATES];
        const float x = chain.at(c);
        trellis_costs(x, chain.weight(c, x), s, cost);
        u32 came = 0;
#pragma unroll
        for (int i = 0; i < STATES; i++) {
            const int before = i / 3, t = i % 3;
            const float way0 = path[before] + cost[trellis_offset(0, before, t)];
            const float way1 = path[3 + before] + cost[trellis_offset(1, before, t)];
            const float way2 = path[6 + before] + cost[trellis_offset(2, before, t)];
            const float least = smaller(way0, way1);
            came |= (u32) (way2 < least ? 2 : way1 < way0) << 2 * i;
            next[i] = smaller(least, way2);
        }
        from[c] = came;
#pragma unroll
        for (int i = 0; i < STATES; i++) {
            path[i] = next[i];
        }
    }
}

__device__ int trellis_from(u32 came, int state) {
    return (int) (came >> 2 * state & 3);
}
