// The choice of wide panels for TP2_2 (ggml/expand.cpp), which otherwise is only built inside ggml. With an argument it
// prints what each kernel of this machine would get.
#include "ggml/expand.h"

#include <cstdio>
#include <cstring>

int main(int argc, char **) {
    int count = 0;
    const ptqtp_panel_kernel * const * kernels = ptqtp_panel_kernels(&count);
    bool plain = false;
    for (int i = 0; i < count; i++) {
        if (ptqtp_panel_kernel_supported(kernels[i])) {
            const bool pays = ptqtp_expansion_pays(kernels[i]);
            const char * name = ptqtp_panel_kernel_name(kernels[i]);
            if (argc > 1) {
                std::printf("%s: %s\n", name, pays ? "wide" : "packed");
            }
            plain = std::strcmp(name, "scalar") == 0 ? pays : plain;
        }
    }
    // plain C decodes a unit three times as slowly as it reads levels, and far more slowly than any memory
    if (!plain) {
        std::puts("the scalar kernel is faster on wide panels, and was not found so");
        return 1;
    }
    return 0;
}
