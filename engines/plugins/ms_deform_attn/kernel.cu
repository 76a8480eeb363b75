// One warp for a head of a query: its lanes are channels, which lie together in memory.
#include "plugin.h"

namespace edgevlm::deform {
namespace {

constexpr int32_t kWarps = 4;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    attend(T const* __restrict__ value, T const* __restrict__ offsets, T const* __restrict__ scores,
           float const* __restrict__ reference, T* __restrict__ y, Shape s) {
    int64_t const task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
    if (task >= static_cast<int64_t>(s.batch) * s.queries * s.heads) return;
    int32_t const m = task % s.heads;
    int32_t const q = task / s.heads % s.queries;
    int32_t const b = task / s.heads / s.queries;
    for (int32_t d = threadIdx.x; d < s.head_dim; d += 32) {
        y[task * s.head_dim + d] = from_float<T>(channel(value, offsets, scores, reference, s, b, q, m, d));
    }
}

struct Launch {
    Shape const& s;
    void const* const* in;
    void* const* out;
    cudaStream_t stream;

    template <typename T>
    void run() const {
        int64_t const tasks = static_cast<int64_t>(s.batch) * s.queries * s.heads;
        dim3 const block(32, kWarps);
        attend<T><<<static_cast<uint32_t>((tasks + kWarps - 1) / kWarps), block, 0, stream>>>(
            static_cast<T const*>(in[0]), static_cast<T const*>(in[1]), static_cast<T const*>(in[2]),
            static_cast<float const*>(in[3]), static_cast<T*>(out[0]), s);
    }
};

}  // namespace

int32_t launch(Shape const& s, Format format, void const* const* in, void* const* out, cudaStream_t stream) noexcept {
    return in_format(format, Launch{s, in, out, stream});
}

}  // namespace edgevlm::deform
