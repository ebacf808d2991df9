/* Dot products of a row with a Q8_0 row: the scalar reference, and the choice of a kernel at run time.
 * The integer sum of each 32 weights is exact in every kernel; only the float sum over them differs in order. */
#include "codec/trellis.h"
#include "kernels/kernels.h"

#include <stdlib.h>

static float dot_levels(int type, int64_t n, const void * weights, const void * q8_0) {
    const ptqtp_unit * x = weights;
    const ptqtp_block_q8_0 * y = q8_0;
    float sum = 0;
    for (int64_t i = 0; i < n / PTQTP_UNIT; i++) {
        int8_t levels[PTQTP_UNIT];
        ptqtp_unit_levels(type, &x[i], levels);
        int32_t a = 0;
        for (int k = 0; k < PTQTP_UNIT; k++) {
            a += levels[k] * y[i].qs[k];
        }
        sum += ptqtp_scale_value(x[i].side) * ptqtp_half_to_float(y[i].d) * (float) a;
    }
    return sum;
}

float ptqtp_dot_tp2_1_scalar(int64_t n, const void * weights, const void * q8_0) {
    return dot_levels(PTQTP_TP2_1, n, weights, q8_0);
}

float ptqtp_dot_tp2_2_scalar(int64_t n, const void * weights, const void * q8_0) {
    return dot_levels(PTQTP_TP2_2, n, weights, q8_0);
}

float ptqtp_dot_tp2_0_scalar(int64_t n, const void * weights, const void * q8_0) {
    const block_tp2_0 * x = weights;
    const ptqtp_block_q8_0 * y = q8_0;
    float sum = 0;
    for (int64_t i = 0; i < n / PTQTP_QK_TP2_0; i++) {
        const float alpha1 = ptqtp_half_to_float(ptqtp_alpha_bits(&x[i], 0));
        const float alpha2 = ptqtp_half_to_float(ptqtp_alpha_bits(&x[i], 1));
        for (int j = 0; j < 4; j++, y++) {
            uint8_t digits[PTQTP_UNIT];
            ptqtp_unit_unpack(&x[i].u[j], digits);
            int32_t a1 = 0, a2 = 0;
            for (int k = 0; k < PTQTP_UNIT; k++) {
                a1 += ptqtp_t1(digits[k]) * y->qs[k];
                a2 += ptqtp_t2(digits[k]) * y->qs[k];
            }
            sum += ptqtp_half_to_float(y->d) * (alpha1 * (float) a1 + alpha2 * (float) a2);
        }
    }
    return sum;
}

static const struct ptqtp_kernel kernels[] = {
#define PTQTP_KERNEL(isa, type, symbol) { #isa, PTQTP_##type, symbol, ptqtp_cpu_##isa },
#define PTQTP_PANEL_KERNEL(isa)
#include "kernels/kernels.inc"
#undef PTQTP_KERNEL
#undef PTQTP_PANEL_KERNEL
};

const struct ptqtp_kernel * ptqtp_kernels(int * count) {
    *count = (int) (sizeof kernels / sizeof kernels[0]);
    return kernels;
}

static const struct ptqtp_kernel * choose(int type) {
    const char * forced = getenv("PTQTP_KERNEL");
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
        const struct ptqtp_kernel * k = &kernels[i];
        if (k->type == type && k->supported() && (!forced || !*forced || strcmp(forced, k->name) == 0)) {
            return k;
        }
    }
    return NULL;
}

const struct ptqtp_kernel * ptqtp_kernel_for(int type) {
    /* Racing threads compute the same answer and store the same pointer. */
    static const struct ptqtp_kernel * chosen[PTQTP_TYPE_COUNT];
    const struct ptqtp_type_traits * t = ptqtp_traits(type);
    if (!t) {
        return NULL;
    }
    int count;
    const ptrdiff_t slot = t - ptqtp_type_table(&count);
    const struct ptqtp_kernel * k = __atomic_load_n(&chosen[slot], __ATOMIC_RELAXED);
    if (!k) {
        k = choose(type);
        __atomic_store_n(&chosen[slot], k, __ATOMIC_RELAXED);
    }
    return k;
}

ptqtp_dot_fn ptqtp_dot_scalar(int type) {
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
        if (kernels[i].type == type && strcmp(kernels[i].name, "scalar") == 0) {
            return kernels[i].dot;
        }
    }
    return NULL;
}
