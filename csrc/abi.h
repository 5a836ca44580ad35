// The contract between Python and native code: dtype codes, strided views and argument structs.
// These headers include neither torch nor Python, so one build serves every torch version. The CPU
// and CUDA backends take the same structs. Sizes and strides are in elements. The flag `given` says
// whether a tensor was passed; its address does not, because an empty tensor has a null address.
#pragma once
#include "abi_advantages.h"
#include "abi_losses.h"
#include "abi_rows.h"
#include "abi_types.h"
