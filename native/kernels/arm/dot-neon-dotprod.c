/* Dot products for AArch64 with the dot-product extension. This file alone is compiled with that flag; kernels/cpu.c
 * asks the CPU first. */
#include "kernels/kernels.h"

#ifdef PTQTP_ARM64
#    define PTQTP_ROW(type) ptqtp_dot_##type##_neon_dotprod
#    define PTQTP_DOTPROD
#    include "kernels/arm/dot-neon.inc"
#endif
