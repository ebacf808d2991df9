# The one list of native sources: included by the top-level build and, inside a patched ggml, by ggml-ptqtp.cmake.
set(PTQTP_CODEC_SOURCES ptqtp-codec.c ptqtp-quantize.c)
set(PTQTP_DOT_SOURCES ptqtp-dot.c ptqtp-dot-avx2.c ptqtp-dot-neon.c)

# Flags of a file that holds one instruction set; ptqtp-dot.c asks the CPU before it calls in. On another architecture
# the file compiles to nothing and takes no flags.
string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" ptqtp_processor)
set(PTQTP_AVX2_FLAGS "")
set(PTQTP_NEON_FLAGS "")
if(NOT MSVC)
  if(ptqtp_processor MATCHES "^(x86_64|amd64|i[3-6]86)$")
    set(PTQTP_AVX2_FLAGS -mavx2 -mfma -mf16c)
  elseif(ptqtp_processor MATCHES "^(aarch64|arm64)$")
    set(PTQTP_NEON_FLAGS -march=armv8.2-a+dotprod)
  endif()
endif()
