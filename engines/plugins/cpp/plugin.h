// A TensorRT plugin (IPluginV3) around an op: a struct that knows its attributes, shapes and launch.
//
// Compiles against the open headers of TensorRT 10.3 to 11.1 and needs none of its libraries.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "numbers.h"

namespace edgevlm {

constexpr char const* kNamespace = "edgevlm";
constexpr char const* kVersion = "1";

// An attribute: its name, and where the op keeps it, an int32_t or a float.
template <typename Op>
struct Attribute {
    char const* name;
    int32_t Op::*integer;
    float Op::*real;
};

template <typename Op>
constexpr Attribute<Op> integer(char const* name, int32_t Op::*at) { return {name, at, nullptr}; }

template <typename Op>
constexpr Attribute<Op> real(char const* name, float Op::*at) { return {name, nullptr, at}; }

inline Format format_of(nvinfer1::DataType type) {
    if (type == nvinfer1::DataType::kHALF) return Format::kHalf;
    return type == nvinfer1::DataType::kBF16 ? Format::kBfloat16 : Format::kFloat;
}

template <typename Op>
std::vector<nvinfer1::PluginField> fields_of(Op const* op) {
    std::vector<nvinfer1::PluginField> fields;
    for (auto const& a : Op::kAttributes) {
        void const* data = nullptr;
        if (op != nullptr) data = a.integer ? static_cast<void const*>(&(op->*a.integer)) : &(op->*a.real);
        auto const type = a.integer ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32;
        fields.emplace_back(a.name, data, type, 1);
    }
    return fields;
}

// Op has: kName, kAttributes, kInputs, kOutputs, float32(position), shapes(...) and enqueue(...).
template <typename Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
public:
    explicit Plugin(Op const& op) : op_(op) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    nvinfer1::IPluginV3* clone() noexcept override { return new Plugin(op_); }

    char const* getPluginName() const noexcept override { return Op::kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return Op::kOutputs; }
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const*, int32_t, nvinfer1::DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return 0;
    }
    // All tensors are in the format of the first, those of `float32` in that.
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                   int32_t) noexcept override {
        using nvinfer1::DataType;
        auto const& tensor = tensors[position].desc;
        if (inputs != Op::kInputs || tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (Op::float32(position)) return tensor.type == DataType::kFLOAT;
        auto const first = tensors[0].desc.type;
        bool const known = first == DataType::kFLOAT || first == DataType::kHALF || first == DataType::kBF16;
        return known && tensor.type == first;
    }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t count, nvinfer1::DataType const* inputs,
                               int32_t) const noexcept override {
        for (int32_t i = 0; i < count; ++i) outputs[i] = inputs[0];
        return 0;
    }
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t, nvinfer1::DimsExprs const*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t, nvinfer1::IExprBuilder& expr) noexcept override {
        op_.shapes(inputs, outputs, expr);
        return 0;
    }
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const*, int32_t, nvinfer1::PluginTensorDesc const*,
                          int32_t) noexcept override {
        return 0;
    }
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        fields_ = fields_of(&op_);
        collection_.nbFields = static_cast<int32_t>(fields_.size());
        collection_.fields = fields_.data();
        return &collection_;
    }
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputs, nvinfer1::PluginTensorDesc const*, void const* const* in,
                    void* const* out, void*, cudaStream_t stream) noexcept override {
        return op_.enqueue(inputs, in, out, stream);
    }

private:
    Op op_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

template <typename Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    Creator() : fields_(fields_of<Op>(nullptr)) {
        collection_.nbFields = static_cast<int32_t>(fields_.size());
        collection_.fields = fields_.data();
    }
    char const* getPluginName() const noexcept override { return Op::kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

    // Null, which TensorRT reports, where an attribute is missing or of another type.
    nvinfer1::IPluginV3* createPlugin(char const*, nvinfer1::PluginFieldCollection const* given,
                                      nvinfer1::TensorRTPhase) noexcept override {
        Op op{};
        for (auto const& wanted : fields_) {
            auto const* found = find(*given, wanted);
            if (found == nullptr) return nullptr;
            for (auto const& a : Op::kAttributes) {
                if (std::strcmp(a.name, wanted.name) != 0) continue;
                if (a.integer) op.*a.integer = *static_cast<int32_t const*>(found->data);
                else op.*a.real = *static_cast<float const*>(found->data);
            }
        }
        return op.valid() ? new Plugin<Op>(op) : nullptr;
    }

private:
    static nvinfer1::PluginField const* find(nvinfer1::PluginFieldCollection const& given,
                                             nvinfer1::PluginField const& wanted) {
        for (int32_t i = 0; i < given.nbFields; ++i) {
            auto const& field = given.fields[i];
            bool const same = std::strcmp(field.name, wanted.name) == 0 && field.type == wanted.type;
            if (same && field.length == 1 && field.data != nullptr) return &field;
        }
        return nullptr;
    }
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace edgevlm
