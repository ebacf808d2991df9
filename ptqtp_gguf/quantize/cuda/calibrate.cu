/* The inner loops of calibrated quantization on a GPU: a group of 32 columns, a thread a row. The loop over groups and
 * the matrix products between them are torch's (gptq.py). The same arithmetic in the same order as gptq_reference.py,
 * the numpy reference, so the bits are equal; compiled at run time by NVRTC as kernels.cu is. The tests compile it for
 * the host. */
#include "scales.cuh"

typedef signed char i8;
typedef long long i64;

enum { G = 32 };

__device__ int clip(int code) {
    return code < 0 ? 0 : code > 255 ? 255 : code;
}

/* The nearest level to t at scale s; ties to the smaller, NaN to 0. An int, so that 0 has no sign. */
__device__ int level_of(float t, float s) {
    const float a = fabsf(t);
    const int n = (a > 0.5f * s) + (a > 1.5f * s) + (a > 2.5f * s) + 2 * (a > 4 * s);
    return t < 0 ? -n : n;
}

/* The k-th code to try around one: 0, -1, +1, -2, +2 ... */
__device__ int around(int code, int k) {
    const int d = (k + 1) / 2;
    return clip(k & 1 ? code - d : code + d);
}

/* The upper triangle of a matrix of 32 by 32; the rest is not read. */
__device__ void load_upper(float (*to)[G], const float * from, i64 ld) {
    for (int i = (int) threadIdx.x; i < G * G; i += (int) blockDim.x) {
        if (i / G <= i % G) {
            to[i / G][i % G] = from[i / G * ld + i % G];
        }
    }
    __syncthreads();
}

/* Of the search's 32 codes the best on v, each weight's squared error times g; 0 where no error is a number. */
__device__ int first_code(const float * v, const float * g) {
    float top = 0;
#pragma unroll
    for (int j = 0; j < G; j++) {
        const float a = fabsf(v[j]);
        top = a > top ? a : top;
    }
    const int c5 = scale_code(top / 5), c2 = scale_code(top / 2), c1 = scale_code(top);
    float best = FLOAT_MAX;
    int code = 0;
    for (int c = 0; c < 32; c++) {
        const int candidate = clip(c < 26 ? c5 - 12 + c : c < 29 ? c2 - 27 + c : c1 - 30 + c);
        const float s = scale_value(candidate);
        float err = 0;
#pragma unroll
        for (int j = 0; j < G; j++) {
            const float e = v[j] - s * (float) level_of(v[j], s);
            err += e * e * g[j];
        }
        code = err < best ? candidate : code;
        best = err < best ? err : best;
    }
    return code;
}

/* w (rows, 32) -> levels, codes, err; u: the diagonal block (32, 32) of the upper Cholesky factor of inv(H). A column
 * whose u_jj is not > 0 feeds nothing back and has no say in the first code. */
extern "C" __global__ void gptq_group(const float * w, i64 ldw, const float * u, i64 ldu, i8 * levels, i64 ldl,
                                      u8 * codes, i64 ldc, float * err, i64 lde, int rows, int window) {
    __shared__ float us[G][G];
    __shared__ float gs[G];
    load_upper(us, u, ldu);
    if (threadIdx.x < G) {
        const float diagonal = us[threadIdx.x][threadIdx.x];
        gs[threadIdx.x] = diagonal > 0 ? 1 / (diagonal * diagonal) : 0;
    }
    __syncthreads();
    const int row = (int) (blockIdx.x * blockDim.x + threadIdx.x);
    if (row >= rows) {
        return;
    }
    float v[G];
#pragma unroll
    for (int j = 0; j < G; j++) {
        v[j] = w[row * ldw + j];
    }
    const int code0 = first_code(v, gs), tries = 2 * window + 1;
    float best = __uint_as_float(0x7f800000u); /* infinity */
    int code = code0;                          /* stays where no cost is a number */
    for (int k = 0; k <= tries; k++) {         /* the last turn writes the best one */
        const int c = k < tries ? around(code0, k) : code;
        const float s = scale_value(c);
        float t[G], cost = 0;
#pragma unroll
        for (int j = 0; j < G; j++) {
            t[j] = v[j];
        }
#pragma unroll
        for (int j = 0; j < G; j++) {
            const int level = level_of(t[j], s);
            const float e = us[j][j] > 0 ? (t[j] - s * (float) level) / us[j][j] : 0;
            cost += e * e;
#pragma unroll
            for (int m = j + 1; m < G; m++) {
                t[m] -= e * us[j][m];
            }
            if (k == tries) {
                levels[row * ldl + j] = (i8) level;
                err[row * lde + j] = e;
            }
        }
        code = cost < best ? c : code;
        best = cost < best ? cost : best;
    }
    codes[row * ldc] = (u8) code;
}

/* r (rows, 32): columns of (W - Q) H; h: the diagonal block (32, 32) of H. Moves levels and codes where that lowers the
 * objective; delta = new - old Q. A column whose h_jj is not > 0 keeps its level. */
extern "C" __global__ void cd_group(const float * r, i64 ldr, const float * h, i64 ldh, i8 * levels, i64 ldl,
                                    u8 * codes, i64 ldc, float * delta, i64 ldd, int rows, int window) {
    __shared__ float hs[G][G];
    load_upper(hs, h, ldh);
    const int row = (int) (blockIdx.x * blockDim.x + threadIdx.x);
    if (row >= rows) {
        return;
    }
    const int code0 = codes[row * ldc], tries = 2 * window + 1;
    const float s0 = scale_value(code0);
    float level0[G], r0[G];
#pragma unroll
    for (int j = 0; j < G; j++) {
        level0[j] = (float) levels[row * ldl + j];
        r0[j] = r[row * ldr + j];
    }
    float best = 0;
    int code = -1;                     /* none is better than nothing */
    for (int k = 0; k <= tries; k++) { /* the last turn writes the best one */
        if (k == tries && code < 0) {
#pragma unroll
            for (int j = 0; j < G; j++) {
                delta[row * ldd + j] = 0;
            }
            break;
        }
        const int c = k < tries ? around(code0, k) : code;
        const float s = scale_value(c);
        float t[G], change = 0;
#pragma unroll
        for (int j = 0; j < G; j++) {
            t[j] = r0[j];
        }
#pragma unroll
        for (int j = 0; j < G; j++) {
            const float diagonal = hs[j][j], q = s0 * level0[j];
            const float level = diagonal > 0 ? (float) level_of(q + t[j] / diagonal, s) : level0[j];
            const float d = s * level - q;
            change += d * (d * diagonal - 2 * t[j]);
#pragma unroll
            for (int m = j + 1; m < G; m++) { /* columns up to j are not looked at again */
                t[m] -= d * hs[j][m];
            }
            if (k == tries) {
                levels[row * ldl + j] = (i8) level;
                delta[row * ldd + j] = d;
            }
        }
        code = change < best ? c : code;
        best = change < best ? change : best;
    }
    if (code >= 0) {
        codes[row * ldc] = (u8) code;
    }
}
