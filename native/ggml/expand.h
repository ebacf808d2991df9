// Whether matrices of TP2_2 lie as wide panels (ptqtp.h): asked once, before the first one is loaded. Private.
#ifndef GGML_PTQTP_EXPAND_H
#define GGML_PTQTP_EXPAND_H

#include "ptqtp.h"

// Where cores read faster than they decode, wide panels are faster although they are a fifth larger: few cores with
// much bandwidth each, or without AVX-512. Measured in some hundredths of a second: true if they gain more than a
// seventh.
bool ptqtp_expansion_pays(const ptqtp_panel_kernel * kernel);

#endif
