// Any bytes as a GGUF in ggml's own reader, patched: header, then every row of every tensor through its validation.
// Needs a patched ggml: -DPTQTP_FUZZ_GGML=TREE, which tools/fuzz/fuzz.py makes.
#include "fuzz/fuzz.h"
#include "ggml.h"
#include "gguf.h"

#include <memory>

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const std::unique_ptr<void, decltype(&free)> file(fuzz_copy(data, size), free);
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_context * meta = nullptr;
    gguf_context * gguf = gguf_init_from_buffer(file.get(), size, { /*no_alloc =*/true, /*ctx =*/&meta });
    if (!gguf) {
        return 0;
    }
    const size_t start = gguf_get_data_offset(gguf);
    for (ggml_tensor * t = ggml_get_first_tensor(meta); t; t = ggml_get_next_tensor(meta, t)) {
        const int64_t id = gguf_find_tensor(gguf, ggml_get_name(t));
        MUST(id >= 0, "tensor %s", ggml_get_name(t));
        const size_t at = start + gguf_get_tensor_offset(gguf, id), nbytes = ggml_nbytes(t);
        if (at >= start && at <= size && nbytes <= size - at) { // as the loader asks before it reads
            const size_t blocks = static_cast<size_t>(ggml_nelements(t) / ggml_blck_size(t->type));
            if (blocks * ggml_type_size(t->type) != nbytes) {
                continue; // upstream's ggml_nbytes wraps for rows of 2^58 and more
            }
            const bool good = ggml_validate_row_data(t->type, static_cast<uint8_t *>(file.get()) + at, nbytes);
            if (good && ptqtp_traits(t->type) != nullptr) {
                MUST(ptqtp_validate(t->type, static_cast<uint8_t *>(file.get()) + at, nbytes, nullptr) == PTQTP_OK,
                     "ggml takes what we do not");
                const std::unique_ptr<float[]> row(new float[static_cast<size_t>(ggml_nelements(t))]);
                ggml_get_type_traits(t->type)->to_float(static_cast<uint8_t *>(file.get()) + at, row.get(),
                                                        ggml_nelements(t));
            }
        }
    }
    gguf_free(gguf);
    ggml_free(meta);
    return 0;
}
