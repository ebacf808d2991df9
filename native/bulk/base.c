/* The bulk loops for the baseline of the architecture (SSE2, NEON). */
#define PTQTP_BULK ptqtp_bulk_base
#define PTQTP_BULK_NAME "base"
#include "bulk/bulk.inc"
