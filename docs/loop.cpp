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
// A model or a reading that is not what this program expects ends it with exit code 1 and one line.
// Only the sizes and values that are used here are checked, not what else the file does: run files
// of your own, or ones that `metarobot run` accepts.
//
// Put your robot where std::cin and std::printf are, behind limits and watchdogs: here are none.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using Floats = std::vector<float>;

// More numbers than any policy's tensor has.
static const int64_t max_numbers = 4000000;

static bool all_finite(const Floats& values) {
    return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

// Return the number that a whole word is; an empty word, a rest, NaN or infinity is an error.
static float parse_number(const std::string& word, const std::string& what) {
    char* end = nullptr;
    const float number = std::strtof(word.c_str(), &end);
    if (word.empty() || *end != '\0' || !std::isfinite(number)) {
        throw std::runtime_error(what + " has '" + word.substr(0, 40) + "' where a number belongs");
    }
    return number;
}

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
        if (outputs.empty() || outputs[0].name != "actions") {
            throw std::runtime_error("the model's first output is not \"actions\"");
        }
        for (size_t i = 1; i < outputs.size(); ++i) {
            const std::string& name = outputs[i].name;
            if (name.size() < 5 || name.substr(name.size() - 4) != "_out") {
                throw std::runtime_error("the model has an output " + name + ", not NAME_out");
            }
        }

        // the vectors are complete and will not move: bind their buffers for all steps
        for (auto& tensor : inputs) {
            binding.BindInput(tensor.name.c_str(), view(tensor));
        }
        for (auto& tensor : outputs) {
            binding.BindOutput(tensor.name.c_str(), view(tensor));
        }
    }

    size_t action_size() const { return outputs[0].data.size(); }

    // Return numbers of the metadata, which are separated by commas; none for "zeros" and for
    // keys that do not exist.
    Floats numbers(const std::string& key) {
        Ort::AllocatorWithDefaultOptions allocator;
        const auto metadata = session.GetModelMetadata();
        const auto held = metadata.LookupCustomMetadataMapAllocated(key.c_str(), allocator);
        const std::string text = held ? held.get() : "";
        Floats found;
        if (text.empty() || text == "zeros") {
            return found;
        }
        std::istringstream words(text);
        for (std::string word; std::getline(words, word, ',');) {
            found.push_back(parse_number(word, key));
        }
        if (text.back() == ',') {
            throw std::runtime_error(key + " ends with a comma");
        }
        return found;
    }

    // Return `count` numbers of the metadata, each in [low, high].
    Floats numbers(const std::string& key, size_t count, float low, float high) {
        const Floats found = numbers(key);
        if (found.size() != count) {
            throw std::runtime_error(key + " has " + std::to_string(found.size()) +
                                     " numbers, not " + std::to_string(count));
        }
        for (const float x : found) {
            if (!(low <= x && x <= high)) {
                throw std::runtime_error(key + " has " + std::to_string(x) + ", out of its bounds");
            }
        }
        return found;
    }

    // Return a whole number of the metadata in [1, high].
    int count(const std::string& key, int high) {
        const float x = numbers(key, 1, 1.0f, static_cast<float>(high))[0];
        if (x != std::floor(x)) {
            throw std::runtime_error(key + " is no whole number");
        }
        return static_cast<int>(x);
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
        for (const auto& tensor : outputs) {
            if (!all_finite(tensor.data)) {
                throw std::runtime_error("the policy's answer is not finite");
            }
        }

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
        if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            throw std::runtime_error(std::string(name) + " is not of float32");
        }
        int64_t size = 1;
        for (const int64_t length : info.GetShape()) {
            // an unknown length is -1
            if (length < 1 || length > max_numbers || (size *= length) > max_numbers) {
                throw std::runtime_error(std::string(name) + " has no fixed shape, or is too large");
            }
        }
        return {name, info.GetShape(), Floats(static_cast<size_t>(size), 0.0f)};
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
                throw std::runtime_error(name + " has " + std::to_string(values.size()) +
                                         " numbers, not " + std::to_string(tensor.data.size()));
            }
            std::copy(values.begin(), values.end(), tensor.data.begin());
        }
    }
};

int main(int argc, char** argv) try {
    Policy policy(argc > 1 ? argv[1] : "policy/policy.onnx");
    const size_t size = policy.action_size();
    const Floats low = policy.numbers("action.low", size, -1e6f, 1e6f);
    const Floats high = policy.numbers("action.high", size, -1e6f, 1e6f);
    for (size_t i = 0; i < size; ++i) {
        if (!(low[i] < high[i])) {
            throw std::runtime_error("an action has no room between its bounds");
        }
    }

    // a robot without declared joints has neither pose nor scale
    const bool has_joints = !policy.numbers("default_joint_pos").empty() ||
                            !policy.numbers("action_scale").empty();
    const size_t joints = has_joints ? size : 0;
    const Floats pose = policy.numbers("default_joint_pos", joints, -100.0f, 100.0f);
    const Floats scale = policy.numbers("action_scale", joints, 1e-6f, 100.0f);
    const int horizon = policy.count("trial.horizon", 1000000);
    const int episodes = policy.count("trial.episodes", 10000);
    const float hz = argc > 2 ? parse_number(argv[2], "the rate")
                              : policy.numbers("control_hz", 1, 0.1f, 10000.0f)[0];
    if (hz < 0.0f || hz > 10000.0f) {
        throw std::runtime_error("the rate is not from 0 to 10000 Hz");
    }
    const auto period = std::chrono::duration<double>(hz > 0 ? 1.0 / hz : 0.0);

    auto next = std::chrono::steady_clock::now();
    int step = 0;
    int episode = 0;
    policy.begin();
    for (std::string line; std::getline(std::cin, line); ++step) {
        std::istringstream words(line);
        Floats reading;
        for (std::string word; words >> word;) {
            reading.push_back(parse_number(word, "a reading"));
        }
        if (reading.size() < 3 || (reading[0] != 0.0f && reading[0] != 1.0f)) {
            throw std::runtime_error("a reading is not 0 or 1, a reward and an observation");
        }
        const bool ended = reading[0] == 1.0f;
        const float reward = reading[1];
        const Floats obs(reading.begin() + 2, reading.end());

        // an episode ends early, or at its horizon; a trial is a number of episodes
        const bool done = ended || step == horizon;
        if (done) {
            step = 0;
            ++episode;
            if (episode == episodes) {
                episode = 0;
                policy.begin();
            }
        }

        const bool first_of_trial = episode == 0 && step == 0;
        const Floats& action = policy.act(obs, first_of_trial ? 0.0f : reward, done && episode > 0);

        for (size_t i = 0; i < action.size(); ++i) {
            const float clipped = std::min(std::max(action[i], low[i]), high[i]);
            const float target = joints == 0 ? clipped : pose[i] + scale[i] * clipped;
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
