// The quantizers over several threads. Rows are handed out in fixed chunks, so the bytes do not depend on the threads.
#include "ptqtp-quantize.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Calls work(first_row, nrows) for chunks that cover all rows; returns the first status that is not PTQTP_OK.
template <typename Work> int over_rows(int64_t nrows, int64_t n_per_row, int nthreads, const Work & work) {
    const int64_t chunk = std::max<int64_t>(1, 65536 / std::max<int64_t>(n_per_row, 1));
    std::atomic<int64_t> next{ 0 };
    std::atomic<int> result{ PTQTP_OK };
    const auto loop = [&] {
        for (int64_t row; result == PTQTP_OK && (row = next.fetch_add(chunk)) < nrows;) {
            const int status = work(row, std::min(chunk, nrows - row));
            if (status != PTQTP_OK) {
                result = status;
            }
        }
    };
    std::vector<std::thread> threads;
    try {
        for (int i = 1; i < nthreads; i++) {
            threads.emplace_back(loop);
        }
    } catch (const std::system_error &) { // no more threads to be had: go on with those that there are
    }
    loop();
    for (auto & t : threads) {
        t.join();
    }
    return result;
}

} // namespace

extern "C" int ptqtp_quantize_parallel(int type, int method, const float * x, const float * importance, void * dst,
                                       int64_t nrows, int64_t n_per_row, int nthreads) try {
    const int64_t qk = ptqtp_block_size(type);
    if (qk == 0) {
        return PTQTP_BAD_TYPE;
    }
    if (nthreads <= 0) {
        nthreads = std::max(1u, std::thread::hardware_concurrency());
    }
    const int64_t row_size = n_per_row / qk * static_cast<int64_t>(ptqtp_type_size(type));
    const auto out = [&](int64_t row) { return static_cast<uint8_t *>(dst) + row * row_size; };
    int status = ptqtp_quantize_check(type, method, x, importance, 0, n_per_row);
    if (status == PTQTP_OK) {
        status = over_rows(nrows, n_per_row, nthreads, [&](int64_t row, int64_t n) {
            return ptqtp_quantize_check(type, method, x + row * n_per_row, nullptr, n, n_per_row);
        });
    }
    if (status != PTQTP_OK) {
        return status;
    }
    if (method == PTQTP_SEARCH) {
        return over_rows(nrows, n_per_row, nthreads, [&](int64_t row, int64_t n) {
            return ptqtp_search_rows(type, x + row * n_per_row, importance, out(row), n, n_per_row);
        });
    }
    double largest[PTQTP_PAPER_MAX_ITERS] = {};
    std::mutex guard;
    over_rows(nrows, n_per_row, nthreads, [&](int64_t row, int64_t n) {
        double mine[PTQTP_PAPER_MAX_ITERS] = {};
        ptqtp_paper_probe(x + row * n_per_row, n, n_per_row, mine);
        const std::lock_guard<std::mutex> lock(guard);
        for (int t = 0; t < PTQTP_PAPER_MAX_ITERS; t++) {
            largest[t] = std::max(largest[t], mine[t]);
        }
        return PTQTP_OK;
    });
    const int iters = ptqtp_paper_iters(largest);
    return over_rows(nrows, n_per_row, nthreads, [&](int64_t row, int64_t n) {
        return ptqtp_paper_rows(x + row * n_per_row, out(row), n, n_per_row, iters);
    });
} catch (const std::bad_alloc &) {
    return PTQTP_NO_MEMORY;
}
