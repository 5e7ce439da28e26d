#include <pybind11/pybind11.h>

PYBIND11_MODULE(_sampler, m) { m.doc() = "vito-fast C++ core"; }
