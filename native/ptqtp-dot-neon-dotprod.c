/* Dot products for AArch64 with the dot-product extension. This file alone is compiled with that flag; ptqtp-cpu.c asks
 * the CPU first. */
#include "ptqtp-kernels.h"

#ifdef PTQTP_ARM64
#    define PTQTP_ROW(type) ptqtp_dot_##type##_neon_dotprod
#    define PTQTP_DOTPROD
#    include "ptqtp-dot-neon.inc"
#endif
