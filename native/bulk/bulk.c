/* Which build of the bulk loops runs: the best one of this CPU, or the one that PTQTP_KERNEL means. */
#include "bulk/bulk.h"

#include "kernels/kernels.h"

#include <stdlib.h>
#include <string.h>

extern const struct ptqtp_bulk ptqtp_bulk_base;
#ifdef PTQTP_X86
extern const struct ptqtp_bulk ptqtp_bulk_avx2, ptqtp_bulk_avx512;
#endif

const struct ptqtp_bulk * const * ptqtp_bulk_all(int * count) {
#ifdef PTQTP_X86
    static const struct ptqtp_bulk * const all[] = { &ptqtp_bulk_avx512, &ptqtp_bulk_avx2, &ptqtp_bulk_base,
                                                     &ptqtp_bulk_plain };
    const int skip = ptqtp_cpu_avx512bw() ? 0 : ptqtp_cpu_avx2() ? 1 : 2;
#else
    static const struct ptqtp_bulk * const all[] = { &ptqtp_bulk_base, &ptqtp_bulk_plain };
    const int skip = 0;
#endif
    *count = (int) (sizeof all / sizeof all[0]) - skip;
    return all + skip;
}

/* The best build that an instruction set of kernels/kernels.inc contains; the list below asks for one of each. */
#define BULK_amx ptqtp_bulk_avx512
#define BULK_avx512vbmi ptqtp_bulk_avx512
#define BULK_avx512vnni ptqtp_bulk_avx512
#define BULK_avx512bw ptqtp_bulk_avx512
#define BULK_avxvnni ptqtp_bulk_avx2
#define BULK_avx2 ptqtp_bulk_avx2
#define BULK_avx ptqtp_bulk_base
#define BULK_ssse3 ptqtp_bulk_base
#define BULK_neon_i8mm ptqtp_bulk_base
#define BULK_neon_dotprod ptqtp_bulk_base
#define BULK_neon ptqtp_bulk_base
#define BULK_scalar ptqtp_bulk_plain

static const struct {
    const char * name;
    bool (*supported)(void);
    const struct ptqtp_bulk * bulk;
} sets[] = {
#define PTQTP_KERNEL(isa, type, symbol)
#define PTQTP_PANEL_KERNEL(isa) { #isa, ptqtp_cpu_##isa, &BULK_##isa },
#include "kernels/kernels.inc"
#undef PTQTP_KERNEL
#undef PTQTP_PANEL_KERNEL
};

const struct ptqtp_bulk * ptqtp_bulk_of(const char * kernel) {
    for (size_t i = 0; i < sizeof sets / sizeof sets[0]; i++) {
        if (strcmp(kernel, sets[i].name) == 0 && sets[i].supported()) {
            return sets[i].bulk;
        }
    }
    return NULL;
}

static const struct ptqtp_bulk * choose(void) {
    const char * forced = getenv("PTQTP_KERNEL");
    const struct ptqtp_bulk * bulk = forced && *forced ? ptqtp_bulk_of(forced) : NULL;
    int count;
    return bulk ? bulk : ptqtp_bulk_all(&count)[0];
}

const struct ptqtp_bulk * ptqtp_bulk_chosen(void) {
    /* Racing threads compute the same answer and store the same pointer. */
    static const struct ptqtp_bulk * chosen;
    const struct ptqtp_bulk * bulk = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
    if (!bulk) {
        bulk = choose();
        __atomic_store_n(&chosen, bulk, __ATOMIC_RELAXED);
    }
    return bulk;
}

ptqtp_bulk_maker_fn ptqtp_bulk_maker(const struct ptqtp_bulk * bulk, int method, int type) {
    if (method != PTQTP_SEARCH) {
        return NULL;
    }
    return type == PTQTP_TP2_1 ? bulk->search_tp2_1 : type == PTQTP_TP2_2 ? bulk->search_tp2_2 : NULL;
}
