// The switch keeps what a function call must keep in each ABI (callee-saved registers), and nothing else.
#include "fiber.h"

#include <cstdint>
#include <cstring>

#ifdef PODIUM_FIBER_UCONTEXT
#include <ucontext.h>
#include <memory>
#endif

namespace emulate {

#ifdef __APPLE__
#define SYMBOL "_podium_emulate_switch"
#else
#define SYMBOL "podium_emulate_switch"
#endif

#if defined(__x86_64__)

asm(".text\n"
    ".p2align 4\n"
    ".globl " SYMBOL "\n"
    SYMBOL ":\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n");

void* prepare_fiber(char* stack, std::size_t bytes, void (*entry)()) {
    // At a function's entry the stack pointer is 8 beyond a multiple of 16: six registers and the address of `entry`
    // are taken off, and a return address that is never used stays.
    auto top = (reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t{15};
    auto* slots = reinterpret_cast<std::uintptr_t*>(top) - 8;
    std::memset(slots, 0, 8 * sizeof *slots);
    slots[6] = reinterpret_cast<std::uintptr_t>(entry);
    return slots;
}

#elif defined(__aarch64__)

asm(".text\n"
    ".p2align 4\n"
    ".globl " SYMBOL "\n"
    SYMBOL ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");

void* prepare_fiber(char* stack, std::size_t bytes, void (*entry)()) {
    auto top = (reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t{15};
    auto* slots = reinterpret_cast<std::uintptr_t*>(top - 160);
    std::memset(slots, 0, 160);
    slots[11] = reinterpret_cast<std::uintptr_t>(entry);  // x30, to which `ret` jumps
    return slots;
}

#else  // Any other processor: slower, for swapcontext keeps the signal mask too.

namespace {
struct Fiber {
    ucontext_t context;
};
thread_local Fiber scheduler;
}  // namespace

void podium_emulate_switch(void** from, void* to) {
    // The scheduler's first switch finds nothing saved in *from.
    auto* source = *from != nullptr ? static_cast<Fiber*>(*from) : &scheduler;
    *from = source;
    swapcontext(&source->context, &static_cast<Fiber*>(to)->context);
}

void* prepare_fiber(char* stack, std::size_t bytes, void (*entry)()) {
    // The context lies at the low end of its own stack.
    auto at = (reinterpret_cast<std::uintptr_t>(stack) + 63) & ~std::uintptr_t{63};
    auto* fiber = reinterpret_cast<Fiber*>(at);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = reinterpret_cast<char*>(fiber + 1);
    fiber->context.uc_stack.ss_size = static_cast<std::size_t>(stack + bytes - reinterpret_cast<char*>(fiber + 1));
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, entry, 0);
    return fiber;
}

#endif

}  // namespace emulate
