// The launches on the host, in float32: for tests on machines without a graphics card.
#include "../layer_merge/plugin.h"
#include "../ms_deform_attn/plugin.h"
#include "../rotary/plugin.h"

namespace edgevlm {

namespace {
constexpr int32_t kUnsupported = 1;
float const* tensor(void const* data) { return static_cast<float const*>(data); }
}  // namespace

int32_t deform::launch(Shape const& s, Format format, void const* const* in, void* const* out, cudaStream_t) noexcept {
    if (format != Format::kFloat) return kUnsupported;
    auto* y = static_cast<float*>(out[0]);
    for (int32_t b = 0; b < s.batch; ++b)
        for (int32_t q = 0; q < s.queries; ++q)
            for (int32_t m = 0; m < s.heads; ++m)
                for (int32_t d = 0; d < s.head_dim; ++d)
                    *y++ = channel(tensor(in[0]), tensor(in[1]), tensor(in[2]), tensor(in[3]), s, b, q, m, d);
    return 0;
}

int32_t rotate::launch(Shape const& s, Format format, void const* const* in, void* const* out, cudaStream_t) noexcept {
    if (format != Format::kFloat) return kUnsupported;
    for (int32_t b = 0; b < s.batch; ++b)
        for (int32_t t = 0; t < s.tokens; ++t)
            for (int32_t m = 0; m < s.heads; ++m)
                for (int32_t d = 0; d < s.head_dim / 2; ++d) {
                    float const angle = tensor(in[2])[static_cast<int64_t>(t) * (s.head_dim / 2) + d];
                    for (int32_t i = 0; i < 2; ++i)
                        pair(tensor(in[i]), static_cast<float*>(out[i]), cosf(angle), sinf(angle), s, b, t, m, d);
                }
    return 0;
}

int32_t merge::launch(Shape const& s, Format format, void const* const* in, void* const* out, cudaStream_t) noexcept {
    if (format != Format::kFloat) return kUnsupported;
    auto const *gain = tensor(in[1]), *shift = tensor(in[2]), *scale = tensor(in[3]), *weight = tensor(in[4]);
    for (int32_t t = 0; t < s.tokens; ++t)
        for (int32_t o = 0; o < s.outputs; ++o) {
            float sum = 0.F;
            for (int32_t level = 0; level < s.levels; ++level) {
                auto const* row = tensor(in[0]) + (static_cast<int64_t>(t) * s.levels + level) * s.hidden;
                auto const found = statistics(sums(row, s.hidden, 0, 1), row[0], s.hidden, s.epsilon);
                for (int32_t c = 0; c < s.hidden; ++c) {
                    int64_t const at = static_cast<int64_t>(level) * s.hidden + c;
                    sum += ready(row[c], found, gain[at], shift[at], scale[level]) * weight[at * s.outputs + o];
                }
                sum += scale[level] * tensor(in[5])[static_cast<int64_t>(level) * s.outputs + o];
            }
            static_cast<float*>(out[0])[static_cast<int64_t>(t) * s.outputs + o] = sum;
        }
    return 0;
}

}  // namespace edgevlm
