/* What the native tests share: a check that names itself, and random numbers that are the same on every machine. */
#ifndef PTQTP_TEST_H
#define PTQTP_TEST_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(cond, ...)                                                                                               \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond);                                                 \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static uint64_t seed = 0x9e3779b97f4a7c15u;

static uint32_t rnd(void) { /* xorshift64* */
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return (uint32_t) (seed * 2685821657736338717u >> 32);
}

static float gaussian(void) {
    const double u = (rnd() + 1.0) / 4294967297.0, v = rnd() / 4294967296.0;
    return (float) (sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

#endif
