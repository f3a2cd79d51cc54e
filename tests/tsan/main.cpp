// CPU kernels from four threads at once, each of which splits its work over three, under ThreadSanitizer. All read the
// same inputs. An argument plants a race: all write to the same gradient.
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "class_mean/class_mean.h"
#include "common/cpu/work.h"
#include "gather_pixels/gather_pixels.h"
#include "positive/positive.h"

using namespace pixcontrast;

namespace {

constexpr int64_t kPixels = 6000, kDim = 48, kClasses = 7, kCapacity = 600, kSteps = 5;

struct Inputs {
  std::vector<float> features = std::vector<float>(kPixels * kDim), logits = std::vector<float>(kPixels);
  std::vector<float> queue = std::vector<float>(kClasses * kCapacity * kDim);
  std::vector<float> queue_logits = std::vector<float>(kClasses * kCapacity);
  std::vector<int64_t> labels = std::vector<int64_t>(kPixels), index = labels, order = labels;
  std::vector<int64_t> counts = std::vector<int64_t>(kClasses, kCapacity);

  Inputs() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    for (auto* values : {&features, &logits, &queue, &queue_logits}) {
      for (float& x : *values) x = normal(random);
    }
    for (int64_t i = 0; i < kPixels; ++i) labels[i] = random() % kClasses, index[i] = order[i] = i;
  }
};

double run(const Inputs& in, int64_t map_pixels, std::vector<float>& grad) {
  const FeatureLayout layout{kPixels, kDim, map_pixels};
  std::vector<float> mean(kClasses * kDim), grad_mean(mean), class_loss(kClasses), grad_logits(kPixels);
  std::vector<float> grad_queue_logits(kClasses * kCapacity), rows(kPixels * kDim);
  std::vector<int64_t> counts(kClasses);
  int64_t unknown = 0;
  float loss = 0;
  ClassMean<float> memory{kClasses,    kCapacity, kDim,   in.queue.data(), in.counts.data(), in.queue_logits.data(),
                          mean.data(), nullptr,   nullptr};
  class_mean_cpu(memory);
  positive_cpu(Positive<float>{layout, kClasses, 255, 1.0, in.features.data(), in.labels.data(), in.logits.data(),
                               mean.data(), in.counts.data(), &loss, class_loss.data(), counts.data(), &unknown,
                               grad.data(), grad_logits.data(), grad_mean.data()});
  memory.mean = nullptr, memory.grad_mean = grad_mean.data(), memory.grad_weight_logits = grad_queue_logits.data();
  class_mean_backward_cpu(memory);
  gather_pixels_cpu(
      GatherPixels<float>{layout, kPixels, in.index.data(), in.order.data(), in.features.data(), rows.data()});
  scatter_pixels_cpu(GatherPixels<float>{layout, kPixels, in.index.data(), in.order.data(), rows.data(), grad.data()});
  const auto kept = cpu::kept_memory()->allocate(size_t{16} << 20);
  static_cast<char*>(kept.get())[0] = 1;
  return loss;
}

}  // namespace

int main(int arguments, char**) {
  const bool planted = arguments > 1;
  const Inputs in;
  std::vector<std::vector<float>> grads(4, std::vector<float>(kPixels * kDim));
  std::vector<double> losses(4);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int step = 0; step < kSteps; ++step) {
        losses[t] = run(in, step % 2 ? 0 : kPixels / 2, grads[planted ? 0 : t]);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  std::printf("4 threads, %d steps each, loss %.6f\n", static_cast<int>(kSteps), losses[0]);
  return losses[0] != losses[1] || losses[0] != losses[2] || losses[0] != losses[3];
}
