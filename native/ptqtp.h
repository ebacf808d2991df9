/* ptqtp: trit-plane tensor types for ggml. Codec, data-free quantizers and dot products.
 *
 * This header is the whole public C interface. The same sources build three ways: into the Python package's
 * own library, into ggml (see ../patches), and into stand-alone tests and benchmarks. The library never prints,
 * never aborts and never allocates in the codec and the dot products.
 *
 * A weight is a pair of trits (t1, t2), each -1, 0 or +1, stored as one base-9 digit d = 3*(t1+1) + (t2+1).
 * All types are built from one 14-byte unit of 32 weights:
 *
 *     byte   0 1   2 3   4 5   6 7   8 9  10 11   12     13
 *          [ q0  | q1  | q2  | q3  | q4  | q5  | side | r ]      q: little-endian uint16, r: uint8
 *
 *     q_j holds five digits, r two, most significant first, as fixed-point fractions rounded up:
 *         q = ceil(N * 65536 / 59049), N = the five digits read in base 9;   r = ceil(N * 256 / 81)
 *     so a digit is the integer part of 9 * fraction, and the rest is the next fraction:
 *         d = (q * 9) >> 16, q = (q * 9) & 0xffff         (exact for every N; every word decodes to digits 0..8)
 *     weight of digit k of word j, in units of values from the unit's start:
 *         k = 0, 1:  2*j + k         j = 0..6  (word 6 is r)      weights  0..13
 *         k = 2, 3:  14 + 2*j + k-2  j = 0..5                     weights 14..25
 *         k = 4:     26 + j          j = 0..5                     weights 26..31
 *     so the byte vectors that a SIMD kernel extracts line up with contiguous activations. Word 6 is side + 256*r,
 *     decoded like the others for two digits: the side byte lies below the digits of r and cannot disturb them.
 *
 *     TP2_1, 32 weights, 14 bytes: one unit; w = s * (3*t1 + 2*t2), side = code of s.
 *     TP2_2, 32 weights, 14 bytes: one unit, bytes and scale as TP2_1's; w = s * (3*t1 + 2*t2 + p), and the third trit
 * p is not stored: it follows from the t2 of the two weights before (codec/trellis.h). TP2_0, 128 weights, 56 bytes:
 * four units; w = a1*t1 + a2*t2, the four side bytes are a1, a2 as little-endian fp16: a1 low, a1 high, a2 low, a2
 * high.
 *
 *     scale code c = e*16 + m:  s = (1 + m/16) * 2^(e - 15), all 256 codes valid, 2^-15 .. 1.9375;
 *     the bits of s as a float are (c << 19) + (112 << 23).
 */
#ifndef PTQTP_H
#define PTQTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#    error "ptqtp runs on little-endian machines only: its blocks, and GGUF files, are little-endian"
#endif

#ifndef PTQTP_API
#    if defined(_WIN32)
#        define PTQTP_API
#    else
#        define PTQTP_API __attribute__((visibility("default")))
#    endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define PTQTP_FORMAT_VERSION 2 /* the newest that is read; of a file: the newest of its types. docs/format.md */

#define PTQTP_UNIT 32      /* weights a unit */
#define PTQTP_UNIT_WORDS 6 /* five-digit words a unit */
#define PTQTP_QK_TP2_1 32  /* weights a TP2_1 block (= group) */
#define PTQTP_QK_TP2_0 128 /* weights a TP2_0 block (= group) */
#define PTQTP_QK_TP2_2 32  /* weights a TP2_2 block (= group) */

/* = ggml type ids, part of the format */
enum ptqtp_type { PTQTP_TP2_0 = 250, PTQTP_TP2_1 = 251, PTQTP_TP2_2 = 252, PTQTP_TYPE_END };
#define PTQTP_TYPE_COUNT (PTQTP_TYPE_END - PTQTP_TP2_0)

enum ptqtp_method { PTQTP_PAPER = 0, PTQTP_SEARCH = 1 };

