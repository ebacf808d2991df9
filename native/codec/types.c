/* The one table of tensor types: what differs between them is a row here, and whoever asks "which type?" asks it. */
#include "codec/types.h"

#define ROW(name) [PTQTP_##name - PTQTP_TP2_0]

static const struct ptqtp_type_traits types[PTQTP_TYPE_COUNT] = {
    ROW(TP2_0) = {
        .type = PTQTP_TP2_0,
        .since = 1,
        .planes = 2,
        .name = "TP2_0",
        .block = PTQTP_QK_TP2_0,
        .group = PTQTP_QK_TP2_0,
        .size = sizeof(block_tp2_0),
        .scale_size = 2 * sizeof(uint16_t),
        .reach = 32768.0f, /* well inside fp16 */
        .panels = false,
        .pack = ptqtp_pack_tp2_0,
        .unpack = ptqtp_unpack_tp2_0,
        .dequantize = ptqtp_dequantize_tp2_0,
        .validate = ptqtp_validate_block_tp2_0,
    },
    ROW(TP2_1) = {
        .type = PTQTP_TP2_1,
        .since = 1,
        .planes = 2,
        .name = "TP2_1",
        .block = PTQTP_QK_TP2_1,
        .group = PTQTP_QK_TP2_1,
        .size = sizeof(block_tp2_1),
        .scale_size = sizeof(uint8_t),
        .reach = 9.6875f, /* 5 * 1.9375, the outermost level at the largest scale */
        .panels = true,
        .pack = ptqtp_pack_tp2_1,
        .unpack = ptqtp_unpack_tp2_1,
        .dequantize = ptqtp_dequantize_tp2_1,
        .validate = ptqtp_validate_block_tp2_1,
    },
    ROW(TP2_2) = {
        .type = PTQTP_TP2_2,
        .since = 2,
        .planes = 2,
        .name = "TP2_2",
        .block = PTQTP_QK_TP2_2,
        .group = PTQTP_QK_TP2_2,
        .size = sizeof(block_tp2_2),
        .scale_size = sizeof(uint8_t),
        .reach = 11.625f, /* 6 * 1.9375 */
        .panels = true,
        .pack = ptqtp_pack_tp2_2,
        .unpack = ptqtp_unpack_tp2_2,
        .dequantize = ptqtp_dequantize_tp2_2,
        .validate = ptqtp_validate_block_tp2_2,
    },
};

const struct ptqtp_type_traits * ptqtp_type_table(int * count) {
    *count = PTQTP_TYPE_COUNT;
    return types;
}

const struct ptqtp_type_traits * ptqtp_traits(int type) {
    return type >= PTQTP_TP2_0 && type < PTQTP_TYPE_END ? &types[type - PTQTP_TP2_0] : NULL;
}

size_t ptqtp_type_size(int type) {
    const struct ptqtp_type_traits * t = ptqtp_traits(type);
    return t ? t->size : 0;
}

int64_t ptqtp_block_size(int type) {
    const struct ptqtp_type_traits * t = ptqtp_traits(type);
    return t ? t->block : 0;
}
