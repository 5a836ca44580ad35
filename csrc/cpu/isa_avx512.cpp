#define RK_ISA avx512
#include "all_ops.h"
