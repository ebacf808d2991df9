/* See dot-tp2_2.inc. This file alone is compiled for this instruction set; kernels/cpu.c asks the CPU first. */
#include "kernels/kernels.h"

#ifdef PTQTP_X86
#    define PTQTP_ROW ptqtp_dot_tp2_2_avx2
#    include "kernels/x86/dot-tp2_2.inc"
#endif
