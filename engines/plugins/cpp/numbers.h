// What the kernels and their reference on the host share: shapes, and numbers in three formats.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define EDGEVLM_BOTH __host__ __device__ inline
#else
#define EDGEVLM_BOTH inline
#endif

namespace edgevlm {

enum class Format : int32_t { kFloat, kHalf, kBfloat16 };

EDGEVLM_BOTH float to_float(float x) { return x; }

template <typename T>
EDGEVLM_BOTH T from_float(float x);

template <>
EDGEVLM_BOTH float from_float<float>(float x) { return x; }

#if defined(__CUDACC__)
EDGEVLM_BOTH float to_float(__half x) { return __half2float(x); }
EDGEVLM_BOTH float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <>
EDGEVLM_BOTH __half from_float<__half>(float x) { return __float2half(x); }
template <>
EDGEVLM_BOTH __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }

// Calls `launch.run<T>()` with the type of a format; what CUDA says of the launch.
template <typename Launch>
int32_t in_format(Format format, Launch const& launch) {
    switch (format) {
        case Format::kFloat: launch.template run<float>(); break;
        case Format::kHalf: launch.template run<__half>(); break;
        case Format::kBfloat16: launch.template run<__nv_bfloat16>(); break;
    }
    return static_cast<int32_t>(cudaGetLastError());
}
#endif

}  // namespace edgevlm
