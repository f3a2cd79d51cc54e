// Stages of InfoNCE, each of them a launch or two:
//   sort, gather       anchors by class, the list of key tiles                          cuda/infonce_anchors.cuh
//   negatives, merge   m, sum e^(z - m), sum e^(z - m) k; then L and the mean negative  cuda/infonce_pass.cuh, with
//   positives, merge   sums of the loss, sigma(L - z), sigma(L - z) k                   products by infonce_tensor.cuh
//   pairs              without queues: the gradient of both sides of every pair         or infonce_simple.cuh
//   mean, scatter      the loss; the gradient, to the pixels of the anchors             cuda/infonce_finish.cuh
// A pass is cut into as many parts of the keys as fill the device once and leave the workspace below kWorkspace.
#include <algorithm>

#include "infonce/finish.cuh"
#include "infonce/float32.cuh"
#include "infonce/infonce_cuda.h"
#include "infonce/mma.cuh"

namespace pixcontrast {
namespace {

using namespace cuda;

constexpr size_t kWorkspace = 16 << 20;  // bytes, unless the anchors and two slots need more

// Launches passes of one kind of multiplication.
struct Kernel {
  int rows, tile_keys, blocks_per_sm;  // anchors of a block, keys of a tile
  cudaError_t (*launch)(const Pass& pass, int parts, cudaStream_t stream);
};

template <class T, int kDim>
Kernel tensor_kernel() {
  using Tile = TensorTile<T, kDim>;
  return {kTensorRows<Tile>, Tile::kTileKeys, Tile::kBlocks, [](const Pass& pass, int parts, cudaStream_t stream) {
            const auto blocks = static_cast<unsigned>((pass.capacity + kTensorRows<Tile> - 1) / kTensorRows<Tile>);
            return cu_launch(tensor_pass<T, kDim>, dim3(blocks, parts), dim3(kTensorThreads<Tile>),
                             kTensorShared<T, kDim>, stream, pass);
          }};
}

template <class T>
Kernel simple_kernel() {
  return {kSimpleRows, kSimpleRows, kSimpleBlocks, [](const Pass& pass, int parts, cudaStream_t stream) {
            const auto blocks = static_cast<unsigned>((pass.capacity + kSimpleRows - 1) / kSimpleRows);
            return cu_launch(simple_pass<T>, dim3(blocks, parts), dim3(kSimpleThreads), kSimpleShared, stream, pass);
          }};
}

// Calls body with a number of the type.
template <class Body>
auto with_type(Storage type, const Body& body) {
  if (type == Storage::kBFloat16) return body(__nv_bfloat16());
  if (type == Storage::kHalf) return body(__half());
  return body(float());
}

int64_t bytes_of(Storage type) { return type == Storage::kFloat ? 4 : 2; }

// How the arguments are worked on.
struct Plan {
  bool tensor;  // on tensor cores: anchors are kept in the features' type; else in float
  Kernel kernel;
  int parts;     // of the keys in a pass
  int slots;     // for sums over keys
  int segments;  // of the keys
  Storage anchor_type;
};

bool fits_tensor_cores(const InfoNCECuda& args) {
  bool aligned = true;
  for (int q = 0; q < args.queues; ++q) aligned = aligned && reinterpret_cast<uintptr_t>(args.queue[q].rows) % 16 == 0;
  const bool same = args.queues == 0 || args.queue_type == args.feature_type;
  const int64_t dim = args.layout.dim;
  return args.capability >= 80 && aligned && same && dim % 16 == 0 && dim <= 256 &&
         (args.feature_type != Storage::kFloat || args.allow_tf32);
}

template <class T>
bool choose_tensor_kernel(const InfoNCECuda& args, Kernel* kernel) {
  const auto choose = [&](auto dim) {
    *kernel = tensor_kernel<T, decltype(dim)::value>();
    return static_cast<int64_t>(kTensorShared<T, decltype(dim)::value>) <= args.shared_memory;
  };
  if (args.layout.dim <= 64) return choose(std::integral_constant<int, 64>());
  if (args.layout.dim <= 128) return choose(std::integral_constant<int, 128>());
  return choose(std::integral_constant<int, 256>());
}

Plan make_plan(const InfoNCECuda& args, int sm_count) {
  Plan plan{};
  const auto choose = [&](auto number) { return choose_tensor_kernel<decltype(number)>(args, &plan.kernel); };
  plan.tensor = fits_tensor_cores(args) && with_type(args.feature_type, choose);
  plan.anchor_type = plan.tensor ? args.feature_type : Storage::kFloat;
  if (!plan.tensor) {
    const auto simple = [](auto number) { return simple_kernel<decltype(number)>(); };
    plan.kernel = with_type(args.queues > 0 ? args.queue_type : Storage::kFloat, simple);
  }
  plan.segments = args.queues > 0 ? static_cast<int>(args.classes) * args.queues : 1;

  const int64_t tiles = (args.count + plan.kernel.rows - 1) / plan.kernel.rows;
  const int64_t filling = std::max<int64_t>(1, int64_t{sm_count} * plan.kernel.blocks_per_sm / tiles);
  const int64_t row = args.layout.dim * (args.grad_features != nullptr ? sizeof(float) : 0) + sizeof(float2);
  const int64_t anchors = args.count * (args.layout.dim * bytes_of(plan.anchor_type) + 64);
  const int64_t fitting = std::max<int64_t>(1, (int64_t{kWorkspace} - anchors) / (args.count * row));
  plan.parts = static_cast<int>(std::min(filling, fitting));
  // With queues the first slot keeps the negatives while the others take the positives.
  plan.slots = std::max(plan.parts, args.queues > 0 ? 2 : 1);
  return plan;
}

// Hands out pieces of the workspace, each aligned to 256 bytes.
class Pieces {
 public:
  explicit Pieces(void* start) : next_(reinterpret_cast<uintptr_t>(start)), start_(next_) {}

  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  size_t size() const { return next_ - start_; }

