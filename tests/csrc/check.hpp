// The least that unit tests need: tests register themselves, a failed check throws.
#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Test {
  std::string suite, name;
  std::function<void()> body;
};

std::vector<Test>& tests();

struct Registration {
  Registration(const char* suite, const char* name, std::function<void()> body) {
    tests().push_back({suite, name, std::move(body)});
  }
};

#define TEST(suite, name)                                              \
  static void suite##_##name();                                        \
  static const Registration register_##suite##_##name(#suite, #name, suite##_##name); \
  static void suite##_##name()

#define FAIL(text)                                                                    \
  do {                                                                                \
    std::ostringstream message_;                                                      \
    message_ << __FILE__ << ":" << __LINE__ << ": " << text;                          \
    throw std::runtime_error(message_.str());                                         \
  } while (false)

#define CHECK(condition) \
  do {                   \
    if (!(condition)) FAIL(#condition); \
  } while (false)

#define CHECK_EQUAL(a, b)                                                        \
  do {                                                                           \
    const auto a_ = (a);                                                         \
    const decltype(a_) b_ = (b);                                                 \
    if (!(a_ == b_)) FAIL(#a " is " << a_ << ", not " << b_);                    \
  } while (false)

#define CHECK_THROWS(expression, exception, part)                                             \
  do {                                                                                        \
    bool thrown_ = false;                                                                     \
    try {                                                                                     \
      (void)(expression);                                                                     \
    } catch (const exception& e) {                                                            \
      thrown_ = true;                                                                         \
      if (std::string(e.what()).find(part) == std::string::npos) FAIL("message: " << e.what()); \
    }                                                                                         \
    if (!thrown_) FAIL(#expression " did not throw");                                         \
  } while (false)
