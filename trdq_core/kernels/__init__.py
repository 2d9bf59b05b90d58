"""Integer kernels: one oracle (`reference`), an eager torch path, a C++ library for CPUs, and the choice between them."""
