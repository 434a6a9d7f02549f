// Fibers and their order.
#include <sys/mman.h>

#include <cstdlib>
#include <sstream>
#include <vector>

#include "cuda_runtime.h"
#include "emulated_instructions.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#ifdef PYDEFECT_EMULATION_RACES
#include <sanitizer/tsan_interface.h>
#endif

namespace emulation {

Fiber* current = nullptr;
uint3 block_index;
dim3 block_size;
dim3 grid_size;
char* dynamic_shared = nullptr;

namespace {

constexpr size_t kStack = size_t{128} << 10;
constexpr int kMostThreads = 1024;
// Of the smallest cards that run the machine code for 8.0.
constexpr size_t kMostShared = size_t{99} << 10;

#if defined(__x86_64__)
// swapcontext asks the kernel for the signal mask each time, which would cost a hundred times this.
asm(R"(
.text
.globl pydefect_emulation_switch
.hidden pydefect_emulation_switch
.type pydefect_emulation_switch, @function
pydefect_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pydefect_emulation_switch, .-pydefect_emulation_switch
)");
extern "C" __attribute__((visibility("hidden"))) void pydefect_emulation_switch(void** from, void* to);

class Context {
 public:
  void start(char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + kStack);
    *--top = nullptr;  // where `entry` would return to; it never does
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
  }
  void switch_to(Context& other) { pydefect_emulation_switch(&stack_pointer_, other.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};
#else
class Context {
 public:
  void start(char* stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};
#endif

// What ThreadSanitizer is told: every fiber is a thread of its own, and only barriers order what threads of a
// block read and write. Collective operations such as __shfl_sync order no memory. One block follows the
// other, as if all were ordered: shared memory is the same for all of them here. This file is not
// instrumented, so that the scheduler's own bookkeeping is no race.
#ifdef PYDEFECT_EMULATION_RACES
class Races {
 public:
  void switch_to() {
    if (fiber_ == nullptr) fiber_ = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(fiber_, __tsan_switch_to_fiber_no_sync);
  }
  void be_here() { fiber_ = __tsan_get_current_fiber(); }
  static void arrive(void* barrier) { __tsan_release(barrier); }
  static void leave(void* barrier) { __tsan_acquire(barrier); }

 private:
  void* fiber_ = nullptr;
};
#else
class Races {
 public:
  void switch_to() {}
  void be_here() {}
  static void arrive(void*) {}
  static void leave(void*) {}
};
#endif

// A thread may be at the next barrier before another has left this one, never two ahead.
struct Barriers {
  uint64_t both[2];
  void* of(unsigned passed) { return &both[passed % 2]; }
};

struct Copy {
  void* to;
  const void* from;
  int valid;
  int bytes;

  void make() const {
    std::memcpy(to, from, static_cast<size_t>(valid));
    std::memset(static_cast<char*>(to) + valid, 0, static_cast<size_t>(bytes - valid));
  }
};

struct Slot {
  Fiber fiber;
  std::vector<Copy> open;                 // not committed yet
  std::vector<std::vector<Copy>> groups;  // oldest first
  Context context;
  Races races;
  Wait waits = Wait::kNothing;
  const char* where = "";
  unsigned operations = 0;
  unsigned warp_barriers = 0;
  unsigned block_barriers = 0;
};

uint64_t generator = 0x9e3779b97f4a7c15u;
std::vector<Slot> slots;
char* stacks = nullptr;
int thread_count = 0;
Context scheduler;
Races scheduler_races;
Barriers block_barriers;
Barriers warp_barriers[kMostThreads / kLanes];
uint64_t block_start;
uint64_t block_end;
const std::function<void()>* body = nullptr;
std::string failure;
alignas(64) char messages[kMostThreads][2][kLargestMessage];

Slot& slot_of(Fiber* fiber) {
  return slots[static_cast<size_t>(fiber->warp * kLanes + fiber->lane)];
}

void enter() {
  Races::leave(&block_start);
  try {
    (*body)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  wait(Wait::kEnd, "the end");
}

[[noreturn]] void fail(const char* name, const std::string& what) {
  std::ostringstream text;
  text << "emulated kernel " << name << ", block (" << block_index.x << ", " << block_index.y << ", "
       << block_index.z << "): " << what;
  throw std::runtime_error(text.str());
}

// Runs a warp until all of its lanes are at a barrier of the block, or at their end.
void run_warp(const char* name, int warp) {
  const int first = warp * kLanes;
  const int lanes = std::min(kLanes, thread_count - first);
  for (;;) {
    const unsigned shuffle = random_below(kLanes);
    int at_warp = 0;
    int elsewhere = 0;
    Slot* waits = nullptr;
    for (int i = 0; i < kLanes; ++i) {
      const int lane = static_cast<int>(static_cast<unsigned>(i) ^ shuffle);
      if (lane >= lanes) continue;
      Slot& slot = slots[static_cast<size_t>(first + lane)];
      if (slot.waits == Wait::kNothing) {
        current = &slot.fiber;
        slot.races.switch_to();
        scheduler.switch_to(slot.context);
        current = nullptr;
        if (!failure.empty()) fail(name, failure);
      }
      if (slot.waits == Wait::kWarp || slot.waits == Wait::kCollective) {
        if (waits != nullptr && std::string(waits->where) != slot.where) {
          fail(name, std::string("lanes of a warp are at ") + waits->where + " and at " + slot.where);
        }
        waits = &slot;
        ++at_warp;
      } else {
        ++elsewhere;
      }
    }
    if (at_warp == 0) return;
    if (elsewhere > 0 || lanes < kLanes) {
      fail(name, std::string("not all lanes of a warp are at ") + waits->where);
    }
    for (int lane = 0; lane < lanes; ++lane) slots[static_cast<size_t>(first + lane)].waits = Wait::kNothing;
  }
}

void run_block(const char* name) {
  const int warps = (thread_count + kLanes - 1) / kLanes;
  for (int t = 0; t < thread_count; ++t) {
    Slot& slot = slots[static_cast<size_t>(t)];
    slot.fiber = {{static_cast<unsigned>(t), 0, 0}, t % kLanes, t / kLanes};
    slot.waits = Wait::kNothing;
    slot.warp_barriers = 0;
    slot.block_barriers = 0;
    slot.open.clear();
    slot.groups.clear();
    slot.context.start(stacks + static_cast<size_t>(t) * kStack, &enter);
  }
  scheduler_races.be_here();
  Races::arrive(&block_start);
  for (;;) {
    const int shift = static_cast<int>(random_below(static_cast<unsigned>(warps)));
    const bool backwards = random_below(2) == 1;
    for (int i = 0; i < warps; ++i) {
      const int turn = (i + shift) % warps;
      run_warp(name, backwards ? warps - 1 - turn : turn);
    }
    int ended = 0;
    for (int t = 0; t < thread_count; ++t) ended += slots[static_cast<size_t>(t)].waits == Wait::kEnd;
    if (ended == thread_count) break;
    if (ended > 0) fail(name, "some threads have ended, others wait at __syncthreads");
    for (int t = 0; t < thread_count; ++t) slots[static_cast<size_t>(t)].waits = Wait::kNothing;
  }
  Races::leave(&block_end);
}

}  // namespace

unsigned random_below(unsigned bound) {
  generator ^= generator << 13;
  generator ^= generator >> 7;
  generator ^= generator << 17;
  return static_cast<unsigned>((generator >> 33) % bound);
}

void* message(int lane) {
  const Slot& slot = slot_of(current);
  return messages[current->warp * kLanes + lane][slot.operations % 2];
}

void next_message() {
  ++slot_of(current).operations;
}

void wait(Wait what, const char* where) {
  Slot& slot = slot_of(current);
  slot.waits = what;
  slot.where = where;
  void* barrier = nullptr;
  if (what == Wait::kWarp) barrier = warp_barriers[current->warp].of(slot.warp_barriers++);
  if (what == Wait::kBlock) barrier = block_barriers.of(slot.block_barriers++);
  if (what == Wait::kEnd) barrier = &block_end;
  if (barrier != nullptr) Races::arrive(barrier);
  scheduler_races.switch_to();
  slot.context.switch_to(scheduler);
  if (barrier != nullptr) Races::leave(barrier);
}

void copy(void* to, const void* from, int valid, int bytes) {
  const Copy one{to, from, valid, bytes};
  if (random_below(2) == 0) {
    one.make();
  } else {
    slot_of(current).open.push_back(one);
  }
}

void commit() {
  Slot& slot = slot_of(current);
  slot.groups.push_back(std::move(slot.open));
  slot.open.clear();
}

void wait_for(int pending) {
  std::vector<std::vector<Copy>>& groups = slot_of(current).groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& one : groups.front()) one.make();
    groups.erase(groups.begin());
  }
}

void run(const char* name, dim3 grid, int threads, size_t shared, const std::function<void()>& kernel) {
  if (stacks == nullptr) {
    void* memory =
        mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the emulation's stacks");
    stacks = static_cast<char*>(memory);
    slots.resize(kMostThreads);
    if (const char* seed = std::getenv("PYDEFECT_EMULATION_SEED"))
      generator += std::strtoull(seed, nullptr, 10) << 1;
  }
  block_index = {0, 0, 0};
  if (threads < 1 || threads > kMostThreads)
    fail(name, "no block has " + std::to_string(threads) + " threads");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail(name, "no grid has this size");
  }
  if (shared > kMostShared) fail(name, std::to_string(shared) + " bytes of shared memory are too many");
  thread_count = threads;
  block_size = dim3(static_cast<unsigned>(threads));
  grid_size = grid;
  body = &kernel;
  failure.clear();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t shift = random_below(static_cast<unsigned>(std::min<uint64_t>(blocks, 1u << 30)));
  const bool backwards = random_below(2) == 1;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t turn = (i + shift) % blocks;
    const uint64_t block = backwards ? blocks - 1 - turn : turn;
    block_index = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                   static_cast<unsigned>(block / grid.x / grid.y)};
    // A fresh place for every block, full of NaN: what it reads it must have written.
    std::vector<char> memory(shared + 128, static_cast<char>(0xff));
    dynamic_shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128);
    run_block(name);
  }
}

}  // namespace emulation
