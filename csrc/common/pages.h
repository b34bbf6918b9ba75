// Larger pages for large results: the first write to a page of 4 KB costs more than what the kernels write to it.
#pragma once
#include "common/tensor.h"

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace icf {

// Asks Linux to put fresh memory of 4 MB and more into huge pages, from where NumPy does, too. A refusal does no harm.
inline void prefer_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t least = 4 << 20, page = 4096;
  const uintptr_t bytes = uintptr_t(t.numel()) * t.element_size();
  if (bytes < least) return;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(t.data_ptr()) + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(start), (bytes - page) / page * page, MADV_HUGEPAGE);
#endif
}

}  // namespace icf
