// Cutting a window out of a picture and resizing it to a square, in one pass over the pixels that count.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vito {

// 8-bit RGB, three bytes a pixel; rows lie `stride` bytes apart.
struct Picture {
  const uint8_t* pixels;
  size_t height, width, stride;
};

struct Window {
  size_t y, x, height, width;
};

// Keys' cubic (a = -1/2) without an antialiasing filter, pixel centers at half integers. Beyond the window's border its
// outermost pixels are repeated. Rounds to nearest, ties to even, in float32. `out` takes size * size pixels without
// gaps, mirrored top to bottom if `vertically` and left to right if `horizontally`. The result is the same on every
// machine. Throws std::invalid_argument for a window that is not inside the picture.
void resize_cubic(const Picture& picture, const Window& window, bool vertically, bool horizontally, size_t size,
                  uint8_t* out);

}  // namespace vito
