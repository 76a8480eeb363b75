// Deformable attention, one channel of one head of one query: the kernel and the host run this.
#pragma once

#include "../cpp/numbers.h"

namespace edgevlm::deform {

struct Shape {
    int32_t batch, queries, heads, points, head_dim, levels, height, width;
};

// A cell's channel, 0 outside the grid. `cells` is a level's first cell at that channel.
template <typename T>
EDGEVLM_BOTH float cell(T const* cells, Shape const& s, int32_t x, int32_t y) {
    if (x < 0 || y < 0 || x >= s.width || y >= s.height) return 0.F;
    return to_float(cells[(static_cast<int64_t>(y) * s.width + x) * s.heads * s.head_dim]);
}

// Between the four cells around (x, y), which are counted from the centre of the first.
template <typename T>
EDGEVLM_BOTH float bilinear(T const* cells, Shape const& s, float x, float y) {
    x = fminf(fmaxf(x, -2.F), s.width + 1.F);  // so that cells' numbers fit an int32_t
    y = fminf(fmaxf(y, -2.F), s.height + 1.F);
    float const left = floorf(x), top = floorf(y), right = x - left, down = y - top;
    int32_t const cx = static_cast<int32_t>(left), cy = static_cast<int32_t>(top);
    float const above = (1.F - right) * cell(cells, s, cx, cy) + right * cell(cells, s, cx + 1, cy);
    float const below = (1.F - right) * cell(cells, s, cx, cy + 1) + right * cell(cells, s, cx + 1, cy + 1);
    return (1.F - down) * above + down * below;
}

// Channel d of head m of query q: softmax over all levels' samples, each sampled and weighted.
template <typename T>
EDGEVLM_BOTH float channel(T const* value, T const* offsets, T const* scores, float const* reference, Shape const& s,
                           int32_t b, int32_t q, int32_t m, int32_t d) {
    int32_t const samples = s.levels * s.points;
    int64_t const row = ((static_cast<int64_t>(b) * s.queries + q) * s.heads + m) * samples;
    float const x0 = reference[2 * q] * s.width - 0.5F, y0 = reference[2 * q + 1] * s.height - 0.5F;
    float most = to_float(scores[row]);
    for (int32_t j = 1; j < samples; ++j) most = fmaxf(most, to_float(scores[row + j]));
    float total = 0.F, sum = 0.F;
    for (int32_t j = 0; j < samples; ++j) {
        int64_t const first = (static_cast<int64_t>(b) * s.levels + j / s.points) * s.height * s.width;
        T const* cells = value + first * s.heads * s.head_dim + m * s.head_dim + d;
        float const weight = expf(to_float(scores[row + j]) - most);
        float const x = x0 + to_float(offsets[2 * (row + j)]), y = y0 + to_float(offsets[2 * (row + j) + 1]);
        total += weight;
        sum += weight * bilinear(cells, s, x, y);
    }
    return sum / total;
}

}  // namespace edgevlm::deform
