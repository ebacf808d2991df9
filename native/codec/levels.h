/* Levels and digits of many units, piece by piece; host/convert.cpp spreads it over threads. Private. */
#ifndef PTQTP_CODEC_LEVELS_H
#define PTQTP_CODEC_LEVELS_H

#include "ptqtp.h"

#ifdef __cplusplus
extern "C" {
#endif

/* As ptqtp_levels_of_digits and ptqtp_digits_of_levels. type: PTQTP_TP2_1 or PTQTP_TP2_2; n a multiple of 32. */
int ptqtp_levels_piece(int type, const uint8_t * digits, int8_t * levels, int64_t n);
void ptqtp_digits_piece(int type, const int8_t * levels, uint8_t * digits, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
