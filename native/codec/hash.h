/* The checksum of reconstructed weights: a sum mod 2^64 of a mix of each value's bits with its index in the tensor, so
 * it is the same for any split into pieces and any order of threads, and any changed, moved or swapped value shows.
 * For one index the mix is injective in the bits. Private. */
#ifndef PTQTP_CODEC_HASH_H
#define PTQTP_CODEC_HASH_H

#include <stdint.h>

#define PTQTP_HASH_STEP 0x9e3779b97f4a7c15u /* odd: 2^64 / the golden ratio */

/* key = (index + 1) * PTQTP_HASH_STEP, which a loop makes by adding */
static inline uint64_t ptqtp_mix(uint32_t bits, uint64_t key) {
    uint64_t z = (uint64_t) (bits ^ (uint32_t) (key >> 32)) * 0xd6e8feb9u + key;
    z ^= z >> 32;
    z *= 0x9fb21c65u; /* odd 32-bit constants: two or three 32-bit products, which every SIMD set has */
    return z ^ z >> 29;
}

#endif
