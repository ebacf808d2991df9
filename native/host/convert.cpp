// What a converter does to weights besides quantizing: other types to and from float, looking for damage, checksums,
// verification. Fixed chunks over threads (host/chunks.h).
#include "bulk/bulk.h"
#include "codec/check.h"
#include "codec/levels.h"
#include "codec/trellis.h"
#include "codec/unit.h"
#include "host/chunks.h"

#include <mutex>
#include <new>

using ptqtp::kChunk;
using ptqtp::over_chunks;

extern "C" uint64_t ptqtp_hash(const float * x, int64_t n, uint64_t first, int nthreads) {
    const ptqtp_bulk * bulk = ptqtp_bulk_chosen();
    std::atomic<uint64_t> sum{ 0 };
    over_chunks(n, kChunk, nthreads, [&](int64_t i, int64_t m) {
        sum += bulk->hash(x + i, m, first + static_cast<uint64_t>(i));
        return PTQTP_OK;
    });
    return sum;
}

extern "C" int ptqtp_check(int type, const void * data, int64_t nblocks, uint64_t first, int nthreads, uint64_t * hash,
                           int64_t * bad_block) {
    const int64_t qk = ptqtp_block_size(type);
    if (qk == 0) {
        return PTQTP_BAD_TYPE;
    }
    if (nblocks < 0) {
        return PTQTP_BAD_SIZE;
    }
    static std::once_flag once;
    std::call_once(once, ptqtp_check_init);
    const ptqtp_bulk * bulk = ptqtp_bulk_chosen();
    std::atomic<uint64_t> sum{ 0 };
    std::atomic<int64_t> bad{ nblocks };
    over_chunks(nblocks, kChunk / qk, nthreads, [&](int64_t block, int64_t n) {
        uint64_t mine = 0;
        const int64_t found =
            ptqtp_check_piece(type, static_cast<const uint8_t *>(data) + block * ptqtp_type_size(type), n,
                              first + static_cast<uint64_t>(block * qk), bulk->hash, &mine);
        sum += mine;
        if (found >= 0) {
            for (int64_t least = bad; block + found < least && !bad.compare_exchange_weak(least, block + found);) {
            }
        }
        return PTQTP_OK;
    });
    *hash = sum;
    *bad_block = bad == nblocks ? -1 : bad.load();
    return *bad_block < 0 ? PTQTP_OK : PTQTP_BAD_WORD;
}

// ggml's type ids
enum { F32 = 0, F16 = 1, Q8_0 = 8, BF16 = 30 };

// Whether n values are whole blocks of a type that is converted here.
static int convertible(int ggml_type, int64_t n) {
    if (ggml_type != F32 && ggml_type != F16 && ggml_type != BF16 && ggml_type != Q8_0) {
        return PTQTP_BAD_TYPE;
    }
    return n < 0 || (ggml_type == Q8_0 && n % 32) ? PTQTP_BAD_SIZE : PTQTP_OK;
}

extern "C" int ptqtp_to_float(int ggml_type, const void * src, float * dst, int64_t n, int nthreads) {
    if (const int status = convertible(ggml_type, n)) {
        return status;
    }
    const ptqtp_bulk * bulk = ptqtp_bulk_chosen();
    return over_chunks(n, kChunk, nthreads, [&](int64_t i, int64_t m) {
        switch (ggml_type) {
            case F32: std::copy_n(static_cast<const float *>(src) + i, m, dst + i); break;
            case F16: bulk->from_f16(static_cast<const uint16_t *>(src) + i, dst + i, m); break;
            case BF16: bulk->from_bf16(static_cast<const uint16_t *>(src) + i, dst + i, m); break;
            default: bulk->from_q8_0(static_cast<const ptqtp_block_q8_0 *>(src) + i / 32, dst + i, m);
        }
        return PTQTP_OK;
    });
}

extern "C" int ptqtp_from_float(int ggml_type, const float * src, void * dst, int64_t n, int nthreads) {
    if (const int status = ggml_type == F32 ? PTQTP_BAD_TYPE : convertible(ggml_type, n)) {
        return status;
    }
    const ptqtp_bulk * bulk = ptqtp_bulk_chosen();
    return over_chunks(n, kChunk, nthreads, [&](int64_t i, int64_t m) {
        switch (ggml_type) {
            case F16: bulk->to_f16(src + i, static_cast<uint16_t *>(dst) + i, m); break;
            case BF16: bulk->to_bf16(src + i, static_cast<uint16_t *>(dst) + i, m); break;
            default: bulk->to_q8_0(src + i, static_cast<ptqtp_block_q8_0 *>(dst) + i / 32, m);
        }
        return PTQTP_OK;
    });
}

// Whether n values are whole units of a type that has levels.
static int with_levels(int type, int64_t n) {
    if (type != PTQTP_TP2_1 && type != PTQTP_TP2_2) {
        return PTQTP_BAD_TYPE;
    }
    return n < 0 || n % PTQTP_UNIT ? PTQTP_BAD_SIZE : PTQTP_OK;
}

