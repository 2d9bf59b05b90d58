"""Integer kernels: one oracle (`reference`), an eager torch path, C++ for CPUs, Triton for GPUs, and the choice between them."""
