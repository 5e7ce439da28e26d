// core_tests [SUITE]: runs the tests of a suite, or all; exit status 1 if one failed, 2 if there are none.
#include <cstdio>
#include <exception>

#include "check.hpp"

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

int main(int argc, char** argv) {
  int run = 0, failed = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && test.suite != argv[1]) continue;
    ++run;
    try {
      test.body();
      std::printf("ok     %s.%s\n", test.suite.c_str(), test.name.c_str());
    } catch (const std::exception& e) {
      ++failed;
      std::printf("FAILED %s.%s: %s\n", test.suite.c_str(), test.name.c_str(), e.what());
    }
  }
  return run == 0 ? 2 : failed != 0;
}
