// As much of onnxruntime's C++ API as docs/loop.cpp uses, over a model of two joints that is not
// there. Its metadata are the lines "key=value" of the file given as the model; the key "nan" makes
// its action not a number, and "actions" sets how many actions it has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

enum OrtAllocatorType { OrtDeviceAllocator };
enum OrtMemType { OrtMemTypeCPU };
enum ONNXTensorElementDataType { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT };
struct OrtAllocator {};

namespace Ort {
using Shape = std::vector<int64_t>;
using Metadata = std::map<std::string, std::string>;
using AllocatedStringPtr = std::unique_ptr<char, void (*)(char*)>;

inline AllocatedStringPtr copy_of(const std::string& text) {
    char* copy = new char[text.size() + 1];
    std::strcpy(copy, text.c_str());
    return AllocatedStringPtr(copy, [](char* p) { delete[] p; });
}

struct Env {};
struct AllocatorWithDefaultOptions {
    operator OrtAllocator*() { return nullptr; }
};
struct MemoryInfo {
    static MemoryInfo CreateCpu(OrtAllocatorType, OrtMemType) { return {}; }
};
struct TypeInfo {
    Shape shape;
    TypeInfo GetTensorTypeAndShapeInfo() const { return *this; }
    Shape GetShape() const { return shape; }
    ONNXTensorElementDataType GetElementType() const {
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
};
struct Value {
    float* data;
    template <class T>
    static Value CreateTensor(const MemoryInfo&, T* data, size_t, const int64_t*, size_t) {
        return {data};
    }
};
struct SessionOptions {
    SessionOptions& SetIntraOpNumThreads(int) { return *this; }
    SessionOptions& SetInterOpNumThreads(int) { return *this; }
};
struct RunOptions {
    explicit RunOptions(std::nullptr_t) {}
};
struct ModelMetadata {
    Metadata held;
    AllocatedStringPtr LookupCustomMetadataMapAllocated(const char* key, OrtAllocator*) const {
        const auto found = held.find(key);
        if (found == held.end()) {
            return AllocatedStringPtr(nullptr, [](char*) {});
        }
        return copy_of(found->second);
    }
};
struct IoBinding;
struct Session {
    std::vector<std::string> inputs{"obs", "action_in", "reward_in", "h_in"};
    std::vector<std::string> outputs{"actions", "h_out"};
    Metadata held;

    Session(const Env&, const char* path, const SessionOptions&) {
        std::ifstream file(path);
        for (std::string line; std::getline(file, line);) {
            const size_t at = line.find('=');
            held[line.substr(0, at)] = line.substr(at + 1);
        }
    }
    int64_t width(const std::string& name) const {
        if (name == "reward_in") return 1;
        return name == "h_in" || name == "h_out" ? 3 : std::stoll(held.at("actions"));
    }
    size_t GetInputCount() const { return inputs.size(); }
    size_t GetOutputCount() const { return outputs.size(); }
    AllocatedStringPtr GetInputNameAllocated(size_t i, OrtAllocator*) { return copy_of(inputs[i]); }
    AllocatedStringPtr GetOutputNameAllocated(size_t i, OrtAllocator*) {
        return copy_of(outputs[i]);
    }
    TypeInfo GetInputTypeInfo(size_t i) const { return {{1, width(inputs[i])}}; }
    TypeInfo GetOutputTypeInfo(size_t i) const { return {{1, width(outputs[i])}}; }
    ModelMetadata GetModelMetadata() const { return {held}; }
    void Run(const RunOptions&, const IoBinding&);
};
struct IoBinding {
    std::map<std::string, float*> buffers;
    explicit IoBinding(Session&) {}
    void BindInput(const char* name, const Value& value) { buffers[name] = value.data; }
    void BindOutput(const char* name, const Value& value) { buffers[name] = value.data; }
};
inline void Session::Run(const RunOptions&, const IoBinding& io) {
    const float* obs = io.buffers.at("obs");
    for (int64_t i = 0; i < width("actions"); ++i) {
        io.buffers.at("actions")[i] = held.count("nan") ? NAN : obs[i];
    }
    for (int64_t i = 0; i < 3; ++i) {
        io.buffers.at("h_out")[i] = io.buffers.at("h_in")[i] + 1.0f;
    }
}
}  // namespace Ort
