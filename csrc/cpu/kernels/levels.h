// Every .cpp file in this folder is compiled once for each instruction set level, with that level's flags and
// with PYDEFECT_LEVEL as the name of the namespace that its code sits in. PYDEFECT_KERNEL declares the table
// of inner loops that such a file defines at every level; PYDEFECT_ACTIVE_KERNEL (../dispatch.h) chooses one.
#pragma once

#ifdef PYDEFECT_X86_KERNELS
#define PYDEFECT_KERNEL(Type, name) \
  namespace portable {              \
  extern const Type name;           \
  }                                 \
  namespace avx2 {                  \
  extern const Type name;           \
  }                                 \
  namespace avx512 {                \
  extern const Type name;           \
  }                                 \
  namespace avx512bf16 {            \
  extern const Type name;           \
  }
#else
#define PYDEFECT_KERNEL(Type, name) \
  namespace portable {              \
  extern const Type name;           \
  }
#endif