enum ptqtp_status {
    PTQTP_OK = 0,
    PTQTP_BAD_TYPE,   /* not a type of this library */
    PTQTP_BAD_METHOD, /* the method does not make this type, or takes no importance */
    PTQTP_BAD_SIZE,   /* a row or buffer length is no multiple of the block, or is negative */
    PTQTP_BAD_DIGIT,  /* a digit above 8 */
    PTQTP_BAD_WORD,   /* a word or remainder byte that no packer writes */
    PTQTP_BAD_SCALE,  /* an fp16 scale that is Inf or NaN */
    PTQTP_NOT_FINITE, /* a weight or importance that is Inf or NaN, or an importance below zero */
    PTQTP_TOO_LARGE,  /* a weight beyond what the type's scales reach */
    PTQTP_NO_MEMORY,
    PTQTP_BAD_BLOCK, /* calibration: a size, window or distance between rows out of bounds */
};

typedef struct {
    uint8_t q[2 * PTQTP_UNIT_WORDS]; /* six little-endian uint16 words of five digits */
    uint8_t side;                    /* a byte of scale */
    uint8_t r;                       /* two digits */
} ptqtp_unit;

typedef struct {
    ptqtp_unit u;
} block_tp2_1;

typedef struct {
    ptqtp_unit u[4];
} block_tp2_0;

typedef struct {
    ptqtp_unit u;
} block_tp2_2;

#ifdef __cplusplus
#    define PTQTP_STATIC_ASSERT static_assert
#else
#    define PTQTP_STATIC_ASSERT _Static_assert
#endif
PTQTP_STATIC_ASSERT(sizeof(ptqtp_unit) == 6 * 2 + 1 + 1, "wrong unit size");
PTQTP_STATIC_ASSERT(sizeof(block_tp2_1) == 6 * 2 + 1 + 1, "wrong TP2_1 block size");
PTQTP_STATIC_ASSERT(sizeof(block_tp2_0) == 4 * (6 * 2 + 1) + 2 * 2, "wrong TP2_0 block size");
PTQTP_STATIC_ASSERT(sizeof(block_tp2_2) == 6 * 2 + 1 + 1, "wrong TP2_2 block size");

/* A block of ggml's Q8_0, the activation type of the dot products: fp16 d, then 32 int8. */
typedef struct {
    uint16_t d;
    int8_t qs[32];
} ptqtp_block_q8_0;
PTQTP_STATIC_ASSERT(sizeof(ptqtp_block_q8_0) == 34, "wrong Q8_0 block size");

/* ---- types (codec/types.c) -------------------------------------------------------------------------------- */

/* What there is to know of a tensor type. A new type is an id above, a row in codec/types.c and its functions, a
 * decoder in codec/check.c, the scalar kernel at least in kernels/kernels.inc, `search` in quantize/methods.c. */
struct ptqtp_type_traits {
    int type;          /* enum ptqtp_type */
    int since;         /* format version that brought it */
    int planes;        /* trit-planes stored */
    const char * name; /* "TP2_1" */
    int64_t block;     /* weights a block; a row is whole blocks */
    int64_t group;     /* weights that share scales */
    size_t size;       /* bytes a block */
    size_t scale_size; /* bytes of scale a group, as pack takes and unpack gives them */
    float reach;       /* the largest |weight| that the quantizers take */
    bool panels;       /* whether the panels below hold it */
    /* As the functions named after the type, below. */
    int (*pack)(const uint8_t * digits, const void * scales, void * dst, int64_t n);
    int (*unpack)(const void * src, uint8_t * digits, void * scales, int64_t n);
    void (*dequantize)(const void * src, float * dst, int64_t n);
    int (*validate)(const void * block); /* of one block: PTQTP_OK, _BAD_WORD or _BAD_SCALE */
};

/* The types in the order of their ids. */
PTQTP_API const struct ptqtp_type_traits * ptqtp_type_table(int * count);
PTQTP_API const struct ptqtp_type_traits * ptqtp_traits(int type); /* NULL for an unknown type */
PTQTP_API size_t ptqtp_type_size(int type);                        /* bytes a block; 0 for an unknown type */
PTQTP_API int64_t ptqtp_block_size(int type);                      /* weights a block; 0 for an unknown type */

