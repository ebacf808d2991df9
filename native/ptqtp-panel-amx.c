/* See ptqtp-panel-avx512.inc. This file alone is compiled for this instruction set; ptqtp-cpu.c asks the CPU first. */
#define PTQTP_ISA amx
#include "ptqtp-panel-avx512.inc"
