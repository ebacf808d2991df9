/* The one table of methods, and of what makes which type. */
#include "quantize/methods.h"

#include "quantize/quantize.h"

#include <float.h>
#include <math.h>
#include <string.h>

static const struct ptqtp_method_traits methods[] = {
    { PTQTP_PAPER, "paper", .whole_matrix = true, .importance = false },
    { PTQTP_SEARCH, "search", .whole_matrix = false, .importance = true },
};

static const struct ptqtp_maker makers[] = {
    { PTQTP_PAPER, PTQTP_TP2_0, ptqtp_paper_rows, ptqtp_paper_probe, ptqtp_paper_iters },
    { PTQTP_SEARCH, PTQTP_TP2_0, ptqtp_search_rows_tp2_0, NULL, NULL },
    { PTQTP_SEARCH, PTQTP_TP2_1, ptqtp_search_rows_tp2_1, NULL, NULL },
    { PTQTP_SEARCH, PTQTP_TP2_2, ptqtp_search_rows_tp2_2, NULL, NULL },
};

static const struct ptqtp_method_traits * traits_of(int method) {
    for (size_t i = 0; i < sizeof methods / sizeof methods[0]; i++) {
        if (methods[i].method == method) {
            return &methods[i];
        }
    }
    return NULL;
}

const struct ptqtp_method_traits * ptqtp_method_table(int * count) {
    *count = (int) (sizeof methods / sizeof methods[0]);
    return methods;
}

const struct ptqtp_maker * ptqtp_maker_of(int method, int type) {
    for (size_t i = 0; i < sizeof makers / sizeof makers[0]; i++) {
        if (makers[i].method == method && makers[i].type == type) {
            return &makers[i];
        }
    }
    return NULL;
}

bool ptqtp_method_makes(int method, int type) {
    return ptqtp_maker_of(method, type) != NULL;
}

int ptqtp_quantize_check(int type, int method, const float * x, const float * importance, int64_t nrows,
                         int64_t n_per_row) {
    const struct ptqtp_type_traits * t = ptqtp_traits(type);
    if (!t) {
        return PTQTP_BAD_TYPE;
    }
    if (!ptqtp_method_makes(method, type) || (importance && !traits_of(method)->importance)) {
        return PTQTP_BAD_METHOD;
    }
    int64_t n;
    if (nrows < 0 || n_per_row < 0 || n_per_row % t->block || __builtin_mul_overflow(nrows, n_per_row, &n)) {
        return PTQTP_BAD_SIZE;
    }
    const float limit = t->reach;
    bool finite = true, in_reach = true;
    for (int64_t i = 0; i < n; i++) {
        finite &= fabsf(x[i]) <= FLT_MAX;
        in_reach &= !(fabsf(x[i]) > limit);
    }
    for (int64_t i = 0; importance && i < n_per_row; i++) {
        finite &= importance[i] >= 0 && importance[i] <= FLT_MAX;
    }
    return !finite ? PTQTP_NOT_FINITE : !in_reach ? PTQTP_TOO_LARGE : PTQTP_OK;
}

int ptqtp_quantize_rows(int type, int method, const float * x, const float * importance, void * dst, int64_t nrows,
                        int64_t n_per_row) {
    const int status = ptqtp_quantize_check(type, method, x, importance, nrows, n_per_row);
    if (status != PTQTP_OK) {
        return status;
    }
    const struct ptqtp_maker * maker = ptqtp_maker_of(method, type);
    int settled = 0;
    if (maker->probe) {
        double seen[PTQTP_SEEN] = { 0 };
        maker->probe(x, nrows, n_per_row, seen);
        settled = maker->settle(seen);
    }
    return maker->rows(x, importance, dst, NULL, nrows, n_per_row, settled);
}
