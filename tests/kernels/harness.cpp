// Loads a library of plugins as TensorRT would, makes one, asks it all that TensorRT asks, and runs
// it on arrays of this machine:  harness LIBRARY JOB
//
// A job has lines "op NAME", "int NAME VALUE", "real NAME VALUE", "input FILE SIZES...", and
// "output FILE". The first thing that is not as it should be ends the program.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

#define EXPECT(condition)                                              \
    do {                                                               \
        if (!(condition)) {                                            \
            std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
            std::exit(1);                                              \
        }                                                              \
    } while (false)

namespace {

// An expression of shapes that is a number.
class Number final : public IDimensionExpr, private apiv::VDimensionExpr {
public:
    explicit Number(int64_t value) : value_(value) { mImpl = this; }
    ~Number() noexcept override = default;

private:
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }
    int64_t value_;
};

class Builder final : public IExprBuilder, private apiv::VExprBuilder {
public:
    Builder() { mImpl = this; }
    ~Builder() noexcept override = default;
    IDimensionExpr const* constant(int64_t value) override {
        made_.push_back(std::make_unique<Number>(value));
        return made_.back().get();
    }

private:
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
    std::vector<std::unique_ptr<Number>> made_;
};

struct Tensor {
    std::string file;
    Dims dims{};
    std::vector<float> data;
};

struct Job {
    std::string op;
    std::deque<std::pair<std::string, int32_t>> integers;
    std::deque<std::pair<std::string, float>> reals;
    std::vector<Tensor> inputs, outputs;
};

size_t size_of(Dims const& dims) {
    size_t size = 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) size *= static_cast<size_t>(dims.d[i]);
    return size;
}

Job read(char const* path) {
    Job job;
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string kind, name;
        words >> kind >> name;
        if (kind == "op") job.op = name;
        if (kind == "int") words >> job.integers.emplace_back(name, 0).second;
        if (kind == "real") words >> job.reals.emplace_back(name, 0.F).second;
        if (kind == "output") job.outputs.push_back({name, {}, {}});
        if (kind != "input") continue;
        Tensor tensor{name, {}, {}};
        for (int64_t size; words >> size;) tensor.dims.d[tensor.dims.nbDims++] = size;
        tensor.data.resize(size_of(tensor.dims));
        std::ifstream raw(name, std::ios::binary);
        raw.read(reinterpret_cast<char*>(tensor.data.data()), static_cast<std::streamsize>(4 * tensor.data.size()));
        EXPECT(raw.gcount() == static_cast<std::streamsize>(4 * tensor.data.size()));
        job.inputs.push_back(tensor);
    }
    return job;
}

template <typename T>
T* as(IPluginV3* plugin, PluginCapabilityType type) {
    auto* found = static_cast<T*>(plugin->getCapabilityInterface(type));
    EXPECT(found != nullptr);
    return found;
}

void ask_formats(IPluginV3OneBuild* build, Job const& job) {
    auto const inputs = static_cast<int32_t>(job.inputs.size()), outputs = static_cast<int32_t>(job.outputs.size());
    std::vector<DynamicPluginTensorDesc> tensors(static_cast<size_t>(inputs + outputs));
    for (auto type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        int32_t mixed = 0;
        for (int32_t i = 0; i < inputs + outputs; ++i) {
            for (auto& t : tensors) t.desc.type = type, t.desc.format = TensorFormat::kLINEAR;
            bool const same = build->supportsFormatCombination(i, tensors.data(), inputs, outputs);
            tensors[static_cast<size_t>(i)].desc.type = DataType::kFLOAT;
            bool const real = build->supportsFormatCombination(i, tensors.data(), inputs, outputs);
            EXPECT(same || real);
            mixed += type != DataType::kFLOAT && i > 0 && real;
            tensors[static_cast<size_t>(i)].desc.format = TensorFormat::kCHW32;
            EXPECT(!build->supportsFormatCombination(i, tensors.data(), inputs, outputs));
        }
        std::printf("float32 beside others: %d\n", mixed);
    }
    for (auto& t : tensors) t.desc.type = DataType::kINT8, t.desc.format = TensorFormat::kLINEAR;
    EXPECT(!build->supportsFormatCombination(0, tensors.data(), inputs, outputs));
    EXPECT(!build->supportsFormatCombination(0, tensors.data(), inputs + 1, outputs));
}

