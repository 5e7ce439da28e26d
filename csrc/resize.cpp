#include "resize.hpp"

#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace vito {

namespace {

constexpr size_t kTaps = 4;

// One pixel as red, green, blue and an unused fourth value, as a vector register holds it.
typedef float Pixel __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

// How one row or column of the result is made of four of the window's.
struct Mix {
  std::array<size_t, kTaps> place;
  std::array<float, kTaps> weight;
};

double keys(double distance) {
  constexpr double a = -0.5;
  const double x = std::abs(distance);
  if (x <= 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? a * (((x - 5) * x + 8) * x - 4) : 0;
}

std::vector<Mix> mixes(size_t source, size_t target, bool mirrored) {
  std::vector<Mix> result(target);
  for (size_t i = 0; i < target; ++i) {
    const double center = (static_cast<double>(i) + 0.5) * static_cast<double>(source) / static_cast<double>(target) - 0.5;
    const double first = std::floor(center) - 1;
    Mix& mix = result[mirrored ? target - 1 - i : i];
    for (size_t tap = 0; tap < kTaps; ++tap) {
      const double place = first + static_cast<double>(tap), last = static_cast<double>(source) - 1;
      mix.place[tap] = static_cast<size_t>(place < 0 ? 0 : place > last ? last : place);
      mix.weight[tap] = static_cast<float>(keys(center - place));
    }
  }
  return result;
}

Pixel load(const float* pixel) {
  Pixel result;
  std::memcpy(&result, pixel, sizeof result);
  return result;
}

// `floats` takes the row's `width` pixels, and one value more as the last pixel's fourth.
void resize_row(const uint8_t* row, size_t width, const std::vector<Mix>& columns, float* floats, Pixel* out) {
  for (size_t i = 0; i < 3 * width; ++i) floats[i] = row[i];
  for (const Mix& mix : columns) {
    Pixel taps[kTaps];
    for (size_t tap = 0; tap < kTaps; ++tap) taps[tap] = mix.weight[tap] * load(floats + 3 * mix.place[tap]);
    *out++ = (taps[0] + taps[1]) + (taps[2] + taps[3]);
  }
}

void store(Pixel value, uint8_t* out) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  const Pixel zero = {}, top = zero + 255;
  value = value < zero ? zero : value > top ? top : value;
  const Ints4 whole = __builtin_convertvector((value + kRound) - kRound, Ints4);
  for (size_t channel = 0; channel < 3; ++channel) out[channel] = static_cast<uint8_t>(whole[channel]);
}

}  // namespace

void resize_cubic(const Picture& picture, const Window& window, bool vertically, bool horizontally, size_t size,
                  uint8_t* out) {
  if (!window.height || !window.width || window.y > picture.height || window.height > picture.height - window.y ||
      window.x > picture.width || window.width > picture.width - window.x)
    throw std::invalid_argument("a window of " + std::to_string(window.height) + " x " + std::to_string(window.width) +
                                " at (" + std::to_string(window.y) + ", " + std::to_string(window.x) +
                                ") is not inside a picture of " + std::to_string(picture.height) + " x " +
                                std::to_string(picture.width));
  const uint8_t* corner = picture.pixels + window.y * picture.stride + 3 * window.x;
  const std::vector<Mix> rows = mixes(window.height, size, vertically), columns = mixes(window.width, size, horizontally);

  // The window's rows, resized across, for the current rows of the result. Row n is in slot n % 4, since four neighbors
  // are needed at a time.
  std::vector<Pixel> kept(kTaps * size);
  std::vector<float> floats(3 * window.width + 1);
  std::array<size_t, kTaps> holds;
  holds.fill(window.height);
  for (const Mix& mix : rows) {
    std::array<const Pixel*, kTaps> taps;
    for (size_t tap = 0; tap < kTaps; ++tap) {
      const size_t place = mix.place[tap], slot = place % kTaps;
      Pixel* resized = kept.data() + slot * size;
      if (holds[slot] != place) {
        resize_row(corner + place * picture.stride, window.width, columns, floats.data(), resized);
        holds[slot] = place;
      }
      taps[tap] = resized;
    }
    for (size_t i = 0; i < size; ++i, out += 3)
      store(mix.weight[0] * taps[0][i] + mix.weight[1] * taps[1][i] + mix.weight[2] * taps[2][i] +
                mix.weight[3] * taps[3][i],
            out);
  }
}

}  // namespace vito
