/* Dot products for any AArch64: plain NEON. */
#include "kernels/kernels.h"

#ifdef PTQTP_ARM64
#    define PTQTP_ROW(type) ptqtp_dot_##type##_neon
#    include "kernels/arm/dot-neon.inc"
#endif
