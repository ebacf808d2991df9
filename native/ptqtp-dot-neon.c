/* Dot products for any AArch64: plain NEON. */
#include "ptqtp-kernels.h"

#ifdef PTQTP_ARM64
#    define PTQTP_ROW(type) ptqtp_dot_##type##_neon
#    include "ptqtp-dot-neon.inc"
#endif