extern "C" int ptqtp_levels_of_digits(int type, const uint8_t * digits, int8_t * levels, int64_t n, int nthreads) {
    if (const int status = with_levels(type, n)) {
        return status;
    }
    return over_chunks(n, kChunk, nthreads,
                       [&](int64_t i, int64_t m) { return ptqtp_levels_piece(type, digits + i, levels + i, m); });
}

extern "C" int ptqtp_digits_of_levels(int type, const int8_t * levels, uint8_t * digits, int64_t n, int nthreads) {
    if (const int status = with_levels(type, n)) {
        return status;
    }
    return over_chunks(n, kChunk, nthreads, [&](int64_t i, int64_t m) {
        ptqtp_digits_piece(type, levels + i, digits + i, m);
        return PTQTP_OK;
    });
}

extern "C" int ptqtp_scan(const float * x, int64_t n, int64_t group, float floor, int nthreads,
                          ptqtp_scan_result * out) {
    if (n < 0 || group < 1) {
        return PTQTP_BAD_SIZE;
    }
    const ptqtp_bulk * bulk = ptqtp_bulk_chosen();
    ptqtp_scan_result all = { -1, 0, 0, 0 };
    std::mutex guard;
    over_chunks(n, std::max<int64_t>(1, kChunk / group) * group, nthreads, [&](int64_t i, int64_t m) {
        ptqtp_scan_result mine;
        bulk->scan(x + i, m, group, floor, &mine);
        const std::lock_guard<std::mutex> lock(guard);
        if (mine.bad >= 0 && (all.bad < 0 || i + mine.bad < all.bad)) {
            all.bad = i + mine.bad;
        }
        all.largest = std::max(all.largest, mine.largest);
        all.groups += mine.groups;
        all.below += mine.below;
        return PTQTP_OK;
    });
    *out = all;
    return PTQTP_OK;
}

extern "C" int ptqtp_count_words(const void * units, int64_t nunits, int nthreads, uint64_t * five, uint64_t * last) {
    constexpr size_t kWords = 65536;
    constexpr int64_t kMost = 1 << 20;  // units a chunk: 32 bits hold its counts
    constexpr int64_t kLeast = 1 << 14; // fewer are not worth tables of their own
    if (nunits < 0) {
        return PTQTP_BAD_SIZE;
    }
    const auto * all = static_cast<const ptqtp_unit *>(units);
    const int64_t threads =
        nthreads > 0 ? nthreads : static_cast<int64_t>(std::max(1u, std::thread::hardware_concurrency()));
    const int64_t chunk = std::min(kMost, std::max(kLeast, (nunits + threads - 1) / threads));
    std::mutex guard;
    return over_chunks(nunits, chunk, nthreads, [&](int64_t first, int64_t n) {
        std::vector<uint32_t> counts;
        try {
            counts.resize(2 * kWords);
        } catch (const std::bad_alloc &) {
            return static_cast<int>(PTQTP_NO_MEMORY);
        }
        for (int64_t i = first; i < first + n; i++) {
            for (int j = 0; j < PTQTP_UNIT_WORDS; j++) {
                counts[ptqtp_get_u16(all[i].q + 2 * j)]++;
            }
            counts[kWords + all[i].side + 256u * all[i].r]++;
        }
        const std::lock_guard<std::mutex> lock(guard);
        for (size_t q = 0; q < kWords; q++) {
            five[q] += counts[q];
            last[q] += counts[kWords + q];
        }
        return static_cast<int>(PTQTP_OK);
    });
}

extern "C" int ptqtp_count_third(const void * units, int64_t nunits, int nthreads, uint64_t * counts) {
    static const uint8_t chain[PTQTP_UNIT] = { PTQTP_CHAIN_ORDER };
    if (nunits < 0) {
        return PTQTP_BAD_SIZE;
    }
    const auto * all = static_cast<const ptqtp_unit *>(units);
    std::atomic<uint64_t> minus{ 0 }, zero{ 0 };
    over_chunks(nunits, kChunk / PTQTP_UNIT, nthreads, [&](int64_t first, int64_t n) {
        uint32_t my_minus = 0, my_zero = 0;
        for (int64_t i = first; i < first + n; i++) {
            uint8_t digits[PTQTP_UNIT], second[2 + PTQTP_UNIT]; // trits t2 + 1, 0..2, along the chain
            ptqtp_unit_unpack(&all[i], digits);
            for (int c = 0; c < PTQTP_UNIT; c++) {
                second[2 + c] = digits[chain[c]];
            }
            for (int c = 2; c < 2 + PTQTP_UNIT; c++) {
                second[c] = static_cast<uint8_t>(second[c] % 3);
            }
            second[0] = static_cast<uint8_t>(2 - second[PTQTP_UNIT]);
            second[1] = static_cast<uint8_t>(2 - second[PTQTP_UNIT + 1]);
            for (int c = 0; c < PTQTP_UNIT; c++) {
                const int sum = second[c] + second[c + 1]; // t2[-1] + t2[-2] + 2
                my_minus += sum == 1 || sum == 4;
                my_zero += sum == 2;
            }
        }
        minus += my_minus;
        zero += my_zero;
        return PTQTP_OK;
    });
    counts[0] += minus;
    counts[1] += zero;
    counts[2] += static_cast<uint64_t>(nunits) * PTQTP_UNIT - minus - zero;
    return PTQTP_OK;
}
