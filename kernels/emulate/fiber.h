// Cooperative threads: one stack each, switched by hand.
#pragma once

#include <cstddef>

namespace emulate {

// Saves the caller's stack pointer in *from and goes on where `to` was saved.
#if defined(__x86_64__) || defined(__aarch64__)
extern "C" void podium_emulate_switch(void** from, void* to);
#else
#define PODIUM_FIBER_UCONTEXT
void podium_emulate_switch(void** from, void* to);
#endif

// Prepares a stack so that the first switch to the returned pointer calls `entry`, which never returns.
void* prepare_fiber(char* stack, std::size_t bytes, void (*entry)());

}  // namespace emulate
