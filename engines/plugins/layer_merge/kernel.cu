// One block makes 64 x 64 of the output: normed rows go into shared memory and are multiplied
// there, by tensor cores in half formats.
#include <mma.h>

#include "plugin.h"

namespace edgevlm::merge {
namespace {

constexpr int32_t kTile = 64, kDepth = 32, kThreads = 256, kPad = 8, kPart = 16;

// result[64][64] += left[64][32] * right[32][64]; a warp makes a strip of 16 x 32.
template <typename T>
struct Product {
    nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kPart, kPart, kPart, float> parts[2];

    __device__ Product() {
        for (auto& part : parts) nvcuda::wmma::fill_fragment(part, 0.F);
    }
    __device__ void add(T const (*left)[kDepth + kPad], T const (*right)[kTile + kPad]) {
        using namespace nvcuda::wmma;
        int32_t const warp = threadIdx.x / 32, row = warp / 2 * kPart, column = warp % 2 * 32;
        fragment<matrix_a, kPart, kPart, kPart, T, row_major> a;
        fragment<matrix_b, kPart, kPart, kPart, T, row_major> b;
        for (int32_t k = 0; k < kDepth; k += kPart) {
            load_matrix_sync(a, &left[row][k], kDepth + kPad);
            for (int32_t i = 0; i < 2; ++i) {
                load_matrix_sync(b, &right[k][column + i * kPart], kTile + kPad);
                mma_sync(parts[i], a, b, parts[i]);
            }
        }
    }
    __device__ void store(float (*result)[kTile]) {
        int32_t const warp = threadIdx.x / 32, row = warp / 2 * kPart, column = warp % 2 * 32;
        for (int32_t i = 0; i < 2; ++i) {
            nvcuda::wmma::store_matrix_sync(&result[row][column + i * kPart], parts[i], kTile, nvcuda::wmma::mem_row_major);
        }
    }
};

template <>
struct Product<float> {
    float parts[4][4]{};

    __device__ void add(float const (*left)[kDepth + kPad], float const (*right)[kTile + kPad]) {
        int32_t const row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll 1  // unrolled, it would not fit the registers
        for (int32_t k = 0; k < kDepth; ++k) {
            for (int32_t i = 0; i < 4; ++i) {
                for (int32_t j = 0; j < 4; ++j) parts[i][j] += left[row + i][k] * right[k][column + j];
            }
        }
    }
    __device__ void store(float (*result)[kTile]) {
        int32_t const row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
        for (int32_t i = 0; i < 4; ++i) {
            for (int32_t j = 0; j < 4; ++j) result[row + i][column + j] = parts[i][j];
        }
    }
};

template <typename T>
struct Arguments {
    T const *x, *gain, *shift, *scale, *weight, *bias;
    T* y;
};

template <typename T>
union Shared {
    struct {
        T left[kTile][kDepth + kPad];
        T right[kDepth][kTile + kPad];
    } tiles;
    float result[kTile][kTile];
};

// A level's statistics of the block's rows: four lanes a row.
template <typename T>
__device__ void measure(T const* x, int32_t row0, int32_t level, Shape const& s, Statistics* found) {
    int32_t const row = threadIdx.x / 4, lane = threadIdx.x % 4;
    bool const there = row0 + row < s.tokens;
    T const* at = x + (static_cast<int64_t>(there ? row0 + row : 0) * s.levels + level) * s.hidden;
    Sums part = sums(at, s.hidden, lane, 4);
    for (int32_t step = 1; step < 4; step *= 2) {
        part.total += __shfl_xor_sync(0xffffffffU, part.total, step);
        part.squares += __shfl_xor_sync(0xffffffffU, part.squares, step);
    }
    if (lane == 0) found[row] = statistics(part, to_float(at[0]), s.hidden, s.epsilon);
}

template <typename T>
__device__ void fill(Arguments<T> const& a, Shape const& s, int32_t row0, int32_t column0, int32_t level, int32_t k,
                     Statistics const* found, Shared<T>& shared) {
    float const share = to_float(a.scale[level]);
    for (int32_t i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
        int32_t const row = i / kDepth, c = k + i % kDepth, at = level * s.hidden + c;
        float value = 0.F;
        if (row0 + row < s.tokens && c < s.hidden) {
            float const x = to_float(a.x[static_cast<int64_t>(row0 + row) * s.levels * s.hidden + at]);
            value = ready(x, found[row], to_float(a.gain[at]), to_float(a.shift[at]), share);
        }
        shared.tiles.left[row][i % kDepth] = from_float<T>(value);
        int32_t const depth = i / kTile, column = i % kTile;
        bool const inside = k + depth < s.hidden && column0 + column < s.outputs;
        int64_t const from = (static_cast<int64_t>(level) * s.hidden + k + depth) * s.outputs + column0 + column;
        shared.tiles.right[depth][column] = inside ? a.weight[from] : from_float<T>(0.F);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) multiply(Arguments<T> a, Shape s) {
    __shared__ Shared<T> shared;
    __shared__ Statistics found[kTile];
    int32_t const across = (s.outputs + kTile - 1) / kTile;
    int32_t const row0 = blockIdx.x / across * kTile, column0 = blockIdx.x % across * kTile;
    Product<T> product;
    for (int32_t level = 0; level < s.levels; ++level) {
        measure(a.x, row0, level, s, found);
        __syncthreads();
        for (int32_t k = 0; k < s.hidden; k += kDepth) {
            fill(a, s, row0, column0, level, k, found, shared);
            __syncthreads();
            product.add(shared.tiles.left, shared.tiles.right);
            __syncthreads();
        }
    }
    product.store(shared.result);
    __syncthreads();
    for (int32_t i = threadIdx.x; i < kTile * kTile; i += kThreads) {
        int32_t const row = row0 + i / kTile, column = column0 + i % kTile;
        if (row >= s.tokens || column >= s.outputs) continue;
        float offset = 0.F;
        for (int32_t level = 0; level < s.levels; ++level) {
            offset += to_float(a.scale[level]) * to_float(a.bias[level * s.outputs + column]);
        }
        a.y[static_cast<int64_t>(row) * s.outputs + column] = from_float<T>(shared.result[i / kTile][i % kTile] + offset);
    }
}

struct Launch {
    Shape const& s;
    void const* const* in;
    void* const* out;
    cudaStream_t stream;

    template <typename T>
    void run() const {
        auto const tensor = [this](int32_t i) { return static_cast<T const*>(in[i]); };
        Arguments<T> const a{tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5), static_cast<T*>(out[0])};
        int32_t const down = (s.tokens + kTile - 1) / kTile, across = (s.outputs + kTile - 1) / kTile;
        multiply<T><<<static_cast<uint32_t>(down) * across, kThreads, 0, stream>>>(a, s);
    }
};

}  // namespace

int32_t launch(Shape const& s, Format format, void const* const* in, void* const* out, cudaStream_t stream) noexcept {
    return in_format(format, Launch{s, in, out, stream});
}

}  // namespace edgevlm::merge
