#include "ggml/expand.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

using seconds = std::chrono::duration<double>;

double seconds_since(std::chrono::steady_clock::time_point start) {
    return seconds(std::chrono::steady_clock::now() - start).count();
}

// Seconds a weight of a matrix that lies in the cache, one thread, best of some.
double decoding(const ptqtp_panel_kernel * kernel, int form) {
    constexpr int64_t N = 1024, ROWS = 64;
    std::vector<char> panels(ptqtp_panels_size(form, ROWS, N));
    std::vector<char> acts((size_t) (N / PTQTP_UNIT) * ptqtp_gemv_act_size(kernel, PTQTP_TP2_2, form));
    std::vector<float> x(N, 1.0f), y(ROWS);
    ptqtp_gemv_quantize(kernel, PTQTP_TP2_2, form, x.data(), acts.data(), N);
    double best = 1;
    for (int i = 0; i < 24; i++) {
        const auto start = std::chrono::steady_clock::now();
        ptqtp_gemv(kernel, PTQTP_TP2_2, form, N, ROWS, panels.data(), 0, ROWS / PTQTP_PANEL_ROWS, acts.data(),
                   y.data());
        best = std::min(best, seconds_since(start));
    }
    return best / (N * ROWS);
}

// Seconds a byte for each of `threads` that read memory at the same time; 0 where there is no memory to try it.
double reading(unsigned threads) {
    constexpr size_t WORDS = (24 << 20) / sizeof(uint64_t); // of each: with those of the others beyond the caches
    const unsigned readers = std::min(threads, 8u);
    std::vector<double> times(readers, 0);
    const auto read = [&](unsigned r) {
        const std::unique_ptr<uint64_t[]> words(new (std::nothrow) uint64_t[WORDS]);
        if (!words) {
            return;
        }
        std::memset(words.get(), 1, WORDS * sizeof(uint64_t));
        for (int pass = 0; pass < 3; pass++) {
            const auto start = std::chrono::steady_clock::now();
            uint64_t sum[8] = {};
            for (size_t i = 0; i < WORDS; i += 8) {
                for (int k = 0; k < 8; k++) {
                    sum[k] += words[i + k];
                }
            }
            volatile uint64_t keep = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
            (void) keep;
            times[r] += seconds_since(start) / (3 * WORDS * sizeof(uint64_t));
        }
    };
    std::vector<std::thread> others;
    try {
        for (unsigned r = 1; r < readers; r++) {
            others.emplace_back(read, r);
        }
    } catch (const std::system_error &) { // no more threads: their share is not known
    }
    const bool all = others.size() + 1 == readers;
    read(0);
    for (auto & t : others) {
        t.join();
    }
    return all ? *std::max_element(times.begin(), times.end()) * threads / readers : 0;
}

} // namespace

bool ptqtp_expansion_pays(const ptqtp_panel_kernel * kernel) {
    constexpr double PACKED = (double) PTQTP_TILE_SIZE / (PTQTP_PANEL_ROWS * PTQTP_UNIT); // bytes a weight
    constexpr double WIDE = (double) PTQTP_WIDE_TILE_SIZE / (PTQTP_PANEL_ROWS * PTQTP_UNIT);
    const double byte = reading(std::max(1u, std::thread::hardware_concurrency()));
    const double packed = std::max(decoding(kernel, PTQTP_PACKED), PACKED * byte);
    const double wide = std::max(decoding(kernel, PTQTP_WIDE), WIDE * byte);
    return byte > 0 && 7 * packed > 8 * wide;
}
