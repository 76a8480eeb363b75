// A level's norm, token by token: the kernel and the host run this.
#pragma once

#include "../cpp/numbers.h"

namespace edgevlm::merge {

struct Shape {
    int32_t tokens, levels, hidden, outputs;
    float epsilon;
};

// Sums of what a row's channels differ from its first by, so that a large mean costs no digits.
struct Sums {
    float total, squares;
};

template <typename T>
EDGEVLM_BOTH Sums sums(T const* row, int32_t hidden, int32_t start, int32_t step) {
    float const first = to_float(row[0]);
    Sums s{0.F, 0.F};
    for (int32_t c = start; c < hidden; c += step) {
        float const apart = to_float(row[c]) - first;
        s.total += apart;
        s.squares += apart * apart;
    }
    return s;
}

struct Statistics {
    float mean, scaling;
};

EDGEVLM_BOTH Statistics statistics(Sums const& s, float first, int32_t hidden, float epsilon) {
    float const mean = s.total / hidden, variance = fmaxf(s.squares / hidden - mean * mean, 0.F);
    return {first + mean, 1.F / sqrtf(variance + epsilon)};
}

EDGEVLM_BOTH float ready(float x, Statistics const& s, float gain, float shift, float share) {
    return ((x - s.mean) * s.scaling * gain + shift) * share;
}

}  // namespace edgevlm::merge
