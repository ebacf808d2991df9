/* The bulk loops for AVX2 + FMA + F16C. */
#ifdef __AVX2__
#    define PTQTP_BULK ptqtp_bulk_avx2
#    define PTQTP_BULK_NAME "avx2"
#    include "bulk/bulk.inc"
#endif
