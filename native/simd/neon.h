/* NEON of AArch64: 4 floats. */
#ifndef PTQTP_SIMD_NEON_H
#define PTQTP_SIMD_NEON_H

#include <arm_neon.h>

#define PTQTP_LANES 4
typedef float32x4_t vf;
typedef int32x4_t vi;
typedef uint32x4_t vm;

#define vf_load vld1q_f32
#define vf_store vst1q_f32
#define vf_set vdupq_n_f32
#define vf_add vaddq_f32
#define vf_sub vsubq_f32
#define vf_mul vmulq_f32
#define vf_div vdivq_f32
#define vf_min(a, b) vminq_f32(a, b)
#define vf_nearer(best, a, v) vminq_f32(best, vabdq_f32(a, v))
#define vi_load vld1q_s32
#define vi_store vst1q_s32
#define vf_of_bits vreinterpretq_f32_s32
#define vf_less vcltq_f32
#define vm_any(m) (vmaxvq_u32(m) != 0)
#define vf_pick vbslq_f32
#define vf_keep(m, v) vbslq_f32(m, v, vdupq_n_f32(0))
#define vf_abs vabsq_f32
#define vf_signed(a, sign) vbslq_f32(vdupq_n_u32(1u << 31), sign, a)
#define vi_pick vbslq_s32

#endif
