// The two functions that TensorRT looks for in a library of plugins.
#include "../layer_merge/plugin.h"
#include "../ms_deform_attn/plugin.h"
#include "../rotary/plugin.h"

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static edgevlm::Creator<edgevlm::MSDeformAttn> deform;
    static edgevlm::Creator<edgevlm::LayerMerge> merge;
    static edgevlm::Creator<edgevlm::RotateHeads> rotate;
    static nvinfer1::IPluginCreatorInterface* const all[] = {&deform, &merge, &rotate};
    count = 3;
    return all;
}
