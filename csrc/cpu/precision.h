// torch's switch for float32 products.
#pragma once

namespace mixout::cpu {

// Whether oneDNN may round float32 operands to bfloat16 at this moment: torch.set_float32_matmul_precision("medium"), or
// torch.backends.mkldnn.matmul.fp32_precision = "bf16". It does so with AMX alone.
bool float32_may_be_rounded();

}  // namespace mixout::cpu
