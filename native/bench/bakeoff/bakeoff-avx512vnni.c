#define ISA(name) name##_avx512vnni
#include "bench/bakeoff/bakeoff-avx512.h"