/* ---- codec (codec/codec.c) ------------------------------------------------------------------------------- */

PTQTP_API const char * ptqtp_status_text(int status);

PTQTP_API float ptqtp_scale_to_float(uint8_t code);
PTQTP_API uint8_t ptqtp_scale_from_float(float s); /* nearest code, ties to the even code, clamped to 0..255 */
PTQTP_API float ptqtp_half_to_float(uint16_t h);
PTQTP_API uint16_t ptqtp_half_from_float(float f); /* round to nearest even */

/* digits: n bytes 0..8, in weight order. scales: TP2_1, TP2_2: n/32 codes (uint8_t); TP2_0: n/128 pairs (a1, a2) of
 * fp16 bits (uint16_t). n a multiple of the block. */
PTQTP_API int ptqtp_pack_tp2_1(const uint8_t * digits, const void * scales, void * dst, int64_t n);
PTQTP_API int ptqtp_pack_tp2_0(const uint8_t * digits, const void * scales, void * dst, int64_t n);
PTQTP_API int ptqtp_pack_tp2_2(const uint8_t * digits, const void * scales, void * dst, int64_t n);
PTQTP_API int ptqtp_unpack_tp2_1(const void * src, uint8_t * digits, void * scales, int64_t n);
PTQTP_API int ptqtp_unpack_tp2_0(const void * src, uint8_t * digits, void * scales, int64_t n);
PTQTP_API int ptqtp_unpack_tp2_2(const void * src, uint8_t * digits, void * scales, int64_t n);

/* dst: n floats. Any bytes decode; no read outside src. */
PTQTP_API void ptqtp_dequantize_tp2_1(const void * src, float * dst, int64_t n);
PTQTP_API void ptqtp_dequantize_tp2_0(const void * src, float * dst, int64_t n);
PTQTP_API void ptqtp_dequantize_tp2_2(const void * src, float * dst, int64_t n);

/* Checks that each word is one that a packer writes and each fp16 scale is finite. On an error *bad_block is the
 * index of the first bad block (bad_block may be NULL). */
PTQTP_API int ptqtp_validate(int type, const void * data, size_t nbytes, int64_t * bad_block);

/* ---- quantizers without calibration (quantize/methods.c, host/parallel.cpp) --------------------------------- */

/* What there is to know of a method. A new method, or a type that a method did not make, is a row in
 * quantize/methods.c and its functions. */
struct ptqtp_method_traits {
    int method;        /* enum ptqtp_method */
    const char * name; /* "paper" */
    bool whole_matrix; /* the bytes of a row depend on all rows: a matrix may not be quantized in pieces */
    bool importance;   /* takes an importance */
};

/* The methods in the order of their ids. */
PTQTP_API const struct ptqtp_method_traits * ptqtp_method_table(int * count);
PTQTP_API bool ptqtp_method_makes(int method, int type); /* false for an unknown method or type */

/* x: nrows x n_per_row floats, row-major. importance: n_per_row floats >= 0 (an imatrix column weight) or NULL,
 * which lets `search` for TP2_1 and TP2_2 weight each squared error by 2 mean|w| + |w| of its group, and all else
 * weight none. dst: nrows * n_per_row / block * size bytes. Single thread. Where the method takes no importance:
 * PTQTP_BAD_METHOD.
 */
PTQTP_API int ptqtp_quantize_rows(int type, int method, const float * x, const float * importance, void * dst,
                                  int64_t nrows, int64_t n_per_row);
/* The same over nthreads threads (<= 0: all cores); the bytes do not depend on nthreads. */
PTQTP_API int ptqtp_quantize_parallel(int type, int method, const float * x, const float * importance, void * dst,
                                      int64_t nrows, int64_t n_per_row, int nthreads);

struct ptqtp_stats {
    double error;  /* sum of (w - r)^2 */
    double power;  /* sum of w^2 */
    uint64_t hash; /* ptqtp_hash of r */
};
/* The same, and what became of the weights: r is the quantizer's own reconstruction, from its planes and scales before
 * they are packed. first: index of x[0] in its tensor. error and power are summed in a fixed order. */
