# What the Python wheel holds: libraries in llama_cpp/lib, tools in llama_cpp/bin, the converter in llama_cpp/convert.
# Included at the end of the bindings' CMakeLists.txt. pyproject.toml installs the component "llama_cpp" alone, so
# nothing that upstream installs (headers, CMake packages, other tools) comes along.

set(PTQTP_LLAMA ${CMAKE_CURRENT_LIST_DIR}/../../../..)
set(PTQTP_PACKAGE ${SKBUILD_PLATLIB_DIR}/llama_cpp)

set(PTQTP_RPC_SERVER ggml-rpc-server)
if (TARGET rpc-server) # llama-cpp-python 0.3.24
    set(PTQTP_RPC_SERVER rpc-server)
endif()
set(PTQTP_TOOLS ${PTQTP_RPC_SERVER})
set(PTQTP_LIBS ggml ggml-base ${GGML_AVAILABLE_BACKENDS} llama llama-common mtmd)
foreach (tool bench cli completion imatrix perplexity quantize server)
    list(APPEND PTQTP_TOOLS llama-${tool})
    if (TARGET llama-${tool}-impl) # the tools' code, a library each
        list(APPEND PTQTP_LIBS llama-${tool}-impl)
    endif()
endforeach()

# their results are the end of their log
foreach (tool perplexity imatrix)
    if (TARGET llama-${tool}-impl)
        target_sources(llama-${tool} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/flush-log.cpp)
        target_link_libraries(llama-${tool} PRIVATE llama-common)
    endif()
endforeach()

if (APPLE)
    set(PTQTP_ORIGIN "@loader_path")
else()
    set(PTQTP_ORIGIN "$ORIGIN")
endif()

foreach (lib IN LISTS PTQTP_LIBS)
    # one file a library: a wheel holds no links, so versioned names would be copies
    set_property(TARGET ${lib} PROPERTY VERSION)
    set_property(TARGET ${lib} PROPERTY SOVERSION)
endforeach()
# the same paths serve the build tree, where all lie side by side, and the wheel
set_target_properties(${PTQTP_LIBS} PROPERTIES
    BUILD_WITH_INSTALL_RPATH TRUE INSTALL_RPATH_USE_LINK_PATH FALSE INSTALL_RPATH "${PTQTP_ORIGIN}")
set_target_properties(${PTQTP_TOOLS} PROPERTIES
    BUILD_WITH_INSTALL_RPATH TRUE INSTALL_RPATH_USE_LINK_PATH FALSE
    INSTALL_RPATH "${PTQTP_ORIGIN}/../lib;${PTQTP_ORIGIN}")

install(TARGETS ${PTQTP_LIBS}
    LIBRARY DESTINATION ${PTQTP_PACKAGE}/lib COMPONENT llama_cpp
    RUNTIME DESTINATION ${PTQTP_PACKAGE}/lib COMPONENT llama_cpp
    PUBLIC_HEADER DESTINATION include COMPONENT headers
    PRIVATE_HEADER DESTINATION include COMPONENT headers)
install(TARGETS ${PTQTP_TOOLS} RUNTIME DESTINATION ${PTQTP_PACKAGE}/bin COMPONENT llama_cpp)
install(PROGRAMS $<TARGET_FILE:${PTQTP_RPC_SERVER}> # under its older name too
    DESTINATION ${PTQTP_PACKAGE}/bin RENAME rpc-server${CMAKE_EXECUTABLE_SUFFIX} COMPONENT llama_cpp)

install(FILES ${PTQTP_LLAMA}/convert_hf_to_gguf.py ${PTQTP_LLAMA}/LICENSE
    DESTINATION ${PTQTP_PACKAGE}/convert COMPONENT llama_cpp)
install(DIRECTORY ${PTQTP_LLAMA}/conversion
    DESTINATION ${PTQTP_PACKAGE}/convert COMPONENT llama_cpp PATTERN __pycache__ EXCLUDE)
install(DIRECTORY ${PTQTP_LLAMA}/models/templates # some architectures take their chat template from there
    DESTINATION ${PTQTP_PACKAGE}/convert/models COMPONENT llama_cpp)
install(DIRECTORY ${PTQTP_LLAMA}/gguf-py/gguf
    DESTINATION ${PTQTP_PACKAGE}/convert/gguf-py COMPONENT llama_cpp PATTERN __pycache__ EXCLUDE)
install(FILES ${PTQTP_LLAMA}/gguf-py/LICENSE DESTINATION ${PTQTP_PACKAGE}/convert/gguf-py COMPONENT llama_cpp)
