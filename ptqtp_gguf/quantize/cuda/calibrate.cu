/* The inner loops of calibrated quantization on a GPU: a group of 32 columns, a thread a row. The loop over groups and
 * the matrix products between them are torch's (gptq.py). The same arithmetic in the same order as gptq_reference.py,
 * the numpy reference, so the bits are equal; compiled at run time by NVRTC as kernels.cu is. The tests compile it for
 * the host. */
#include "trellis.cuh"

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

/* ---- K-best in a group: bulk/kbest.inc, 16 threads a row, nine of them a survivor each ---- */

enum { ROW_THREADS = 16, ROWS = TRELLIS_THREADS / ROW_THREADS }; /* of a block */

#define KBEST_LIMIT 32768.0f

/* What is known of the factor U of a group, for all rows of a block. */
struct Factor {
    float rows[G][G];             /* upper */
    float weight[G], importance[G]; /* 1 / u_jj^2, or 0; the same for the trellis' search */
};

/* A row's levels and what they move. */
struct Moves {
    float level[G], moved[G];
};

struct Row {
    float x[G], target[G], search[G], q[G], y[G];
    Moves tried, best;
};

__device__ float from_lane(float v, int lane) {
    return __shfl_sync(~0u, v, lane, ROW_THREADS);
}

/* U's diagonal has been written. */
__device__ void weigh(Factor & f) {
    float heaviest = 0;
    if (threadIdx.x < G) {
        const float d = f.rows[threadIdx.x][threadIdx.x], w = d > 0 ? 1 / (d * d) : 0;
        f.weight[threadIdx.x] = w;
        f.importance[threadIdx.x] = w < FLOAT_MAX ? w : FLOAT_MAX;
    }
    __syncthreads();
    for (int j = 0; j < G; j++) {
        heaviest = f.importance[j] > heaviest ? f.importance[j] : heaviest;
    }
    __syncthreads();
    if (threadIdx.x < G) {
        const u32 exponent = __float_as_uint(heaviest) >> 23;
        const float unit = __uint_as_float((exponent < 253 ? 254 - exponent : 1) << 23);
        const float h = f.importance[threadIdx.x] * unit;
        f.importance[threadIdx.x] = heaviest > 0 ? h > TRELLIS_LIGHT ? h : TRELLIS_LIGHT : 1;
    }
    __syncthreads();
}

/* The U of H's block, as `factor` in native/host/calibrate.cpp: in double, H = V V^T from the last column on, U =
 * inv(V). A thread a row of V, then a column of U. */
__device__ void factor(const float (*h)[G], double (*v)[G], double (*u)[G], Factor & f) {
    const int lane = (int) threadIdx.x;
    for (int i = lane; i < G * G; i += (int) blockDim.x) {
        v[i / G][i % G] = u[i / G][i % G] = 0;
    }
    __syncthreads();
    for (int j = G - 1; j >= 0; j--) {
        for (int turn = 0; turn < 2; turn++) { /* the pivot, then what divides by it */
            if (lane <= j && (lane == j) == (turn == 0)) {
                double x = (double) h[lane][j];
                for (int k = j + 1; k < G; k++) {
                    x -= v[lane][k] * v[j][k];
                }
                v[lane][j] = lane < j ? (v[j][j] > 0 ? x / v[j][j] : 0) : x > 0 ? sqrt(x) : 0;
            }
            __syncthreads();
        }
    }
    for (int i = G - 1; i >= 0; i--) {
        if (lane >= i && lane < G && v[i][i] > 0) {
            double x = lane == i ? 1 : 0;
            for (int n = i + 1; n < G; n++) {
                x -= v[i][n] * u[n][lane];
            }
            u[i][lane] = x / v[i][i];
        }
        __syncthreads();
    }
    for (int i = lane; i < G * G; i += (int) blockDim.x) {
        f.rows[i / G][i % G] = (float) u[i / G][i % G];
    }
    __syncthreads();
}

/* The best path at scale s, from `start` to the end that closes the chain; into `to`. Returns its cost. All threads of
 * a row call it. */
