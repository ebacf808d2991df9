#define ISA(name) name##_avx2
#include "bench/bakeoff/bakeoff-avx2.h"
