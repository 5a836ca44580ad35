#define RK_ISA avx2
#include "all_ops.h"
