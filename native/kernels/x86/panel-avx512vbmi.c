/* See panel-avx512.inc. This file alone is compiled for this instruction set; kernels/cpu.c asks the CPU first. */
#define PTQTP_ISA avx512vbmi
#include "kernels/x86/panel-avx512.inc"
