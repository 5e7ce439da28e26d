#include "resize.hpp"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "philox.hpp"

using namespace vito;

namespace {

std::vector<uint8_t> noise(size_t bytes, uint32_t seed) {
  std::vector<uint8_t> result(bytes);
  for (size_t i = 0; i < bytes; ++i) result[i] = static_cast<uint8_t>(philox(seed, {static_cast<uint32_t>(i), 0, 0, 0})[0]);
  return result;
}

std::vector<uint8_t> resized(const Picture& picture, const Window& window, bool vertically, bool horizontally, size_t size) {
  std::vector<uint8_t> out(size * size * 3);
  resize_cubic(picture, window, vertically, horizontally, size, out.data());
  return out;
}

}  // namespace

// Buffers are exactly as large as the picture, so that the address sanitizer sees every byte too many.
TEST(resize, the_same_size_is_a_copy) {
  const size_t height = 13, width = 17, stride = 3 * width + 5;
  const std::vector<uint8_t> pixels = noise((height - 1) * stride + 3 * width, 1);
  const Picture picture{pixels.data(), height, width, stride};
  const std::vector<uint8_t> out = resized(picture, {4, 8, 9, 9}, false, false, 9);
  for (size_t y = 0; y < 9; ++y) CHECK(!std::memcmp(&out[y * 27], &pixels[(4 + y) * stride + 24], 27));
}

TEST(resize, mirrors_mirror) {
  const std::vector<uint8_t> pixels = noise(20 * 30 * 3, 2);
  const Picture picture{pixels.data(), 20, 30, 90};
  const std::vector<uint8_t> plain = resized(picture, {0, 0, 20, 30}, false, false, 11);
  const std::vector<uint8_t> turned = resized(picture, {0, 0, 20, 30}, true, true, 11);
  for (size_t i = 0; i < 121; ++i) CHECK(!std::memcmp(&plain[3 * i], &turned[3 * (120 - i)], 3));
}

TEST(resize, a_window_sees_nothing_outside) {
  std::vector<uint8_t> pixels(40 * 50 * 3, 255);
  for (size_t y = 10; y < 31; ++y) std::memset(&pixels[(y * 50 + 20) * 3], 100, 25 * 3);
  const Picture picture{pixels.data(), 40, 50, 150};
  for (const size_t size : {1u, 7u, 21u, 64u})
    for (const uint8_t value : resized(picture, {10, 20, 21, 25}, false, false, size)) CHECK(value == 100);
}

TEST(resize, refuses_windows_outside) {
  const std::vector<uint8_t> pixels = noise(10 * 10 * 3, 3);
  const Picture picture{pixels.data(), 10, 10, 30};
  const size_t far = ~size_t{0};
  for (const Window& window : {Window{0, 0, 0, 1}, Window{0, 0, 1, 0}, Window{1, 0, 10, 1}, Window{0, 1, 1, 10},
                               Window{far, 0, 2, 1}, Window{0, 0, far, 1}, Window{0, 11, 1, 1}}) {
    bool refused = false;
    try {
      resized(picture, window, false, false, 4);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}
