// What every AVX512 kernel begins with: the instruction sets it is compiled for, and whether the CPU has them.
#pragma once

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TRDQ_X86 1
#include <immintrin.h>

#define TRDQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))
#define TRDQ_INLINE TRDQ_AVX512 inline __attribute__((always_inline))

namespace trdq {
namespace avx512 {

inline bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

TRDQ_INLINE __mmask16 tail_mask(int64_t left) {
  return left >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (left > 0 ? left : 0)) - 1u);
}

}  // namespace avx512
}  // namespace trdq
#endif  // x86-64
