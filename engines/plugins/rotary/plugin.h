// edgevlm::RotateHeads: q, k, angles (float32) -> q_rotated, k_rotated.
#pragma once

#include "../cpp/plugin.h"
#include "math.h"

namespace edgevlm {

namespace rotate {
int32_t launch(Shape const&, Format, void const* const* in, void* const* out, cudaStream_t) noexcept;
}

struct RotateHeads {
    static constexpr char const* kName = "RotateHeads";
    static constexpr int32_t kInputs = 3, kOutputs = 2;
    int32_t num_heads, head_dim;
    static std::array<Attribute<RotateHeads>, 2> const kAttributes;

    static bool float32(int32_t position) { return position == 2; }
    bool valid() const { return num_heads > 0 && head_dim > 0 && head_dim % 2 == 0; }
    void shapes(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder& expr) const {
        for (int32_t i = 0; i < kOutputs; ++i) {
            out[i].nbDims = 4;
            out[i].d[0] = in[i].d[0];
            out[i].d[1] = expr.constant(num_heads);
            out[i].d[2] = in[i].d[1];
            out[i].d[3] = expr.constant(head_dim);
        }
    }
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputs, void const* const* in, void* const* out,
                    cudaStream_t stream) const noexcept {
        auto const& q = inputs[0].dims;
        rotate::Shape const shape{static_cast<int32_t>(q.d[0]), static_cast<int32_t>(q.d[1]), num_heads, head_dim};
        return rotate::launch(shape, format_of(inputs[0].type), in, out, stream);
    }
};

inline std::array<Attribute<RotateHeads>, 2> const RotateHeads::kAttributes{
    integer("num_heads", &RotateHeads::num_heads), integer("head_dim", &RotateHeads::head_dim)};

}  // namespace edgevlm
