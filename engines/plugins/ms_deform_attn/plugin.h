// edgevlm::MSDeformAttn: value, offsets, scores, reference (float32) -> y.
#pragma once

#include "../cpp/plugin.h"
#include "math.h"

namespace edgevlm {

namespace deform {
int32_t launch(Shape const&, Format, void const* const* in, void* const* out, cudaStream_t) noexcept;
}

struct MSDeformAttn {
    static constexpr char const* kName = "MSDeformAttn";
    static constexpr int32_t kInputs = 4, kOutputs = 1;
    int32_t num_heads, num_points, head_dim, levels, height, width;
    static std::array<Attribute<MSDeformAttn>, 6> const kAttributes;

    static bool float32(int32_t position) { return position == 3; }
    bool valid() const {
        return num_heads > 0 && num_points > 0 && head_dim > 0 && levels > 0 && height > 0 && width > 0;
    }
    void shapes(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder&) const {
        out[0] = in[1];
        out[0].d[2] = in[0].d[2];
    }
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputs, void const* const* in, void* const* out,
                    cudaStream_t stream) const noexcept {
        auto const& offsets = inputs[1].dims;
        deform::Shape const shape{static_cast<int32_t>(offsets.d[0]), static_cast<int32_t>(offsets.d[1]), num_heads,
                                  num_points, head_dim, levels, height, width};
        return deform::launch(shape, format_of(inputs[0].type), in, out, stream);
    }
};

inline std::array<Attribute<MSDeformAttn>, 6> const MSDeformAttn::kAttributes{
    integer("num_heads", &MSDeformAttn::num_heads), integer("num_points", &MSDeformAttn::num_points),
    integer("head_dim", &MSDeformAttn::head_dim),   integer("levels", &MSDeformAttn::levels),
    integer("height", &MSDeformAttn::height),       integer("width", &MSDeformAttn::width)};

}  // namespace edgevlm
