/* Any bytes as rows of TP2_0 or TP2_1: every decoder reads them, and they agree.
 * Input: byte 0 the type, byte 1 rows, the rest blocks. */
#include "fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 2) {
        return 0;
    }
    const int type = data[0] & 1 ? PTQTP_TP2_1 : PTQTP_TP2_0;
    const size_t block = ptqtp_type_size(type), weights = (size_t) ptqtp_block_size(type), nblocks = (size - 2) / block;
    const int64_t n = (int64_t) (nblocks * weights), nrows = nblocks % (1u + data[1] % 40u) ? 1 : 1 + data[1] % 40;
    uint8_t * rows = fuzz_copy(data + 2, nblocks * block);

    int64_t bad = -2, bad_too = -2;
    uint64_t sum = 0;
    const int status = ptqtp_validate(type, rows, nblocks * block, &bad);
    const int status_too = ptqtp_check(type, rows, (int64_t) nblocks, 7, 1, &sum, &bad_too);
    MUST((status == PTQTP_OK) == (status_too == PTQTP_OK), "validate %d, check %d", status, status_too);
    MUST(status == PTQTP_OK ? bad == -2 && bad_too == -1 : bad == bad_too, "bad blocks %d, %d", (int) bad,
         (int) bad_too);
    MUST(ptqtp_validate(type, rows, nblocks * block + 1, NULL) == PTQTP_BAD_SIZE, "not whole");

    float * values = fuzz_bytes((size_t) n * sizeof(float));
    uint8_t *digits = fuzz_bytes((size_t) n), *back = fuzz_bytes(nblocks * block);
    uint16_t * alphas = fuzz_bytes(nblocks * 4);
    uint8_t * codes = fuzz_bytes(nblocks);
    int packed;
    if (type == PTQTP_TP2_1) {
        ptqtp_dequantize_tp2_1(rows, values, n);
        MUST(ptqtp_unpack_tp2_1(rows, digits, codes, n) == PTQTP_OK, "unpack");
        packed = ptqtp_pack_tp2_1(digits, codes, back, n);
    } else {
        ptqtp_dequantize_tp2_0(rows, values, n);
        MUST(ptqtp_unpack_tp2_0(rows, digits, alphas, n) == PTQTP_OK, "unpack");
        packed = ptqtp_pack_tp2_0(digits, alphas, back, n);
    }
    MUST(packed == PTQTP_OK, "digits of any bytes pack: %d", packed);
    if (status == PTQTP_OK) {
        MUST(!memcmp(rows, back, nblocks * block), "what is valid is what the packer writes");
        MUST(ptqtp_hash(values, n, 7, 1) == sum, "two decoders");
    } else if (status == PTQTP_BAD_WORD) {
        MUST(memcmp(rows, back, nblocks * block) != 0, "a word that no packer writes came from the packer");
    }
    if (type == PTQTP_TP2_1 && n) {
        const int64_t cols = n / nrows;
        for (int form = PTQTP_PACKED; form <= PTQTP_WIDE; form++) {
            uint8_t * panels = fuzz_bytes(ptqtp_panels_size(form, nrows, cols));
            ptqtp_panels_from_rows(form, rows, panels, 0, nrows, cols);
            ptqtp_rows_from_panels(form, panels, back, 0, nrows, cols);
            MUST(status != PTQTP_OK || !memcmp(rows, back, nblocks * block), "panels of form %d and back", form);
            free(panels);
        }
    }
    free(rows);
    free(values);
    free(digits);
    free(back);
    free(alphas);
    free(codes);
    return 0;
}
