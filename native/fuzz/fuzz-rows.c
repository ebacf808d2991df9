/* Any bytes as rows of any type: every decoder reads them, and they agree.
 * Input: byte 0 the type, byte 1 rows, the rest blocks. */
#include "fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 2) {
        return 0;
    }
    const struct ptqtp_type_traits * t = fuzz_type(data[0]);
    const int type = t->type;
    const size_t block = t->size, weights = (size_t) t->block, nblocks = (size - 2) / block;
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
    uint8_t * scales = fuzz_bytes((size_t) (n / t->group) * t->scale_size);
    t->dequantize(rows, values, n);
    MUST(t->unpack(rows, digits, scales, n) == PTQTP_OK, "unpack");
    const int packed = t->pack(digits, scales, back, n);
    MUST(packed == PTQTP_OK, "digits of any bytes pack: %d", packed);
    if (status == PTQTP_OK) {
        MUST(!memcmp(rows, back, nblocks * block), "what is valid is what the packer writes");
        MUST(ptqtp_hash(values, n, 7, 1) == sum, "two decoders");
    } else if (status == PTQTP_BAD_WORD) {
        MUST(memcmp(rows, back, nblocks * block) != 0, "a word that no packer writes came from the packer");
    }
    if (t->panels && n) {
        const int64_t cols = n / nrows;
        for (int form = PTQTP_PACKED; form <= PTQTP_WIDE; form++) {
            uint8_t * panels = fuzz_bytes(ptqtp_panels_size(form, nrows, cols));
            ptqtp_panels_from_rows(t->type, form, rows, panels, 0, nrows, cols);
            ptqtp_rows_from_panels(t->type, form, panels, back, 0, nrows, cols);
            MUST(status != PTQTP_OK || !memcmp(rows, back, nblocks * block), "panels of form %d and back", form);
            free(panels);
        }
    }
    free(rows);
    free(values);
    free(digits);
    free(back);
    free(scales);
    return 0;
}
