// A control loop of a page: runs a policy that `metarobot export` wrote, with onnxruntime's C++ API alone.
//
//   g++ -std=c++17 -O2 loop.cpp -I.../include/onnxruntime -lonnxruntime -o loop
//   ./loop policy/policy.onnx [Hz, by default the policy's own; 0 does not wait] < readings > targets
//
// A line of readings: 1 if the episode ended early (a fall), else 0; the reward of the last action; the observation,
// in the order of `observation_names`. A line of targets: joint angles in rad, in the order of `joint_names`, or for a
// robot without joints the action. Put your robot where cin and cout are, behind limits and watchdogs: here are none.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

using Floats = std::vector<float>;

struct Tensor {  // a buffer that the model reads or writes
    std::string name;
    std::vector<int64_t> shape;
    Floats data;
};

struct Policy {
    Ort::Env env;
    Ort::Session session;
    std::vector<Tensor> inputs, outputs;
    Ort::IoBinding binding;

    explicit Policy(const char* path) : session(env, path, options()), binding(session) {
        Ort::AllocatorWithDefaultOptions heap;
        const auto cpu = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
        auto add = [](std::vector<Tensor>& to, const char* name, const Ort::TypeInfo& type) {
            const auto info = type.GetTensorTypeAndShapeInfo();
            to.push_back({name, info.GetShape(), Floats(info.GetElementCount(), 0.0f)});
        };
        auto view = [&](Tensor& t) {
            return Ort::Value::CreateTensor<float>(cpu, t.data.data(), t.data.size(), t.shape.data(), t.shape.size());
        };
        for (size_t i = 0; i < session.GetInputCount(); ++i)
            add(inputs, session.GetInputNameAllocated(i, heap).get(), session.GetInputTypeInfo(i));
        for (size_t i = 0; i < session.GetOutputCount(); ++i)
            add(outputs, session.GetOutputNameAllocated(i, heap).get(), session.GetOutputTypeInfo(i));
        for (auto& t : inputs) binding.BindInput(t.name.c_str(), view(t));
        for (auto& t : outputs) binding.BindOutput(t.name.c_str(), view(t));
    }

    static Ort::SessionOptions options() {
        Ort::SessionOptions one;
        one.SetIntraOpNumThreads(1).SetInterOpNumThreads(1);
        return one;
    }

    Floats numbers(const std::string& key) {  // comma-separated metadata; none for "zeros" and what there is not
        Ort::AllocatorWithDefaultOptions heap;
        const auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated(key.c_str(), heap);
        Floats found;
        std::istringstream words(text ? text.get() : "");
        for (std::string word; std::getline(words, word, ',') && word != "zeros";) found.push_back(std::stof(word));
        return found;
    }

    void set(const std::string& name, const Floats& values) {  // an agent has no input that it does not read
        for (auto& t : inputs) {
            if (t.name != name) continue;
            if (values.size() != t.data.size()) throw std::runtime_error(name + " is of another length");
            std::copy(values.begin(), values.end(), t.data.begin());
        }
    }

    void begin() {  // a new trial. the context as it was before anything was lived
        for (auto& t : inputs) {
            std::fill(t.data.begin(), t.data.end(), 0.0f);
            const Floats first = numbers("context." + t.name.substr(0, t.name.rfind('_')) + ".begin");
            if (!first.empty()) set(t.name, first);
        }
        set("first_in", {1.0f});
    }

    const Floats& act(const Floats& obs, float reward, bool done) {
        set("obs", obs);
        set("reward_in", {reward});
        set("done_in", {done ? 1.0f : 0.0f});
        session.Run(Ort::RunOptions{nullptr}, binding);
        set("first_in", {0.0f});
        set("action_in", outputs[0].data);  // before the clip, as in training
        for (auto& t : outputs)             // "h_out" goes to "h_in"
            if (t.name != "actions") set(t.name.substr(0, t.name.size() - 3) + "in", t.data);
        return outputs[0].data;
    }
};

int main(int argc, char** argv) try {
    Policy policy(argc > 1 ? argv[1] : "policy/policy.onnx");
    const Floats low = policy.numbers("action.low"), high = policy.numbers("action.high");
    const Floats pose = policy.numbers("default_joint_pos"), scale = policy.numbers("action_scale");
    const int horizon = policy.numbers("trial.horizon").at(0), episodes = policy.numbers("trial.episodes").at(0);
    const float hz = argc > 2 ? std::stof(argv[2]) : policy.numbers("control_hz").at(0);
    const auto period = std::chrono::duration<double>(hz > 0 ? 1.0 / hz : 0.0);
    auto next = std::chrono::steady_clock::now();
    int step = 0, episode = 0;
    policy.begin();
    for (std::string line; std::getline(std::cin, line); ++step) {
        std::istringstream words(line);
        Floats obs;
        float ended = 0, reward = 0;
        words >> ended >> reward;
        for (float x; words >> x;) obs.push_back(x);
        const bool done = ended > 0 || step == horizon;
        if (done) {
            step = 0;
            if (++episode == episodes) episode = 0, policy.begin();
        }
        if (!std::all_of(obs.begin(), obs.end(), [](float x) { return std::isfinite(x); }))
            throw std::runtime_error("an observation is not finite");  // ONNX's Clip would make a number of it
        const Floats& action = policy.act(obs, episode || step ? reward : 0.0f, done && episode > 0);
        for (size_t i = 0; i < action.size(); ++i) {
            if (!std::isfinite(action[i])) throw std::runtime_error("the policy's answer is not finite");
            const float sent = std::min(std::max(action[i], low[i]), high[i]);
            std::printf("%.9g%c", pose.empty() ? sent : pose[i] + scale[i] * sent, i + 1 < action.size() ? ' ' : '\n');
        }
        std::fflush(stdout);
        next += std::chrono::duration_cast<std::chrono::steady_clock::duration>(period);
        std::this_thread::sleep_until(next);
    }
} catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << "\n";
    return 1;
}
