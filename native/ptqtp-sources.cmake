# The one list of native sources: included by the top-level build and, inside a patched ggml, by ggml-ptqtp.cmake.
set(PTQTP_CODEC_SOURCES ptqtp-codec.c ptqtp-quantize.c)
set(PTQTP_DOT_SOURCES ptqtp-cpu.c ptqtp-dot.c ptqtp-panel.c)

# A file that holds one instruction set, and its flags; ptqtp-cpu.c asks the CPU before anything calls in. On another
# architecture the file compiles to nothing and takes no flags.
set(PTQTP_X86_FILES
    "ptqtp-dot-avx2.c:-mavx2 -mfma -mf16c"
    "ptqtp-dot-ssse3.c:-mssse3"
    "ptqtp-panel-ssse3.c:-mssse3"
    "ptqtp-panel-avx.c:-mavx"
    "ptqtp-panel-avx2.c:-mavx2 -mfma"
    "ptqtp-panel-avxvnni.c:-mavx2 -mfma -mavxvnni"
    "ptqtp-panel-avx512bw.c:-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma"
    "ptqtp-panel-avx512vnni.c:-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma"
    "ptqtp-panel-amx.c:-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mamx-tile -mamx-int8")
set(PTQTP_ARM64_FILES
    "ptqtp-dot-neon.c:-march=armv8-a"
    "ptqtp-dot-neon-dotprod.c:-march=armv8.2-a+dotprod"
    "ptqtp-panel-neon.c:-march=armv8-a"
    "ptqtp-panel-neon-dotprod.c:-march=armv8.2-a+dotprod"
    "ptqtp-panel-neon-i8mm.c:-march=armv8.2-a+dotprod+i8mm")

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" ptqtp_processor)
# ptqtp_isa_files(DIR): appends the files to PTQTP_DOT_SOURCES and sets their flags; DIR is where native/ lies
function(ptqtp_isa_files dir)
  set(sources ${PTQTP_DOT_SOURCES})
  foreach(arch X86 ARM64)
    foreach(entry IN LISTS PTQTP_${arch}_FILES)
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
  set(PTQTP_DOT_SOURCES ${sources} PARENT_SCOPE)
endfunction()
