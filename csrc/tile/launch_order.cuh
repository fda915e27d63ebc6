// Programmatic dependent launch: a kernel that is launched to overlap with the one before it on its stream
// (Launch::overlaps).
#pragma once

#include "tile/arch.cuh"

namespace gdn2 {

// A value that is known from here on, as far as the compiler can tell.
template <class T>
__device__ void pin(T*& address) {
  asm volatile("" : "+l"(address));
}

// Returns when the kernels before this one on the stream are done and what they wrote can be read; at once
// where the launch does not overlap. Every thread that touches global memory comes here first. Only reads
// of a call's inputs need not wait, behind a kernel of the same call that does not overlap: no kernel after
// that one starts before all of its CTAs run, which is when all that came before the call is done.
// `addresses` are made before, while the others still run: the compiler may not put that off.
template <class... Address>
__device__ void wait_for_earlier_kernels(Address*&... addresses) {
  (pin(addresses), ...);
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}

// Lets the next kernel's CTAs start where there is room, as soon as all CTAs of this one have come here. They
// wait, in turn, for the end of this kernel, so nothing has to be written yet.
__device__ inline void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

}  // namespace gdn2
