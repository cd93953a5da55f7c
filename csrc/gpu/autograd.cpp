#include "autograd.h"

template class mixout::LinearPlan<mixout::gpu::Source>;
