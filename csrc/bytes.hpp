// A view of bytes that somebody else owns.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace vito {

class Bytes {
 public:
  Bytes() = default;
  Bytes(const unsigned char* data, size_t size) : data_(data), size_(size) {}
  Bytes(const std::vector<unsigned char>& bytes) : data_(bytes.data()), size_(bytes.size()) {}
  Bytes(std::string_view text) : data_(reinterpret_cast<const unsigned char*>(text.data())), size_(text.size()) {}

  const unsigned char* data() const { return data_; }
  const unsigned char* begin() const { return data_; }
  const unsigned char* end() const { return data_ + size_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }

  unsigned char operator[](size_t i) const {
    assert(i < size_);
    return data_[i];
  }
  unsigned char back() const { return (*this)[size_ - 1]; }
  // The first `count` bytes from `first`, as many as there are.
  Bytes sub(size_t first, size_t count = SIZE_MAX) const {
    assert(first <= size_);
    return {data_ + first, count < size_ - first ? count : size_ - first};
  }
  void drop_front(size_t count) { *this = sub(count); }
  void drop_back(size_t count) { *this = sub(0, size_ - count); }

 private:
  const unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace vito
