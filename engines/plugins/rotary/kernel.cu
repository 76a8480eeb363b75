// One block for a token: its threads make the angles' cosines once, for both tensors and all heads.
#include "plugin.h"

namespace edgevlm::rotate {
namespace {

constexpr int32_t kChannels = 32, kHeads = 8;

template <typename T>
__global__ void __launch_bounds__(kChannels* kHeads)
    turn(T const* __restrict__ q, T const* __restrict__ k, float const* __restrict__ angles, T* __restrict__ q_rotated,
         T* __restrict__ k_rotated, Shape s) {
    int32_t const half = s.head_dim / 2;
    int32_t const t = blockIdx.x % s.tokens, b = blockIdx.x / s.tokens;
    for (int32_t d = threadIdx.x; d < half; d += kChannels) {
        float sine, cosine;
        sincosf(angles[static_cast<int64_t>(t) * half + d], &sine, &cosine);
        for (int32_t m = threadIdx.y; m < s.heads; m += kHeads) {
            pair(q, q_rotated, cosine, sine, s, b, t, m, d);
            pair(k, k_rotated, cosine, sine, s, b, t, m, d);
        }
    }
}

struct Launch {
    Shape const& s;
    void const* const* in;
    void* const* out;
    cudaStream_t stream;

    template <typename T>
    void run() const {
        turn<T><<<static_cast<uint32_t>(s.batch) * s.tokens, dim3(kChannels, kHeads), 0, stream>>>(
            static_cast<T const*>(in[0]), static_cast<T const*>(in[1]), static_cast<float const*>(in[2]),
            static_cast<T*>(out[0]), static_cast<T*>(out[1]), s);
    }
};

}  // namespace

int32_t launch(Shape const& s, Format format, void const* const* in, void* const* out, cudaStream_t stream) noexcept {
    return in_format(format, Launch{s, in, out, stream});
}

}  // namespace edgevlm::rotate
