# Our sources in ggml. Included at the end of ggml/src/CMakeLists.txt, when ggml-base and every CPU variant exist.

get_filename_component(PTQTP_DIR ${CMAKE_CURRENT_LIST_DIR} DIRECTORY) # where ptqtp.h lies
include(${PTQTP_DIR}/sources.cmake)
ptqtp_isa_files(${PTQTP_DIR})
list(TRANSFORM PTQTP_CODEC_SOURCES PREPEND ${PTQTP_DIR}/)
list(TRANSFORM PTQTP_DOT_SOURCES PREPEND ${PTQTP_DIR}/)
list(APPEND PTQTP_CODEC_SOURCES ${PTQTP_DIR}/ggml/base.c)
list(APPEND PTQTP_DOT_SOURCES ${PTQTP_DIR}/ggml/cpu.c ${PTQTP_DIR}/ggml/expand.cpp ${PTQTP_DIR}/ggml/panels.cpp)

set(PTQTP_FLAGS "")
if (NOT MSVC)
    set(PTQTP_FLAGS -ffp-contract=off) # the same bits with and without FMA
endif()

# ---- codec and quantizers, in ggml-base ----

target_sources(ggml-base PRIVATE ${PTQTP_CODEC_SOURCES})
# a source's properties belong to a directory: this one, where ggml-base is
set_source_files_properties(${PTQTP_CODEC_SOURCES} PROPERTIES COMPILE_OPTIONS "${PTQTP_FLAGS}")

# public: llama needs the format version
target_include_directories(ggml-base PUBLIC $<BUILD_INTERFACE:${PTQTP_DIR}>)
if (WIN32 AND BUILD_SHARED_LIBS)
    target_compile_definitions(ggml-base PRIVATE "PTQTP_API=__declspec(dllexport)")
endif()

# ---- dot products, in ggml-cpu ----

# Compiled once, without the instruction set of any CPU variant: the choice falls at run time.
add_library(ggml-ptqtp-dot OBJECT ${PTQTP_DOT_SOURCES})
set_target_properties(ggml-ptqtp-dot PROPERTIES POSITION_INDEPENDENT_CODE ON)
target_compile_features(ggml-ptqtp-dot PRIVATE c_std_11 cxx_std_17)
target_compile_options(ggml-ptqtp-dot PRIVATE ${PTQTP_FLAGS})
target_include_directories(ggml-ptqtp-dot PRIVATE ${PTQTP_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/../include
    ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/ggml-cpu)
if (BUILD_SHARED_LIBS)
    target_compile_definitions(ggml-ptqtp-dot PRIVATE GGML_SHARED GGML_BACKEND_SHARED)
endif()

get_property(PTQTP_TARGETS DIRECTORY PROPERTY BUILDSYSTEM_TARGETS)
foreach (target IN LISTS PTQTP_TARGETS)
    get_target_property(type ${target} TYPE)
    if (target MATCHES "^ggml-cpu" AND NOT type STREQUAL "OBJECT_LIBRARY")
        target_sources(${target} PRIVATE $<TARGET_OBJECTS:ggml-ptqtp-dot>)
    endif()
endforeach()

# ---- upstream's AMX kernels: their tiles' configuration (kernels/x86/tile-config.h) ----

if (NOT MSVC)
    foreach (target IN LISTS PTQTP_TARGETS)
        if (target MATCHES "^ggml-cpu")
            get_target_property(sources ${target} SOURCES)
            foreach (source IN LISTS sources)
                if (source MATCHES "amx/mmq\\.cpp$")
                    target_compile_options(${target} PRIVATE
                        "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include \"${PTQTP_DIR}/kernels/x86/tile-config.h\">")
                    target_compile_definitions(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:PTQTP_UPSTREAM_AMX>)
                endif()
            endforeach()
        endif()
    endforeach()
endif()
