/* The configuration of the AMX tiles: stored whole, and not taken for granted.
 *
 * 1. The intrinsics of gcc (seen in 12.2, amxtileintrin.h) name 8 of the 64 bytes as the operand of ldtilecfg. The
 *    compiler then drops the stores to the rest as dead, and the processor reads what the stack happens to hold: a
 *    general protection fault, or tiles of another shape.
 * 2. Upstream's ggml-cpu/amx/mmq.cpp configures each thread once. Whoever else uses the tiles in that thread, such as
 *    torch, leaves them configured otherwise or not at all, and the next product ends in an illegal instruction.
 *
 * ggml-ptqtp.cmake puts this header in front of upstream's file, so that the file needs no patch. */
#ifndef PTQTP_TILE_CONFIG_H
#define PTQTP_TILE_CONFIG_H

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#    include <immintrin.h>

#    undef _tile_loadconfig
#    undef _tile_storeconfig
#    define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char (*)[64])(config)))
#    define _tile_storeconfig(config) __asm__ volatile("sttilecfg %0" : "=m"(*(char (*)[64])(config)))
#endif

#if defined(PTQTP_UPSTREAM_AMX) && defined(__AMX_TILE__)
#    include <immintrin.h>

/* What does its work once a thread gets another name where it is defined, "(void)"; where it is called, "()", the
 * configuration that it made is loaded each time. */
#    define ggml_tile_config_init(...) PTQTP_TILES##__VA_OPT__(_DEFINED)(__VA_ARGS__)
#    define PTQTP_TILES_DEFINED(...) ptqtp_tile_config_once(__VA_ARGS__)
#    define PTQTP_TILES() ptqtp_tile_config([] { ptqtp_tile_config_once(); })

template <typename Once> static void ptqtp_tile_config(Once once) {
    static thread_local bool known = false;
    static thread_local char kept[64];
    if (!known) {
        once();
        _tile_storeconfig(kept);
        known = true;
    } else {
        _tile_loadconfig(kept);
    }
}
#endif

#endif