PTQTP_API int ptqtp_quantize_stats(int type, int method, const float * x, const float * importance, void * dst,
                                   int64_t nrows, int64_t n_per_row, uint64_t first, int nthreads,
                                   struct ptqtp_stats * stats);

/* ---- types with calibration: the inner loops (host/calibrate.cpp, bulk/calibrate.inc, bulk/kbest.inc) -------
 *
 * A block of ncols columns (a multiple of 32, at most PTQTP_CALIB_COLS) of nrows rows; the products between blocks are
 * the caller's. type: PTQTP_TP2_1 or PTQTP_TP2_2, of which the latter's columns are in the order of the chain (codec/
 * trellis.h) within each group. ld*: elements from row to row. levels: -5 .. 5 or -6 .. 6; codes: one a group of 32;
 * w = scale of code * level. window, 0 .. 255: each group also tries the codes that far around, in the order 0, -1, +1,
 * -2, +2 ..., clipped to 0 .. 255; the first of equals wins. nthreads <= 0: all cores. float32, sums in the order of
 * the columns, no fused multiply-add: the result depends on nothing but the arguments. Values that are not finite give
 * some result, levels of TP2_2 that its chain can have. The readable form of the same arithmetic is ptqtp_gguf/
 * quantize/gptq_reference.py. Buffers may not overlap. */
#define PTQTP_CALIB_COLS 256

/* GPTQ with feedback. w: weights. u: the ncols x ncols block on the diagonal of the upper U with inv(H) = U^T U, of
 * which only the upper triangle is read. Writes levels, codes and err = (value before rounding - level * scale) / u_jj,
 * which the caller feeds to later blocks; a column whose u_jj is not > 0 feeds nothing back. */
PTQTP_API int ptqtp_gptq_block(int type, int64_t nrows, int64_t ncols, const float * w, int64_t ldw, const float * u,
                               int64_t ldu, int8_t * levels, int64_t ldl, uint8_t * codes, int64_t ldc, float * err,
                               int64_t lde, int window, int nthreads);
/* One sweep of descent on tr(E H E^T), E = weights - levels * scales. r: this block's columns of E H. h: the
 * ncols x ncols block of H on the diagonal, symmetric (the upper triangle is read). levels, codes: in and out. delta:
 * the change of level * scale, by which the caller updates E H. A group changes only where that lowers the objective.
 * TP2_1: column by column; a column whose h_jj is not > 0 keeps its level. TP2_2: a group at a time. */
PTQTP_API int ptqtp_cd_block(int type, int64_t nrows, int64_t ncols, const float * r, int64_t ldr, const float * h,
                             int64_t ldh, int8_t * levels, int64_t ldl, uint8_t * codes, int64_t ldc, float * delta,
                             int64_t ldd, int window, int nthreads);

/* The levels -6 .. 6 that a TP2_2 matrix can hold nearest to n values in units of their scale (float32, a multiple of
 * 32, finite): the closed path of least squared error for each 32. For training; nthreads as above. */
PTQTP_API int ptqtp_nearest_levels(const float * v, int8_t * levels, int64_t n, int nthreads);

/* ---- for a converter (host/convert.cpp, codec/check.c); nthreads <= 0: all cores, and no result depends on it ----
 */

/* A checksum of floats, their bits and their places: the sum mod 2^64 over i of a mix of x[i] and first + i, so that of
 * a whole is the sum of those of its pieces. */
PTQTP_API uint64_t ptqtp_hash(const float * x, int64_t n, uint64_t first, int nthreads);

/* Verification by a second decoder that shares nothing with the codec: *hash = ptqtp_hash of the weights, *bad_block =
 * the first block that no packer writes or whose scale is not finite, or -1; PTQTP_OK only if there is none. */
PTQTP_API int ptqtp_check(int type, const void * data, int64_t nblocks, uint64_t first, int nthreads, uint64_t * hash,
                          int64_t * bad_block);

