/* See ptqtp-panel-x86.inc. This file alone is compiled for this instruction set; ptqtp-cpu.c asks the CPU first. */
#define PTQTP_ISA avx2
#define PTQTP_WIDTH 256
#include "ptqtp-panel-x86.inc"
