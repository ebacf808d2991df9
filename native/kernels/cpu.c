/* What this CPU can do, asked at run time: one function for each name in kernels/kernels.inc. */
#define _GNU_SOURCE
#include "kernels/kernels.h"

bool ptqtp_cpu_scalar(void) {
    return true;
}

#ifdef PTQTP_X86

#    include <cpuid.h>
#    if defined(__linux__)
#        include <sys/syscall.h>
#        include <unistd.h>
#    endif

bool ptqtp_cpu_ssse3(void) {
    return __builtin_cpu_supports("ssse3");
}

bool ptqtp_cpu_avx(void) {
    return __builtin_cpu_supports("avx");
}

/* clang before 16 does not know "f16c" and "avxvnni" by name; whether the system keeps YMM, "avx2" says */
static bool has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

static bool has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool ptqtp_cpu_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool ptqtp_cpu_avxvnni(void) {
    return ptqtp_cpu_avx2() && has_avxvnni();
}

bool ptqtp_cpu_avx512bw(void) {
    return ptqtp_cpu_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool ptqtp_cpu_avx512vnni(void) {
    return ptqtp_cpu_avx512bw() && __builtin_cpu_supports("avx512vnni");
}

bool ptqtp_cpu_avx512vbmi(void) {
    return ptqtp_cpu_avx512vnni() && __builtin_cpu_supports("avx512vbmi");
}

/* The tile registers are large: Linux gives them to a process that asks. */
bool ptqtp_cpu_amx(void) {
    unsigned a, b, c, d;
    if (!ptqtp_cpu_avx512vbmi() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) {
        return false;
    }
#    if defined(__linux__) && defined(__x86_64__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#    else
    return false;
#    endif
}

#endif

#ifdef PTQTP_ARM64

#    if defined(__linux__)
#        include <sys/auxv.h>
#        ifndef HWCAP_ASIMDDP
#            define HWCAP_ASIMDDP (1 << 20)
#        endif
#        ifndef HWCAP2_I8MM
#            define HWCAP2_I8MM (1 << 13)
#        endif
#    elif defined(__APPLE__)
#        include <sys/sysctl.h>
static bool apple_has(const char * feature) {
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname(feature, &has, &size, NULL, 0) == 0 && has;
}
#    endif

bool ptqtp_cpu_neon(void) {
    return true; /* part of AArch64 */
}

bool ptqtp_cpu_neon_dotprod(void) {
#    if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#    elif defined(__APPLE__)
    return apple_has("hw.optional.arm.FEAT_DotProd");
#    else
    return false;
#    endif
}

bool ptqtp_cpu_neon_i8mm(void) {
#    if defined(__linux__)
    return ptqtp_cpu_neon_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM);
#    elif defined(__APPLE__)
    return ptqtp_cpu_neon_dotprod() && apple_has("hw.optional.arm.FEAT_I8MM");
#    else
    return false;
#    endif
}

#endif
