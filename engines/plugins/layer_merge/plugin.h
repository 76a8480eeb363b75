// edgevlm::LayerMerge: x, norm_weight, norm_bias, scale, weight, bias -> y.
#pragma once

#include "../cpp/plugin.h"
#include "math.h"

namespace edgevlm {

namespace merge {
int32_t launch(Shape const&, Format, void const* const* in, void* const* out, cudaStream_t) noexcept;
}

struct LayerMerge {
    static constexpr char const* kName = "LayerMerge";
    static constexpr int32_t kInputs = 6, kOutputs = 1;
    int32_t levels, hidden_size, output_size;
    float epsilon;
    static std::array<Attribute<LayerMerge>, 4> const kAttributes;

    static bool float32(int32_t) { return false; }
    bool valid() const { return levels > 0 && hidden_size > 0 && output_size > 0 && epsilon >= 0.F; }
    void shapes(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder& expr) const {
        out[0] = in[0];
        out[0].d[2] = expr.constant(output_size);
    }
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputs, void const* const* in, void* const* out,
                    cudaStream_t stream) const noexcept {
        auto const& x = inputs[0].dims;
        merge::Shape const shape{static_cast<int32_t>(x.d[0] * x.d[1]), levels, hidden_size, output_size, epsilon};
        return merge::launch(shape, format_of(inputs[0].type), in, out, stream);
    }
};

inline std::array<Attribute<LayerMerge>, 4> const LayerMerge::kAttributes{
    integer("levels", &LayerMerge::levels), integer("hidden_size", &LayerMerge::hidden_size),
    integer("output_size", &LayerMerge::output_size), real("epsilon", &LayerMerge::epsilon)};

}  // namespace edgevlm
