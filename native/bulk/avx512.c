/* The bulk loops for AVX-512 F, BW, VL, DQ. */
#ifdef __AVX512DQ__
#    define PTQTP_BULK ptqtp_bulk_avx512
#    define PTQTP_BULK_NAME "avx512"
#    include "bulk/bulk.inc"
#endif
