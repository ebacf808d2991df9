/* Functions of single types that only the table of types calls. Private to the codec. */
#ifndef PTQTP_CODEC_TYPES_H
#define PTQTP_CODEC_TYPES_H

#include "ptqtp.h"

int ptqtp_validate_block_tp2_0(const void * block);
int ptqtp_validate_block_tp2_1(const void * block);
int ptqtp_validate_block_tp2_2(const void * block);

#endif