 private:
  uintptr_t next_, start_;
};

struct Stages {
  Listing list;
  Pass pass;
  Finish finish;
  void* rows;  // [R, D] anchors
  size_t workspace;
};

Stages lay_out(const InfoNCECuda& args, const Plan& plan, void* workspace) {
  Stages s{};
  Pieces pieces(workspace);
  const int64_t count = args.count, dim = args.layout.dim, slots = plan.slots;
  const bool gradient = args.grad_features != nullptr, each_other = args.queues == 0;
  s.rows = pieces.take<unsigned char>(count * dim * bytes_of(plan.anchor_type));

  Listing& list = s.list;
  list.layout = args.layout;
  list.classes = each_other ? INT64_MAX : args.classes;
  list.count = static_cast<int>(count);
  list.index = args.index;
  list.labels = args.labels;
  list.excluded = args.excluded;
  list.queues = args.queues;
  std::copy(args.queue, args.queue + args.queues, list.queue);
  list.tile_keys = plan.kernel.tile_keys;
  list.used = pieces.take<int>(1);
  list.row = pieces.take<int>(count);
  list.order = pieces.take<int>(count);
  list.pixel = pieces.take<SamePixel>(count);
  list.anchors = pieces.take<Anchor>(count);
  list.first_tile = pieces.take<int>(plan.segments + 1);
  list.valid = pieces.take<int>(plan.segments);
  list.anchor_loss = args.anchor_loss;
  list.positives = args.positives;

  Finish& finish = s.finish;
  finish.list = list;
  finish.dim = dim;
  finish.level = pieces.take<float>(count);
  finish.sigmoids = pieces.take<float>(count);
  finish.pairs = each_other ? pieces.take<PairWeights>(count) : nullptr;
  finish.factor = pieces.take<float>(1);
  finish.temperature = args.temperature;
  finish.base_temperature = args.base_temperature;
  finish.loss_weight = args.loss_weight;
  finish.loss = args.loss;

  Pass& pass = s.pass;
  pass.capacity = count;
  pass.count = list.used;
  pass.dim = static_cast<int>(dim);
  pass.scale = static_cast<float>(1 / args.temperature);
  pass.rows = s.rows;
  pass.anchors = list.anchors;
  pass.level = finish.level;
  pass.pairs = finish.pairs;
  Keys& keys = pass.keys;
  keys.queues = std::max(args.queues, 1);
  for (int q = 0; q < args.queues; ++q) keys.rows[q] = args.queue[q].rows, keys.capacity[q] = args.queue[q].capacity;
  if (each_other) keys.rows[0] = s.rows, keys.capacity[0] = count;
  keys.segments = plan.segments;
  keys.tile_keys = plan.kernel.tile_keys;
  keys.first_tile = list.first_tile;
  keys.valid = list.valid;
  pass.row_sums = pieces.take<float2>(slots * count);
  pass.key_sums = gradient ? pieces.take<float>(slots * count * dim) : nullptr;
  finish.row_sums = pass.row_sums;
  s.workspace = pieces.size();
  return s;
}

bool fits(const InfoNCECuda& args) {
  int64_t keys = args.count;
  if (args.queues > kMaxQueues) return false;
  for (int q = 0; q < args.queues; ++q) keys += args.classes * (args.queue[q].capacity + 64);  // whole tiles
  return keys < INT_MAX / 2 && args.layout.dim < INT_MAX;
}

unsigned blocks_for(int64_t count, int each) { return static_cast<unsigned>((count + each - 1) / each); }

#define TRY(call) \
  if (const cudaError_t status = (call); status != cudaSuccess) return status

}  // namespace

size_t infonce_cuda_workspace(const InfoNCECuda& args, int sm_count) {
  if (args.count == 0 || !fits(args)) return 0;
  return lay_out(args, make_plan(args, sm_count), nullptr).workspace;
}

cudaError_t infonce_cuda(const InfoNCECuda& args, void* workspace, int sm_count, cudaStream_t stream) {
  if (!fits(args)) return cudaErrorInvalidValue;
  const bool gradient = args.grad_features != nullptr, each_other = args.queues == 0;
  if (gradient) {
    TRY(cudaMemsetAsync(args.grad_features, 0, args.layout.pixels * args.layout.dim * bytes_of(args.feature_type),
                        stream));
  }
  if (args.count == 0) return cudaMemsetAsync(args.loss, 0, sizeof(float), stream);

  const Plan plan = make_plan(args, sm_count);
  Stages stages = lay_out(args, plan, workspace);
  const Listing& list = stages.list;
  Pass& pass = stages.pass;
  Finish& finish = stages.finish;
  const auto count = static_cast<unsigned>(args.count);
  TRY(cu_launch(sort_anchors, dim3(1 + blocks_for(count, 8)), dim3(256), 0, stream, list, plan.segments));
  TRY(with_type(args.feature_type, [&](auto number) {
    using T = decltype(number);
    const auto gather = [&](auto* to) {
      return cu_launch(gather_anchors<T, std::decay_t<decltype(*to)>>, dim3(blocks_for(count, 8)), dim3(256), 0, stream,
                       list, static_cast<const T*>(args.features), to, plan.tensor);
    };
    return plan.tensor ? gather(static_cast<T*>(stages.rows)) : gather(static_cast<float*>(stages.rows));
  }));

  const unsigned channel_blocks = blocks_for(args.layout.dim, 32);
  const bool one_stream = gradient && !each_other;  // the gradient comes out of the passes that give the loss
  float* const key_sums = pass.key_sums;
  pass.kind = Kind::kNegatives;
  pass.sums = one_stream;
  TRY(plan.kernel.launch(pass, plan.parts, stream));
  finish.slots = plan.parts;
  finish.key_sums = one_stream ? key_sums : nullptr;
  TRY(cu_launch(merge_negatives, dim3(count, one_stream ? channel_blocks : 1), dim3(32 * kFinishWarps), 0, stream,
                finish));

  pass.kind = Kind::kPositives;
  if (one_stream) pass.key_sums = key_sums + args.count * args.layout.dim;
  finish.slots = one_stream ? plan.slots - 1 : plan.parts;
  TRY(plan.kernel.launch(pass, finish.slots, stream));
  TRY(cu_launch(merge_positives, dim3(blocks_for(count, 8)), dim3(256), 0, stream, finish));
  TRY(cu_launch(mean_loss, dim3(1), dim3(1024), 0, stream, finish));
  if (!gradient) return cudaSuccess;

  if (each_other) {
    pass.kind = Kind::kPairs;
    pass.sums = true;
    TRY(plan.kernel.launch(pass, plan.parts, stream));
  }
  finish.slots = each_other ? plan.parts : plan.slots;
  finish.key_sums = key_sums;
  return with_type(args.feature_type, [&](auto number) {
    using T = decltype(number);
    return cu_launch(scatter_gradient<T>, dim3(count, channel_blocks), dim3(32 * kFinishWarps), 0, stream, finish,
                     static_cast<T*>(args.grad_features));
  });
}

}  // namespace pixcontrast
