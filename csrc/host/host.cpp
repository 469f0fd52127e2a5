// weft._host: what is not a tensor op. Which instruction-set level this processor and operating
// system can run: CPUID says what exists, XGETBV what the system saves, arch_prctl grants AMX.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

constexpr uint32_t bits(std::initializer_list<int> positions) {
  uint32_t mask = 0;
  for (int p : positions) mask |= 1u << p;
  return mask;
}

constexpr bool has(uint32_t value, uint32_t mask) { return (value & mask) == mask; }

uint32_t saved_by_the_system() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

std::string cpu_level() {
  const Registers one = cpuid(1), seven = cpuid(7), more = cpuid(7, 1);
  if (!has(one.c, bits({12, 27, 29}))) return "generic";  // FMA, OSXSAVE, F16C
  const uint32_t os = saved_by_the_system();
  if (!has(os, 0x6)) return "generic";                             // xmm, ymm
  if (!has(seven.b, bits({3, 5, 8}))) return "generic";            // BMI1, AVX2, BMI2
  if (!has(seven.b, bits({16, 17, 28, 30, 31}))) return "avx2";    // AVX-512 F, DQ, CD, BW, VL
  if (!has(seven.c, bits({11})) || !has(os, 0xe6)) return "avx2";  // VNNI; opmask and zmm
  if (!has(more.a, bits({5})) || !has(seven.c, bits({14}))) return "avx512";  // BF16; VPOPCNTDQ
  const bool amx = has(seven.d, bits({22, 24, 25})) && has(os, 0x60000);
  constexpr int request_permission = 0x1023, tile_data = 18;
  if (amx && syscall(SYS_arch_prctl, request_permission, tile_data) == 0) return "amx";
  return "avx512_bf16";
}

}  // namespace
#else
namespace {
std::string cpu_level() { return "generic"; }
}  // namespace
#endif

PYBIND11_MODULE(_host, m) {
  m.doc() = "Processor features that the choice of a native library needs.";
  m.def("cpu_level", &cpu_level,
        "The best of generic, avx2, avx512, avx512_bf16, amx that runs here.");
  m.attr("compiler") = __VERSION__;
}
