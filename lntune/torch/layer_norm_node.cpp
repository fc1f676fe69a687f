/* The backward of layer norm as a node of PyTorch's autograd graph.
 *
 * An autograd.Function in Python costs some 6 us a call more than a node of PyTorch's own, which at
 * a few rows is more than both kernels take. This is such a node: it saves what PyTorch's own layer
 * norm saves, and its backward goes straight from the gradient to the kernel, without Python and
 * its lock. Whatever is unusual (the backward is itself recorded, modes, transforms, subclasses,
 * rows that do not lie one behind the other, a case whose kernel is not known here yet) goes
 * through the operator lntune::layer_norm_gradients, which is Python and knows them all.
 *
 * Compiled once per machine and release of PyTorch, against the headers that PyTorch brings;
 * without it autograd.Function serves.
 */
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <dlpack/dlpack.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <tvm/ffi/c_api.h>

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

int (*call_function)(void *, TVMFFIAny *, int32_t, TVMFFIAny *);
void (*take_error)(void **);
int (*release_error)(void *);

enum Argument : int64_t { DY, X, MEAN, RSTD, WEIGHT, DX, DGAMMA, DBETA, ARGUMENTS };

/* The kernel of a backward and the order of its arguments; without a kernel PyTorch's own operator
 * was measured to be faster. `tag` is what calls are counted under. */
struct Backward {
  void *kernel;
  int64_t tag, count, order[ARGUMENTS];
};

/* lntune_count of direct.c while cases are recorded, else null. */
using Count = void (*)(int64_t tag, int64_t rows, int64_t ns);
std::atomic<Count> counted{nullptr};

/* Counts a call with the time from here to `served`. */
struct Counting {
  const Count count = counted.load(std::memory_order_relaxed);
  std::chrono::steady_clock::time_point begun;

  Counting() {
    if (count) begun = std::chrono::steady_clock::now();
  }

  void served(int64_t tag, int64_t rows) const {
    if (!count) return;
    const auto taken = std::chrono::steady_clock::now() - begun;
    count(tag, rows, std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count());
  }
};

std::mutex lock; /* of the next, and not one that knows its owner: a forked child is another one */
std::unordered_map<uint64_t, Backward> backwards;

/* Dtypes as in direct.c: 1 float32, 2 float16, 3 bfloat16, 0 anything else. */
uint64_t dtype_of(const Tensor &t) {
  if (!t.defined()) return 0;
  switch (t.scalar_type()) {
  case at::kFloat: return 1;
  case at::kHalf: return 2;
  case at::kBFloat16: return 3;
  default: return 0;
  }
}

uint64_t key_of(uint64_t hidden, uint64_t x, uint64_t weight, uint64_t bias, uint64_t wanted,
                uint64_t row_bits) {
  return hidden << 32 | x << 16 | weight << 14 | bias << 12 | wanted << 8 | row_bits;
}

/* A dense, contiguous tensor on the CPU, without anything that wants to see what is done to it. */
bool plain(const Tensor &t) {
  static const c10::DispatchKeySet usual = at::empty({1}).key_set() |
                                           c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                           c10::DispatchKeySet(c10::DispatchKey::AutocastCPU);
  return (t.key_set() | usual) == usual && t.is_contiguous();
}

/* Modes, transforms and traces: the operator is for them. */
bool watched() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         included.has(c10::DispatchKey::Python) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchVmapMode) ||
         included.has(c10::DispatchKey::Tracer);
}

struct Saved {
  Tensor input, weight, bias, mean, rstd;
  int64_t dims; /* of a row, the last ones of the input */

  /* Hooks for saved tensors give others. */
  bool has_rows() const { return input.dim() >= dims; }
};

