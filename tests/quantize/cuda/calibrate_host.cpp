// calibrate.cu on the host.
#include "cuda_host.h"

#include "calibrate.cu"

static const struct {
    const char * name;
    decltype(&gptq_group) run;
    int threads; // a row
} kernels[] = {
    { "gptq_group", gptq_group, 1 },
    { "cd_group", cd_group, 1 },
    { "gptq_chain_group", gptq_chain_group, ROW_THREADS },
    { "cd_chain_group", cd_chain_group, ROW_THREADS },
};

// Returns 0, or 1 for a name that is no kernel.
extern "C" int run(const char * name, const float * x, i64 ldx, const float * m, i64 ldm, i8 * levels, i64 ldl,
                   u8 * codes, i64 ldc, float * moved, i64 ldv, int rows, int window) {
    for (const auto & k : kernels) {
        if (strcmp(k.name, name) == 0) {
            launch((unsigned) (rows * k.threads), [&] { k.run(x, ldx, m, ldm, levels, ldl, codes, ldc, moved, ldv, rows, window); });
            return 0;
        }
    }
    return 1;
}

extern "C" void run_nearest(const float * v, i8 * levels, unsigned groups) {
    launch(groups, [&] { nearest_tp2_2(v, levels, groups); });
}
