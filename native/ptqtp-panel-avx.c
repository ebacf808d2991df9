/* See ptqtp-panel-x86.inc. This file alone is compiled for this instruction set; ptqtp-cpu.c asks the CPU first. */
#define PTQTP_ISA avx
#define PTQTP_WIDTH 128
#include "ptqtp-panel-x86.inc"
