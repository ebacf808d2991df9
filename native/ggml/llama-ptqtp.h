// TP2 tensors in a GGUF file, for llama.cpp's loader and llama-quantize. Only the patched llama.cpp includes this.
#ifndef LLAMA_PTQTP_H
#define LLAMA_PTQTP_H

#include "gguf.h"
#include "ptqtp.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#    include <sys/mman.h>
#    include <unistd.h>
#endif

#define PTQTP_KEY_FORMAT_VERSION "ptqtp.format_version"
#define PTQTP_KEY_TYPE_IDS "ptqtp.type_ids"

// Throws where the tensors' layout is not this build's: they would load and print garbage. Reads the file's own key,
// so that --override-kv cannot get past it. by_type: a map from ggml_type, as the loader counts tensors.
template <typename Map> void ptqtp_check_format(const gguf_context * file, const Map & by_type) {
    int count;
    const ptqtp_type_traits * types = ptqtp_type_table(&count);
    const ptqtp_type_traits * newest = nullptr; // of the types in the file
    for (int i = 0; i < count; i++) {
        if (by_type.count((ggml_type) types[i].type) && (!newest || types[i].since > newest->since)) {
            newest = &types[i];
        }
    }
    const int64_t key = gguf_find_key(file, PTQTP_KEY_FORMAT_VERSION);
    if (key < 0) {
        if (newest) {
            throw std::runtime_error("the file has TP2 tensors but no " PTQTP_KEY_FORMAT_VERSION
                                     ", so their layout is unknown; convert the model again");
        }
        return;
    }
    if (gguf_get_kv_type(file, key) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(PTQTP_KEY_FORMAT_VERSION " is not a uint32; convert the model again");
    }
    const uint32_t version = gguf_get_val_u32(file, key);
    if (version < 1 || version > PTQTP_FORMAT_VERSION) {
        throw std::runtime_error("the file has " PTQTP_KEY_FORMAT_VERSION " " + std::to_string(version) +
                                 ", this build reads versions 1 to " + std::to_string(PTQTP_FORMAT_VERSION) +
                                 "; use a matching build or convert the model again");
    }
    if (newest && version < (uint32_t) newest->since) {
        throw std::runtime_error("the file says " PTQTP_KEY_FORMAT_VERSION " " + std::to_string(version) +
                                 " but holds " + newest->name + " tensors, which begin with version " +
                                 std::to_string(newest->since) + "; convert the model again");
    }
}

// Sets or removes the keys, by the tensors' target_type. The version is the newest that one of their types needs.
template <typename Tensors> void ptqtp_set_format(gguf_context * file, const Tensors & tensors) {
    std::vector<uint32_t> ids;
    int version = 0, count;
    const ptqtp_type_traits * types = ptqtp_type_table(&count);
    for (int i = 0; i < count; i++) {
        for (const auto & tensor : tensors) {
            if ((int) tensor.target_type == types[i].type) {
                ids.push_back((uint32_t) types[i].type);
                version = std::max(version, types[i].since);
                break;
            }
        }
    }
    gguf_remove_key(file, PTQTP_KEY_FORMAT_VERSION);
    gguf_remove_key(file, PTQTP_KEY_TYPE_IDS);
    if (!ids.empty()) {
        gguf_set_val_u32(file, PTQTP_KEY_FORMAT_VERSION, (uint32_t) version);
        gguf_set_arr_data(file, PTQTP_KEY_TYPE_IDS, GGUF_TYPE_UINT32, ids.data(), ids.size());
    }
}

// Whether the loader makes panels of a file. A tensor that becomes panels lies in memory twice while its rows are
// mapped too, so they should not be before they are read. weights: the loader's weights_map.
template <typename Weights> bool ptqtp_has_panels(const Weights & weights) {
    return std::any_of(weights.begin(), weights.end(), [](const auto & weight) {
        const ptqtp_type_traits * type = ptqtp_traits(weight.second.tensor->type);
        return type && type->panels;
    });
}

// Advice about the whole pages in data .. data + size, of a mapped file; no is an answer.
inline void ptqtp_advise(const void * data, size_t size, bool done) {
#if defined(__linux__)
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), begin = ((size_t) data + page - 1) / page * page;
    const size_t end = ((size_t) data + size) / page * page;
    if (end > begin) {
        (void) madvise((void *) begin, end - begin, done ? MADV_DONTNEED : MADV_WILLNEED);
    }
#else
    (void) data, (void) size, (void) done;
#endif
}

// They will be read.
inline void ptqtp_read_ahead(const void * data, size_t size) {
    ptqtp_advise(data, size, false);
}

// They were copied, and leave this process. The system's cache keeps them, and they are mapped again when somebody
// reads them. Locked pages stay.
inline void ptqtp_give_back(const void * data, size_t size) {
    ptqtp_advise(data, size, true);
}

#endif
