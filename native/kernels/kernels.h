/* Declarations of all kernels of this architecture. Private. */
#ifndef PTQTP_KERNELS_H
#define PTQTP_KERNELS_H

#include "ptqtp.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#    define PTQTP_X86
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#    define PTQTP_ARM64
#endif

#define PTQTP_KERNEL(isa, type, symbol) float symbol(int64_t n, const void * weights, const void * q8_0);
#define PTQTP_PANEL_KERNEL(isa) bool ptqtp_cpu_##isa(void); /* kernels/cpu.c */
#include "kernels/kernels.inc"
#undef PTQTP_KERNEL
#undef PTQTP_PANEL_KERNEL

ptqtp_dot_fn ptqtp_dot_scalar(int type); /* the reference; NULL for an unknown type */

#endif
