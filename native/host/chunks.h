// Work over fixed chunks on several threads: what a chunk is depends on the data only, so results that are joined in
// the order of the chunks (or by a commutative, exact operation) do not depend on the threads. Private, C++.
#ifndef PTQTP_HOST_CHUNKS_H
#define PTQTP_HOST_CHUNKS_H

#include "ptqtp.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace ptqtp {

constexpr int64_t kChunk = 65536; // weights: small enough for L2, large enough that handing out costs nothing

// Calls work(first, n) for chunks of `chunk` items that cover 0 .. count-1; returns the first status that is not
// PTQTP_OK. nthreads <= 0: all cores.
template <typename Work> int over_chunks(int64_t count, int64_t chunk, int nthreads, const Work & work) {
    if (nthreads <= 0) {
        nthreads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    }
    nthreads = static_cast<int>(std::min<int64_t>(nthreads, (count + chunk - 1) / chunk));
    std::atomic<int64_t> next{ 0 };
    std::atomic<int> result{ PTQTP_OK };
    const auto loop = [&] {
        for (int64_t first; result == PTQTP_OK && (first = next.fetch_add(chunk)) < count;) {
            const int status = work(first, std::min(chunk, count - first));
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

} // namespace ptqtp

#endif
