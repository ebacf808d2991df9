# The one list of native sources: included by the top-level build and, inside a patched ggml, by ggml/ggml-ptqtp.cmake.
set(PTQTP_CODEC_SOURCES codec/codec.c codec/types.c quantize/methods.c quantize/planes.c
    quantize/quantize.c quantize/trellis.c)
set(PTQTP_DOT_SOURCES kernels/cpu.c kernels/dot.c kernels/panel.c)

# A file that holds one instruction set, and its flags; kernels/cpu.c asks the CPU before anything calls in. On another
# architecture the file compiles to nothing and takes no flags.
set(ptqtp_zmm "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma")
set(PTQTP_X86_FILES
    "kernels/x86/dot-avx2.c:-mavx2 -mfma -mf16c"
    "kernels/x86/dot-ssse3.c:-mssse3"
    "kernels/x86/dot-tp2_2-avx2.c:-mavx2 -mfma"
    "kernels/x86/dot-tp2_2-ssse3.c:-mssse3"
    "kernels/x86/panel-ssse3.c:-mssse3"
    "kernels/x86/panel-avx.c:-mavx"
    "kernels/x86/panel-avx2.c:-mavx2 -mfma"
    "kernels/x86/panel-avxvnni.c:-mavx2 -mfma -mavxvnni"
    "kernels/x86/panel-avx512bw.c:${ptqtp_zmm}"
    "kernels/x86/panel-avx512vnni.c:${ptqtp_zmm} -mavx512vnni"
    "kernels/x86/panel-avx512vbmi.c:${ptqtp_zmm} -mavx512vnni -mavx512vbmi"
    "kernels/x86/panel-amx.c:${ptqtp_zmm} -mavx512vnni -mavx512vbmi -mamx-tile -mamx-int8")
set(PTQTP_ARM64_FILES
    "kernels/arm/dot-neon.c:-march=armv8-a"
    "kernels/arm/dot-neon-dotprod.c:-march=armv8.2-a+dotprod"
    "kernels/arm/panel-neon.c:-march=armv8-a"
    "kernels/arm/panel-neon-dotprod.c:-march=armv8.2-a+dotprod"
    "kernels/arm/panel-neon-i8mm.c:-march=armv8.2-a+dotprod+i8mm")

# What a converter needs besides; the package's own library only.
set(PTQTP_CONVERT_SOURCES host/parallel.cpp host/calibrate.cpp host/convert.cpp codec/check.c codec/levels.c
    bulk/bulk.c bulk/base.c bulk/plain.c host/read.c)
set(PTQTP_CONVERT_X86_FILES
    "bulk/avx2.c:-mavx2 -mfma -mf16c"
    "bulk/avx512.c:-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512")
set(PTQTP_CONVERT_ARM64_FILES)

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" ptqtp_processor)
# ptqtp_isa_files(DIR [CONVERT]): appends the files to PTQTP_DOT_SOURCES (or PTQTP_CONVERT_SOURCES) and sets their
# flags; DIR is the folder of this file
function(ptqtp_isa_files dir)
  set(what DOT)
  set(lists PTQTP)
  if("CONVERT" IN_LIST ARGN)
    set(what CONVERT)
    set(lists PTQTP_CONVERT)
  endif()
  set(sources ${PTQTP_${what}_SOURCES})
  foreach(arch X86 ARM64)
    foreach(entry IN LISTS ${lists}_${arch}_FILES)
      string(REPLACE ":" ";" entry "${entry}")
      list(GET entry 0 file)
      list(GET entry 1 flags)
      separate_arguments(flags)
      list(APPEND sources ${file})
      if((arch STREQUAL "X86" AND ptqtp_processor MATCHES "^(x86_64|amd64|i[3-6]86)$")
         OR (arch STREQUAL "ARM64" AND ptqtp_processor MATCHES "^(aarch64|arm64)$"))
        if(NOT MSVC)
          set_source_files_properties(${dir}/${file} PROPERTIES COMPILE_OPTIONS "${flags}")
        endif()
      endif()
    endforeach()
  endforeach()
  set(PTQTP_${what}_SOURCES ${sources} PARENT_SCOPE)
endfunction()