/* ggml's F32 (0), F16 (1), Q8_0 (8) and BF16 (30), n weights, to float, and float to the last three: PTQTP_BAD_TYPE for
 * others. The bytes are those of gguf-py, for finite weights. */
PTQTP_API int ptqtp_to_float(int ggml_type, const void * src, float * dst, int64_t n, int nthreads);
PTQTP_API int ptqtp_from_float(int ggml_type, const float * src, void * dst, int64_t n, int nthreads);

/* Digits 0..8 to levels, w = scale * level, and back, n of them in weight order. type: PTQTP_TP2_1 or PTQTP_TP2_2, n a
 * multiple of 32. Levels that no digits give become 255, which no packer takes: for TP2_1 each by itself, for TP2_2 all
 * 32 of the unit. After PTQTP_BAD_DIGIT levels holds anything. Buffers may not overlap. */
PTQTP_API int ptqtp_levels_of_digits(int type, const uint8_t * digits, int8_t * levels, int64_t n, int nthreads);
PTQTP_API int ptqtp_digits_of_levels(int type, const int8_t * levels, uint8_t * digits, int64_t n, int nthreads);

struct ptqtp_scan_result {
    int64_t bad;    /* index of the first NaN or Inf, or -1 */
    float largest;  /* largest |x| of the finite ones */
    int64_t groups; /* groups with a finite weight that is not 0 */
    int64_t below;  /* those of them whose largest |x| is below the floor */
};
/* A last group may be shorter. */
PTQTP_API int ptqtp_scan(const float * x, int64_t n, int64_t group, float floor, int nthreads,
                         struct ptqtp_scan_result * out);

/* Counts words, of any type: adds to five[q] how many of the words 0..5 of the units are q, and to last[q] how many
 * of the words 6 = side + 256*r are. five, last: 65536 entries. Digits and scale codes follow from the counts. */
PTQTP_API int ptqtp_count_words(const void * units, int64_t nunits, int nthreads, uint64_t * five, uint64_t * last);
/* Counts the third trits of TP2_2, which are not stored: adds to counts[t + 1] how many of the units' weights have the
 * third trit t = -1, 0, 1. */
PTQTP_API int ptqtp_count_third(const void * units, int64_t nunits, int nthreads, uint64_t * counts);

/* ---- the machine (host/read.c) --------------------------------------------------------------------------- */

/* The sum mod 2^64 of the whole 64-bit words of data, in the machine's byte order, any alignment; up to 7 bytes at the
 * end are left out. One thread; bound by memory, if data does not fit into the caches: size / time is its bandwidth. */
PTQTP_API uint64_t ptqtp_read_sum(const void * data, size_t size);

/* ---- dot products with Q8_0 activations (kernels/dot.c and one file an instruction set) --------------------- */

typedef float (*ptqtp_dot_fn)(int64_t n, const void * weights, const void * q8_0);

struct ptqtp_kernel {
    const char * name; /* "scalar", "avx2", "neon_dotprod" */
    int type;          /* enum ptqtp_type */
    ptqtp_dot_fn dot;
    bool (*supported)(void); /* on this CPU */
};

/* All row kernels built for this architecture, best first for each type, the scalar reference last. */
PTQTP_API const struct ptqtp_kernel * ptqtp_kernels(int * count);
/* The kernel in use: the first that this CPU supports, or the one that the environment variable PTQTP_KERNEL
 * names; NULL if that name is unknown or not supported here. Chosen once. */
PTQTP_API const struct ptqtp_kernel * ptqtp_kernel_for(int type);

/* ---- panels: 16 rows of TP2_1 or TP2_2 interleaved, in memory only (kernels/panel.c and one file an instruction set)
 * --- */

/* The bytes of 16 units, transposed so that a SIMD lane is a row. A tile is 16 rows x 32 weights, 224 bytes:
 *     byte  64*p + 4*row .. +3   (p = 0, 1, 2)   words 2p and 2p+1 of the row's unit
 *     byte 192 + 2*row   .. +1                   its side byte and remainder byte
 * A panel is the n/32 tiles of 16 rows in order; panels follow one another. Rows that fill up the last panel are 0. */
