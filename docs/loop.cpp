// Run a policy that `metarobot export` wrote, with onnxruntime's C++ API alone.
//
//   g++ -std=c++17 -O2 loop.cpp -I.../include/onnxruntime -lonnxruntime -o loop
//   ./loop policy/policy.onnx [Hz] < readings > targets
//
// The rate is the policy's own if none is given; 0 does not wait. docs/robot.md describes the
// model's inputs and outputs.
//
// A line of readings: 1 if the episode ended early (a fall), else 0; the reward of the last action;
// the observation, in the order of `observation_names`. A line of targets: joint angles in rad, in
// the order of `joint_names`, or the action if the robot has no declared joints.
//
// Put your robot where std::cin and std::printf are, behind limits and watchdogs: here are none.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using Floats = std::vector<float>;

// A buffer that the model reads or writes.
struct Tensor {
    std::string name;
    std::vector<int64_t> shape;
    Floats data;
};

class Policy {
public:
    explicit Policy(const char* path) : session(env, path, options()), binding(session) {
        Ort::AllocatorWithDefaultOptions allocator;
        for (size_t i = 0; i < session.GetInputCount(); ++i) {
            const auto name = session.GetInputNameAllocated(i, allocator);
            inputs.push_back(make_tensor(name.get(), session.GetInputTypeInfo(i)));
        }
        for (size_t i = 0; i < session.GetOutputCount(); ++i) {
            const auto name = session.GetOutputNameAllocated(i, allocator);
            outputs.push_back(make_tensor(name.get(), session.GetOutputTypeInfo(i)));
        }

        // the vectors are complete and will not move: bind their buffers for all steps
        for (auto& tensor : inputs) {
            binding.BindInput(tensor.name.c_str(), view(tensor));
        }
        for (auto& tensor : outputs) {
            binding.BindOutput(tensor.name.c_str(), view(tensor));
        }
    }

    // Return numbers of the metadata, which are separated by commas; none for "zeros" and for
    // keys that do not exist.
    Floats numbers(const std::string& key) {
        Ort::AllocatorWithDefaultOptions allocator;
        const auto metadata = session.GetModelMetadata();
        const auto text = metadata.LookupCustomMetadataMapAllocated(key.c_str(), allocator);
        Floats found;
        std::istringstream words(text ? text.get() : "");
        for (std::string word; std::getline(words, word, ',') && word != "zeros";) {
            found.push_back(std::stof(word));
        }
        return found;
    }

    // Start a trial: reset the context to its initial value.
    void begin() {
        for (auto& tensor : inputs) {
            std::fill(tensor.data.begin(), tensor.data.end(), 0.0f);
            // the input "h_in" is the tensor "h" of the context
            const std::string context_name = tensor.name.substr(0, tensor.name.rfind('_'));
            const Floats initial = numbers("context." + context_name + ".begin");
            if (!initial.empty()) {
                set(tensor.name, initial);
            }
        }
        set("first_in", {1.0f});
    }

    // Return the action before it is clipped. `done` is true on the first step of every episode but
    // the trial's first.
    const Floats& act(const Floats& obs, float reward, bool done) {
        set("obs", obs);
        set("reward_in", {reward});
        set("done_in", {done ? 1.0f : 0.0f});
        session.Run(Ort::RunOptions{nullptr}, binding);

        set("first_in", {0.0f});
        set("action_in", outputs[0].data);
        // the context: "h_out" goes to "h_in"
        for (const auto& tensor : outputs) {
            if (tensor.name != "actions") {
                const std::string context_name = tensor.name.substr(0, tensor.name.size() - 3);
                set(context_name + "in", tensor.data);
            }
        }
        return outputs[0].data;
    }

private:
    Ort::Env env;
    Ort::Session session;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    Ort::IoBinding binding;

    static Ort::SessionOptions options() {
        Ort::SessionOptions one_thread;
        one_thread.SetIntraOpNumThreads(1).SetInterOpNumThreads(1);
        return one_thread;
    }

    static Tensor make_tensor(const char* name, const Ort::TypeInfo& type) {
        const auto info = type.GetTensorTypeAndShapeInfo();
        return {name, info.GetShape(), Floats(info.GetElementCount(), 0.0f)};
    }

    static Ort::Value view(Tensor& tensor) {
        const auto cpu = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
        return Ort::Value::CreateTensor<float>(cpu, tensor.data.data(), tensor.data.size(),
                                               tensor.shape.data(), tensor.shape.size());
    }

    // Set an input; one that the agent does not read does not exist, and is ignored.
    void set(const std::string& name, const Floats& values) {
        for (auto& tensor : inputs) {
            if (tensor.name != name) {
                continue;
            }
            if (values.size() != tensor.data.size()) {
                throw std::runtime_error(name + " is of another length");
            }
            std::copy(values.begin(), values.end(), tensor.data.begin());
        }
    }
};

static bool all_finite(const Floats& values) {
    return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

int main(int argc, char** argv) try {
    Policy policy(argc > 1 ? argv[1] : "policy/policy.onnx");
    const Floats low = policy.numbers("action.low");
    const Floats high = policy.numbers("action.high");
    const Floats pose = policy.numbers("default_joint_pos");
    const Floats scale = policy.numbers("action_scale");
    const int horizon = policy.numbers("trial.horizon").at(0);
    const int episodes = policy.numbers("trial.episodes").at(0);
    const float hz = argc > 2 ? std::stof(argv[2]) : policy.numbers("control_hz").at(0);
    const auto period = std::chrono::duration<double>(hz > 0 ? 1.0 / hz : 0.0);

    auto next = std::chrono::steady_clock::now();
    int step = 0;
    int episode = 0;
    policy.begin();
    for (std::string line; std::getline(std::cin, line); ++step) {
        std::istringstream words(line);
        float ended = 0;
        float reward = 0;
        Floats obs;
        words >> ended >> reward;
        for (float x; words >> x;) {
            obs.push_back(x);
        }

        // an episode ends early, or at its horizon; a trial is a number of episodes
        const bool done = ended > 0 || step == horizon;
        if (done) {
            step = 0;
            ++episode;
            if (episode == episodes) {
                episode = 0;
                policy.begin();
            }
        }

        // ONNX's Clip would turn NaN into a number
        if (!all_finite(obs)) {
            throw std::runtime_error("an observation is not finite");
        }
        const bool first_of_trial = episode == 0 && step == 0;
        const Floats& action = policy.act(obs, first_of_trial ? 0.0f : reward, done && episode > 0);
        if (!all_finite(action)) {
            throw std::runtime_error("the policy's answer is not finite");
        }

        for (size_t i = 0; i < action.size(); ++i) {
            const float clipped = std::min(std::max(action[i], low[i]), high[i]);
            const float target = pose.empty() ? clipped : pose[i] + scale[i] * clipped;
            std::printf("%.9g%c", target, i + 1 < action.size() ? ' ' : '\n');
        }
        std::fflush(stdout);
        next += std::chrono::duration_cast<std::chrono::steady_clock::duration>(period);
        std::this_thread::sleep_until(next);
    }
} catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << "\n";
    return 1;
}
