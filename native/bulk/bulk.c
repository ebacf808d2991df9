/* Which build of the bulk loops this CPU runs. */
#include "bulk/bulk.h"

#include "kernels/kernels.h"

extern const struct ptqtp_bulk ptqtp_bulk_base;
#ifdef PTQTP_X86
extern const struct ptqtp_bulk ptqtp_bulk_avx2, ptqtp_bulk_avx512;
#endif

const struct ptqtp_bulk * const * ptqtp_bulk_all(int * count) {
#ifdef PTQTP_X86
    static const struct ptqtp_bulk * const all[] = { &ptqtp_bulk_avx512, &ptqtp_bulk_avx2, &ptqtp_bulk_base };
    const int skip = ptqtp_cpu_avx512bw() ? 0 : ptqtp_cpu_avx2() ? 1 : 2;
#else
    static const struct ptqtp_bulk * const all[] = { &ptqtp_bulk_base };
    const int skip = 0;
#endif
    *count = (int) (sizeof all / sizeof all[0]) - skip;
    return all + skip;
}

const struct ptqtp_bulk * ptqtp_bulk_best(void) {
    int count;
    return ptqtp_bulk_all(&count)[0];
}

ptqtp_bulk_maker_fn ptqtp_bulk_maker(const struct ptqtp_bulk * bulk, int method, int type) {
    return method == PTQTP_SEARCH && type == PTQTP_TP2_1 ? bulk->search_tp2_1 : NULL;
}
