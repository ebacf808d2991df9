#define ISA(name) name##_avx2
#include "bakeoff-avx2.h"
