/* Our types in ggml-cpu: the dot products with Q8_0, through the kernel chosen at run time. */
#include "ggml.h"
#include "ggml/ggml-ptqtp.h"

#include <assert.h>
#include <stdlib.h>

#ifdef _MSC_VER
#    define SHARED volatile /* its C has no atomics; an aligned pointer is read and written whole */
#else
#    define SHARED _Atomic
#endif

static ptqtp_dot_fn choose(enum ptqtp_type type) {
    const struct ptqtp_kernel * kernel = ptqtp_kernel_for(type);
    if (!kernel) {
        GGML_ABORT("PTQTP_KERNEL=%s names no kernel for %s that this CPU runs; unset it for the best one",
                   getenv("PTQTP_KERNEL"), ggml_type_name((enum ggml_type) type));
    }
    return kernel->dot;
}

/* Threads that race here choose the same kernel. */
#define VEC_DOT(name, NAME)                                                                                            \
    void ggml_vec_dot_##name##_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,          \
                                    size_t by, int nrc) {                                                              \
        static SHARED ptqtp_dot_fn cached;                                                                             \
        ptqtp_dot_fn dot = cached;                                                                                     \
        if (!dot) {                                                                                                    \
            cached = dot = choose(PTQTP_##NAME);                                                                       \
        }                                                                                                              \
        assert(nrc == 1);                                                                                              \
        (void) bs, (void) bx, (void) by, (void) nrc;                                                                   \
        *s = dot(n, vx, vy);                                                                                           \
    }

PTQTP_GGML_TYPES(VEC_DOT)
