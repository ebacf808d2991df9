/* What the fuzz targets share. A target is one C file that defines LLVMFuzzerTestOneInput; it is linked with clang's
 * libFuzzer, or with driver.c, which any compiler builds. A property that does not hold aborts. */
#ifndef PTQTP_FUZZ_H
#define PTQTP_FUZZ_H

#include "ptqtp.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(cond, ...)                                                                                                \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond);                                                 \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#ifdef __cplusplus
extern "C"
#endif
    int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

/* The type that a byte of the input names. */
static inline const struct ptqtp_type_traits * fuzz_type(uint8_t byte) {
    int count;
    const struct ptqtp_type_traits * types = ptqtp_type_table(&count);
    return &types[byte % count];
}

/* n bytes of their own, so that the sanitizer sees a read behind them; free them. */
static inline void * fuzz_bytes(size_t n) {
    void * p = malloc(n ? n : 1);
    MUST(p, "malloc of %zu", n);
    return p;
}

static inline void * fuzz_copy(const uint8_t * data, size_t n) {
    void * p = fuzz_bytes(n);
    memcpy(p, data, n);
    return p;
}

#endif
