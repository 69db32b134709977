// Global<T> and Shared<T>, which are T* under nvcc: the same operators, each access checked.
#pragma once

#include <type_traits>

#include "runtime.h"

// Device memory. Eight bytes, as a device pointer is, so that it may stand in arguments and in structs.
template <class T>
class Global {
  public:
    Global() = default;
    Global(std::nullptr_t) {}
    template <class U>
        requires(std::is_same_v<T, const U>)
    Global(Global<U> other) : address_(other.address()) {}

    static Global at(std::uint64_t address) {
        Global pointer;
        pointer.address_ = address;
        return pointer;
    }
    std::uint64_t address() const { return address_; }

    T& operator[](std::ptrdiff_t i) const { return *(*this + i); }
    T& operator*() const { return *reinterpret_cast<T*>(emulate::global_bytes(address_, sizeof(T), alignof(T), !std::is_const_v<T>)); }
    T* operator->() const { return &**this; }

    Global operator+(std::ptrdiff_t n) const { return at(address_ + static_cast<std::uint64_t>(n) * sizeof(T)); }
    Global operator-(std::ptrdiff_t n) const { return *this + -n; }
    Global& operator+=(std::ptrdiff_t n) { return *this = *this + n; }
    Global& operator++() { return *this += 1; }
    explicit operator bool() const { return address_ != 0; }
    friend bool operator==(Global, Global) = default;

  private:
    std::uint64_t address_ = 0;
};

// One element of shared memory. A use of it is a read, an assignment a write: give a variable that holds a value its
// type, for `auto` would name the place.
template <class T>
class SharedElement {
    using Value = std::remove_const_t<T>;

  public:
    explicit SharedElement(std::uint32_t offset) : offset_(offset) {}
    operator Value() const {
        return *reinterpret_cast<const Value*>(emulate::shared_bytes(offset_, sizeof(T), alignof(T), emulate::Access::read));
    }
    Value operator=(const Value& value) const {
        static_assert(!std::is_const_v<T>);
        *reinterpret_cast<Value*>(emulate::shared_bytes(offset_, sizeof(T), alignof(T), emulate::Access::write)) = value;
        return value;
    }
    Value operator=(const SharedElement& other) const { return *this = static_cast<Value>(other); }
    Value operator+=(Value value) const { return *this = static_cast<Value>(*this) + value; }
    Value operator-=(Value value) const { return *this = static_cast<Value>(*this) - value; }
    Value operator*=(Value value) const { return *this = static_cast<Value>(*this) * value; }
    Value operator|=(Value value) const { return *this = static_cast<Value>(*this) | value; }
    auto operator&() const;

  private:
    std::uint32_t offset_;
};

// Dynamic shared memory of the block: an offset into it, as shared addresses are.
template <class T>
class Shared {
  public:
    Shared() = default;
    template <class U>
        requires(std::is_same_v<T, const U>)
    Shared(Shared<U> other) : offset_(other.offset()) {}

    static Shared at(std::uint32_t offset) {
        Shared pointer;
        pointer.offset_ = offset;
        return pointer;
    }
    std::uint32_t offset() const { return offset_; }

    SharedElement<T> operator[](std::ptrdiff_t i) const { return *(*this + i); }
    SharedElement<T> operator*() const { return SharedElement<T>(offset_); }
    Shared operator+(std::ptrdiff_t n) const {
        return at(offset_ + static_cast<std::uint32_t>(n * static_cast<std::ptrdiff_t>(sizeof(T))));
    }
    Shared operator-(std::ptrdiff_t n) const { return *this + -n; }
    Shared& operator+=(std::ptrdiff_t n) { return *this = *this + n; }
    friend bool operator==(Shared, Shared) = default;

  private:
    std::uint32_t offset_ = 0;
};

template <class T>
auto SharedElement<T>::operator&() const {
    return Shared<T>::at(offset_);
}

// The same bytes as another type.
template <class U, class T>
Global<U> view(Global<T> pointer) {
    return Global<U>::at(pointer.address());
}
template <class U, class T>
Shared<U> view(Shared<T> pointer) {
    return Shared<U>::at(pointer.offset());
}

template <class T>
Shared<T> shared_memory(unsigned byte_offset = 0) {
    return Shared<T>::at(byte_offset);
}