#define PTQTP_PANEL_ROWS 16
#define PTQTP_TILE_SIZE 224

/* Wide panels, on request, for machines that compute slower than they read: the levels as 4-bit codes (level + 6), no
 * digits to decode, 4.25 bits a weight. A tile is 272 bytes, the quads being those of kernels/panel.h:
 *     byte  64*i + 4*row .. +3   (i = 0 .. 3)    quad i of the row in the low four bits, quad i+4 in the high ones
 *     byte 256 + row                             scale code */
#define PTQTP_WIDE_TILE_SIZE 272

enum ptqtp_form { PTQTP_PACKED = 0, PTQTP_WIDE = 1 };

/* A block of 32 activations: a = d * q. q is in the order in which kernels decode weights (see kernels/panel.h);
 * bias = -6 * sum of q, because decoded levels are stored with 6 added. */
typedef struct {
    float d;
    int32_t bias;
    int8_t q[PTQTP_UNIT];
} ptqtp_act;
PTQTP_STATIC_ASSERT(sizeof(ptqtp_act) == 4 + 4 + 32, "wrong activation block size");

struct ptqtp_panel_kernel; /* one instruction set: kernels/panel.h */

/* type, form: a type whose traits say `panels`, and enum ptqtp_form; the same in all calls for a matrix */
PTQTP_API size_t ptqtp_panels_size(int form, int64_t nrows, int64_t n); /* bytes */
/* rows first .. first+nrows-1, n weights each, into panels (first a multiple of 16), or out of them: the same
 * bytes again, if they are bytes that a packer writes. */
PTQTP_API void ptqtp_panels_from_rows(int type, int form, const void * rows, void * panels, int64_t first,
                                      int64_t nrows, int64_t n);
PTQTP_API void ptqtp_rows_from_panels(int type, int form, const void * panels, void * rows, int64_t first,
                                      int64_t nrows, int64_t n);

/* All panel kernels built for this architecture, best first; the one in use, chosen like ptqtp_kernel_for's. */
PTQTP_API const struct ptqtp_panel_kernel * const * ptqtp_panel_kernels(int * count);
PTQTP_API const struct ptqtp_panel_kernel * ptqtp_panel_kernel_chosen(void);
PTQTP_API const char * ptqtp_panel_kernel_name(const struct ptqtp_panel_kernel * k);
PTQTP_API bool ptqtp_panel_kernel_supported(const struct ptqtp_panel_kernel * k); /* on this CPU */

/* x: n floats -> n/32 blocks of ptqtp_act (many columns), or of ptqtp_gemv_act_size() bytes (one column). Rounds to
 * nearest even; d = max|x|/127. A block that holds Inf or NaN gets d = NaN. */
PTQTP_API size_t ptqtp_gemv_act_size(const struct ptqtp_panel_kernel * k, int type, int form);
PTQTP_API void ptqtp_gemv_quantize(const struct ptqtp_panel_kernel * k, int type, int form, const float * x,
                                   void * acts, int64_t n);
PTQTP_API void ptqtp_gemm_quantize(const struct ptqtp_panel_kernel * k, const float * x, ptqtp_act * acts, int64_t n);

/* y[row] = row . x for the rows of panels panel0 .. panel1-1, of a matrix of nrows rows; y is the whole column. */
PTQTP_API void ptqtp_gemv(const struct ptqtp_panel_kernel * k, int type, int form, int64_t n, int64_t nrows,
                          const void * panels, int64_t panel0, int64_t panel1, const void * acts, float * y);
/* The same for ncols columns: acts[c] and y[c] are one column each. scratch: PTQTP_GEMM_SCRATCH bytes, 64-aligned. */
#define PTQTP_GEMM_SCRATCH 73728
PTQTP_API void ptqtp_gemm(const struct ptqtp_panel_kernel * k, int type, int form, int64_t n, int64_t nrows,
                          const void * panels, int64_t panel0, int64_t panel1, int64_t ncols,
                          const ptqtp_act * const * acts, float * const * y, void * scratch);

#ifdef __cplusplus
}
#endif
#endif
