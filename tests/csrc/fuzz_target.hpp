// What the fuzz drivers need of a target.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// Inputs to start mutating from.
std::vector<std::string> fuzz_seeds();
