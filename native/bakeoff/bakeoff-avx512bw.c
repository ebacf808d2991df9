#define ISA(name) name##_avx512bw
#include "bakeoff-avx512.h"
