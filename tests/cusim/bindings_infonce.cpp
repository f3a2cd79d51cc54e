// InfoNCE for the tests, with up to two queues. Types are 0 for float, 1 for bfloat16, 2 for half. Without a workspace
// a call only says in *needed how many bytes it needs.
#include "infonce/infonce.h"

using namespace pixcontrast;

extern "C" int run_infonce(int64_t feature_type, int64_t queue_type, int64_t allow_tf32, int64_t capability,
                           int64_t shared_memory, int64_t sm_count, int64_t pixels, int64_t dim, int64_t map_pixels,
                           int64_t count, int64_t classes, int64_t queues, const void* queue0, int64_t capacity0,
                           const int64_t* counts0, const void* queue1, int64_t capacity1, const int64_t* counts1,
                           double temperature, double base_temperature, double loss_weight, const void* features,
                           const int64_t* index, const int64_t* labels, const int64_t* excluded, float* loss,
                           float* anchor_loss, int64_t* positives, void* grad_features, void* workspace,
                           int64_t* needed) {
  InfoNCE args{};
  args.layout = {pixels, dim, map_pixels};
  args.count = count;
  args.queues = static_cast<int>(queues);
  args.queue[0] = {queue0, counts0, capacity0, static_cast<Dtype>(queue_type)};
  args.queue[1] = {queue1, counts1, capacity1, static_cast<Dtype>(queue_type)};
  args.classes = classes;
  args.temperature = temperature;
  args.base_temperature = base_temperature;
  args.loss_weight = loss_weight;
  args.dtype = static_cast<Dtype>(feature_type);
  args.features = features;
  args.index = index;
  args.labels = labels;
  args.excluded = excluded;
  args.loss = loss;
  args.anchor_loss = anchor_loss;
  args.positives = positives;
  args.grad_features = grad_features;
  const InfoNCEDevice device{static_cast<int>(sm_count), static_cast<int>(capability), shared_memory, allow_tf32 != 0};
  if (workspace) return infonce_cuda(args, device, workspace, nullptr);
  const auto bytes = static_cast<int64_t>(infonce_cuda_workspace(args, device));
  return cudaMemcpyAsync(needed, &bytes, sizeof(bytes), cudaMemcpyHostToDevice, nullptr);
}
