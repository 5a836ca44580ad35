#define RK_ISA baseline
#include "all_ops.h"
