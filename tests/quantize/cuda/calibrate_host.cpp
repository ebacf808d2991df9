// calibrate.cu on the host.
#include "cuda_host.h"

#include "calibrate.cu"

static const struct {
    const char * name;
    decltype(&gptq_group) run;
} kernels[] = { { "gptq_group", gptq_group }, { "cd_group", cd_group } };

// Returns 0, or 1 for a name that is no kernel.
extern "C" int run(const char * name, const float * x, i64 ldx, const float * m, i64 ldm, i8 * levels, i64 ldl,
                   u8 * codes, i64 ldc, float * moved, i64 ldv, int rows, int window) {
    for (const auto & k : kernels) {
        if (strcmp(k.name, name) == 0) {
            launch((unsigned) rows, [&] { k.run(x, ldx, m, ldm, levels, ldl, codes, ldc, moved, ldv, rows, window); });
            return 0;
        }
    }
    return 1;
}