void shape(IPluginV3OneBuild* build, Job& job) {
    Builder builder;
    std::vector<DimsExprs> in(job.inputs.size()), out(job.outputs.size());
    std::vector<DataType> types(in.size(), DataType::kFLOAT), made(out.size());
    for (size_t i = 0; i < in.size(); ++i) {
        in[i].nbDims = job.inputs[i].dims.nbDims;
        for (int32_t k = 0; k < in[i].nbDims; ++k) in[i].d[k] = builder.constant(job.inputs[i].dims.d[k]);
    }
    EXPECT(build->getNbOutputs() == static_cast<int32_t>(out.size()));
    auto const inputs = static_cast<int32_t>(in.size()), outputs = static_cast<int32_t>(out.size());
    EXPECT(build->getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), outputs, builder) == 0);
    EXPECT(build->getOutputDataTypes(made.data(), outputs, types.data(), inputs) == 0);
    for (size_t i = 0; i < out.size(); ++i) {
        EXPECT(made[i] == DataType::kFLOAT);
        auto& dims = job.outputs[i].dims;
        dims.nbDims = out[i].nbDims;
        std::printf("output");
        for (int32_t k = 0; k < dims.nbDims; ++k) {
            dims.d[k] = out[i].d[k]->getConstantValue();
            std::printf(" %d", static_cast<int>(dims.d[k]));
        }
        std::printf("\n");
        job.outputs[i].data.resize(size_of(dims));
    }
}

void run(IPluginV3OneRuntime* runtime, Job& job) {
    std::vector<PluginTensorDesc> in(job.inputs.size()), out(job.outputs.size());
    std::vector<void const*> from;
    std::vector<void*> to;
    for (size_t i = 0; i < in.size(); ++i) {
        in[i].dims = job.inputs[i].dims;
        in[i].type = DataType::kFLOAT;
        from.push_back(job.inputs[i].data.data());
    }
    for (size_t i = 0; i < out.size(); ++i) {
        out[i].dims = job.outputs[i].dims;
        to.push_back(job.outputs[i].data.data());
    }
    EXPECT(runtime->enqueue(in.data(), out.data(), from.data(), to.data(), nullptr, nullptr) == 0);
    for (auto const& tensor : job.outputs) {
        std::ofstream file(tensor.file, std::ios::binary);
        file.write(reinterpret_cast<char const*>(tensor.data.data()), static_cast<std::streamsize>(4 * tensor.data.size()));
    }
}

IPluginCreatorV3One* creator(char const* library, std::string const& op) {
    void* opened = dlopen(library, RTLD_NOW);
    if (opened == nullptr) std::fprintf(stderr, "%s\n", dlerror());
    EXPECT(opened != nullptr && dlsym(opened, "setLoggerFinder") != nullptr);
    using Get = IPluginCreatorInterface* const* (*)(int32_t&);
    auto const get = reinterpret_cast<Get>(dlsym(opened, "getCreators"));
    EXPECT(get != nullptr);
    int32_t count = 0;
    auto const* all = get(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* one = static_cast<IPluginCreatorV3One*>(all[i]);
        if (op == one->getPluginName()) return one;
    }
    EXPECT(!"the library has a creator of that name");
    return nullptr;
}

}  // namespace

int main(int, char** arguments) {
    Job job = read(arguments[2]);
    auto* from = creator(arguments[1], job.op);
    EXPECT(std::string("edgevlm") == from->getPluginNamespace() && std::string("1") == from->getPluginVersion());
    std::vector<PluginField> fields;
    for (auto& [name, value] : job.integers) fields.emplace_back(name.c_str(), &value, PluginFieldType::kINT32, 1);
    for (auto& [name, value] : job.reals) fields.emplace_back(name.c_str(), &value, PluginFieldType::kFLOAT32, 1);
    EXPECT(from->getFieldNames()->nbFields == static_cast<int32_t>(fields.size()));
    PluginFieldCollection given{static_cast<int32_t>(fields.size()) - 1, fields.data()};
    EXPECT(from->createPlugin("p", &given, TensorRTPhase::kBUILD) == nullptr);  // one is missing
    ++given.nbFields;
    auto* first = from->createPlugin("p", &given, TensorRTPhase::kBUILD);
    EXPECT(first != nullptr);
    auto* build = as<IPluginV3OneBuild>(first, PluginCapabilityType::kBUILD);
    EXPECT(job.op == as<IPluginV3OneCore>(first, PluginCapabilityType::kCORE)->getPluginName());
    ask_formats(build, job);
    shape(build, job);
    // As an engine does: what was serialized makes the plugin that runs.
    auto* stored = as<IPluginV3OneRuntime>(first, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
    auto* again = from->createPlugin("p", stored, TensorRTPhase::kRUNTIME);
    EXPECT(again != nullptr);
    auto* attached = as<IPluginV3OneRuntime>(again, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
    run(as<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME), job);
    return 0;
}