/* The gradients by way of Python, whatever the tensors are and whoever watches. */
variable_list general(const Tensor &dy, const Saved &s, std::array<bool, 3> wanted) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("lntune::layer_norm_gradients", "");
  TORCH_CHECK(s.has_rows(), "the saved input has fewer dimensions than a row");
  const auto sizes = s.input.sym_sizes();
  const auto optional = [](const Tensor &t) {
    return t.defined() ? c10::IValue(t) : c10::IValue();
  };
  const c10::SymIntArrayRef shape(sizes.slice(sizes.size() - s.dims));
  const c10::List<bool> mask({wanted[0], wanted[1], wanted[2]});
  const auto weight = optional(s.weight), bias = optional(s.bias);
  torch::jit::Stack stack{dy, s.input, shape, s.mean, s.rstd, weight, bias, mask};
  op.callBoxed(stack);
  variable_list results(3);
  for (size_t i = 0; i < 3; ++i)
    if (wanted[i] && stack[i].isTensor()) results[i] = stack[i].toTensor();
  return results;
}

DLTensor described(const Tensor &t, int64_t *shape, int ndim) {
  const uint8_t code = t.scalar_type() == at::kBFloat16 ? kDLBfloat : kDLFloat;
  const DLDataType dtype{code, (uint8_t)(8 * t.element_size()), 1};
  return {t.data_ptr(), {kDLCPU, 0}, ndim, dtype, shape, nullptr, 0};
}

/* The gradients by the kernel; false, and nothing done, where none is known or it refuses. */
bool direct(Tensor dy, const Saved &s, std::array<bool, 3> wanted, variable_list &results) {
  if (at::GradMode::is_enabled() || watched()) return false;
  /* As from sum(). */
  if (dy.key_set() == s.input.key_set() && !dy.is_contiguous()) dy = dy.contiguous();
  const bool usual = plain(dy) && plain(s.input) && plain(s.mean) && plain(s.rstd) &&
                     (!s.weight.defined() || plain(s.weight)) &&
                     (!s.bias.defined() || plain(s.bias));
  if (!usual || dy.scalar_type() != s.input.scalar_type() || dy.sizes() != s.input.sizes() ||
      s.mean.scalar_type() != at::kFloat || s.rstd.scalar_type() != at::kFloat || !s.has_rows())
    return false;
  const auto shape = s.input.sizes().slice(s.input.dim() - s.dims);
  int64_t hidden = c10::multiply_integers(shape);
  if (hidden <= 0 || hidden >> 31 || !s.input.numel()) return false;
  int64_t rows = s.input.numel() / hidden;
  /* Other ones, by hooks for saved tensors. */
  if (s.mean.numel() != rows || s.rstd.numel() != rows ||
      (s.weight.defined() && s.weight.sizes() != shape) ||
      (s.bias.defined() && s.bias.sizes() != shape))
    return false;
  const uint64_t mask = wanted[0] | wanted[1] << 1 | wanted[2] << 2;
  const uint64_t bits = 64 - __builtin_clzll((uint64_t)rows);
  Backward backward;
  {
    std::lock_guard<std::mutex> reading(lock);
    const auto entry = backwards.find(
        key_of(hidden, dtype_of(s.input), dtype_of(s.weight), dtype_of(s.bias), mask, bits));
    if (entry == backwards.end()) return false;
    backward = entry->second;
  }
  if (!backward.kernel) {
    auto stats = s.input.sizes().vec();
    std::fill(stats.end() - s.dims, stats.end(), 1);
    const Counting counting;
    const auto out = at::native_layer_norm_backward(dy, s.input, shape, s.mean.view(stats),
                                                    s.rstd.view(stats), s.weight, s.bias, wanted);
    counting.served(backward.tag, rows);
    results = {std::get<0>(out), std::get<1>(out), std::get<2>(out)};
    return true;
  }
  const Tensor *like[] = {&s.input, &s.weight, &s.bias};
  for (size_t i = 0; i < 3; ++i)
    if (wanted[i]) results[i] = at::detail::empty_cpu(like[i]->sizes(), like[i]->scalar_type());
  const Tensor *tensors[ARGUMENTS] = {&dy,       &s.input,    &s.mean,     &s.rstd,
                                      &s.weight, &results[0], &results[1], &results[2]};
  DLTensor described_[ARGUMENTS];
  TVMFFIAny values[ARGUMENTS], nothing;
  std::memset(values, 0, sizeof values);
  std::memset(&nothing, 0, sizeof nothing);
  int64_t matrix[2] = {rows, hidden};
  for (int64_t i = 0; i < backward.count; ++i) {
    const int64_t which = backward.order[i];
    const bool is_matrix = which == DY || which == X || which == DX;
    const bool by_row = which == MEAN || which == RSTD;
    described_[i] =
        described(*tensors[which], is_matrix || by_row ? matrix : matrix + 1, is_matrix ? 2 : 1);
    values[i].type_index = kTVMFFIDLTensorPtr;
    values[i].v_ptr = &described_[i];
  }
  const Counting counting;
  if (!call_function(backward.kernel, values, (int32_t)backward.count, &nothing)) {
    counting.served(backward.tag, rows);
    return true;
  }
  void *error = nullptr; /* Python will call again and say it */
  take_error(&error);
  if (error) release_error(error);
  results = variable_list(3);
  return false;
}

