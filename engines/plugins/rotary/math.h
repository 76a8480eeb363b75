// A pair of channels turned by its angle: the kernel and the host run this.
#pragma once

#include "../cpp/numbers.h"

namespace edgevlm::rotate {

struct Shape {
    int32_t batch, tokens, heads, head_dim;
};

// Channels d and d + head_dim / 2 of head m of token t; source [B, tokens, heads * head_dim],
// target [B, heads, tokens, head_dim].
template <typename T>
EDGEVLM_BOTH void pair(T const* source, T* target, float cosine, float sine, Shape const& s, int32_t b, int32_t t,
                       int32_t m, int32_t d) {
    int32_t const half = s.head_dim / 2;
    int64_t const from = ((static_cast<int64_t>(b) * s.tokens + t) * s.heads + m) * s.head_dim + d;
    int64_t const to = ((static_cast<int64_t>(b) * s.heads + m) * s.tokens + t) * s.head_dim + d;
    float const first = to_float(source[from]), second = to_float(source[from + half]);
    target[to] = from_float<T>(first * cosine - second * sine);
    target[to + half] = from_float<T>(second * cosine + first * sine);
}

}  // namespace edgevlm::rotate
