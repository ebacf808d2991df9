#define ISA(name) name##_avxvnni
#include "bakeoff-avx2.h"