struct LayerNormBackward : torch::autograd::Node {
  SavedVariable input, weight, bias, mean, rstd;
  int64_t dims = 1;

  std::string name() const override { return "LntuneLayerNormBackward"; }

  std::array<bool, 3> wanted() const {
    return {task_should_compute_output(0), task_should_compute_output(1),
            task_should_compute_output(2)};
  }

  variable_list apply(variable_list &&gradients) override {
    std::lock_guard<std::mutex> holding(mutex_);
    if (!gradients[0].defined()) return variable_list(3);
    const Saved saved{input.unpack(), weight.unpack(), bias.unpack(),
                      mean.unpack(),  rstd.unpack(),   dims};
    variable_list results(3);
    if (direct(gradients[0], saved, wanted(), results)) return results;
    return general(gradients[0], saved, wanted());
  }

  void release_variables() override {
    std::lock_guard<std::mutex> holding(mutex_);
    for (SavedVariable *saved : {&input, &weight, &bias, &mean, &rstd}) saved->reset_data();
  }

  /* For torch's compiled autograd, which traces the operator. */
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs &args) const override {
    args.collect(std::string("lntune::layer_norm"));
    args.collect(dims);
    for (const SavedVariable *saved : {&input, &weight, &bias, &mean, &rstd})
      args.collect(*saved, false);
  }

  static variable_list traced(const variable_list &gradients,
                              const std::vector<c10::IValue> &values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    const auto saved = packed.unpack<variable_list>();
    const auto present = packed.unpack<std::vector<bool>>();
    const auto asked = packed.unpack<std::vector<bool>>();
    const auto dims = packed.unpack<int64_t>();
    if (!gradients[0].defined()) return variable_list(3);
    Tensor whole[5];
    for (size_t i = 0, next = 0; i < 5; ++i)
      if (present[i]) whole[i] = saved[next++];
    return general(gradients[0], {whole[0], whole[1], whole[2], whole[3], whole[4], dims},
                   {asked[0], asked[1], asked[2]});
  }

  variable_list apply_with_saved(const variable_list &gradients,
                                 torch::dynamo::autograd::SwapSavedVariables &swap) override {
    SavedVariable *all[] = {&input, &weight, &bias, &mean, &rstd};
    for (SavedVariable *saved : all) swap.before(*saved);
    variable_list saved;
    std::vector<bool> present;
    for (SavedVariable *one : all) {
      Tensor t = one->unpack();
      present.push_back(t.defined());
      if (t.defined()) saved.push_back(std::move(t));
    }
    torch::dynamo::autograd::PackedArgs packed;
    packed.pack(saved);
    packed.pack(present);
    const auto asked = wanted();
    packed.pack(std::vector<bool>(asked.begin(), asked.end()));
    packed.pack(dims);
    std::vector<at::TypePtr> schema;
    for (const auto &value : packed.vec()) schema.emplace_back(value.type());
    using namespace torch::dynamo::autograd;
    const auto metadata =
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            get_input_metadata(next_edges()));
    const auto &python = getPyCompilerInterface();
    /* Once a process, as PyTorch's own nodes do: a name can be bound only once, and every node of
     * this kind is the same function. */
    static const std::string function = python->bind_function(
        swap.get_py_compiler(), "LntuneLayerNormBackward", traced, schema, false, true);
    auto results = python->call_function(swap.get_py_compiler(), "apply_functional", function,
                                         gradients, packed.vec(), metadata);
    for (SavedVariable *one : all) swap.after(*one);
    return results;
  }
};

