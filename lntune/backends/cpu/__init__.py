"""CPUs: code by LLVM, shared libraries, time by the clock."""
