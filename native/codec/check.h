/* The second decoder, piece by piece; host/convert.cpp spreads it over threads. Private. */
#ifndef PTQTP_CODEC_CHECK_H
#define PTQTP_CODEC_CHECK_H

#include "ptqtp.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef uint64_t (*ptqtp_hash_fn)(const float * x, int64_t n, uint64_t first);

void ptqtp_check_init(void); /* once, before the first piece */
/* Adds the checksum of the weights to *sum; returns the first bad block or -1. */
int64_t ptqtp_check_piece(int type, const uint8_t * data, int64_t nblocks, uint64_t first, ptqtp_hash_fn hash,
                          uint64_t * sum);

#ifdef __cplusplus
}
#endif
#endif
