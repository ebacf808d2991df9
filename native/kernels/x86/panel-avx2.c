/* See panel-x86.inc. This file alone is compiled for this instruction set; kernels/cpu.c asks the CPU first. */
#define PTQTP_ISA avx2
#define PTQTP_WIDTH 256
#include "kernels/x86/panel-x86.inc"
