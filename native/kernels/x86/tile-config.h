/* ldtilecfg and sttilecfg, with the whole 64 bytes of the configuration as their operand.
 *
 * The intrinsics of gcc (seen in 12.2, amxtileintrin.h) name 8 bytes only. The compiler then drops the stores to the
 * rest as dead, and the processor reads what the stack happens to hold: a general protection fault, or tiles of another
 * shape. Upstream's ggml-cpu/amx/mmq.cpp has that fault when such a gcc compiles it; ggml-ptqtp.cmake puts this header
 * in front of it, so that the file needs no patch. */
#ifndef PTQTP_TILE_CONFIG_H
#define PTQTP_TILE_CONFIG_H

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#    include <immintrin.h>

#    undef _tile_loadconfig
#    undef _tile_storeconfig
#    define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char (*)[64])(config)))
#    define _tile_storeconfig(config) __asm__ volatile("sttilecfg %0" : "=m"(*(char (*)[64])(config)))
#endif

#endif
