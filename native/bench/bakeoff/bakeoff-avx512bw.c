#define ISA(name) name##_avx512bw
#include "bench/bakeoff/bakeoff-avx512.h"
