#define ISA(name) name##_avx512vnni
#include "bakeoff-avx512.h"
