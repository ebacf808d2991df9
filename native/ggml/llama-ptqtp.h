// TP2 tensors in a GGUF file, for llama.cpp's loader and llama-quantize. Only the patched llama.cpp includes this.
#ifndef LLAMA_PTQTP_H
#define LLAMA_PTQTP_H

#include "gguf.h"
#include "ptqtp.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

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

#endif
