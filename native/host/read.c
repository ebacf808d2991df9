/* Reading memory as fast as it goes: what the bandwidth of a machine is measured with. */
#include "ptqtp.h"

#include <string.h>

enum { LANES = 32 };

uint64_t ptqtp_read_sum(const void * data, size_t size) {
    const uint8_t * bytes = data;
    const size_t whole = size / sizeof(uint64_t);
    uint64_t sum[LANES] = { 0 }; /* many sums: bound by memory, not by one chain of additions */
    size_t i = 0;
    for (; i + LANES <= whole; i += LANES) {
        for (int k = 0; k < LANES; k++) {
            uint64_t word;
            memcpy(&word, bytes + (i + (size_t) k) * sizeof word, sizeof word); /* any alignment */
            sum[k] += word;
        }
    }
    for (; i < whole; i++) {
        uint64_t word;
        memcpy(&word, bytes + i * sizeof word, sizeof word);
        sum[0] += word;
    }
    for (int k = 1; k < LANES; k++) {
        sum[0] += sum[k];
    }
    return sum[0];
}
