// The quantizers over several threads. Rows are handed out in fixed chunks, so the bytes do not depend on the threads.
#include "bulk/bulk.h"
#include "host/chunks.h"
#include "quantize/methods.h"

#include <memory>
#include <mutex>
#include <new>

namespace {

// The statistics of one chunk, from the weights and what the quantizer made of them.
ptqtp_stats compare(const ptqtp_bulk * bulk, const float * x, const float * r, int64_t n, uint64_t first) {
    double error[PTQTP_ERROR_LANES] = {}, power[PTQTP_ERROR_LANES] = {};
    ptqtp_stats s = { 0, 0, bulk->hash(r, n, first) };
    bulk->compare(x, r, n, error, power);
    for (int l = 0; l < PTQTP_ERROR_LANES; l++) {
        s.error += error[l];
        s.power += power[l];
    }
    return s;
}

} // namespace

extern "C" int ptqtp_quantize_stats(int type, int method, const float * x, const float * importance, void * dst,
                                    int64_t nrows, int64_t n_per_row, uint64_t first, int nthreads,
                                    ptqtp_stats * stats) try {
    const int64_t qk = ptqtp_block_size(type);
    if (qk == 0) {
        return PTQTP_BAD_TYPE;
    }
    int64_t all = 0;
    if (nrows < 0 || __builtin_mul_overflow(nrows, n_per_row, &all)) {
        return PTQTP_BAD_SIZE;
    }
    const int64_t chunk = std::max<int64_t>(1, ptqtp::kChunk / std::max<int64_t>(n_per_row, 1));
    const auto over_rows = [&](const auto & work) { return ptqtp::over_chunks(nrows, chunk, nthreads, work); };
    int status = ptqtp_quantize_check(type, method, x, importance, 0, n_per_row);
    if (status == PTQTP_OK) {
        status = over_rows([&](int64_t row, int64_t n) {
            return ptqtp_quantize_check(type, method, x + row * n_per_row, nullptr, n, n_per_row);
        });
    }
    if (status != PTQTP_OK) {
        return status;
    }
    const ptqtp_maker * maker = ptqtp_maker_of(method, type);
    int settled = 0;
    if (maker->probe) {
        double seen[PTQTP_SEEN] = {};
        std::mutex guard;
        over_rows([&](int64_t row, int64_t n) {
            double mine[PTQTP_SEEN] = {};
            maker->probe(x + row * n_per_row, n, n_per_row, mine);
            const std::lock_guard<std::mutex> lock(guard);
            for (int i = 0; i < PTQTP_SEEN; i++) {
                seen[i] = std::max(seen[i], mine[i]);
            }
            return PTQTP_OK;
        });
        settled = maker->settle(seen);
    }
    const ptqtp_bulk * bulk = ptqtp_bulk_chosen();
    const ptqtp_bulk_maker_fn fast = ptqtp_bulk_maker(bulk, method, type);
    const int64_t row_size = n_per_row / qk * static_cast<int64_t>(ptqtp_type_size(type));
    std::vector<ptqtp_stats> parts(stats ? static_cast<size_t>((nrows + chunk - 1) / chunk) : 0);
    status = over_rows([&](int64_t row, int64_t n) {
        const float * w = x + row * n_per_row;
        void * out = static_cast<uint8_t *>(dst) + row * row_size;
        // not a vector: no need to clear it, and no exception may leave a thread
        const std::unique_ptr<float[]> r(stats ? new (std::nothrow) float[static_cast<size_t>(n * n_per_row)]
                                               : nullptr);
        float * values = r.get();
        if (stats && !values) {
            return static_cast<int>(PTQTP_NO_MEMORY);
        }
        int done = PTQTP_OK;
        if (fast) {
            const int64_t groups = n_per_row / qk;
            fast(w, importance, groups, out, values, n * groups);
        } else {
            done = maker->rows(w, importance, out, values, n, n_per_row, settled);
        }
        if (stats && done == PTQTP_OK) {
            const uint64_t at = first + static_cast<uint64_t>(row * n_per_row);
            parts[static_cast<size_t>(row / chunk)] = compare(bulk, w, values, n * n_per_row, at);
        }
        return done;
    });
    if (stats && status == PTQTP_OK) {
        *stats = {};
        for (const auto & p : parts) {
            stats->error += p.error;
            stats->power += p.power;
            stats->hash += p.hash;
        }
    }
    return status;
} catch (const std::bad_alloc &) {
    return PTQTP_NO_MEMORY;
}

extern "C" int ptqtp_quantize_parallel(int type, int method, const float * x, const float * importance, void * dst,
                                       int64_t nrows, int64_t n_per_row, int nthreads) {
    return ptqtp_quantize_stats(type, method, x, importance, dst, nrows, n_per_row, 0, nthreads, nullptr);
}

extern "C" int ptqtp_nearest_levels(const float * v, int8_t * levels, int64_t n, int nthreads) try {
    if (n < 0 || n % PTQTP_UNIT) {
        return PTQTP_BAD_SIZE;
    }
    const ptqtp_bulk * bulk = ptqtp_bulk_chosen();
    const int64_t chunk = ptqtp::kChunk / PTQTP_UNIT;
    return ptqtp::over_chunks(n / PTQTP_UNIT, chunk, nthreads, [&](int64_t group, int64_t count) {
        bulk->nearest_tp2_2(v + group * PTQTP_UNIT, levels + group * PTQTP_UNIT, count);
        return static_cast<int>(PTQTP_OK);
    });
} catch (const std::bad_alloc &) {
    return PTQTP_NO_MEMORY;
}