__device__ float best_path(const Factor & f, const float * x, float s, int start, int lane, Moves & to) {
    const int state = lane < STATES ? lane : 0, before = state / 3, t = state % 3;
    const float s3 = 3 * s;
    float v[G], moved[G], path = 0;
    int mark[G]; /* level + 6, and 16 times the trit two before */
#pragma unroll
    for (int j = 0; j < G; j++) {
        v[j] = x[j];
    }
#pragma unroll
    for (int j = 0; j < G; j++) {
        float way[3], value[3];
#pragma unroll
        for (int before2 = 0; before2 < 3; before2++) {
            const int o = trellis_offset(before2, before, t) - 3;
            value[before2] = from_lane(v[j], 3 * before2 + before);
            float e = fabsf(value[before2] - (float) o * s);
            e = nearer(e, e - s3);
            way[before2] = from_lane(path, 3 * before2 + before) + e * e * f.weight[j];
        }
        int chosen = way[1] < way[0];
        chosen = way[2] < (chosen ? way[1] : way[0]) ? 2 : chosen;
        chosen = j == 0 ? start / 3 : j == 1 ? start % 3 : chosen;
        const float taken = chosen == 0 ? value[0] : chosen == 1 ? value[1] : value[2];
        const int o = trellis_offset(chosen, before, t) - 3;
        const float e = taken - s * (float) o, a = fabsf(e);
        const int level = o + (fabsf(a - s3) < a ? e < 0 ? -3 : 3 : 0);
        path = chosen == 0 ? way[0] : chosen == 1 ? way[1] : way[2];
        moved[j] = f.rows[j][j] > 0 ? (taken - s * (float) level) / f.rows[j][j] : 0;
        mark[j] = level + 6 + 16 * chosen;
#pragma unroll
        for (int k = j + 1; k < G; k++) {
            v[k] = from_lane(v[k], 3 * chosen + before) - moved[j] * f.rows[j][k];
        }
    }
    int end = STATES - 1 - start;
    const float cost = from_lane(path, end);
#pragma unroll
    for (int j = G - 1; j >= 0; j--) {
        const int m = __shfl_sync(~0u, mark[j], end, ROW_THREADS);
        const float e = from_lane(moved[j], end);
        if (lane == 0) {
            to.level[j] = (float) (m % 16 - 6);
            to.moved[j] = e;
        }
        end = 3 * (m / 16) + end / 3;
    }
    __syncwarp();
    return cost;
}

/* The first of the lanes below n whose value is least. */
__device__ int least_lane(float v, int n) {
    float best = FLOAT_MAX;
    int found = 0;
    for (int i = 0; i < n; i++) {
        const float other = from_lane(v, i);
        found = other < best ? i : found;
        best = other < best ? other : best;
    }
    return found;
}

/* What the levels of `m` at scale s do to the objective; m.moved = their changes. */
__device__ float change_by(const float (*h)[G], const Row & row, float s, int lane, Moves & m) {
    for (int j = lane; j < G; j += ROW_THREADS) {
        m.moved[j] = s * m.level[j] - row.q[j];
    }
    __syncwarp();
    float term[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int j = lane + ROW_THREADS * half;
        float v = row.x[j];
        for (int i = 0; i < j; i++) {
            v -= m.moved[i] * h[i][j];
        }
        term[half] = m.moved[j] * (m.moved[j] * h[j][j] - 2 * v);
    }
    float score = 0;
    for (int j = 0; j < G; j++) {
        score += from_lane(j < ROW_THREADS ? term[0] : term[1], j % ROW_THREADS);
    }
    return score;
}

/* One group of TP2_2, columns in the order of the chain. CD: x is E H, m is H, moved the change of the weights; else x
 * is the weights, m is U, moved the errors over u_jj. */
