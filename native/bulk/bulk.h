/* Loops over many weights, built once for each instruction set (bulk/bulk.inc) and chosen at run time. All give the
 * same bits. Private. */
#ifndef PTQTP_BULK_H
#define PTQTP_BULK_H

#include "ptqtp.h"

struct ptqtp_calib; /* bulk/calibrate.h */
struct ptqtp_calib_rows;

#ifdef __cplusplus
extern "C" {
#endif

enum { PTQTP_ERROR_LANES = 8 };

/* A method on ngroups checked groups of a type: the importance of group g begins at importance + block * (g % period),
 * values may be NULL. */
typedef void (*ptqtp_bulk_maker_fn)(const float * x, const float * importance, int64_t period, void * dst,
                                    float * values, int64_t ngroups);

struct ptqtp_bulk {
    const char * name;
    /* sum of ptqtp_mix over x[0 .. n-1], x[0] having the index first */
    uint64_t (*hash)(const float * x, int64_t n, uint64_t first);
    /* adds (x - r)^2 to error and x^2 to power, lane l the elements l, l+8, ...; n a multiple of 8 */
    void (*compare)(const float * x, const float * r, int64_t n, double error[PTQTP_ERROR_LANES],
                    double power[PTQTP_ERROR_LANES]);
    void (*from_f16)(const uint16_t * src, float * dst, int64_t n);
    void (*from_bf16)(const uint16_t * src, float * dst, int64_t n);
    void (*from_q8_0)(const ptqtp_block_q8_0 * src, float * dst, int64_t n);
    void (*to_f16)(const float * src, uint16_t * dst, int64_t n);
    void (*to_bf16)(const float * src, uint16_t * dst, int64_t n);
    void (*to_q8_0)(const float * src, ptqtp_block_q8_0 * dst, int64_t n);
    /* ptqtp_scan's fields for one piece */
    void (*scan)(const float * x, int64_t n, int64_t group, float floor, struct ptqtp_scan_result * out);
    ptqtp_bulk_maker_fn search_tp2_1, search_tp2_2;
    /* ptqtp_nearest_levels on whole groups */
    void (*nearest_tp2_2)(const float * v, int8_t * levels, int64_t ngroups);
    /* ptqtp_gptq_block and ptqtp_cd_block on checked arguments */
    void (*gptq)(int type, const struct ptqtp_calib * block, const struct ptqtp_calib_rows * rows, int64_t nrows,
                 int window);
    void (*cd)(int type, const struct ptqtp_calib * block, const struct ptqtp_calib_rows * rows, int64_t nrows,
               int window);
};

/* All that are built for this architecture and run on this CPU, best first; the plain one last. */
const struct ptqtp_bulk * const * ptqtp_bulk_all(int * count);
/* The best that a kernel's instruction set contains, a name of kernels/kernels.inc; NULL for an unknown name, or one
 * that this CPU does not run. */
const struct ptqtp_bulk * ptqtp_bulk_of(const char * kernel);
/* The one in use, chosen once: what the environment variable PTQTP_KERNEL names, or else the best. These loops cannot
 * refuse, as kernels do, and need not, as all give the same bits: a name without a build forces nothing. */
const struct ptqtp_bulk * ptqtp_bulk_chosen(void);
/* The fast way of a method to a type, or NULL where only quantize/methods.h has one. */
ptqtp_bulk_maker_fn ptqtp_bulk_maker(const struct ptqtp_bulk * bulk, int method, int type);
/* Without SIMD of ours, as on an architecture that we do not know; PTQTP_KERNEL=scalar. */
extern const struct ptqtp_bulk ptqtp_bulk_plain;

#ifdef __cplusplus
}
#endif
#endif