/* PyTorch counted its nodes by std::shared_ptr first and by itself later. */
template <typename T> auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>) return c10::make_intrusive<T>();
  else return std::shared_ptr<T>(new T(), [](T *node) { deleteNode(node); });
}

Tensor borrowed(void *impl) {
  if (!impl) return Tensor();
  return Tensor(
      c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::unsafe_reclaim_from_nonowning(
          (c10::TensorImpl *)impl));
}

} // namespace

extern "C" {

void lntune_layer_norm_node_init(void *call, void *error, void *decref) {
  call_function = (int (*)(void *, TVMFFIAny *, int32_t, TVMFFIAny *))call;
  take_error = (void (*)(void **))error;
  release_error = (int (*)(void *))decref;
  /* A process forks only between two looks at the table: a child that inherits the lock shut by
   * another thread would wait for ever. */
  static const int registered =
      pthread_atfork([] { lock.lock(); }, [] { lock.unlock(); }, [] { lock.unlock(); });
  (void)registered;
}

/* A Record of direct.c; inputs: x, normalized_shape, weight, bias, eps; outputs: y, mean, rstd. */
int lntune_layer_norm_node_record(void *const *inputs, void *const *outputs, int dims,
                                  char *message, size_t size) {
  try {
    const Tensor input = borrowed(inputs[0]);
    const Tensor weight = borrowed(inputs[2]), bias = borrowed(inputs[3]);
    const Tensor &y = *(const Tensor *)outputs[0];
    auto node = make_node<LayerNormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, weight, bias));
    node->dims = dims;
    node->input = SavedVariable(input, false);
    node->weight = SavedVariable(weight, false);
    node->bias = SavedVariable(bias, false);
    node->mean = SavedVariable(*(const Tensor *)outputs[1], false);
    node->rstd = SavedVariable(*(const Tensor *)outputs[2], false);
    torch::autograd::create_gradient_edge(const_cast<Tensor &>(y), node);
    return 0;
  } catch (const c10::Error &e) {
    std::strncpy(message, e.what_without_backtrace(), size - 1);
  } catch (const std::exception &e) {
    /* Of Python's, from a hook for saved tensors: then its error is set. */
    std::strncpy(message, e.what(), size - 1);
  }
  return 1;
}

/* The kernel (null: PyTorch's operator) of backwards that look like this, with rows of first to
 * last bits; dtypes as above, 0 where there is no vector; `wanted` has a bit for each of dx,
 * dgamma, dbeta; `tag` is what calls are counted under. */
void lntune_layer_norm_node_remember(void *kernel, int64_t hidden, int64_t x, int64_t weight,
                                     int64_t bias, int64_t wanted, int64_t first, int64_t last,
                                     int64_t tag, int64_t count, const int64_t *order) {
  Backward backward{kernel, tag, count, {}};
  std::copy(order, order + count, backward.order);
  std::lock_guard<std::mutex> writing(lock);
  for (int64_t bits = first; bits <= last; ++bits)
    backwards[key_of(hidden, x, weight, bias, wanted, bits)] = backward;
}

/* Count calls from now on by lntune_count of direct.c, or with null no longer. */
void lntune_layer_norm_node_count(void *count) { counted = (Count)count; }

void lntune_layer_norm_node_forget() {
  std::lock_guard<std::mutex> writing(lock);
  backwards.clear();
}
}
