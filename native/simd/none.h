/* No SIMD: one group, or row, at a time. float_of is bulk.inc's. */
#ifndef PTQTP_SIMD_NONE_H
#define PTQTP_SIMD_NONE_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#define PTQTP_LANES 1
typedef float vf;
typedef int32_t vi;
typedef bool vm;

#define vf_load(p) (*(const float *) (p))
#define vf_store(p, v) (*(float *) (p) = (v))
#define vf_set(f) (f)
#define vf_add(a, b) ((a) + (b))
#define vf_sub(a, b) ((a) - (b))
#define vf_mul(a, b) ((a) * (b))
#define vf_div(a, b) ((a) / (b))
#define vf_min(a, b) ((b) < (a) ? (b) : (a))
static inline vf vf_nearer(vf best, vf a, vf v) {
    const vf d = fabsf(a - v);
    return d < best ? d : best;
}
#define vi_load(p) (*(const int32_t *) (p))
#define vi_store(p, v) (*(int32_t *) (p) = (v))
#define vf_of_bits(v) float_of((uint32_t) (v))
#define vf_less(a, b) ((a) < (b))
#define vm_any(m) (m)
#define vf_pick(m, yes, no) ((m) ? (yes) : (no))
#define vi_pick(m, yes, no) ((m) ? (yes) : (no))
#define vf_keep(m, v) ((m) ? (v) : 0.0f)
#define vf_abs(v) fabsf(v)
#define vf_signed(a, sign) copysignf(a, sign)

#endif
