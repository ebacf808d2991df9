#define ISA(name) name##_avxvnni
#include "bench/bakeoff/bakeoff-avx2.h"
