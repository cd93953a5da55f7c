// The instructions that the process may use: ONEDNN_MAX_CPU_ISA, which holds oneDNN to older ones, means our GEMMs too.
#pragma once

#include <cstdlib>
#include <string_view>

namespace mixout::cpu {

// The value of that variable, empty where anything is allowed.
inline std::string_view max_isa() {
  const char* name = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (name == nullptr) name = std::getenv("DNNL_MAX_CPU_ISA");
  const std::string_view isa = name == nullptr ? "" : name;
  return isa == "ALL" || isa == "DEFAULT" ? "" : isa;
}

// Whether the variable has one of these words in it, or allows anything.
template <typename... Words>
bool isa_allows(const Words&... words) {
  const std::string_view isa = max_isa();
  return isa.empty() || ((isa.find(words) != std::string_view::npos) || ...);
}

}  // namespace mixout::cpu