template <bool CD>
__device__ void chain_group(const float * x, i64 ldx, const float * m, i64 ldm, i8 * levels, i64 ldl, u8 * codes,
                            i64 ldc, float * moved, i64 ldv, int rows, int window) {
    __shared__ Factor f;
    __shared__ float hs[G][G];
    __shared__ double work[2][CD ? G : 1][G];
    __shared__ Row all[ROWS];
    if constexpr (CD) {
        load_upper(hs, m, ldm);
        factor(hs, work[0], work[1], f);
    } else {
        load_upper(f.rows, m, ldm);
    }
    weigh(f);
    const int lane = (int) threadIdx.x % ROW_THREADS, place = (int) (blockIdx.x * blockDim.x + threadIdx.x) / ROW_THREADS;
    const bool mine = place < rows; /* the others go along, for the shuffles */
    const int r = mine ? place : rows - 1;
    Row & row = all[threadIdx.x / ROW_THREADS];
    int code = CD ? codes[r * ldc] : 0;
    float score = CD ? 0 : __uint_as_float(0x7f800000u); /* infinity */
    for (int j = lane; j < G; j += ROW_THREADS) {
        row.x[j] = x[r * ldx + j];
        row.best.level[j] = CD ? (float) levels[r * ldl + j] : 0;
        row.best.moved[j] = 0;
        row.q[j] = scale_value(code) * row.best.level[j];
        row.target[j] = row.x[j];
    }
    __syncwarp();
    if constexpr (CD) { /* q + r inv(H) */
        for (int j = lane; j < G; j += ROW_THREADS) {
            float sum = 0;
            for (int k = j; k < G; k++) {
                sum += row.x[k] * f.rows[j][k];
            }
            row.y[j] = sum;
        }
        __syncwarp();
        for (int k = lane; k < G; k += ROW_THREADS) {
            float sum = 0;
            for (int j = 0; j <= k; j++) {
                sum += row.y[j] * f.rows[j][k];
            }
            row.target[k] = row.q[k] + sum;
        }
    }
    __syncwarp();
    for (int j = lane; j < G; j += ROW_THREADS) { /* within bounds, NaN as 0 */
        const float v = row.target[j], a = fabsf(v);
        row.search[j] = a < KBEST_LIMIT ? v : a > 0 ? v < 0 ? -KBEST_LIMIT : KBEST_LIMIT : 0;
    }
    __syncwarp();
    const GivenWeights chain = { row.search, f.importance };
    if constexpr (!CD) {
        float top = 0;
        for (int j = 0; j < G; j++) {
            const float a = fabsf(row.search[j]);
            top = a > top ? a : top;
        }
        const int tried = trellis_code(lane < TRELLIS_CODES ? lane : 0, top);
        const float rank = trellis_rank(chain, scale_value(tried), FLOAT_MAX);
        code = __shfl_sync(~0u, tried, least_lane(rank, TRELLIS_CODES), ROW_THREADS);
    }
    const int centre = code;
    for (int k = 0; k <= 2 * window; k++) {
        const int c = around(centre, k);
        const float s = scale_value(c);
        const int start = least_lane(trellis_closed(chain, s, lane < STATES ? lane : 0), STATES);
        float cost = best_path(f, row.target, s, start, lane, row.tried);
        if constexpr (CD) {
            cost = change_by(hs, row, s, lane, row.tried);
        }
        __syncwarp();
        if (cost < score || (!CD && k == 0)) { /* the first stays where no cost is a number */
            for (int j = lane; j < G; j += ROW_THREADS) {
                row.best.level[j] = row.tried.level[j];
                row.best.moved[j] = row.tried.moved[j];
            }
        }
        code = cost < score ? c : code;
        score = cost < score ? cost : score;
        __syncwarp();
    }
    for (int j = lane; mine && j < G; j += ROW_THREADS) {
        levels[r * ldl + j] = (i8) row.best.level[j];
        moved[r * ldv + j] = row.best.moved[j];
    }
    if (mine && lane == 0) {
        codes[r * ldc] = (u8) code;
    }
}

extern "C" __global__ void gptq_chain_group(const float * w, i64 ldw, const float * u, i64 ldu, i8 * levels, i64 ldl,
                                            u8 * codes, i64 ldc, float * err, i64 lde, int rows, int window) {
    chain_group<false>(w, ldw, u, ldu, levels, ldl, codes, ldc, err, lde, rows, window);
}

extern "C" __global__ void cd_chain_group(const float * r, i64 ldr, const float * h, i64 ldh, i8 * levels, i64 ldl,
                                          u8 * codes, i64 ldc, float * delta, i64 ldd, int rows, int window) {
    chain_group<true>(r, ldr, h, ldh, levels, ldl, codes, ldc, delta, ldd, rows, window);
}

/* ---- training: the levels that a TP2_2 matrix can hold nearest to values in units of their scale ---- */

extern "C" __global__ void nearest_tp2_2(const float * v, i8 * levels, u32 groups) {
    __shared__ float chains[UNIT * TRELLIS_THREADS];
    const u32 g = blockIdx.x * blockDim.x + threadIdx.x;
    if (g >= groups) {
        return;
    }
    const OwnWeights chain = { chains + threadIdx.x, 0, 0 };
    for (int c = 0; c < UNIT; c++) {
        chains[c * TRELLIS_THREADS + threadIdx.x] = v[(u64) g * UNIT + chain_weight(c)];
    }
    const int start = trellis_start(chain, 1);
    u32 from[UNIT];
    trellis_trace(chain, 1, start, from);
    int state = STATES - 1 - start;
    for (int c = UNIT - 1; c >= 0; c--) {
        const int before = state / 3, t = state % 3, before2 = trellis_from(from[c], state);
        const int o = trellis_offset(before2, before, t) - 3;
        const float x = chain.at(c) - (float) o, e = fabsf(x);
        levels[(u64) g * UNIT + chain_weight(c)] = (i8) (o + (fabsf(e - 3) < e ? x < 0 ? -3 : 3 : 0));
        state = 3 * before2 + before;
    }
}
