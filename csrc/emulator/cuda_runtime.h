// CUDA kernels on the CPU, for their tests on machines without a GPU: `make emulate`. In place of the toolkit's header of
// this name, so that a host compiler takes the .cu files as they are.
//
// Blocks run one after the other; every thread of a block is a fiber, which runs until it waits for others, in an order
// drawn anew each time. So what depends on a barrier that is missing comes out wrong sooner or later, a barrier that not
// all reach is an error and no hang, and so is what a launch may not ask for. Shared memory begins as NaN and is watched
// at its end. What is not seen: how memory is ordered between barriers, alignment, speed, registers.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time, in one thread of the system

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x, int64_t y = 1, int64_t z = 1) : x(unsigned(x)), y(unsigned(y)), z(unsigned(z)) {}
};
struct int4 {
  int x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;

using std::max;
using std::min;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim = 1, gridDim = 1;

namespace icf::emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10, kGuard = 64;          // bytes
constexpr size_t kFree = 48 << 10, kMost = 227 << 10;      // of shared memory, without and with permission
enum class State { ready, at_warp, at_block, done };

struct Fiber {
  jmp_buf point;  // where it waits
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  int line;            // of the barrier it waits at
  unsigned exchanges;  // with its warp so far
};

inline std::vector<Fiber> fibers;  // of the block that runs
inline std::vector<uint64_t> slots;  // [2, threads], what the lanes of a warp show one another, in turn
inline jmp_buf scheduler;
inline const void* body;  // of the kernel, with its arguments
inline void (*call_body)(const void*);
inline unsigned current;
inline std::vector<unsigned char> shared_memory;
inline std::map<const void*, size_t> permitted;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("emulated CUDA: " + what + ", block " + std::to_string(blockIdx.x));
}

inline void wait(State state, int line) {
  Fiber& self = fibers[current];
  self.state = state, self.line = line;
  if (_setjmp(self.point) == 0) _longjmp(scheduler, 1);  // a tenth of the time of swapcontext
}

inline void run_fiber() {
  if (_setjmp(fibers[current].point) == 0) _longjmp(scheduler, 1);
  call_body(body);
  wait(State::done, 0);
}

inline void start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get(), context.uc_stack.ss_size = kStack, context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  if (_setjmp(scheduler) == 0) setcontext(&context);
  fiber.state = State::ready, fiber.exchanges = 0;
}

// Lets threads go on whom nobody is missing for; returns whether there are any.
inline bool release() {
  bool any = false, block = true;
  for (const Fiber& fiber : fibers) block &= fiber.state == State::at_block || fiber.state == State::done;
  for (size_t first = 0; first < fibers.size(); first += kWarp) {
    const auto begin = fibers.begin() + first, end = begin + kWarp;
    const bool together = std::all_of(begin, end, [&](const Fiber& fiber) {
      return fiber.state == State::at_warp && fiber.line == begin->line && fiber.exchanges == begin->exchanges;
    });
    for (auto fiber = begin; fiber != end; ++fiber) {
      if (together || (block && fiber->state == State::at_block)) fiber->state = State::ready;
      any |= fiber->state == State::ready;
    }
  }
  return any;
}

inline void run_block(std::minstd_rand& random) {
  std::vector<unsigned> order(fibers.size());
  for (unsigned t = 0; t < fibers.size(); ++t) {
    current = order[t] = t;
    start(fibers[t]);
  }
  do {
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned t : order) {
      if (fibers[t].state != State::ready) continue;
      current = t, threadIdx = {t, 0, 0};
      if (_setjmp(scheduler) == 0) _longjmp(fibers[t].point, 1);
    }
  } while (release());
  for (const Fiber& fiber : fibers)
    if (fiber.state != State::done) fail("not all threads reach the barrier of line " + std::to_string(fiber.line));
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(shared_memory.data());
}

template <typename F, typename... P>
void launch(void (*kernel)(P...), dim3 grid, unsigned block, size_t shared, const F& run) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    fail("no such grid");
  if (block == 0 || block > 1024 || block % kWarp) fail("no such block");
  const auto granted = permitted.find(reinterpret_cast<const void*>(kernel));
  if (shared > (granted == permitted.end() ? kFree : granted->second)) fail("more shared memory than permitted");
  fibers.resize(block), slots.resize(2 * block);
  body = &run, call_body = [](const void* f) { (*static_cast<const F*>(f))(); };
  gridDim = grid, blockDim = block;
  std::minstd_rand random(grid.x);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        shared_memory.assign(shared + kGuard, 0xff);
        run_block(random);
        if (std::any_of(shared_memory.end() - kGuard, shared_memory.end(), [](unsigned char x) { return x != 0xff; }))
          fail("written beyond shared memory");
      }
}

template <typename... P>
void permit_shared(void (*kernel)(P...), size_t bytes) {
  if (bytes > kMost) fail("more shared memory than a GPU has");
  permitted[reinterpret_cast<const void*>(kernel)] = bytes;
}

// What each lane of the warp gives, for all of them to see.
template <typename T>
const uint64_t* exchange(unsigned mask, T x, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != ~0u) fail("only whole warps are emulated");
  const unsigned turn = fibers[current].exchanges++ % 2;
  uint64_t* const own = slots.data() + turn * fibers.size() + current / kWarp * kWarp;
  std::memcpy(own + current % kWarp, &x, sizeof(T));
  wait(State::at_warp, line);
  return own;
}

template <typename T>
T shown(const uint64_t* slots, unsigned lane) {
  T x;
  std::memcpy(&x, slots + lane, sizeof(T));
  return x;
}

}  // namespace icf::emulator

inline void __syncthreads(int line = __builtin_LINE()) { icf::emulator::wait(icf::emulator::State::at_block, line); }

inline void __syncwarp(int line = __builtin_LINE()) { icf::emulator::exchange(~0u, 0, line); }

inline unsigned __ballot_sync(unsigned mask, bool x, int line = __builtin_LINE()) {
  const uint64_t* const all = icf::emulator::exchange(mask, x, line);
  unsigned set = 0;
  for (unsigned lane = 0; lane < icf::emulator::kWarp; ++lane) set |= icf::emulator::shown<bool>(all, lane) << lane;
  return set;
}

inline bool __any_sync(unsigned mask, bool x, int line = __builtin_LINE()) { return __ballot_sync(mask, x, line) != 0; }

template <typename T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, int line = __builtin_LINE()) {
  const unsigned lane = threadIdx.x % icf::emulator::kWarp;
  return icf::emulator::shown<T>(icf::emulator::exchange(mask, x, line), lane / width * width + from % width);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int step, int width = 32, int line = __builtin_LINE()) {
  return __shfl_sync(mask, x, int(threadIdx.x % width) ^ step, width, line);
}

inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T atomicAdd(T* to, T x) {
  return std::exchange(*to, *to + x);
}

inline float4 atomicAdd(float4* to, float4 x) {  // as from compute capability 9.0 on
  return std::exchange(*to, {to->x + x.x, to->y + x.y, to->z + x.z, to->w + x.w});
}
