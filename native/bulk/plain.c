/* The bulk loops as an architecture without known SIMD runs them; elsewhere for PTQTP_KERNEL=scalar and the tests. */
#define PTQTP_NO_SIMD
#define PTQTP_BULK ptqtp_bulk_plain
#define PTQTP_BULK_NAME "plain"
#include "bulk/bulk.inc"
